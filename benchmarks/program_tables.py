"""Results of train_speed.py, generation_speed.py and trials.py as markdown."""

from __future__ import annotations

from typing import Any

from markdown_cells import cells


def way(graph: bool, compiled: bool) -> str:
    """How a training step is launched."""
    return {(False, False): "eager", (True, False): "graph", (False, True): "compiled"}.get(
        (graph, compiled), "graph, compiled"
    )


def training_table(content: dict[str, Any]) -> str:
    """Markdown: tokens/s of every configuration, then where the time of ours goes."""
    headers = ["training", "backend", "step", "tokens/s", "MFU", "ms a step", "peak memory", "relative"]
    first = next((run["tokens_per_s"] for run in content["runs"] if "failure" not in run), None)
    lines, failures = [], []
    for run in content["runs"]:
        name = [run["model"], run["backend"], way(run.get("graph", False), run["compiled"])]
        if "failure" in run:
            failures.append(f"FAILED  {' '.join(name[:2])}, {name[2]}: {run['failure']}")
            continue
        peak = run["peak_bytes"]
        lines.append(
            [*name, f"{run['tokens_per_s']:,.0f}", f"{run['mfu']:.1%}" if "mfu" in run else "-", f"{run['median_ms']:,.1f}", "-" if peak is None else f"{peak / 2**20:,.0f} MiB",
             f"{run['tokens_per_s'] / first:.2f}x"]
        )  # fmt: skip
    parts = [
        f"Preset {content['preset']}, {content['batch']} x {content['length']} tokens a step, {content['precision']}.",
        cells(headers, lines),
        *failures,
    ]
    for run in content["runs"]:
        if profile := run.get("profile"):
            what = f"{run['model']}, {way(run.get('graph', False), run['compiled'])}"
            lines = [
                [op["name"], f"{op['us']:,.0f}", f"{op['percent']:.1f}", f"{op['calls']:g}"] for op in profile["top"]
            ]
            parts.append(cells([f"{what}: {profile['of']}", "us a step", "%", "calls a step"], lines))
            parts.append(
                f"{profile['total_us'] / 1e3:,.1f} ms in all of them; a step takes {run['median_ms']:,.1f} ms."
            )
    return "\n\n".join(parts)


def contexts_table(content: dict[str, Any]) -> str:
    """Markdown: tokens/s and peak memory of training by length of the segment, a pair of columns for each model."""
    names = list(dict.fromkeys(run["model"] for run in content["contexts"]))
    runs = {(run["model"], run["length"]): run for run in content["contexts"]}
    lines = []
    for length in sorted({run["length"] for run in content["contexts"]}):
        line = [f"{length:,}"]
        for name in names:
            run = runs.get((name, length))
            if run is None:  # the run was cut short
                line += ["-", "-"]
            elif "failure" in run:
                line += ["out of memory" if "OutOfMemory" in run["failure"] else "failed", "-"]
            else:
                peak = run["peak_bytes"]
                line += [
                    f"{run['tokens_per_s']:,.0f}" + ("" if run["graph"] else "*"),
                    "-" if peak is None else readable_bytes(peak),
                ]
        lines.append(line)
    headers = ["tokens of context", *(f"{name}, {what}" for name in names for what in ("tokens/s", "peak memory"))]
    note = f"Training, preset {content['preset']}, one stream, {content['precision']}; a Transformer sees all of the context."
    if any(not run.get("graph", True) for run in content["contexts"]):
        note += " *: launched kernel by kernel, not as a CUDA graph."
    return f"{note}\n\n{cells(headers, lines)}"


def readable_bytes(count: int) -> str:
    unit, name = next(((2**k, name) for k, name in ((30, "GiB"), (20, "MiB")) if count >= 2**k), (2**10, "KiB"))
    return f"{count / unit:,.1f} {name}"


def generation_table(content: dict[str, Any]) -> str:
    """Markdown: tokens/s of every model, batch and context, and how near they are to reading the weights once."""
    headers = ["generation", "batch", "context", "tokens/s", "us a step", "% of weight read", "state", "peak memory"]
    lines, failures = [], []
    for run in content["generation"]:
        context = "any" if run["context"] is None else f"{run['context']:,}"
        name = [f"{run['preset']} {run['model']}", str(run["batch"]), context]
        if "failure" in run:
            failures.append(f"FAILED  {', '.join(name)}: {run['failure']}")
            continue
        peak = run["peak_bytes"]
        lines.append(
            [*name, f"{run['tokens_per_s']:,.0f}", f"{run['median_ms'] * 1e3:,.1f}", f"{run['percent_of_bound']:.1f}",
             readable_bytes(run["state_bytes"]), "-" if peak is None else readable_bytes(peak)]
        )  # fmt: skip
    read = f"Memory is read at {content['read_gbps']:,.0f} GB/s."
    parts = [read, cells(headers, lines), *failures]
    if "long" in content:
        of_one = [
            [run["preset"], f"{run['tokens']:,}", f"{run['tokens_per_s']:,.0f}",
             *("-" if run[key] is None else f"{run[key]:,}" for key in ("allocated_bytes", "peak_bytes"))]
            for run in content["long"]
        ]  # fmt: skip
        parts.append(
            cells(["one text", "tokens", "tokens/s since the last line", "bytes allocated", "at most"], of_one)
        )
    return "\n\n".join(parts)


def trials_table(content: dict[str, Any]) -> str:
    """Markdown: validation perplexity of every recipe with one setting changed, then with several."""
    found = {(trial["recipe"], trial["trial"]): trial["valid_perplexity"] for trial in content["trials"]}
    recipes = list(dict.fromkeys(recipe for recipe, _ in found))
    best = {  # none where all of them diverged
        recipe: min((v for (of, _), v in found.items() if of == recipe and v is not None), default=None)
        for recipe in recipes
    }

    def cell(recipe: str, value: float | None) -> str:
        return "diverged" if value is None else f"**{value:.2f}**" if value == best[recipe] else f"{value:.2f}"

    names = dict.fromkeys(name for _, name in found)
    alone = [name for name in names if "+" not in name]
    lines = [[name, *(cell(of, found[of, name]) if (of, name) in found else "-" for of in recipes)] for name in alone]
    several = [
        [recipe, name.replace("+", ", "), cell(recipe, value)] for (recipe, name), value in found.items() if "+" in name
    ]
    parts = [
        f"{content['steps']:,} steps each; validation perplexity, a recipe's best in bold.",
        cells(["one change", *recipes], lines),
    ]
    if several:  # they come after all others
        parts.append(cells(["recipe", "several changes", "perplexity"], several))
    return "\n\n".join(parts)
