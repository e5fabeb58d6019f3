"""Results as JSON, as a markdown table and as plots: `python benchmarks/report.py [results.json ...]`.

Without arguments it takes every benchmarks/results/*.json. For each it prints the table and writes, beside the file,
<device>-roofline.png, <device>-speedup.png, <device>-scaling.png and <device>-overhead.png, whichever it has rows for. No GPU
is needed. Files of train_speed.py are printed; of generation_speed.py, expressivity.py and recurrent.py <file>.png is drawn too.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import program_tables
import recurrent_report
import torch
from markdown_cells import cells

from newllm import speed
from newllm_kernels import native

Row = dict[str, Any]
Key = tuple[str, str, str, str]  # operation, size, dtype, direction
OURS, EAGER, COMPILED = "newllm", "eager", "compiled"
OVERHEADS = ("overhead", "overhead, recorded", "overhead, backward")
HEADLINE = {"cpu": "8x1024x512", "cuda": "8x4096x1024"}


# ---- the machine and the file ---------------------------------------------------------------------------------------


def device_name() -> str:
    return speed.device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def device_slug() -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    return slug if torch.cuda.is_available() else f"cpu-{slug}-{torch.get_num_threads()}-threads"


def environment() -> dict[str, Any]:
    triton = None
    if find_spec("triton"):
        import triton as module

        triton = module.__version__
    try:
        build = native.build_info()
    except ImportError:  # of another Python than the library that serves it
        build = {}
    return {
        "device": device_name(), "date": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__,
        "triton": triton, "python": platform.python_version(), "compiler": build.get("compiler"),
        "cuda_compiler": build.get("cuda_compiler"), "threads": torch.get_num_threads(),
        "isa": native.active_isa() if native.library().ok else None,
    }  # fmt: skip


def as_json(content: dict[str, Any]) -> str:
    """JSON with a line for every key, and for every row of a table: a diff then shows what was measured anew."""
    lines = []
    for key, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def save(path: Path, content: dict[str, Any]) -> None:
    """All or nothing: a reader never sees half a file."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(as_json(content))
    draft.replace(path)


def write(path: Path, rows: list[Row], copies: list[float], refused: list[str]) -> None:
    """The file of a run of benchmarks."""
    copy = {"copy_gbps": max(copies), "copy_gbps_seen": copies} if copies else {}
    content = {**environment(), **copy, "ratios": ratios(rows), "refused": refused, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, content)


# ---- ratios ---------------------------------------------------------------------------------------------------------


def size_of(row: Row) -> str:
    return "x".join(map(str, row["shape"]))


def grouped(rows: list[Row], series: str | None = None) -> dict[Key, dict[str, Row]]:
    """Measurements of one thing, by provider; those of a series only where it is named."""
    groups: dict[Key, dict[str, Row]] = {}
    for row in rows:
        if row.get("series") != series:
            continue
        groups.setdefault((row["op"], size_of(row), row["dtype"], row["direction"]), {})[row["provider"]] = row
    return groups


def kernel_us(row: Row) -> float:
    """Time in a CUDA graph where there is one, which leaves the host out."""
    return row.get("graph_us") or row["median_us"]


def share(row: Row) -> float:
    """% of the copy bandwidth, by that time."""
    return row["percent_of_copy"] * row["median_us"] / kernel_us(row)


def gbps(row: Row) -> float:
    return row["bytes"] / kernel_us(row) / 1e3


def best_compiled(group: dict[str, Row]) -> Row | None:
    """The fastest compiled formulation, the further candidates included where they were timed."""
    found = [row for name, row in group.items() if name.startswith(COMPILED)]
    return min(found, key=kernel_us) if found else None


def speedup(group: dict[str, Row], over: Row | None) -> float | None:
    if not over or OURS not in group:
        return None
    both_in_graphs = over.get("graph_us") and group[OURS].get("graph_us")
    times = [row["graph_us"] if both_in_graphs else row["median_us"] for row in (over, group[OURS])]
    return times[0] / times[1]


