"""The PNGs in run folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from newllm import checkpoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def loss_plot(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Training and validation loss over steps, from the records of metrics.jsonl."""
    figure = _figure(7, 4)
    axes = figure.subplots()
    _curves(axes, metrics)
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    if axes.lines:  # a run stopped before its first record has none
        axes.legend()
    _save(figure, path)


def compare_plot(rows: list[dict[str, Any]], metrics: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Validation loss over steps of every model, beside bars of the figures in the table of `newllm compare`."""
    panels = [
        ("perplexity", "validation perplexity", 1), ("tokens_per_s", "training, tokens/s", 1),
        ("peak_memory_bytes", "peak memory, MiB", 2**20), ("state_bytes", "state at generation, KiB", 2**10),
    ]  # fmt: skip
    figure = _figure(14, 4)
    curves, *bars = figure.subplots(1, 1 + len(panels), width_ratios=[2.5] + [1] * len(panels))
    for name, records in metrics.items():
        points = [(record["step"], record["valid_loss"]) for record in records if "valid_loss" in record]
        curves.plot(*zip(*points, strict=True), marker="o", label=name)
    curves.set(xlabel="step", ylabel="validation loss (nats per token)")
    curves.legend()
    for axes, (key, title, unit) in zip(bars, panels, strict=True):
        drawn = axes.bar([row["model"] for row in rows], [row[key] / unit for row in rows], color=["C0", "C1"])
        axes.bar_label(drawn, fmt="{:,.4g}")
        axes.set_title(title, fontsize=10)
        axes.margins(y=0.15)
    _save(figure, path)


def diagnosis_plot(cells: list[dict[str, Any]], path: Path, title: str) -> None:
    """What `newllm diagnose` found, a row of panels for every cell (newllm.diagnosis.Diagnosis as a dict)."""
    figure = _figure(14, 3.2 * len(cells))
    for cell, row in zip(cells, figure.subplots(len(cells), 4, squeeze=False), strict=True):
        trace, spectrum, passes, gates = row
        trace.semilogy(range(1, len(cell["trace"]) + 1), [max(value, 1e-16) for value in cell["trace"]])
        trace.set(title=f"{cell['layer']}: trace of another start", xlabel="step", ylabel="relative distance")
        spectrum.semilogy([max(value, 1e-16) for value in cell["variances"]])
        spectrum.set(
            title=f"variance of contexts, rank {cell['effective_rank']:.1f}", xlabel="component", ylabel="share"
        )
        for T in sorted({one["T"] for one in cell["passes"]}):
            points = [(one["chunk"], one["passes"]) for one in cell["passes"] if one["T"] == T]
            passes.plot(*zip(*points, strict=True), "o-", label=f"T={T}")
        passes.set(title="passes until chunks meet", xlabel="steps of a chunk", ylabel="passes")
        passes.set_xscale("log", base=2)
        passes.legend()
        for place, values in enumerate(cell["gates"].values()):
            gates.plot([place, place], [values["10%"], values["90%"]], color="C0", linewidth=6, alpha=0.4)
            gates.plot(place, values["50%"], "o", color="C0")
        gates.set_xticks(range(len(cell["gates"])), list(cell["gates"]))
        gates.set(title="gates: 10%, 50%, 90%", ylim=(0, 1))
    figure.suptitle(title)
    _save(figure, path)


def fixpoint_plot(report: dict[str, Any], metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """What `newllm fixpoint` did, a row of panels for every cell (newllm.fixpoint.FixedPoints as a dict)."""
    figure = _figure(14, 3.2 * len(report["before"]))
    rows = figure.subplots(len(report["before"]), 3, squeeze=False)
    for before, after, (curves, settled, spectrum) in zip(report["before"], report["after"], rows, strict=True):
        for key in ("move", "alike"):
            points = [(record["step"], max(record[key], 1e-12)) for record in metrics if key in record]
            if points:  # a run stopped before its first record has none
                curves.semilogy(*zip(*points, strict=True), label=key)
        curves.set(title="objective, mean of all cells", xlabel="step")
        for name, one in (("before", before), ("after", after)):
            counts, reached = one["settled"], []
            for count in counts:
                reached.append(count / one["phrases"] + (reached[-1] if reached else 0.0))
            settled.plot(range(1, len(counts) + 1), reached, label=name)
            rank = f"{name}, rank {one['effective_rank']:.1f}"
            spectrum.semilogy([max(value, 1e-16) for value in one["variances"]], label=rank)
        settled.set(
            title=f"{before['layer']}: come to rest by", xlabel="pass", ylabel="share of phrases", ylim=(-0.02, 1.02)
        )
        spectrum.set(title="variance of the fixed points", xlabel="component", ylabel="share")
        for axes in (curves, settled, spectrum):
            if axes.lines:
                axes.legend()
    figure.suptitle(title)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # takes a second to import, and no window: the Agg canvas is its default

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def _curves(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    for key, label, style in (("loss", "training", "-"), ("valid_loss", "validation", "o-")):
        points = [(record["step"], record[key]) for record in metrics if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)


def _save(figure: Figure, path: Path) -> None:
    with checkpoint.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
