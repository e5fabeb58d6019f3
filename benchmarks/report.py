"""Results as JSON, as a markdown table and as plots: `python benchmarks/report.py [results.json ...]`.

Without arguments it takes every benchmarks/results/*.json. For each it prints the table and writes, beside the file,
<device>-roofline.png, <device>-speedup.png and <device>-overhead.png.
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

import torch

from newllm_kernels import native

Row = dict[str, Any]
Key = tuple[str, str, str, str]  # operation, size, dtype, direction
OURS, EAGER, COMPILED = "newllm", "eager", "compiled"
HEADLINE = {"cpu": "8x1024x512", "cuda": "8x4096x1024"}


# ---- the machine and the file ---------------------------------------------------------------------------------------


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


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
    except ImportError as error:
        build = {"compiler": str(error)}
    return {
        "device": device_name(), "date": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__,
        "triton": triton, "python": platform.python_version(), "compiler": build.get("compiler"),
        "cuda_compiler": build.get("cuda_compiler"), "threads": torch.get_num_threads(),
        "isa": native.active_isa() if native.library().ok else None,
    }  # fmt: skip


def write(path: Path, rows: list[Row], copies: list[float], refused: list[str]) -> None:
    """All or nothing: a reader never sees half a file."""
    copy = {"copy_gbps": max(copies), "copy_gbps_seen": copies} if copies else {}
    content = {**environment(), **copy, "ratios": ratios(rows), "refused": refused, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)


# ---- ratios ---------------------------------------------------------------------------------------------------------


def size_of(row: Row) -> str:
    return "x".join(map(str, row["shape"]))


def grouped(rows: list[Row]) -> dict[Key, dict[str, Row]]:
    """Measurements of one thing, by provider."""
    groups: dict[Key, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], size_of(row), row["dtype"], row["direction"]), {})[row["provider"]] = row
    return groups


def best_compiled(group: dict[str, Row]) -> Row | None:
    """The fastest compiled formulation, the further candidates included where they were timed."""
    found = [row for name, row in group.items() if name.startswith(COMPILED)]
    return min(found, key=lambda row: row["median_us"]) if found else None


def speedup(group: dict[str, Row], over: Row | None) -> float | None:
    return over["median_us"] / group[OURS]["median_us"] if over and OURS in group else None


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
                add(f"{what}, % of copy", ours["percent_of_copy"], 60)
            if direction in ("forward", "backward"):
                add(f"{what}, over a Python loop", speedup(group, group.get("loop")), 10)
                add(f"{what}, over a tuned Python loop", speedup(group, eager), 10)
                add(f"{what}, over the best compiled PyTorch", speedup(group, best_compiled(group)), 2)
        elif operation == "layer_norm" and direction in ("forward", "backward"):
            add(f"{what}, over torch", speedup(group, eager), 1)
        elif operation == "context_update" and direction in ("forward", "backward"):
            add(f"{what}, over eager", speedup(group, eager), 3)
        if direction.startswith("overhead") and ours:
            add(f"{operation} host {direction}, us", ours["median_us"], 15, at_least=False)
    return found


# ---- tables ---------------------------------------------------------------------------------------------------------


def _cells(headers: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(line[k]) for line in [headers, *lines]) for k in range(len(headers))]
    rule = ["-" * (widths[0] + 1) + "|", *("-" * (width + 1) + ":|" for width in widths[1:])]
    body = ["| " + " | ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True))) + " |" for line in [headers, *lines]]  # fmt: skip
    return "\n".join([body[0], "|-" + "".join(rule), *body[1:]])


def _us(row: Row | None) -> str:
    return "-" if row is None else f"{row['median_us']:,.{0 if row['median_us'] >= 1000 else 1}f}"


def table(rows: list[Row], copy_gbps: float) -> str:
    """Markdown: times and speed-ups, then host overhead, then the ratios that were asked for."""
    groups = grouped(rows)
    timed = {key: group for key, group in groups.items() if key[3] in ("forward", "backward")}
    others = sorted(
        {
            name
            for name in (row["provider"] for row in rows)
            if name not in (OURS, EAGER) and not name.startswith(COMPILED)
        }
    )
    graph = any("graph_us" in row for row in rows)
    headers = ["what (us, median)", OURS, *(["in a graph"] if graph else []), "GB/s", "% of copy", EAGER, "ours is", COMPILED, "ours is", *others]  # fmt: skip
    lines = []
    for (operation, size, dtype, direction), group in timed.items():
        ours = group.get(OURS)
        line = [f"{operation} {size} {dtype} {direction}", _us(ours)]
        if graph:
            line.append(f"{ours['graph_us']:,.1f}" if ours and ours.get("graph_us") else "-")
        line += [f"{ours['gbps']:.1f}", f"{ours['percent_of_copy']:.0f}"] if ours else ["-", "-"]
        for peer in (group.get(EAGER), best_compiled(group)):
            ratio = speedup(group, peer)
            line += [_us(peer), "-" if ratio is None else f"{ratio:.2f}x"]
        lines.append([*line, *(_us(group.get(name)) for name in others)])
    parts = [f"Copy bandwidth {copy_gbps:.1f} GB/s (read plus written)."]
    if lines:
        parts.append(_cells(headers, lines))
    if candidates := _candidates(timed):
        parts.append(candidates)
    if inexact := [row for row in rows if row.get("parameter_error", 0.0) > row.get("tolerance", math.inf)]:
        worst = max(inexact, key=lambda row: row["parameter_error"])
        names = ", ".join(dict.fromkeys(f"{row['provider']} {row['op']} {row['dtype']}" for row in inexact))
        parts.append(f"Inexact: gradients of weight and bias, up to {worst['parameter_error']:.0e} off, of {names}.")
    if overhead := _overhead(rows):
        lines = [[name, *(f"{value:.1f}" if value else "-" for value in values)] for name, values in overhead.items()]
        parts.append(_cells(["host overhead (us)", "no gradients", "recorded"], lines))
    if wanted := ratios(rows):
        lines = [[r["what"], f"{r['value']:g}", r["wanted"], "yes" if r["met"] else "NO"] for r in wanted]
        parts.append(_cells(["wanted", "measured", "goal", "met"], lines))
    return "\n\n".join(parts)


def _candidates(timed: dict[Key, dict[str, Row]]) -> str | None:
    """The pure-PyTorch formulations beside each other, where more than one was timed."""
    lines = []
    for key, group in timed.items():
        found = {name: row for name, row in group.items() if name.startswith(COMPILED)}
        if any(":" in name for name in found):
            lines.append([" ".join(key), ", ".join(f"{name} {_us(row)}" for name, row in found.items())])
    return _cells(["torch.compile of (us)", "the fastest counts above"], lines) if lines else None


def _overhead(rows: list[Row]) -> dict[str, tuple[float | None, float | None]]:
    times = {
        (_name(row), row["direction"]): row["median_us"] for row in rows if row["direction"].startswith("overhead")
    }
    names = dict.fromkeys(name for name, _ in times)
    return {name: (times.get((name, "overhead")), times.get((name, "overhead, recorded"))) for name in names}


def _name(row: Row) -> str:
    return row["op"] if row["provider"] == OURS else f"torch {row['op']}"


def main(arguments: list[str]) -> int:
    import plots

    paths = [Path(a) for a in arguments] or sorted((Path(__file__).parent / "results").glob("*.json"))
    if not paths:
        print("no results: run `pytest benchmarks/ --benchmark-only` first, or name a JSON file", file=sys.stderr)
        return 2
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            print(f"{path}: not a readable results file: {error}", file=sys.stderr)
            return 2
        rows = content["rows"]
        print(f"\n## {content['device']}, {content['date'][:10]}\n")
        versions = ", ".join(
            f"{k} {content[k]}" for k in ("torch", "triton", "python", "compiler", "isa") if content[k]
        )
        print(f"{content['threads']} threads; {versions}.\n\n{table(rows, content['copy_gbps'])}\n")
        for picture in plots.draw(rows, path.with_suffix(""), content):
            print(f"wrote {picture}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
