"""The pictures of a results file: share of the copy bandwidth, speed-up over the baselines, scaling, host overhead."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator
from report import COMPILED, EAGER, OURS, Key, Row, _overhead, best_compiled, gbps, grouped, share, speedup

COLOURS = {
    OURS: "#1b6ca8", "cuda": "#6fa8d6", "triton": "#a9cbe6", EAGER: "#c2c2c2", COMPILED: "#e0943a", "loop": "#4d4d4d", "fla": "#5a9e6f", "liger": "#b5514d",
    "accelerated-scan": "#8c6bb1", "accelerated-scan-triton": "#c9a6dd",
}  # fmt: skip


def draw(rows: list[Row], stem: Path, content: dict[str, Any]) -> list[Path]:
    """Write <stem>-roofline.png, -speedup.png, -scaling.png and -overhead.png, whichever have rows; returns their paths."""
    caption = f"{content['device']}, {content['threads']} threads, torch {content['torch']}, {content['date'][:10]}"
    written = []
    for name, painter in PAINTERS.items():
        figure = painter(rows, content)
        if figure is not None:
            figure.text(0.995, 0.005, caption, ha="right", va="bottom", fontsize=7, color="#666666")
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path, dpi=130)
            plt.close(figure)
            written.append(path)
    return written


def draw_generation(content: dict[str, Any], path: Path) -> Path:
    """Tokens/s of one text against the length of what was read before, a panel for each preset."""
    runs = [run for run in content["generation"] if "failure" not in run]
    batch = min((run["batch"] for run in runs), default=1)
    presets = list(dict.fromkeys(run["preset"] for run in content["generation"]))
    figure, axes = plt.subplots(
        1, len(presets), figsize=(1 + 3.6 * len(presets), 3.6), squeeze=False, layout="constrained"
    )
    for axis, preset in zip(axes[0], presets, strict=True):
        here = [run for run in runs if run["preset"] == preset and run["batch"] == batch]
        points = sorted((run["context"], run["tokens_per_s"]) for run in here if run["context"] is not None)
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[COMPILED], label="Transformer, full cache")
        for run in here:
            if run["context"] is None:
                axis.axhline(run["tokens_per_s"], color=COLOURS[OURS], label="New-LLM")
                bound = run["tokens_per_s"] / run["percent_of_bound"] * 100
                axis.axhline(bound, color="black", linewidth=1, linestyle="--", label="reading the weights once")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(preset, fontsize=10)
        axis.set_xlabel("tokens read before", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"tokens/s, batch {batch}", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3, fontsize=8)
    figure.suptitle(f"Generation on {content['device']}, torch {content['torch']}, {content['date'][:10]}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


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


def _figure(labels: list[str], title: str, height: float = 0.38) -> tuple[Any, Any]:
    size = (12, 1.6 + max(height, 0.38) * len(labels))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    figure.suptitle(title)
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        axis.set_title(direction, fontsize=10)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.grid(axis="x", color="#e6e6e6")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def roofline(rows: list[Row], content: dict[str, Any]) -> Any:
    labels, sides = _panels(rows)
    if not labels:
        return None
    graphs = "; times in a CUDA graph where one could be made" if any("graph_us" in row for row in rows) else ""
    title = (
        f"Share of the copy bandwidth ({content['copy_gbps']:,.0f} GB/s read plus written){graphs}; longer is better"
    )
    found = {name for side in sides.values() for group in side.values() for name in group}
    providers = [name for name in COLOURS if name in found]
    most = max(len(group) for side in sides.values() for group in side.values())
    figure, axes = _figure(labels, title, 0.14 * most)
    height = 0.84 / most
    for axis, side in zip(axes, sides.values(), strict=True):
        # The bars of one label stand together, whoever is missing.
        present = {label: [name for name in providers if name in side.get(label, {})] for label in labels}
        for provider in providers:
            places = [(y, label) for y, label in enumerate(labels) if provider in present[label]]
            centres = [
                y + (present[label].index(provider) - (len(present[label]) - 1) / 2) * height for y, label in places
            ]
            shares = [share(side[label][provider]) for _, label in places]
            bars = axis.barh(centres, shares, height, color=COLOURS[provider], label=provider)
            axis.bar_label(bars, fmt="%.0f", fontsize=6.5, padding=2, fontweight="bold" if provider == OURS else None)
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


def scaling(rows: list[Row], content: dict[str, Any]) -> Any:
    """Rate against the length of one sequence: a panel for each operation and direction, a line for each provider."""
    groups = grouped(rows, "scaling")
    panels = list(dict.fromkeys((key[0], key[3]) for key in groups))
    if not panels:
        return None
    operations, directions = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    size = (1.5 + 4.2 * len(operations), 1.2 + 3.2 * len(directions))
    figure, axes = plt.subplots(
        len(directions), len(operations), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    first = next(row for group in groups.values() for row in group.values())
    figure.suptitle(f"One sequence of T steps (1 x T x {first['shape'][2]}, {first['dtype']})", fontsize=11)
    for (i, direction), (j, operation) in product(enumerate(directions), enumerate(operations)):
        axis = axes[i][j]
        lines: dict[str, list[tuple[int, float]]] = {}
        for key, group in groups.items():
            if (key[0], key[3]) == (operation, direction):
                for provider, row in group.items():
                    lines.setdefault(provider, []).append((row["shape"][1], gbps(row)))
        for provider, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, color=COLOURS[provider], label=provider)
        axis.axhline(content["copy_gbps"], color="black", linewidth=1, linestyle="--")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(color="#e6e6e6")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"{operation}, {direction}", fontsize=10)
        axis.set_ylabel("GB/s (dashed: a copy)" if j == 0 else "", fontsize=8)
        axis.set_xlabel("T" if i == len(directions) - 1 else "", fontsize=8)
    handles = {name: line for axis in axes.flat for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=len(handles), fontsize=8)
    return figure


def overheads(rows: list[Row], content: dict[str, Any]) -> Any:
    overhead = _overhead(rows)
    if not overhead:
        return None
    figure, axis = plt.subplots(figsize=(8, 1.4 + 0.5 * len(overhead)), layout="constrained")
    kinds = {"no gradients": COLOURS[OURS], "gradients recorded": COLOURS[COMPILED], "backward": COLOURS["fla"]}
    for k, (label, colour) in enumerate(kinds.items()):
        found = {y: times[k] for y, times in enumerate(overhead.values()) if times[k]}
        if found:  # files of before have no backward
            bars = axis.barh([y - 0.28 + 0.28 * k for y in found], found.values(), 0.27, color=colour, label=label)
            axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=3, bbox={"color": "white", "pad": 0.5})
    axis.axvline(15, color="black", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(overhead)), list(overhead), fontsize=8)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("microseconds a call on a tensor of 32 elements (dashed: the goal of a call, 15)", fontsize=8)
    axis.set_title("Host overhead of one small call", fontsize=10)
    figure.legend(loc="outside lower left", ncols=3, fontsize=8)
    return figure


PAINTERS = {"roofline": roofline, "speedup": speedups, "scaling": scaling, "overhead": overheads}
