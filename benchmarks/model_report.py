"""The results section of docs/model.md, made from committed JSON: `python benchmarks/model_report.py`.

    collect RUN ...   condense run folders into benchmarks/results/model/<name>.json, to be committed
    write             (without arguments) tables into docs/model.md between its two marks, plots beside the JSON

A file of `collect` holds the run's config and command, final scores, speed, and its curves thinned to CURVE points:

    name, group, note, command, date, device, torch    where it comes from; runs of one group share a table
    config             {"model", "training", "data"} of config.json
    parameters, steps, best_step, tokens, seconds, tokens_per_s, mfu, peak_memory_bytes
    best_valid         {"step", "loss", "tokens"}: the best evaluation during training, of so many tokens
    splits             {split: {"tokens", "loss", "perplexity", "bits_per_byte", "dynamic": {...}, "by_position": [...]}}
    train, valid       curves: [[step, tokens, seconds, loss], ...]

Scores come from summary.json and from every eval*.json in the run folder (`newllm eval RUN --json --dynamic --by-position >
RUN/eval.json`); a judge.json (`newllm judge`) becomes a file of its own, <name>-judge.json. Throughput and memory against context
come from train_speed.py --contexts and generation_speed.py. Nothing here needs a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import command_line
import program_tables
from markdown_cells import cells

from newllm import checkpoint
from newllm.config import ModelConfig, count_parameters
from newllm.errors import UserError
from newllm.run import Run, find_run
from newllm.training_config import TrainingConfig

Results = dict[str, Any]
CURVE = 200  # points of a curve
SAMPLES = 3  # of a judgement, the first
ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: python benchmarks/model_report.py -->", "<!-- end of results -->"
HIDDEN = {
    "vocab_size",
    "hidden_dim",
    "device",
    "threads",
    "log_every",
    "checkpoint_every",
    "eval_every",
    "eval_tokens",
    "cuda_graph",
    "precision",
    "num_heads",
}  # fmt: skip - settings that a table of runs need not tell apart


# ---- collect --------------------------------------------------------------------------------------------------------


def collect(run: Run, name: str, group: str | None, note: str, given: dict[str, str | None]) -> Results:
    """Everything worth keeping of one run folder, but not where it lay. `given`: what it does not know (command, device, torch,
    date)."""
    config, records = run.config(), run.metrics()
    corpus = Path(config["data"]["corpus"]).name  # not where it lay on one machine
    if not records:
        raise UserError(f"{run.path}: has no metrics yet")
    summary = checkpoint.read_json(run.summary_file) if run.summary_file.exists() else {}
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "valid_loss" in record]
    last = steps[-1] if steps else {}
    rates = [record["mfu"] for record in steps if "mfu" in record]
    day = datetime.fromtimestamp(run.metrics_file.stat().st_mtime, UTC).date().isoformat()
    found: Results = {
        "name": name, "group": group or Path(corpus).stem, "note": note,
        "command": given["command"] or re.sub(r" --out \S+", "", config.get("command") or ""), "date": given["date"] or summary.get("date") or day,
        "device": given["device"] or summary.get("device"), "torch": given["torch"] or summary.get("torch"),
        "config": {**{part: config[part] for part in ("model", "training")}, "data": {**config["data"], "corpus": corpus}},
        "parameters": summary.get("parameters") or count_parameters(run.model_config()),
        "steps": summary.get("steps") or records[-1]["step"], "best_step": summary.get("best_step"),
        "tokens": last.get("tokens"), "seconds": summary.get("seconds") or last.get("elapsed_s"),
        "tokens_per_s": summary.get("tokens_per_s"), "mfu": statistics.median(rates) if rates else None,
        "peak_memory_bytes": summary.get("peak_memory_bytes"), "best_valid": None,
        "splits": {split: summary[split] for split in ("valid", "test") if split in summary},
    }  # fmt: skip
    if found["tokens_per_s"] is None and found["seconds"]:
        found["tokens_per_s"] = found["tokens"] / found["seconds"]
    if evaluations:
        best = min(evaluations, key=lambda record: record["valid_loss"])
        found["best_valid"] = {
            "step": best["step"], "loss": best["valid_loss"], "tokens": config["training"]["eval_tokens"],
        }  # fmt: skip
    for file in sorted(run.path.glob("eval*.json")):
        for split, row in checkpoint.read_json(file)["splits"].items():
            found["splits"].setdefault(split, {}).update(row)
    if missing := [key for key in ("command", "device", "torch") if not found[key]]:
        raise UserError(f"{run.path}: does not say its {', '.join(missing)}; give --{' --'.join(missing)}")
    return found | {"train": _curve(steps, "loss", steps), "valid": _curve(evaluations, "valid_loss", steps)}


def _curve(records: list[Results], key: str, steps: list[Results]) -> list[list[float]]:
    """[step, tokens, seconds, loss] of at most CURVE records, the last among them; tokens and time are those of the
    step's own line."""
    at = {record["step"]: record for record in steps}
    stride = max(1, math.ceil(len(records) / CURVE))
    kept = records[::-1][::stride][::-1]
    rows = []
    for record in kept:
        own = at.get(record["step"])
        if own:
            rows.append([record["step"], own["tokens"], round(own["elapsed_s"], 2), round(record[key], 5)])
    return rows


