"""`newllm calibrate`"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from torch import Tensor

from newllm import checkpoint
from newllm.cli.settings import device_settings
from newllm.cli.train import shown
from newllm.config import ModelConfig
from newllm.errors import UserError, arguments_are_the_users
from newllm.evaluation import calibrate
from newllm.model import build_model
from newllm.prepare import Data, data_record, fill_run, run_data, training_config, write_config
from newllm.run import Run, find_run, new_run

ENTRIES = 16384


def run(args: argparse.Namespace) -> int:
    of = find_run(args.of)
    device = device_settings(args)
    before = of.model_config()
    if before.architecture == "classic":
        raise UserError(f"{of.path}: is a run of architecture {before.architecture}, which takes no recall")
    entries = args.recall if args.recall is not None else before.recall or ENTRIES
    if entries < 1:
        raise UserError(f"--recall {entries}: wanted at least 1")
    with arguments_are_the_users():
        config = dataclasses.replace(before, recall=entries)
    into = new_run(args.run, args.out, f"{of.path.name}-recall")
    data = run_data(of, before)
    tensors = with_recall(of.weights(), config)
    model = build_model(config)
    checkpoint.load_model(model, tensors, of.best_file)
    model = model.to(device).eval()
    score = calibrate(model, data.tokens["valid"], progress="calibrating")
    tensors["recall.shares"] = model.recall.shares.cpu()
    _write(into, of, config, tensors, score.loss, data, args.typed)
    print(f"recall                 3 tables of {entries:,} entries")
    print(f"validation perplexity  {score.perplexity:,.2f}")
    print(f"run                    {shown(into.path)}")
    print(f"measure it with:\n  newllm eval {shown(into.path)}")
    return 0


def with_recall(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights of a model that may lack recall, with those of `config` that begin at zero: what their softmax predicts is what it predicted. The
    shares, which are set anew, are zero in any case."""
    with torch.device("meta"):
        wanted = checkpoint.model_tensors(build_model(config))
    dtype = tensors["embedding.weight"].dtype
    added = {
        name: torch.zeros(like.shape, dtype=dtype if name.endswith("weight") else torch.float32)
        for name, like in wanted.items()
        if name == checkpoint.SHARES or (name.startswith("recall.") and name not in tensors)
    }
    return tensors | added


def _write(
    into: Run, of: Run, config: ModelConfig, tensors: dict[str, Tensor], loss: float, data: Data, command: str
) -> None:
    step = int(checkpoint.load(of.best_file)[1].get("step", 0)) if of.best_file.exists() else 0
    fill_run(into, config, data)
    info = {"step": step, "valid_loss": loss}
    for file in (into.best_file, into.last_file):  # `latest` is the run that wrote a checkpoint last
        checkpoint.save(file, checkpoint.prefixed("model", tensors), info)
    write_config(into, config, training_config(of), data_record(data), command, init=of)
