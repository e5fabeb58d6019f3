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