def save(path: Path, content: Results) -> None:
    """Indented, but lists of numbers on one line."""
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda match: f"[{' '.join(match.group(1).split())}]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(path, text + "\n")


def run_collect(args: argparse.Namespace) -> int:
    if args.name and len(args.runs) > 1:
        raise UserError("--name: names one run")
    given = {key: getattr(args, key) for key in ("command", "device", "torch", "date")}
    for which in args.runs:
        run = find_run(which)
        name = args.name or run.path.resolve().name
        content = collect(run, name, args.group, args.note, given)
        save(args.results / f"{name}.json", content)
        print(f"wrote {args.results / name}.json")
        judged = run.path / "judge.json"
        if judged.exists():
            about = {key: content[key] for key in ("group", "date", "device", "torch")}
            judgement = checkpoint.read_json(judged)
            for judge in judgement["runs"].values():
                judge["path"] = Path(judge["path"]).name
            save(args.results / f"{name}-judge.json", about | {"judge": judgement})
            print(f"wrote {args.results / name}-judge.json")
    return 0


# ---- write ----------------------------------------------------------------------------------------------------------


def load(folder: Path) -> tuple[dict[str, list[Results]], dict[str, list[Results]]]:
    """Runs and judgements by group, in order of their names."""
    runs: dict[str, list[Results]] = {}
    judged: dict[str, list[Results]] = {}
    for path in sorted(folder.glob("*.json")):
        content = checkpoint.read_json(path)
        if "judge" not in content and not {"config", "splits", "train"} <= content.keys():
            raise UserError(f"{path}: not a file that `model_report.py collect` wrote")
        (judged if "judge" in content else runs).setdefault(content["group"], []).append(content)
    return dict(sorted(runs.items())), judged


def final_loss(run: Results, split: str) -> float | None:
    return run["splits"].get(split, {}).get("loss")


def valid_loss(run: Results) -> float:
    """Of the whole validation text, or the best seen in training."""
    loss = final_loss(run, "valid")
    return loss if loss is not None else run["best_valid"]["loss"] if run["best_valid"] else math.inf


def differences(runs: list[Results]) -> dict[str, str]:
    """Settings of each run that are not those of most runs of its group, by name of the run; all that differ where no value
    is shared."""
    # Runs of before an option was there have its default; one that is gone again is left out where a run does not have it.
    defaults = {**ModelConfig().to_dict(), **dataclasses.asdict(TrainingConfig())}
    flat = [{**defaults, **run["config"]["model"], **run["config"]["training"]} for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in HIDDEN]
    varied = [key for key in keys if len({json.dumps(one.get(key)) for one in flat}) > 1]
    usual = {}
    for key in varied:
        (value, count), *_ = Counter(json.dumps(one.get(key)) for one in flat).most_common(1)
        if count > 1 and key != "architecture":
            usual[key] = value
    of_transformers = {
        "max_seq_len", "coupling", "hops", "norm", "context_dim", "fnn_layers", "clamp", "context_init", "forget_init", "input_init",
    }  # fmt: skip

    def shown(one: Results) -> str:
        transformer = one["architecture"] == "transformer"
        parts = []
        for key in varied:
            foreign = (key == "max_seq_len") != transformer and key in of_transformers
            if foreign or key not in one or json.dumps(one[key]) == usual.get(key):
                continue
            value = one.get(key)
            parts.append(str(value) if key in ("architecture", "coupling") else f"{key} {value}")
        return ", ".join(parts) or "-"

    return {run["name"]: shown(one) for run, one in zip(runs, flat, strict=True)}


