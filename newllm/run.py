"""The run folder: everything one training run leaves behind, and nothing that is not in it.

runs/<name>/
    config.json          model, training settings, data: what is needed to build all of it again
    tokenizer.json       in the format of the `tokenizers` library
    unigram.safetensors  how often each token occurred in training: the baseline of every evaluation
    metrics.jsonl        one JSON object per line: training (step, loss, lr, grad_norm, ...) and evaluation
    last.safetensors     everything training needs to go on to the last digit
    best.safetensors     the weights with the lowest validation loss so far
    loss.png             the loss curve
    summary.json         the figures printed at the end
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from newllm import checkpoint
from newllm.config import ModelConfig
from newllm.errors import UserError, one_line, os_reason, typed_path
from newllm.model import LanguageModel, build_model
from newllm.tokenizer import Tokenizer, load_tokenizer


def runs_root() -> Path:
    """Where runs lie: $NEWLLM_RUNS, else ./runs."""
    return Path(os.environ.get("NEWLLM_RUNS") or "runs")


@dataclass(frozen=True)
class Run:
    path: Path

    config_file = property(lambda self: self.path / "config.json")
    tokenizer_file = property(lambda self: self.path / "tokenizer.json")
    unigram_file = property(lambda self: self.path / "unigram.safetensors")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    last_file = property(lambda self: self.path / "last.safetensors")
    best_file = property(lambda self: self.path / "best.safetensors")
    plot_file = property(lambda self: self.path / "loss.png")
    summary_file = property(lambda self: self.path / "summary.json")

    def make(self) -> None:
        """Make the folder. Raises UserError where that is not possible, or another run has taken it since it was chosen."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            taken = any(self.path.iterdir())
        except OSError as error:
            raise UserError(f"cannot make the run folder {self.path}: {os_reason(error)}") from error
        if taken:
            raise UserError(f"{self.path} was empty a moment ago and is another run's now; choose another --run NAME")

    def config(self) -> dict[str, Any]:
        """config.json: {"model": {...}, "training": {...}, "data": {...}}."""
        config = checkpoint.read_json(self.config_file)
        for part in ("model", "training", "data"):
            if not isinstance(config.get(part), dict):
                raise UserError(f"{self.config_file}: has no {part!r}; it is not the config of a training run")
        return config

    def model_config(self) -> ModelConfig:
        try:
            return ModelConfig.from_dict(self.config()["model"])
        except ValueError as error:
            raise UserError(f"{self.config_file}: {one_line(error)}") from error

    def tokenizer(self, config: ModelConfig) -> Tokenizer:
        """The run's tokenizer. Raises UserError where its vocabulary is not the model's."""
        tokenizer = load_tokenizer(self.tokenizer_file)
        if tokenizer.vocab_size != config.vocab_size:
            raise UserError(
                f"{self.tokenizer_file}: a vocabulary of {tokenizer.vocab_size} tokens, the model of this run has"
                f" {config.vocab_size}; put back the tokenizer the run was trained with"
            )
        return tokenizer

    def load(self, device: torch.device) -> tuple[LanguageModel, Tokenizer]:
        """The run's best model so far, in eval mode, and its tokenizer."""
        config = self.model_config()
        tokenizer = self.tokenizer(config)
        model = build_model(config)
        checkpoint.load_model(model, self.weights(), self._weights_file())
        return model.to(device).eval(), tokenizer

    def weights(self) -> checkpoint.Tensors:
        """Those of the run's best model so far; a note on stderr where none was found yet, and the last is taken."""
        if not self.best_file.exists() and self.last_file.exists():
            unset = (
                "; its recall has no share yet of what it predicts: newllm calibrate sets it"
                if self.model_config().recall
                else ""
            )
            print(
                f"newllm: note: {self.path} has not been evaluated yet, so this is its last checkpoint{unset}",
                file=sys.stderr,
            )
        return checkpoint.with_prefix("model", checkpoint.load(self._weights_file())[0])

    def _weights_file(self) -> Path:
        file = self.best_file if self.best_file.exists() else self.last_file
        if not file.exists():
            raise UserError(f"{self.path}: holds no checkpoint yet; train with: newllm train --resume {self.path}")
        return file

    def save_unigram(self, counts: np.ndarray) -> None:
        checkpoint.save(self.unigram_file, {"counts": torch.from_numpy(counts.astype(np.int64))}, {})

    def unigram_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token occurs in the training text: (V,) int64."""
        counts = checkpoint.load(self.unigram_file)[0].get("counts")
        if counts is None or counts.shape != (vocab_size,):
            raise UserError(f"{self.unigram_file}: does not hold the {vocab_size} token counts of this run")
        return counts.numpy()

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line. It may be lost in a crash; resuming cuts the file back to its checkpoint anyway."""
        try:
            with open(self.metrics_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            message = f"cannot write {self.metrics_file}: {os_reason(error)}; the checkpoints are untouched"
            raise UserError(message) from error

    def metrics(self) -> list[dict[str, Any]]:
        """All whole records; a last line that a kill cut short is not one."""
        if not self.metrics_file.exists():
            return []
        records = []
        with open(self.metrics_file, encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.endswith("\n"):
                    break
                place = f"{self.metrics_file}, line {len(records) + 1}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{place}: not valid JSON ({one_line(error)})") from error
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    raise UserError(f"{place}: not a record of a training run (it has no step)")
                records.append(record)
        return records

    def cut_metrics(self, step: int) -> None:
        """Drop the records after `step`: training goes on from there and will write them anew."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        checkpoint.write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))


def new_run(name: str | None, out: str | None, default_name: str) -> Run:
    """A folder for a new run: `out` if given, else `name` (or default_name, made unique) under the runs root.

    Nothing is made yet: `Run.make` does. Raises UserError where the folder holds something already.
    """
    if name is not None and out is not None:
        raise UserError("--run and --out both say where the run goes; give one of them")
    if name is not None and (not re.fullmatch(r"[\w+=][\w.+= -]*", name) or name == "latest"):
        raise UserError(
            f"--run {name!r}: a name is one folder's name, without slashes, and not 'latest'; a path goes with --out"
        )
    path = typed_path(out) if out is not None else runs_root() / (name or _unused(default_name))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(
            f"{path} exists and is not an empty folder; go on with it by --resume {path}, or choose another --run NAME"
        )
    return Run(path)


def _unused(name: str) -> str:
    candidates = (name if attempt == 1 else f"{name}-{attempt}" for attempt in range(1, 10_000))
    return next(candidate for candidate in candidates if not (runs_root() / candidate).exists())


def find_run(which: str = "latest", option: str = "RUN") -> Run:
    """The run of a name under the runs root, or of a path, or the "latest": the one that wrote a checkpoint last. `option`: what
    a person typed it for, named in the UserError that is raised where there is no such run."""
    if not which:
        raise UserError(f"{option}: got an empty name, wanted that of a run, or its path")
    root = runs_root()
    if which == "latest":
        runs = [Run(config.parent) for config in root.glob("*/config.json")]
        runs = [run for run in runs if run.last_file.exists()]
        if not runs:
            raise UserError(f"no runs in {root}; make one with: newllm train")
        return max(runs, key=lambda run: (run.last_file.stat().st_mtime_ns, run.path.name))
    for path in (typed_path(which), root / which):
        if (path / "config.json").is_file():
            return Run(path)
    raise UserError(f"{option}: no run {which!r}: neither a folder with a config.json nor a name in {root}")
