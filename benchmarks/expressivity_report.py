"""Table and plot of the results of expressivity.py; `python benchmarks/report.py FILE` calls it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Run = dict[str, Any]
CHANCE = {"parity": 1 / 2, "mod5": 1 / 5, "a5": 1 / 60, "s5": 1 / 120}
SOLVED = 0.99


def best_runs(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """By problem and model, the seeds of the learning rate (and steps) that did best at the length of training (then in loss)."""
    by_rate: dict[tuple[str, str], dict[tuple[float, int, int], list[Run]]] = {}
    for run in runs:
        of_model = by_rate.setdefault((run["problem"], run["model"]), {})
        of_model.setdefault((run["lr"], run["steps"], run["batch"]), []).append(run)

    def merit(seeds: list[Run]) -> tuple[float, float]:
        trained = min(seeds[0]["accuracy"], key=int)
        return mean(run["accuracy"][trained] for run in seeds), -mean(run["loss"] for run in seeds)

    return {key: max(rates.values(), key=merit) for key, rates in by_rate.items()}


def best_of(run: Run, rates: set[float]) -> str:
    return f"{run['lr']:g} of {len(rates)}"


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def table(content: dict[str, Any]) -> str:
    """Markdown: a table for every problem, mean share of right answers over the seeds and, where they differ, the worst."""
    best = best_runs(content["expressivity"])
    rates: dict[tuple[str, str], set[float]] = {}
    for run in content["expressivity"]:
        rates.setdefault((run["problem"], run["model"]), set()).add(run["lr"])
    parts = [
        f"Trained on words of up to {content['trained']} elements; right answers in the last quarter of the positions up to a length, of "
        f"{content['words']} words. Learning rate: the best of those given; mean of seeds (worst)."
    ]  # fmt: skip
    for problem in dict.fromkeys(problem for problem, _ in best):
        found = {model: seeds for (name, model), seeds in best.items() if name == problem}
        lengths = list(next(iter(found.values()))[0]["accuracy"])
        lines = [
            [problem, "shape", "parameters", "steps", "lr", "seeds", *lengths, "32 after"],
            ["---"] * (7 + len(lengths)),
        ]
        for model, seeds in found.items():
            first = seeds[0]
            after = [run["full_length_after"] for run in seeds]
            steps = "-" if None in after else f"{mean(after):,.0f} steps"
            cells = [_cell([run["accuracy"][length] for run in seeds]) for length in lengths]
            lines.append([model, first["shape"], f"{first['parameters']:,}", f"{first['steps']:,} x {first['batch']}", best_of(first, rates[problem, model]), str(len(seeds)), *cells, steps])  # fmt: skip
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts)


def _cell(shares: list[float]) -> str:
    average, worst = mean(shares), min(shares)
    text = f"{average:.3f}" if average - worst < 0.0005 else f"{average:.3f} ({worst:.3f})"
    return f"**{text}**" if worst > SOLVED else text


def draw(content: dict[str, Any], path: Path) -> Path:
    """Share of right answers against length, a panel for every problem."""
    best = best_runs(content["expressivity"])
    problems, models = (list(dict.fromkeys(names)) for names in zip(*best, strict=True))
    figure, panels = plt.subplots(
        1, len(problems), figsize=(3.6 * len(problems), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, problem in zip(panels[0], problems, strict=True):
        for k, model in enumerate(models):
            seeds = best.get((problem, model), [])
            if not seeds:
                continue
            lengths = [int(length) for length in seeds[0]["accuracy"]]
            shares = [[run["accuracy"][str(length)] for run in seeds] for length in lengths]
            axes.plot(
                lengths,
                [mean(some) for some in shares],
                "o-",
                color=f"C{k}",
                markersize=4,
                linewidth=4 if model == "full" else 1.5,
                label=model,
            )
            axes.fill_between(lengths, [min(some) for some in shares], [max(some) for some in shares], color=f"C{k}", alpha=0.15)  # fmt: skip
        axes.axhline(CHANCE[problem], color="black", linewidth=1, linestyle="--")
        axes.axvline(content["trained"], color="#9a9a9a", linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set(title=problem, xlabel="length", ylim=(-0.03, 1.03))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("right answers (dashed: chance)")
    handles = {name: line for axes in panels[0] for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=len(handles), fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