def table(runs: list[Results]) -> str:
    """Markdown: a line per run of a group, the best first."""
    told = differences(runs)
    transformers = [math.exp(loss) for run in runs if run["config"]["model"]["architecture"] == "transformer"
                    and (loss := final_loss(run, "test")) is not None]  # fmt: skip
    dynamic = any("dynamic" in row for run in runs for row in run["splits"].values())
    per_byte = any("bits_per_byte" in run["splits"].get("test", {}) for run in runs)
    headers = ["run", "parameters", "valid", "test", *(["test, dynamic"] if dynamic else []),
               *(["bits per byte"] if per_byte else []), *(["of the best Transformer's"] if transformers else []),
               "tokens read", "minutes", "tokens/s", "MFU", "differs in"]  # fmt: skip
    lines = []
    for run in sorted(runs, key=lambda run: (final_loss(run, "test") or valid_loss(run), run["name"])):
        test = run["splits"].get("test", {})
        loss = final_loss(run, "test")
        valid = f"{math.exp(valid_loss(run)):,.2f}" if valid_loss(run) < math.inf else "-"
        whole = final_loss(run, "valid") is not None
        line = [run["name"], f"{run['parameters'] / 1e6:.1f}M", valid + ("" if whole else "*")]
        line.append("-" if loss is None else f"{math.exp(loss):,.2f}")
        if dynamic:
            line.append(f"{test['dynamic']['perplexity']:,.2f}" if "dynamic" in test else "-")
        if per_byte:
            line.append(f"{test['bits_per_byte']:.4f}" if "bits_per_byte" in test else "-")
        if transformers:
            line.append("-" if loss is None else f"{math.exp(loss) / min(transformers):.3f}")
        line += [
            f"{(run['tokens'] or 0) / 1e6:,.1f}M", f"{(run['seconds'] or 0) / 60:.1f}", f"{run['tokens_per_s'] or 0:,.0f}",
            "-" if run["mfu"] is None else f"{run['mfu']:.1%}", told[run["name"]] + (f" ({run['note']})" if run["note"] else ""),
        ]  # fmt: skip
        lines.append(line)
    return cells(headers, lines)


def about(runs: list[Results]) -> str:
    """Where the figures of a group come from: devices, dates, commands."""
    devices = sorted({f"{run['device']}, torch {run['torch']}" for run in runs})
    dates = sorted({run["date"][:10] for run in runs})
    starred = any(final_loss(run, "valid") is None for run in runs)
    text = f"{'; '.join(devices)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. Minutes are of training alone."
    if starred:
        text += " *: the best evaluation in training, of as many tokens as `eval_tokens` says."
    commands = "\n".join(f"{run['name']}: {run['command']}" for run in runs)
    return f"{text}\n\n<details><summary>Commands</summary>\n\n```\n{commands}\n```\n\n</details>"


def judgement(content: Results) -> str:
    from newllm import judge

    found = content["judge"]
    how = ", ".join(f"{key} {value}" for key, value in found["sampling"].items() if value is not None)
    parts = [f"Continuations of the {found['split']} text ({how}):", judge.table(found)]
    for number, sample in enumerate(found["samples"][:SAMPLES], start=1):
        texts = "\n\n".join(f"--- {writer}\n{text.strip()}" for writer, text in sample.items())
        parts.append(f"<details><summary>Sample {number}</summary>\n\n```\n{texts}\n```\n\n</details>")
    return "\n\n".join(parts)


def contexts(results: Path) -> list[Results]:
    """Files of train_speed.py --contexts, and those of generation_speed.py from the same devices."""
    files = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    devices = {content["device"] for content in files if "contexts" in content}
    return [
        content
        for content in files
        if "contexts" in content or ("generation" in content and content["device"] in devices)
    ]


