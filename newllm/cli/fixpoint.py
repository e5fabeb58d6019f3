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
from newllm.cli.parser import FIXPOINT_OPTIONS
from newllm.cli.settings import data_settings, device_settings, model_settings
from newllm.cli.train import shown
from newllm.fixpoint import MEASURED, PASSES, FixedPoints, FixpointConfig, FixpointTrainer, check, measure, phrases_of
from newllm.model import build_model
from newllm.plots import fixpoint_plot
from newllm.prepare import data_record, fill_run
from newllm.run import Run, new_run


def run(args: argparse.Namespace) -> int:
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
    fill_run(folder, model_config, data)
    checkpoint.write_json(
        folder.config_file,
        {"model": model_config.to_dict(), "training": dataclasses.asdict(trainer.training), "data": data_record(data),
         "fixpoint": dataclasses.asdict(config)},
    )  # fmt: skip
    before = measure(model, measured, config.tolerance, progress="fixed points before")
    begin = time.perf_counter()
    signal_number = trainer.train(folder.append_metrics)
    seconds = time.perf_counter() - begin
    after = measure(model, measured, config.tolerance, progress="fixed points after")
    checkpoint.save(
        folder.best_file, checkpoint.prefixed("model", checkpoint.model_tensors(model)), {"step": trainer.step}
    )
    report = {
        "run": str(folder.path), "steps": trainer.step, "seconds": round(seconds, 3), "phrase": config.phrase,
        "tolerance": config.tolerance, "before": [x.to_dict() for x in before], "after": [x.to_dict() for x in after],
    }  # fmt: skip
    checkpoint.write_json(folder.path / "fixpoint.json", report)
    fixpoint_plot(report, folder.metrics(), folder.path / "fixpoint.png", folder.path.name)
    print(json.dumps(report) if args.json else _text(folder, report, before, after))
    return 128 + signal_number if signal_number else 0


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
