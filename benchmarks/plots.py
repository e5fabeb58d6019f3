"""The pictures of a results file: share of the copy bandwidth, speed-up over the baselines, host overhead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from report import COMPILED, EAGER, OURS, Key, Row, _overhead, best_compiled, grouped, speedup

COLOURS = {OURS: "#1b6ca8", EAGER: "#c2c2c2", COMPILED: "#e0943a"}
MORE = ["#5a9e6f", "#8c6bb1", "#b5514d", "#4d4d4d"]


def draw(rows: list[Row], stem: Path, content: dict[str, Any]) -> list[Path]:
    """Write <stem>-roofline.png, -speedup.png and -overhead.png, whichever have rows; returns their paths."""
    caption = f"{content['device']}, {content['threads']} threads, torch {content['torch']}, {content['date'][:10]}"
    written = []
    for name, painter in (("roofline", roofline), ("speedup", speedups), ("overhead", overheads)):
        figure = painter(rows, content)
        if figure is not None:
            figure.text(0.995, 0.005, caption, ha="right", va="bottom", fontsize=7, color="#666666")
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path, dpi=130)
            plt.close(figure)
            written.append(path)
    return written


def _label(key: Key) -> str:
    operation, size, dtype, _ = key
    return f"{operation}  {size}  {dtype.replace('float', 'f')}"


def _panels(rows: list[Row]) -> tuple[list[str], dict[str, dict[str, dict[str, Row]]]]:
    """Labels in the order measured, and direction -> label -> provider -> row; "compiled" is the fastest."""
    groups = grouped(rows)
    sides: dict[str, dict[str, dict[str, Row]]] = {"forward": {}, "backward": {}}
    for key, group in groups.items():
        if key[3] in sides:
            shown = {name: row for name, row in group.items() if not name.startswith(COMPILED)}
            best = best_compiled(group)
            sides[key[3]][_label(key)] = shown | ({COMPILED: best} if best else {})
    return list(dict.fromkeys([*sides["forward"], *sides["backward"]])), sides


def _figure(labels: list[str], title: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.6 + 0.38 * len(labels)), sharey=True, layout="constrained")
    figure.suptitle(title)
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        axis.set_title(direction, fontsize=10)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.grid(axis="x", color="#e6e6e6")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colour(provider: str, providers: list[str]) -> str:
    extra = [name for name in providers if name not in COLOURS]
    return COLOURS[provider] if provider in COLOURS else MORE[extra.index(provider) % len(MORE)]


def roofline(rows: list[Row], content: dict[str, Any]) -> Any:
    labels, sides = _panels(rows)
    if not labels:
        return None
    title = f"Share of the copy bandwidth ({content['copy_gbps']:.1f} GB/s, read plus written); longer is better"
    figure, axes = _figure(labels, title)
    providers = list(dict.fromkeys(name for side in sides.values() for group in side.values() for name in group))
    height = 0.8 / len(providers)
    for axis, side in zip(axes, sides.values(), strict=True):
        for k, provider in enumerate(providers):
            places = [y for y, label in enumerate(labels) if provider in side.get(label, {})]
            shares = [side[labels[y]][provider]["percent_of_copy"] for y in places]
            bars = axis.barh(
                [y - 0.4 + (k + 0.5) * height for y in places], shares, height, color=_colour(provider, providers),
                label=provider,
            )  # fmt: skip
            if provider == OURS:
                axis.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
        axis.axvline(100, color="black", linewidth=1, linestyle="--")
        axis.set_xlabel("% of copy (dashed: the copy itself)", fontsize=8)
        axis.set_xlim(0, max(115.0, axis.get_xlim()[1]))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(providers), fontsize=8)
    return figure


def speedups(rows: list[Row], content: dict[str, Any]) -> Any:
    labels, sides = _panels(rows)
    if not labels:
        return None
    figure, axes = _figure(labels, "Speed-up of newllm_kernels over PyTorch, logarithmic; right of 1 is faster")
    for axis, side in zip(axes, sides.values(), strict=True):
        for k, peer in enumerate((EAGER, COMPILED)):
            found = {y: speedup(side.get(label, {}), side.get(label, {}).get(peer)) for y, label in enumerate(labels)}
            found = {y: value for y, value in found.items() if value}
            # Bars start at 1, so that slower points left.
            bars = axis.barh(
                [y - 0.2 + 0.4 * k for y in found], [value - 1 for value in found.values()], 0.38, left=1,
                color="#9a9a9a" if peer == EAGER else COLOURS[peer], label=f"over {peer}",
            )  # fmt: skip
            axis.bar_label(bars, [f"{value:.1f}x" for value in found.values()], fontsize=7, padding=2)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.set_xlim(min(0.5, low * 0.7), high * 1.6)
        axis.axvline(1, color="black", linewidth=1)
        axis.xaxis.set_major_formatter("{x:g}x")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=8)
    return figure


def overheads(rows: list[Row], content: dict[str, Any]) -> Any:
    overhead = _overhead(rows)
    if not overhead:
        return None
    figure, axis = plt.subplots(figsize=(8, 1.4 + 0.45 * len(overhead)), layout="constrained")
    for k, (label, colour) in enumerate((("no gradients", COLOURS[OURS]), ("gradients recorded", COLOURS[COMPILED]))):
        values = [pair[k] or 0.0 for pair in overhead.values()]
        bars = axis.barh([y - 0.2 + 0.4 * k for y in range(len(overhead))], values, 0.38, color=colour, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=3, bbox={"color": "white", "pad": 0.5})
    axis.axvline(15, color="black", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(overhead)), list(overhead), fontsize=8)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("microseconds a call on a tensor of 32 elements (dashed: the goal, 15)", fontsize=8)
    axis.set_title("Host overhead of one small call", fontsize=10)
    figure.legend(loc="outside lower left", ncols=2, fontsize=8)
    return figure