def ratios(rows: list[Row]) -> list[dict[str, Any]]:
    """What was asked for, what came out."""
    found: list[dict[str, Any]] = []

    def add(what: str, value: float | None, wanted: float, *, at_least: bool = True) -> None:
        if value is not None and math.isfinite(value):
            met = value >= wanted if at_least else value < wanted
            found.append(
                {
                    "what": what,
                    "value": round(value, 2),
                    "wanted": f"{'>=' if at_least else '<'} {wanted:g}",
                    "met": met,
                }
            )

    for (operation, size, dtype, direction), group in grouped(rows).items():
        what = f"{operation} {size} {dtype} {direction}"
        eager, ours = group.get(EAGER), group.get(OURS)
        if operation in ("scan", "gated_scan") and ours and size == HEADLINE.get(ours["device"]):
            if dtype == "float32" and direction == "forward":
                add(f"{what}, % of copy", share(ours), 60)
            if direction in ("forward", "backward"):
                add(f"{what}, over a Python loop", speedup(group, group.get("loop")), 10)
                add(f"{what}, over a tuned Python loop", speedup(group, eager), 10)
                add(f"{what}, over the best compiled PyTorch", speedup(group, best_compiled(group)), 2)
        elif operation == "layer_norm" and direction in ("forward", "backward"):
            add(f"{what}, over torch", speedup(group, eager), 1)
        elif operation == "context_update" and direction in ("forward", "backward"):
            add(f"{what}, over eager", speedup(group, eager), 3)
        if direction in OVERHEADS[:2] and ours:
            add(f"{operation} host {direction}, us", ours["median_us"], 15, at_least=False)
    return found


# ---- tables ---------------------------------------------------------------------------------------------------------


def _us(row: Row | None) -> str:
    """Time in a graph; an event time is starred where the others are not: no graph could be made."""
    if row is None:
        return "-"
    us = kernel_us(row)
    return f"{us:,.{0 if us >= 1000 else 1}f}" + ("*" if "graph_us" in row and not row["graph_us"] else "")


def table(rows: list[Row], copy_gbps: float) -> str:
    """Markdown: times and speed-ups, then host overhead, then the ratios that were asked for."""
    groups = grouped(rows)
    timed = {key: group for key, group in groups.items() if key[3] in ("forward", "backward")}
    others = sorted(
        {
            name
            for group in timed.values()
            for name in group
            if name not in (OURS, EAGER) and not name.startswith(COMPILED)
        }
    )
    graph = any("graph_us" in row for row in rows)
    unit = "us, in a CUDA graph" if graph else "us, median"
    headers = [f"what ({unit})", OURS, *(["by events"] if graph else []), "GB/s", "% of copy", EAGER, "ours is", COMPILED, "ours is", *others]  # fmt: skip
    lines = []
    for (operation, size, dtype, direction), group in timed.items():
        ours = group.get(OURS)
        line = [f"{operation} {size} {dtype} {direction}", _us(ours)]
        if graph:
            line.append(f"{ours['median_us']:,.1f}" if ours else "-")
        line += [f"{gbps(ours):.1f}", f"{share(ours):.0f}"] if ours else ["-", "-"]
        for peer in (group.get(EAGER), best_compiled(group)):
            ratio = speedup(group, peer)
            line += [_us(peer), "-" if ratio is None else f"{ratio:.2f}x"]
        lines.append([*line, *(_us(group.get(name)) for name in others)])
    parts = [f"Copy bandwidth {copy_gbps:.1f} GB/s (read plus written)."]
    if lines:
        parts.append(cells(headers, lines))
    if any("*" in cell for line in lines for cell in line):
        parts.append("* by events: no CUDA graph could be made of it.")
    if backends := _backends(timed):
        parts.append(backends)
    if candidates := _candidates(timed):
        parts.append(candidates)
    if scaling := _scaling(rows):
        parts.append(scaling)
    for what, error in (("results", "error"), ("gradients of weight and bias", "parameter_error")):
        if inexact := [row for row in rows if row.get(error, 0.0) > row.get("tolerance", math.inf)]:
            worst = max(row[error] for row in inexact)
            names = ", ".join(dict.fromkeys(f"{row['provider']} {row['op']} {row['dtype']}" for row in inexact))
            parts.append(f"Inexact: {what}, up to {worst:.0e} off, of {names}.")
    if overhead := _overhead(rows):
        lines = [[name, *(f"{value:.1f}" if value else "-" for value in values)] for name, values in overhead.items()]
        parts.append(cells(["host overhead (us)", "no gradients", "recorded", "backward"], lines))
    if wanted := ratios(rows):
        lines = [[r["what"], f"{r['value']:g}", r["wanted"], "yes" if r["met"] else "NO"] for r in wanted]
        parts.append(cells(["wanted", "measured", "goal", "met"], lines))
    return "\n\n".join(parts)


