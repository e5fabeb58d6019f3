"""What each part of New-LLM is worth: `python benchmarks/ablations.py [NAME ...]`.

A variant is a recipe with one thing changed, at the same number of parameters: layers or the width of the feed-forward networks
make up for it. All are trained alike, in processes of their own, `--beside` of them on each of `--gpus`; `model_report.py collect`
condenses what is finished into benchmarks/results/model/ablation-<name>.json, and `model_report.py` makes the table.

Stopped (Control-C, --max-minutes) and started again the command goes on: runs that have a summary are left alone, others are resumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import command_line
from tqdm import tqdm

from newllm.cli.parser import MODEL_OPTIONS
from newllm.cli.settings import model_settings
from newllm.config import ModelConfig, count_parameters
from newllm.errors import UserError
from newllm.recipe import read_recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "model"

# Fields of ModelConfig beside the recipe's. The feed-forward width follows from the parameters.
VARIANTS: dict[str, dict[str, object]] = {
    "base": {},
    "width-256": {"context_dim": 256},
    "width-512": {"context_dim": 512},
    "width-1024": {"context_dim": 1024, "num_layers": 9},
    "width-4096": {"context_dim": 4096, "num_layers": 2},
    "depth-2": {"num_layers": 2},
    "depth-6": {"num_layers": 6},
    "depth-12": {"num_layers": 12},
    "depth-24": {"num_layers": 24, "context_dim": 384},
    "hops-2": {"coupling": "hops", "hops": 2, "context_dim": 512, "num_layers": 8},
    "hops-4": {"coupling": "hops", "hops": 4, "context_dim": 512, "num_layers": 8},
    "hops-8": {"coupling": "hops", "hops": 8, "context_dim": 512, "num_layers": 8},
    "full": {"coupling": "full", "norm": "state", "context_dim": 256, "hidden_dim": 512, "fnn_layers": 1},
    "norm-state": {"norm": "state"},
    "norm-none": {"norm": None},
    "hidden-layer": {"fnn_layers": 1, "hidden_dim": 384},
}


def variant(base: ModelConfig, changes: dict[str, object]) -> ModelConfig:
    """The changed model whose feed-forward width, in steps of 8, brings it nearest to the parameters of `base`."""
    changed = dataclasses.replace(base, **changes)
    one, nine = (count_parameters(dataclasses.replace(changed, ffn_dim=width)) for width in (1, 9))
    width = 8 * round((count_parameters(base) - one) / (nine - one))
    if width < 8:
        raise ValueError(f"changes: {changes} leave no room for a feed-forward network; take fewer layers")
    return dataclasses.replace(changed, ffn_dim=width)


def options(model: ModelConfig, base: ModelConfig) -> list[str]:
    """What of `newllm train` makes this model of the recipe's."""
    flags = {field: flag for flag, field, _, _ in MODEL_OPTIONS}
    given: list[str] = []
    for field, value in model.to_dict().items():
        if value != getattr(base, field):
            given += [flags[field], "none" if value is None else str(value)]
    return given


class Runs:
    """A queue of commands, and threads that each work on one of them on one GPU."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = time.monotonic() + 60 * args.max_minutes
        self.waiting: queue.Queue[tuple[str, list[str]]] = queue.Queue()
        self.stopping = threading.Event()
        self.failed: list[str] = []

    def command(self, name: str, given: list[str]) -> list[str] | None:
        """None where there is nothing left to do."""
        folder = self.args.out / name
        if (folder / "summary.json").exists():
            return None
        left = max(0.05, (self.deadline - time.monotonic()) / 60)
        train = [sys.executable, "-m", "newllm", "train"]
        limit = ["--max-minutes", f"{left:.2f}"] if left < float("inf") else []
        if (folder / "last.safetensors").exists():
            return [*train, "--resume", str(folder), *limit]
        return [
            *train,
            "--config",
            self.args.config,
            *given,
            "--steps",
            str(self.args.steps),
            "--out",
            str(folder),
            *limit,
        ]

    def work(self, gpu: str | None) -> None:
        while not self.stopping.is_set() and time.monotonic() < self.deadline:
            try:
                name, given = self.waiting.get_nowait()
            except queue.Empty:
                return
            command = self.command(name, given)
            if command is None:
                self.bar.update()
                continue
            began = time.monotonic()
            environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
            with (self.args.out / f"{name}.log").open("a") as log:
                code = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
                ).returncode
            finished = (self.args.out / name / "summary.json").exists()
            if code != 0:
                self.failed.append(name)
            state = "finished" if finished else "stopped in time" if code == 0 else f"failed ({code}), see {name}.log"
            tqdm.write(f"{name:<14} {state} after {time.monotonic() - began:.0f} s")
            self.bar.update()

    def run(self, todo: list[tuple[str, list[str]]]) -> None:
        for one in todo:
            self.waiting.put(one)
        self.bar = tqdm(total=len(todo), unit="run", disable=None)  # silent where nobody looks
        gpus = self.args.gpus or [None]
        threads = [threading.Thread(target=self.work, args=(gpu,)) for _ in range(self.args.beside) for gpu in gpus]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:  # the runs have had it too, and save themselves
            self.stopping.set()
            for thread in threads:
                thread.join()


def run(args: argparse.Namespace) -> int:
    unknown = sorted(set(args.names) - VARIANTS.keys())
    if unknown:
        raise UserError(f"no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    for name in ("beside", "steps", "vocab_size", "max_minutes"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, wanted a number above 0")
    recipe = read_recipe(args.config)
    base = dataclasses.replace(model_settings(argparse.Namespace(**recipe)), vocab_size=args.vocab_size)
    further = shlex.split(args.options)
    if args.data is not None:
        further = ["--data", args.data, *further]
    todo = []
    for name in args.names or VARIANTS:
        model = variant(base, VARIANTS[name])
        todo.append((name, [*options(model, base), *further]))
        print(f"{name:<14} {count_parameters(model):>12,} parameters  {shlex.join(todo[-1][1])}", flush=True)
    if args.dry_run:
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(args)
    runs.run(todo)
    for name, _ in todo:
        folder = args.out / name
        if (folder / "summary.json").exists():
            note = f"{args.beside} side by side on a GPU" if args.beside > 1 else ""
            collect = ["collect", str(folder), "--name", f"ablation-{name}", "--group", "ablations", "--note", note]
            tool = [sys.executable, str(ROOT / "benchmarks" / "model_report.py")]
            subprocess.run([*tool, *collect, "--results", str(args.results)], check=True, stdout=subprocess.DEVNULL)
    return 1 if runs.failed else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser("ablations", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--config", default="wikitext-2", help="the recipe (default: %(default)s)")
    parser.add_argument("--data", help="in place of the recipe's")
    parser.add_argument(
        "--vocab-size", type=int, default=33278, help="of that data, to count parameters with (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=10000, help="of each (default: %(default)s)")
    parser.add_argument("--gpus", nargs="*", metavar="N", help="their numbers (default: as each run chooses)")
    parser.add_argument("--beside", type=int, default=1, metavar="N", help="runs at a time on each (default: 1)")
    parser.add_argument(
        "--max-minutes", type=float, default=float("inf"), metavar="X", help="stop, all saved, after this long"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ablations"), help="of the run folders (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="of the JSON (default: benchmarks/results/model)")
    parser.add_argument("--options", default="", help="more options of newllm train for every run, in one argument")
    parser.add_argument("--dry-run", action="store_true", help="print the variants only")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        return run(args)
    except (UserError, OSError) as error:
        return command_line.refuse("ablations", error)


if __name__ == "__main__":
    sys.exit(main())
