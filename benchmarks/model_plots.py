"""The pictures of the results section of docs/model.md, from the JSON of model_report.py, train_speed.py and generation_speed.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

Results = dict[str, Any]
MANY = 12  # runs of a group that still get a curve each; of more only the best
mpl.rcParams["axes.prop_cycle"] = mpl.cycler(color=[*mpl.colormaps["tab10"].colors, "black", "gold"])  # MANY of them


def _style(run: Results) -> dict[str, Any]:
    """Transformers dashed."""
    return {"linestyle": "--" if run["config"]["model"]["architecture"] == "transformer" else "-", "label": run["name"]}


def _best(runs: list[Results]) -> list[Results]:
    def loss(run: Results) -> float:
        return min((row[3] for row in run["valid"]), default=math.inf)

    return sorted(runs, key=loss)[:MANY]


def _finish(figure: Any, path: Path, runs: list[Results]) -> None:
    days: dict[str, list[str]] = {}
    for run in runs:
        days.setdefault(f"{run['device']}, torch {run['torch']}", []).append(run["date"][:10])
    sources = [f"{source}, {' to '.join(dict.fromkeys((min(of), max(of))))}" for source, of in sorted(days.items())]
    figure.supxlabel("; ".join(sources), x=0.995, ha="right", fontsize=7, color="#666666")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves(runs: list[Results], path: Path) -> bool:
    """Validation perplexity against tokens and against minutes of training, training perplexity beside them."""
    runs = [run for run in _best(runs) if run["train"]]
    if not runs:
        return False
    figure, (tokens, minutes, train) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for run in runs:
        style = _style(run)
        if run["valid"]:
            _, read, seconds, losses = zip(*run["valid"], strict=True)
            values = [math.exp(min(loss, 700)) for loss in losses]
            tokens.plot([count / 1e6 for count in read], values, marker="o", markersize=3, **style)
            minutes.plot([second / 60 for second in seconds], values, marker="o", markersize=3, **style)
        _, read, _, losses = zip(*run["train"], strict=True)
        train.plot([count / 1e6 for count in read], [math.exp(min(loss, 700)) for loss in losses], linewidth=1, **style)
    for axis, title, label in (
        (tokens, "validation, equal tokens", "tokens read, millions"), (minutes, "validation, equal time", "minutes of training"),
        (train, "training", "tokens read, millions"),
    ):  # fmt: skip
        axis.set(title=title, xlabel=label, yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    tokens.set_ylabel("perplexity")
    train.legend(fontsize=7)
    _finish(figure, path, runs)
    return True


def positions(runs: list[Results], path: Path) -> bool:
    """Perplexity by place in the document, of the test text or else the validation text."""
    found = []
    for run in runs:
        row = next((run["splits"][split] for split in ("test", "valid") if "by_position" in run["splits"].get(split, {})), None)  # fmt: skip
        if row is not None:
            found.append((run, row["by_position"]))
    if not found:
        return False
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for run, rows in found:
        kept = [row for row in rows if row["tokens"] >= 100]  # of fewer the mean says nothing
        axis.plot([max(row["first"], 1) for row in kept], [row["perplexity"] for row in kept], marker="o", markersize=3, **_style(run))  # fmt: skip
        model = run["config"]["model"]
        if model["architecture"] == "transformer":
            axis.axvline(model["max_seq_len"], color="#999999", linewidth=1, linestyle=":")
    axis.set(
        xlabel="place in the document, tokens (dotted: windows of Transformers)", ylabel="perplexity", yscale="log"
    )
    axis.set_xscale("log", base=2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    _finish(figure, path, [run for run, _ in found])
    return True


def contexts(files: list[Results], path: Path) -> None:
    """Training: tokens/s and peak memory against the segment's length. Generation: tokens/s and state against what was
    read before, of the preset that was trained, else of the first."""
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    training = [content for content in files if "contexts" in content]
    presets = {content["preset"] for content in training}
    for content in training:
        for name in dict.fromkeys(run["model"] for run in content["contexts"]):
            runs = [run for run in content["contexts"] if run["model"] == name and "failure" not in run]
            runs.sort(key=lambda run: run["length"])
            lengths = [run["length"] for run in runs]
            label = f"{name}, {content['preset']}"
            axes[0].plot(lengths, [run["tokens_per_s"] for run in runs], "o-", label=label)
            measured = [run for run in runs if run["peak_bytes"] is not None]
            if measured:  # not on a CPU
                peaks = [run["peak_bytes"] / 2**30 for run in measured]
                axes[1].plot([run["length"] for run in measured], peaks, "o-", label=label)
    runs = [
        run for content in files for run in content.get("generation", ()) if "failure" not in run and run["batch"] == 1
    ]
    chosen = next((run["preset"] for run in runs if run["preset"] in presets), runs[0]["preset"] if runs else None)
    for name in dict.fromkeys(run["model"] for run in runs):
        here = [run for run in runs if run["model"] == name and run["preset"] == chosen]
        for axis, key, unit in ((axes[2], "tokens_per_s", 1), (axes[3], "state_bytes", 2**20)):
            points = {
                run["context"]: run[key] / unit for run in here if run["context"] is not None
            }  # of two files the later
            if points:
                axis.plot(*zip(*sorted(points.items()), strict=True), "o-", color="C1", label=f"{name}, {chosen}")
            else:
                axis.axhline(here[-1][key] / unit, color="C0", label=f"{name}, {chosen}, any length")
    titles = ("training, tokens/s", "training, peak memory, GiB", "generation, tokens/s", "generation, state, MiB")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        if not axis.get_legend_handles_labels()[1]:
            axis.axis("off")
            axis.text(0.5, 0.5, "not measured", ha="center")
            continue
        axis.set(xlabel="tokens of context", yscale="log")
        axis.set_xscale("log", base=2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7)
    devices = sorted({f"{content['device']}, {content['date'][:10]}" for content in files})
    figure.supxlabel("; ".join(devices), x=0.995, ha="right", fontsize=7, color="#666666")
    figure.savefig(path, dpi=130)
    plt.close(figure)
