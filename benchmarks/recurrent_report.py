"""The table and the picture of a results file of recurrent.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markdown_cells import cells

Row = dict[str, Any]
HEADERS = (
    "B x T x D", "what", "dtype", "weights", "backend", "passes", "off by", "forward", "in a graph", "backward", "in a graph",
)  # fmt: skip


def table(rows: list[Row]) -> str:
    """Markdown: microseconds a step, by events and in a CUDA graph. Passes forward / backward, + where the rest then went in order;
    off by: relative difference of the contexts from those in order."""
    return cells(list(HEADERS), [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    passes = " / ".join(
        f"{count}{'+' if ordered else ''}"
        for count, ordered in zip(row.get("passes", ()), row.get("in_order", ()), strict=True)
    )
    name = row["name"]
    if name == "auto":
        name = f"auto: {'in order' if row['chunks'] == 1 else str(row['chunks']) + ' chunks'}, {row['over_sequential']:.2f} of in order"
    times = [row.get(key) for key in ("forward_us", "forward_graph_us", "backward_us", "backward_graph_us")]
    return [
        "x".join(map(str, row["shape"])), name, row["dtype"], row["weights"], row.get("backend", "-"), passes or "-",
        f"{row['difference']:.1e}" if "difference" in row else "-", *("-" if us is None else f"{us:.3g}" for us in times),
    ]  # fmt: skip


def draw(content: dict[str, Any], path: Path) -> Path:
    """Bars of the fastest of every kind, a panel for each shape, forward and backward."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in content["recurrent"] if row["name"] == "in order"))
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(1 + 3.7 * len(shapes), 4.2), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        bars = _bars(
            [row for row in content["recurrent"] if row["shape"][0] == shape[0] and row["shape"][2] == shape[2]]
        )
        for k, (direction, colour) in enumerate((("forward", "#1b6ca8"), ("backward", "#a9cbe6"))):
            found = {y: bar[direction] for y, bar in enumerate(bars.values())}
            drawn = axis.barh(
                [y - 0.2 + 0.4 * k for y in found], list(found.values()), 0.38, color=colour, label=direction
            )
            axis.bar_label(drawn, fmt="%.3g", fontsize=7, padding=2)
        axis.set_yticks(range(len(bars)), list(bars), fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.15 * axis.get_xlim()[1])
        axis.set_title("x".join(map(str, shape)), fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_xlabel("microseconds a step; shorter is better", fontsize=8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=8)
    figure.suptitle(
        f"The full cell on {content['device']}, torch {content['torch']}, {content['date'][:10]}", fontsize=10
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _bars(rows: list[Row]) -> dict[str, dict[str, float]]:
    """label -> direction -> the least microseconds a step, by events or in a graph; of chunks the fastest number."""
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["name"] == "auto":
            continue
        kind = "chunks" if "chunks" in row else row["name"]
        label = f"{kind} {row['dtype']}" + (f", {row['weights']}" if kind in ("chunks", "in order") else "")
        for direction in ("forward", "backward"):
            least = min(us for us in (row[f"{direction}_us"], row[f"{direction}_graph_us"]) if us is not None)
            bar = bars.setdefault(label, {})
            bar[direction] = min(least, bar.get(direction, least))
    return bars
