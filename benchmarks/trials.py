"""As many trials for one recipe as for another: `python benchmarks/trials.py wikitext-2-hops wikitext-2-full --data FOLDER --gpus 0 1 2 3`.

Trains every recipe nineteen times for --steps steps, a process each, on all GPUs side by side:

    1         as the recipe says
    2 to 13   with one setting changed: learning rate, weight decay, dropout, where gates begin, noise (`changes`)
    14 to 19  with the two, three ... seven changes that were best by themselves, together

What is best on the validation text is printed as a command, for a run at full length. Changes are relative to the recipe's own settings.
A trial that diverges counts as one, and is the worst. Figures go to --results after every trial; a trial whose run is there already, with
the same settings, is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import report
from tqdm import tqdm

from newllm.config import preset
from newllm.errors import UserError
from newllm.recipe import read_recipe
from newllm.training_config import TRAINING_PRESETS

TOGETHER = range(2, 8)
Settings = dict[str, float]


def changes(recipe: dict[str, Any]) -> dict[str, Settings]:
    """The trials of one change each, by name: options of `newllm train` and their values."""
    rates = ("dropout", "input_dropout", "output_dropout")
    sees_contexts = recipe["architecture"] != "transformer" and recipe["coupling"] != "none"

    def around(name: str, step: float) -> dict[str, Settings]:
        option = name.replace("-", "_")
        return {
            f"{name}-low": {option: max(recipe[option] - step, 0.0)},
            f"{name}-high": {option: recipe[option] + step},
        }

    def scaled(name: str, factor: float) -> dict[str, Settings]:
        option = name.replace("-", "_")
        return {f"{name}-low": {option: recipe[option] / factor}, f"{name}-high": {option: recipe[option] * factor}}

    return {
        **scaled("lr", 1.5),
        **scaled("weight-decay", 1.5),
        "dropout-low": {rate: max(recipe[rate] - 0.1, 0.0) for rate in rates},
        "dropout-high": {rate: recipe[rate] + 0.1 for rate in rates},
        **(around("recurrent-dropout", 0.2) if sees_contexts else around("embed-dropout", 0.1)),
        **(scaled("context-init", 3) if sees_contexts else scaled("clip", 2)),
        "noise-high": {"noise": recipe["noise"] * 2 or 0.1},
        **(
            {"warmup-high": {"warmup": recipe["warmup"] * 2}}
            if recipe["architecture"] == "transformer"
            else {"forget-init-high": {"forget_init": recipe["forget_init"] * 2}}
        ),
    }


def settings_of(name: str) -> dict[str, Any]:
    """All settings of a recipe, those that it leaves alone as the options have them."""
    recipe = read_recipe(name)
    base = recipe.get("preset", "tiny")  # as `newllm train` takes them
    settings = dataclasses.asdict(preset(base)) | dataclasses.asdict(TRAINING_PRESETS[base]) | recipe
    if settings["input_dropout"] is None:
        settings["input_dropout"] = settings["dropout"]
    return settings


def clash(one: Settings, other: Settings) -> bool:
    """Whether they change the same setting."""
    return bool(one.keys() & other.keys())


def together(found: dict[str, float], singles: dict[str, Settings]) -> dict[str, Settings]:
    """The trials of several changes: the best two, the best three, ..., of which no two are of one setting.

    found: perplexity of every change by itself.
    """
    chosen: list[str] = []
    for name in sorted(found, key=found.__getitem__):
        if not any(clash(singles[name], singles[other]) for other in chosen):
            chosen.append(name)
    trials = {}
    for count in TOGETHER:
        merged = {option: value for name in chosen[:count] for option, value in singles[name].items()}
        trials["+".join(chosen[:count])] = merged
    return trials


def options(settings: Settings) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", f"{value:.6g}")]


# Recipe, name of the trial, settings that it changes, GPU -> validation perplexity, infinite where it diverges.
Train = Callable[[str, str, Settings, str | None], float]


class Search:
    """All trials of all recipes, on workers that each own a GPU."""

    def __init__(
        self, recipes: dict[str, dict[str, Any]], train: Train, note: Callable[[dict[str, Any]], None]
    ) -> None:
        self.recipes, self.train, self.note = recipes, train, note
        self.jobs: queue.Queue[tuple[str, str, Settings]] = queue.Queue()
        self.singles = {name: changes(recipe) for name, recipe in recipes.items()}
        self.results: dict[str, dict[str, float]] = {name: {} for name in recipes}
        self.settings: dict[str, dict[str, Settings]] = {
            name: {"as-it-is": {}, **singles} for name, singles in self.singles.items()
        }
        self.lock, self.failures = threading.Lock(), []
        self.left = sum(len(trials) for trials in self.settings.values()) + len(recipes) * len(TOGETHER)
        for position in range(1 + max(map(len, self.singles.values()))):  # recipes take turns
            for recipe, trials in self.settings.items():
                if position < len(trials):
                    name = list(trials)[position]
                    self.jobs.put((recipe, name, trials[name]))

    def work(self, gpu: str | None) -> None:
        while self.left > 0 and not self.failures:
            try:
                recipe, name, settings = self.jobs.get(timeout=0.2)
            except queue.Empty:  # the last trials of one change are on their way
                continue
            try:
                perplexity = self.train(recipe, name, settings, gpu)
                with self.lock:
                    self.left -= 1
                    self._done(recipe, name, perplexity)
            except Exception as error:  # ends all workers; `run` raises it
                self.failures.append(error)
                return

    def _done(self, recipe: str, name: str, perplexity: float) -> None:
        of_recipe, singles = self.results[recipe], self.singles[recipe]
        of_recipe[name] = perplexity
        settings = self.settings[recipe][name]
        shown = perplexity if math.isfinite(perplexity) else None  # JSON has no infinity
        self.note({"recipe": recipe, "trial": name, "settings": settings, "valid_perplexity": shown})
        if len(of_recipe) == 1 + len(singles):
            found = {change: of_recipe[change] for change in singles}
            for combined, merged in together(found, singles).items():
                self.settings[recipe][combined] = merged
                self.jobs.put((recipe, combined, merged))

    def run(self, gpus: list[str | None]) -> None:
        workers = [threading.Thread(target=self.work, args=(gpu,)) for gpu in gpus]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if self.failures:
            raise self.failures[0]

    def best(self, recipe: str) -> tuple[str, float]:
        name = min(self.results[recipe], key=self.results[recipe].__getitem__)
        return name, self.results[recipe][name]


# What a run may have otherwise than its recipe: settings of no account, or written in another way.
UNLIKE = {"eval_every", "checkpoint_every", "device", "threads", "vocab_size", "hops", "norm"}


def differ(run: Path, wanted: dict[str, Any]) -> None:
    """Raise UserError where a run folder is of other settings than those wanted."""
    config = json.loads((run / "config.json").read_text())
    kept = config["model"] | config["training"]
    if kept["input_dropout"] is None:
        kept["input_dropout"] = kept["dropout"]
    for key in sorted((wanted.keys() & kept.keys()) - UNLIKE):
        one, other = kept[key], wanted[key]
        numbers = all(isinstance(value, (int, float)) for value in (one, other))
        if not (
            math.isclose(one, other, rel_tol=1e-4) if numbers else one == other
        ):  # options are typed with six digits
            raise UserError(f"{run}: was trained with {key} {one}, not {other}; name other --runs")


def run_training(folder: Path, data: str, steps: int) -> Train:
    """Trains by `newllm train`, one process a trial."""

    def train(recipe: str, name: str, settings: Settings, gpu: str | None) -> float:
        run = folder / f"{Path(recipe).stem}-{name}"
        summary = run / "summary.json"
        if summary.exists():
            differ(run, settings_of(recipe) | settings | {"steps": steps})
        else:
            command = [sys.executable, "-m", "newllm", "train", "--config", recipe, "--data", data, "--out", str(run)]
            command += ["--steps", str(steps), "--eval-every", str(steps), "--checkpoint-every", str(steps)]
            command += [
                *options(settings),
                *([] if gpu is None else ["--device", "cuda"]),
            ]  # no GPU of that number: an error
            environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                if "training has diverged" in last:
                    return math.inf
                raise UserError(f"{' '.join(command)}: {last}")
        return float(json.loads(summary.read_text())["valid"]["perplexity"])

    return train


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser("trials", __doc__)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="names or files, as of newllm train --config")
    parser.add_argument("--data", required=True, help="as of newllm train")
    parser.add_argument("--steps", type=int, default=8000, help="of every trial (default: 8000)")
    parser.add_argument("--gpus", nargs="*", default=[], metavar="N", help="none: one trial at a time, on the device that newllm train takes")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=Path("runs/trials"), metavar="FOLDER", help="where runs are written")  # fmt: skip
    parser.add_argument("--results", type=Path, metavar="FILE", help="write the figures to this JSON file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        if args.steps < 1:
            raise UserError(f"--steps {args.steps}: wanted at least 1")
        if args.results and not args.results.parent.is_dir():
            raise UserError(f"--results {args.results}: no such folder {args.results.parent}")
        recipes = {name: settings_of(name) for name in args.recipes}
        content: dict[str, Any] = {
            **report.environment(),
            "command": [command_line.typed("trials", arguments)],
            "steps": args.steps,
            "trials": [],
        }

        def note(trial: dict[str, Any]) -> None:
            content["trials"].append(trial)
            found = trial["valid_perplexity"]
            bar.write(f"{trial['recipe']}  {'diverged' if found is None else f'{found:8.2f}'}  {trial['trial']}")
            bar.update()
            if args.results:
                report.save(args.results, content)

        search = Search(recipes, run_training(args.runs, args.data, args.steps), note)
        with tqdm(total=search.left, unit="trial", leave=False, disable=None) as bar:
            search.run(args.gpus or [None])
    except ValueError as error:
        return command_line.refuse("trials", error)
    for name in recipes:
        trial, perplexity = search.best(name)
        more = " ".join(options(search.settings[name][trial]))
        print(f"best of {len(search.results[name])}: {perplexity:.2f}  newllm train --config {name} {more}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