def generation_contexts(files: list[Results], presets: set[str]) -> str | None:
    """Markdown: tokens/s and state of one text by what was read before, of the presets that were trained at lengths too."""
    lines = []
    for preset in sorted(presets):
        runs = [run for content in files for run in content.get("generation", ()) if run["preset"] == preset]
        found = {(run["model"], run["context"]): run for run in runs if run["batch"] == 1 and "failure" not in run}
        for (name, context), run in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
            length = "any" if context is None else f"{context:,}"
            lines.append(
                [
                    f"{preset} {name}",
                    length,
                    f"{run['tokens_per_s']:,.0f}",
                    program_tables.readable_bytes(run["state_bytes"]),
                ]
            )
    headers = ["generation, one text", "tokens read before", "tokens/s", "state"]
    return cells(headers, lines) if lines else None


def section(results: Path, pictures: Path, relative: str) -> str:
    """The whole text between the marks; draws the plots into `pictures`, which the text calls `relative`."""
    import model_plots

    runs, judged = load(pictures)
    parts = ["## Results", "Made by `python benchmarks/model_report.py` from `benchmarks/results/model/*.json`."]
    for group, found in runs.items():
        parts += [f"### {group}", table(found), about(found)]
        for name, painter in (("curves", model_plots.curves), ("position", model_plots.positions)):
            path = pictures / f"{group}-{name}.png"
            if painter(found, path):
                parts.append(f"![{group}: {name}]({relative}/{path.name})")
        parts += [judgement(content) for content in judged.get(group, [])]
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text())
        if "trials" in content:
            commands = "\n".join(content["command"])
            parts += [
                f"### {path.stem}",
                f"{content['device']}, {content['date'][:10]}"
                + (f": {content['note']}." if "note" in content else "."),
            ]
            parts += [program_tables.trials_table(content), f"```\n{commands}\n```"]
    files = contexts(results)
    if files:
        parts.append("### Length of context")
        for content in files:
            if "contexts" in content:
                made = f", `{content['command']}`" if "command" in content else ""
                parts += [f"{content['device']}, {content['date'][:10]}{made}:", program_tables.contexts_table(content)]
        presets = {content["preset"] for content in files if "contexts" in content}
        parts += [text for text in [generation_contexts(files, presets)] if text]
        path = pictures / "contexts.png"
        model_plots.contexts(files, path)
        parts.append(f"![Throughput and memory against the length of context]({relative}/{path.name})")
    return "\n\n".join(parts)


def run_write(args: argparse.Namespace) -> int:
    page = args.page.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise UserError(f"{args.page}: wants one line {BEGIN} and after it one line {END}")
    before, rest = page.split(BEGIN)
    args.results.mkdir(parents=True, exist_ok=True)
    text = section(args.results.parent, args.results, f"../benchmarks/results/{args.results.name}")
    checkpoint.write_text(args.page, f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
    print(f"wrote {args.page}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser("model_report", __doc__)
    parser.set_defaults(
        run=run_write, page=ROOT / "docs" / "model.md", results=ROOT / "benchmarks" / "results" / "model"
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    keep = commands.add_parser("collect", help="condense run folders into JSON", allow_abbrev=False)
    keep.set_defaults(run=run_collect)
    keep.add_argument("runs", nargs="+", metavar="RUN", help="names or paths of run folders")
    keep.add_argument("--name", help="of the file and in tables, of a single run (default: the folder's)")
    keep.add_argument("--group", help="runs of one group share a table (default: after the data)")
    keep.add_argument("--note", default="", help="what a reader of the table has to know of these runs")
    for key in ("command", "device", "torch", "date"):
        keep.add_argument(f"--{key}", help="where the run folder does not say it")
    write = commands.add_parser("write", help="write tables and plots (default)", allow_abbrev=False)
    for command in (keep, write):
        command.add_argument("--results", type=Path, default=argparse.SUPPRESS, help="folder of the JSON and the plots")
    write.add_argument("--page", type=Path, default=argparse.SUPPRESS, help="the page (default: docs/model.md)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        return args.run(args)
    except (UserError, OSError) as error:
        return command_line.refuse("model_report", error)


if __name__ == "__main__":
    sys.exit(main())
