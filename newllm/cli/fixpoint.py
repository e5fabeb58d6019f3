"""`newllm fixpoint`"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import time
from typing import Any

import numpy as np
import torch

from newllm import checkpoint
from newllm.cli.parser import FIXPOINT_OPTIONS, MODEL_OPTIONS
from newllm.cli.settings import data_settings, device_settings, model_settings, note_unread
from newllm.cli.train import NEW_RUN_FIELDS, shown
from newllm.config import ModelConfig
from newllm.errors import UserError
from newllm.fixpoint import MEASURED, PASSES, FixedPoints, FixpointConfig, FixpointTrainer, check, measure, phrases_of
from newllm.model import build_model
from newllm.plots import fixpoint_plot
from newllm.prepare import data_record, fill_run, run_data
from newllm.run import Run, find_run, new_run


def run(args: argparse.Namespace) -> int:
    if args.stop_after is not None and args.stop_after < 1:
        raise UserError(f"--stop-after: got {args.stop_after}, wanted at least 1")
    folder, trainer, measured, info = _resume(args) if args.resume is not None else _begin(args)
    begin = time.perf_counter() - info["seconds"]

    def save() -> None:
        trainer.save(folder.last_file, info | {"seconds": time.perf_counter() - begin})

    signal_number = trainer.train(folder.append_metrics, save=save, stop_after=args.stop_after)
    save()
    seconds = time.perf_counter() - begin
    if trainer.step < trainer.config.steps:
        print(f"stopped at step {trainer.step} of {trainer.config.steps}, all of it saved; go on with:")
        print(f"  newllm fixpoint --resume {shlex.quote(shown(folder.path))}")
        return 128 + signal_number if signal_number else 0
    config, before = trainer.config, [FixedPoints(**one) for one in info["before"]]
    after = measure(trainer.model, measured, config.tolerance, progress="fixed points after")
    weights = checkpoint.prefixed("model", checkpoint.model_tensors(trainer.model))
    checkpoint.save(folder.best_file, weights, {"step": trainer.step})
    report = {
        "run": str(folder.path), "steps": trainer.step, "seconds": round(seconds, 3), "phrase": config.phrase,
        "tolerance": config.tolerance, "before": [x.to_dict() for x in before], "after": [x.to_dict() for x in after],
    }  # fmt: skip
    checkpoint.write_json(folder.path / "fixpoint.json", report)
    fixpoint_plot(report, folder.metrics(), folder.path / "fixpoint.png", folder.path.name)
    print(json.dumps(report) if args.json else _text(folder, report, before, after))
    return 128 + signal_number if signal_number else 0


def _begin(args: argparse.Namespace) -> tuple[Run, FixpointTrainer, np.ndarray, dict[str, Any]]:
    """The new folder, trainer, phrases to measure, and what a checkpoint tells beside the state of training."""
    args.preset = getattr(args, "preset", "classic")
    fields = [field for _, field, _, _ in FIXPOINT_OPTIONS]
    config = FixpointConfig(**{field: getattr(args, field) for field in fields if hasattr(args, field)})
    device, model_config = device_settings(args), model_settings(args)
    check(model_config)  # before the data is read
    name = f"fixpoint-{args.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = new_run(getattr(args, "run", None), getattr(args, "out", None), name)
    data = data_settings(args, model_config)
    torch.manual_seed(config.seed)
    model_config = dataclasses.replace(model_config, vocab_size=data.tokenizer.vocab_size)
    model = build_model(model_config).to(
        device
    )  # float32: where a context rests, it moves by less than 16 bits tell apart
    trainer = FixpointTrainer(model, data.tokens["train"], config)
    measured = _measured(data.tokens["valid"], model_config.vocab_size, config)
    note_unread(args, model_config)
    fill_run(folder, model_config, data)
    _write_config(folder, model_config, trainer, data_record(data))
    before = measure(model, measured, config.tolerance, progress="fixed points before")
    info = {"before": [one.to_dict() for one in before], "seconds": 0.0}
    trainer.save(folder.last_file, info)
    return folder, trainer, measured, info


def _resume(args: argparse.Namespace) -> tuple[Run, FixpointTrainer, np.ndarray, dict[str, Any]]:
    fields = NEW_RUN_FIELDS | {field for _, field, _, _ in (*MODEL_OPTIONS, *FIXPOINT_OPTIONS)}
    refused = sorted(field for field in fields - {"steps"} if hasattr(args, field))
    if refused:
        names = ", ".join("--" + field.replace("_", "-") for field in refused)
        raise UserError(f"--resume goes on with the run's own settings; it does not take {names}")
    folder = find_run(args.resume, "--resume")
    stored = folder.config()
    if "fixpoint" not in stored:
        raise UserError(f"{folder.path}: not a run of newllm fixpoint; go on with newllm train --resume {folder.path}")
    try:
        config = FixpointConfig(**stored["fixpoint"])
    except TypeError as error:
        raise UserError(f"{folder.config_file}: 'fixpoint' does not hold what newllm fixpoint wrote") from error
    config = dataclasses.replace(config, steps=getattr(args, "steps", config.steps))
    device, model_config = device_settings(args), folder.model_config()
    data = run_data(folder, model_config)
    trainer = FixpointTrainer(build_model(model_config).to(device), data.tokens["train"], config)
    info = trainer.load(folder.last_file)
    if trainer.step > config.steps:
        raise UserError(f"--steps {config.steps}: {folder.path} has already trained {trainer.step} steps")
    folder.cut_metrics(trainer.step)
    if config.steps != stored["fixpoint"]["steps"]:
        _write_config(folder, model_config, trainer, stored["data"])
    return folder, trainer, _measured(data.tokens["valid"], model_config.vocab_size, config), info


def _write_config(folder: Run, model: ModelConfig, trainer: FixpointTrainer, data: dict[str, str]) -> None:
    content = {"model": model.to_dict(), "training": dataclasses.asdict(trainer.training), "data": data,
               "fixpoint": dataclasses.asdict(trainer.config)}  # fmt: skip
    checkpoint.write_json(folder.config_file, content)


def _measured(tokens: np.ndarray, vocab_size: int, config: FixpointConfig) -> np.ndarray:
    """Every token of the vocabulary, or phrases of the text that was not trained on."""
    count = vocab_size if config.phrase == 1 else MEASURED
    return np.sort(phrases_of(tokens, vocab_size, config.phrase, count, seed=0), axis=0)


def _text(folder: Run, report: dict[str, Any], before: list[FixedPoints], after: list[FixedPoints]) -> str:
    what = "tokens of the vocabulary" if report["phrase"] == 1 else f"phrases of {report['phrase']} tokens"
    parts = [f"trained {report['steps']} steps in {report['seconds']:,.1f} s; {before[0].phrases:,} {what}, {PASSES} passes over each"]  # fmt: skip
    for one, other in zip(before, after, strict=True):
        lines = [f"{one.layer:<44}{'before':>12}{'after':>12}"]
        for (label, old), (_, new) in zip(_rows(one), _rows(other), strict=True):
            lines.append(f"  {label:<42}{old:>12}{new:>12}")
        parts.append("\n".join(lines))
    path = shlex.quote(shown(folder.path))
    parts.append(f"figures and plot: {path}/fixpoint.json, fixpoint.png\nstart from it:  newllm train --init {path}")
    return "\n\n".join(parts)


def _rows(one: FixedPoints) -> list[tuple[str, str]]:
    """Labels and figures of one cell."""
    rows = [("come to rest", f"{one.converged:.1%}"), ("same place from a random start", f"{one.unique:.1%}")]
    for share, passes in one.passes.items():
        rows.append((f"passes until {share} have", "more" if passes is None else str(passes)))
    rows.append(("change shrinks a pass by the factor", f"{one.rate:.3f}"))
    rows.append((f"effective rank of the fixed points, of {len(one.variances)}", f"{one.effective_rank:.1f}"))
    rows.append(("participation ratio", f"{one.participation:.1f}"))
    for name, value in one.similarity.items():
        rows.append((f"cosine of two, {name}", f"{value:+.3f}"))
    return rows
