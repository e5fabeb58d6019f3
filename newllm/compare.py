"""New-LLM against a Transformer: the same number of parameters, data, trainer, and the same steps or the same minutes.

Each model trains in a process of its own (`newllm train --resume`), so that peak memory is that of one model and a
comparison that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from newllm import checkpoint, plots
from newllm.config import ModelConfig, transformer_like
from newllm.errors import UserError, arguments_are_the_users
from newllm.model import build_model, state_bytes
from newllm.prepare import Data, new_trainer, training_config
from newllm.run import Run
from newllm.training_config import TrainingConfig

BASELINE = "transformer"
EQUAL_TIME = "equal-time.json"  # minutes of each run, and the steps that came to for those measured so far


def check(model: ModelConfig) -> None:
    """Raise UserError where there is nothing to set against the Transformer."""
    if model.architecture == BASELINE:
        raise UserError(f"--architecture {BASELINE}: compare wants the model to set against the {BASELINE}")


def prepare(
    folder: Run,
    model: ModelConfig,
    config: TrainingConfig,
    data: Data,
    command: str,
    minutes: float | None = None,
    baseline_recall: bool = False,
) -> None:
    """Make the runs <folder>/<model's architecture> and <folder>/transformer, neither of them trained yet. `minutes`: of
    training for each, in place of the steps of `config`. `baseline_recall`: the Transformer has the model's tables of recall, too."""
    check(model)
    if minutes is not None:
        config = dataclasses.replace(config, steps=max(config.steps, _measured_steps(config) + 1))
    model = dataclasses.replace(model, vocab_size=data.tokenizer.vocab_size)
    with arguments_are_the_users():
        baseline = transformer_like(model, recall=baseline_recall)
    # Longer positions than a segment has would be used at evaluation without ever having been trained.
    baseline = dataclasses.replace(baseline, max_seq_len=config.segment)
    for contestant in (model, baseline):
        new_trainer(Run(folder.path / contestant.architecture), contestant, config, data, command=command)
    if minutes is not None:
        checkpoint.write_json(folder.path / EQUAL_TIME, {"minutes": minutes, "steps": {}})


def contestants(folder: Path) -> list[Run]:
    """The runs of a comparison, the Transformer last. Raises UserError where `folder` is not one."""
    runs = [Run(config.parent) for config in folder.glob("*/config.json")]
    names = [run.path.name for run in runs]
    if len(runs) != 2 or BASELINE not in names:
        raise UserError(
            f"{folder}: not the folder of a comparison (it holds the runs: {', '.join(sorted(names)) or 'none'})"
        )
    return sorted(runs, key=lambda run: run.path.name == BASELINE)


def train(run: Run) -> int:
    """Train one contestant to its end in a process of its own; returns its exit code. One that is done is left alone:
    its peak memory would be measured anew, without the training."""
    if run.summary_file.exists() and checkpoint.read_json(run.summary_file).get("steps") == training_config(run).steps:
        return 0
    options: list[str] = []
    agreed = run.path.parent / EQUAL_TIME
    if agreed.exists() and run.path.name not in (plan := checkpoint.read_json(agreed))["steps"]:
        code = _measure(run)
        if code:
            return code
        plan["steps"][run.path.name] = steps = _steps_in(run, plan["minutes"])
        options = ["--steps", str(steps)]
        checkpoint.write_json(agreed, plan)
    return _train(run, options)


def _measured_steps(config: TrainingConfig) -> int:
    """Steps after which the speed of a run is known: kernels are compiled and graphs captured before the second log."""
    return 2 * config.log_every


def _measure(run: Run) -> int:
    """Train the first steps of a run, which then goes on; returns the exit code."""
    missing = _measured_steps(training_config(run)) - checkpoint.load(run.last_file)[1]["step"]
    return _train(run, ["--stop-after", str(missing)]) if missing > 0 else 0


def _steps_in(run: Run, minutes: float) -> int:
    """Steps of `minutes` at the speed of the last log: what is compiled once is not counted against a model."""
    config = training_config(run)
    rate = next(record["tokens_per_s"] for record in reversed(run.metrics()) if "tokens_per_s" in record)
    return max(_measured_steps(config) + 1, round(60 * minutes * rate / config.tokens_per_step))


def _train(run: Run, options: list[str]) -> int:
    # A process group of its own: Ctrl-C reaches it once, through here, and not from the terminal too.
    command = [sys.executable, "-m", "newllm", "train", "--resume", str(run.path), *options]
    with subprocess.Popen(command, process_group=0) as child, _passing_signals_to(child):
        code = child.wait()
    if code < 0:
        raise UserError(
            f"training {run.path} was killed by signal {-code}; go on with: newllm compare --resume {run.path.parent}"
        )
    return code


@contextmanager
def _passing_signals_to(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hand SIGINT and SIGTERM on to the child, which saves before it ends, instead of dying above it."""
    before = {
        number: signal.signal(number, lambda number, frame: child.send_signal(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report(folder: Path) -> list[dict[str, Any]]:
    """One row of figures per model, also written to compare.json, and drawn in compare.png."""
    runs = contestants(folder)
    rows = [_row(run) for run in runs]
    checkpoint.write_json(folder / "compare.json", {"models": rows})
    plots.compare_plot(rows, {run.path.name: run.metrics() for run in runs}, folder / "compare.png")
    return rows


def _row(run: Run) -> dict[str, Any]:
    summary = checkpoint.read_json(run.summary_file)
    config = run.model_config()
    row = {"model": run.path.name, "parameters": summary["parameters"], "perplexity": summary["valid"]["perplexity"]}
    if "test" in summary:
        row["test_perplexity"] = summary["test"]["perplexity"]
    return row | {
        "unigram_perplexity": summary["valid"]["unigram_perplexity"],
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "tokens_per_s": summary["tokens_per_s"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "state_bytes": generation_state_bytes(config),
        "config": config.to_dict(),
    }


def generation_state_bytes(config: ModelConfig) -> int:
    """Bytes a model remembers of one text that is longer than its window."""
    model = build_model(config).eval()
    tokens = torch.zeros(1, 1 if model.carries_context else config.max_seq_len, dtype=torch.int64)
    with torch.inference_mode():
        return state_bytes(model(tokens)[1])


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as text, one line per model."""
    columns = [
        ("model", "model", str),
        ("parameters", "parameters", "{:,}".format),
        ("perplexity", "perplexity", "{:,.2f}".format),
    ]
    if "test_perplexity" in rows[0]:
        columns.append(("test_perplexity", "test", "{:,.2f}".format))
    if len({row["steps"] for row in rows}) > 1:  # equal minutes
        columns += [("steps", "steps", "{:,}".format), ("seconds", "seconds", "{:,.0f}".format)]
    columns += [
        ("tokens_per_s", "tokens/s", "{:,.0f}".format),
        ("peak_memory_bytes", "peak memory", lambda size: f"{size / 2**20:,.0f} MiB"),
        ("state_bytes", "state at generation", lambda size: f"{size / 2**10:,.1f} KiB"),
    ]
    cells = [[title for _, title, _ in columns]] + [[show(row[key]) for key, _, show in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