def _backends(timed: dict[Key, dict[str, Row]]) -> str | None:
    """Our two GPU backends and the fastest of all peers, PyTorch among them, and how many times longer the others take."""

    def ratio(row: Row | None, over: Row | None) -> str:
        return f"{kernel_us(row) / kernel_us(over):.2f}x" if row and over else "-"

    lines = []
    for key, group in timed.items():
        cuda, triton = group.get("cuda"), group.get("triton")
        if cuda is None and triton is None:
            continue
        peers = [row for name, row in group.items() if name not in (OURS, "cuda", "triton")]
        peer = min(peers, key=kernel_us, default=None)
        name = f" {peer['provider']}" if peer else ""
        best = min((row for row in (cuda, triton) if row), key=kernel_us)
        shares = [f"{share(row):.0f}" if row else "-" for row in (cuda, triton)]
        lines.append(
            [" ".join(key), _us(cuda), shares[0], _us(triton), shares[1], _us(peer) + name, ratio(triton, cuda),
             ratio(peer, best)]
        )  # fmt: skip
    headers = ["our backends (us)", "CUDA C++", "% of copy", "Triton", "% of copy", "best peer", "Triton over CUDA", "peer over the better"]  # fmt: skip
    return cells(headers, lines) if lines else None


def _candidates(timed: dict[Key, dict[str, Row]]) -> str | None:
    """The pure-PyTorch formulations beside each other, where more than one was timed."""
    lines = []
    for key, group in timed.items():
        found = {name: row for name, row in group.items() if name.startswith(COMPILED)}
        if any(":" in name for name in found):
            lines.append([" ".join(key), ", ".join(f"{name} {_us(row)}" for name, row in found.items())])
    return cells(["torch.compile of (us)", "the fastest counts above"], lines) if lines else None


def _scaling(rows: list[Row]) -> str | None:
    """Rates along the length of one sequence."""
    groups = grouped(rows, "scaling")
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    lines = [
        [" ".join(key), *(f"{gbps(group[name]):.1f}" if name in group else "-" for name in names)]
        for key, group in groups.items()
    ]
    return cells(["scaling (GB/s)", *names], lines) if lines else None


def _overhead(rows: list[Row]) -> dict[str, tuple[float | None, ...]]:
    """Name of a call -> its time by each of OVERHEADS."""
    times = {(_name(row), row["direction"]): row["median_us"] for row in rows if row["direction"] in OVERHEADS}
    names = dict.fromkeys(name for name, _ in times)
    return {name: tuple(times.get((name, kind)) for kind in OVERHEADS) for name in names}


def _name(row: Row) -> str:
    return row["op"] if row["provider"] == OURS else f"torch {row['op']}"


def _read(path: Path) -> dict[str, Any]:
    """A results file, of the benchmarks (rows), or of train_speed.py (runs, contexts), generation_speed.py, expressivity.py,
    recurrent.py or trials.py (their names)."""
    content = json.loads(path.read_text())
    kinds = {"runs", "contexts", "generation", "expressivity", "recurrent", "trials"}
    if not isinstance(content, dict) or not (kinds & content.keys() or {"rows", "copy_gbps"} <= content.keys()):
        raise ValueError("has no rows of benchmarks")
    return content


def main(arguments: list[str]) -> int:
    import expressivity_report
    import plots

    paths = [Path(a) for a in arguments] or sorted((Path(__file__).parent / "results").glob("*.json"))
    if not paths:
        print("no results: run `pytest benchmarks/ --benchmark-only` first, or name a JSON file", file=sys.stderr)
        return 2
    for path in paths:
        try:
            content = _read(path)
        except (OSError, ValueError) as error:
            print(f"{path}: not a readable results file: {error}", file=sys.stderr)
            return 2
        print(f"\n## {content['device']}, {content['date'][:10]}\n")
        versions = ", ".join(
            f"{k} {content[k]}" for k in ("torch", "triton", "python", "compiler", "isa") if content[k]
        )
        if "generation" in content:
            body = program_tables.generation_table(content)
        elif "contexts" in content:
            body = program_tables.contexts_table(content)
        elif "expressivity" in content:
            body = expressivity_report.table(content)
        elif "trials" in content:
            body = program_tables.trials_table(content)
        elif "recurrent" in content:
            body = recurrent_report.table(content["recurrent"])
        else:
            body = (
                program_tables.training_table(content)
                if "runs" in content
                else table(content["rows"], content["copy_gbps"])
            )
        commands = content.get("command", [])
        told = "".join(f"\n\n    {command}" for command in ([commands] if isinstance(commands, str) else commands))
        print(f"{content['threads']} threads; {versions}.{told}\n\n{body}\n")
        if {"generation", "expressivity"} & content.keys():
            painter = plots.draw_generation if "generation" in content else expressivity_report.draw
            picture = painter(content, path.with_suffix(".png"))
            print(f"wrote {picture}", file=sys.stderr)
        if "recurrent" in content:
            print(f"wrote {recurrent_report.draw(content, path.with_suffix('.png'))}", file=sys.stderr)
        if "rows" in content:
            for picture in plots.draw(content["rows"], path.with_suffix(""), content):
                print(f"wrote {picture}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
