"""The trainer: AdamW over streams of text whose context is carried from segment to segment.

A step reads the next T tokens of B streams (`grad_accum` times over), starting from the contexts the last segment ended
with, cut off from its graph: truncated backpropagation through time. After every `checkpoint_every` steps all that decides
the next step is in `last.safetensors`, so that a run that is killed and resumed walks through the same losses, on a CPU
to the last digit.
"""

from __future__ import annotations

import dataclasses
import math
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from newllm import checkpoint
from newllm.config import ModelConfig
from newllm.data import Streams, fingerprint
from newllm.errors import UserError
from newllm.evaluation import evaluate
from newllm.model import State, build_model, detach_state
from newllm.run import Run


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides a training run beside model and data. Raises UserError naming the option."""

    steps: int = 1000
    batch_size: int = 16  # B, streams side by side
    segment: int = 128  # T, tokens a stream reads per forward pass
    grad_accum: int = 1  # segments per optimizer step
    lr: float = 1e-3  # at the top of the schedule
    min_lr: float = 0.1  # at its end, as a fraction of lr
    warmup: int = 50  # steps
    weight_decay: float = 0.1  # on matrices only
    beta2: float = 0.99
    clip: float = 1.0  # norm that gradients are clipped to
    eval_every: int = 100
    eval_tokens: int = 65536  # validation tokens of a periodic evaluation; the last one takes all
    checkpoint_every: int = 100
    log_every: int = 10
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"  # "auto" | "float32" | "bfloat16"
    threads: int = 0  # of the CPU; 0: as PyTorch chooses
    compile: bool = False

    def __post_init__(self) -> None:
        at_least_one = (
            "steps", "batch_size", "segment", "grad_accum", "eval_every", "eval_tokens", "checkpoint_every", "log_every",
        )  # fmt: skip
        for name in ("warmup", "seed", "threads", *at_least_one):
            minimum = 1 if name in at_least_one else 0
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise UserError(f"--{name.replace('_', '-')}: got {value!r}, wanted an integer of at least {minimum}")
        if self.seed >= 2**63:
            raise UserError(f"--seed: got {self.seed}, wanted an integer below 2**63")
        for name, wanted, fits in (
            ("lr", "a number above 0", lambda x: x > 0),
            ("clip", "a number above 0", lambda x: x > 0),
            ("weight_decay", "a number of at least 0", lambda x: x >= 0),
            ("min_lr", "a fraction from 0 to 1", lambda x: 0 <= x <= 1),
            ("beta2", "a number from 0 to below 1", lambda x: 0 <= x < 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or not fits(value):
                raise UserError(f"--{name.replace('_', '-')}: got {value!r}, wanted {wanted}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise UserError(f"--precision: got {self.precision!r}, wanted auto, float32 or bfloat16")
        if not isinstance(self.device, str) or not isinstance(self.compile, bool):
            raise UserError(
                f"got the device {self.device!r} and compile {self.compile!r}, wanted a name and true or false"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"unknown training setting {', '.join(unknown)}")
        return cls(**values)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.segment * self.grad_accum


# What each preset of newllm.config trains with unless options say otherwise.
TRAINING_PRESETS: dict[str, TrainingConfig] = {
    # 600 steps read the built-in text 13 times: with 1000, validation was at its best half-way and rose after.
    "tiny": TrainingConfig(steps=600),
    "classic": TrainingConfig(steps=2000, batch_size=16, segment=64, lr=2e-3),
    "40m": TrainingConfig(
        steps=20000, batch_size=32, segment=256, lr=1e-3, warmup=500, eval_every=500, checkpoint_every=500
    ),
    "100m": TrainingConfig(
        steps=50000, batch_size=32, segment=512, lr=6e-4, warmup=1000, eval_every=1000, checkpoint_every=500
    ),
}


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; wanted auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; wanted auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 on a GPU, none (plain float32) on a CPU, unless the precision is named."""
    if precision == "bfloat16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return None


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Of step 0, 1, ...: linear warm-up to lr, then half a cosine down to min_lr * lr at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr + (1 - config.min_lr) * cosine)


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors (biases, norms, start contexts) alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))


@contextmanager
def catching_signals() -> Iterator[list[int]]:
    """Yield a list that SIGINT and SIGTERM are appended to instead of ending the process; a second one ends it at once.

    Only the main thread may handle signals; in any other the list stays empty.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """Trains the model of one run folder. `train` is the loop; `save` and `load` are its whole state."""

    def __init__(
        self, run: Run, model: ModelConfig, config: TrainingConfig, train: np.ndarray, valid: np.ndarray
    ) -> None:
        self.run, self.config, self.valid = run, config, valid
        self.device = choose_device(config.device)
        self.autocast = autocast_dtype(config.precision, self.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)  # noqa: NPY002 - the global one, whoever draws from it
        torch.manual_seed(config.seed)
        self.model = build_model(model).to(self.device)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.optimizer = make_optimizer(self.model, config)
        self.streams = Streams(train, config.batch_size, config.segment, config.seed)
        self.data = f"{fingerprint(train)}/{fingerprint(valid)}"
        self.state: State | None = None
        self.step = 0
        self._saved_at: int | None = None
        self._grad_norm = torch.zeros((), device=self.device)  # of the last step
        self.best_loss = math.inf
        self.seconds = 0.0  # of training, without evaluation and saving
        self._forget_losses()

    def _forget_losses(self) -> None:
        """The loss that is logged is the mean since the last log. It stays on the device: reading it would make the
        GPU wait every step."""
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._losses, self._logged_at = 0, self.seconds

    def train(self, stop_after: int | None = None) -> int | None:
        """Train to the last step, or for `stop_after` steps. A checkpoint is on the disk whenever this returns.

        Returns the number of the signal that ended it early, or None. Raises UserError where the loss is no number or
        the run folder cannot be written to; the last good checkpoint stands then.
        """
        end = self.config.steps if stop_after is None else min(self.config.steps, self.step + stop_after)
        bar = tqdm(total=self.config.steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True)
        with catching_signals() as caught, bar:
            while self.step < end and not caught:
                started = time.perf_counter()
                self._train_step()
                self.seconds += time.perf_counter() - started
                bar.update()
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    self._log(bar)
                if self.step % self.config.eval_every == 0 or self.step == self.config.steps:
                    self._evaluate(bar)
                if self.step % self.config.checkpoint_every == 0:
                    self.save()
            if self._saved_at != self.step:
                self.save()
        return caught[0] if caught else None

    def _train_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.model.train()
        for _ in range(self.config.grad_accum):
            inputs, targets, fresh = self.streams.next()  # (B, T) each
            state = None if fresh or not self.model.carries_context else self.state
            with torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
                logits, state = self.forward(inputs.to(self.device, non_blocking=True), state)  # (B, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(self.device, non_blocking=True))
            (loss / self.config.grad_accum).backward()
            self.state = detach_state(state) if self.model.carries_context else None
            self._loss_sum += loss.detach()
            self._losses += 1
        self._grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _check_finite(self) -> None:
        """Raise UserError where a loss since the last log was no number, or the gradient that made the present weights."""
        for name, value in (("loss", self._loss_sum.item()), ("gradient norm", self._grad_norm.item())):
            if not math.isfinite(value):
                raise UserError(
                    f"the {name} is {value} at step {self.step}: training has diverged; the checkpoint before it stands."
                    " Lower --lr or --clip"
                )

    def _log(self, bar: tqdm) -> None:
        self._check_finite()
        loss = (self._loss_sum / self._losses).item()
        tokens = self._losses * self.config.batch_size * self.config.segment
        tokens_per_s = tokens / max(self.seconds - self._logged_at, 1e-9)
        self.run.append_metrics(
            {
                "step": self.step,
                "loss": loss,
                "lr": learning_rate(self.config, self.step - 1),
                "grad_norm": self._grad_norm.item(),
                "tokens": self.step * self.config.tokens_per_step,
                "tokens_per_s": round(tokens_per_s, 1),
                "elapsed_s": round(self.seconds, 3),
            }
        )
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s")
        self._forget_losses()

    def _evaluate(self, bar: tqdm) -> None:
        self._check_finite()
        score = evaluate(self.model, self.valid, limit=self.config.eval_tokens, autocast=self.autocast)
        self.run.append_metrics({"step": self.step, "valid_loss": score.loss, "valid_perplexity": score.perplexity})
        line = f"step {self.step:>6}  validation loss {score.loss:.4f}  perplexity {score.perplexity:,.2f}"
        if score.loss < self.best_loss:
            line += "  (best)"
            self.best_loss = score.loss
            weights = checkpoint.prefixed("model", checkpoint.model_tensors(self.model))
            checkpoint.save(self.run.best_file, weights, {"step": self.step, "valid_loss": score.loss})
        bar.write(line)

    def save(self) -> None:
        """Write last.safetensors: all that decides how training goes on."""
        self._check_finite()  # a diverged model does not take the place of a good one
        rng_tensors, rng_info = checkpoint.rng_state()
        tensors = (
            checkpoint.prefixed("model", checkpoint.model_tensors(self.model))
            | checkpoint.prefixed("optimizer", checkpoint.optimizer_tensors(self.optimizer))
            | checkpoint.prefixed("state", self.state or {})
            | checkpoint.prefixed("rng", rng_tensors)
        )
        info = {
            "step": self.step,
            "streams": self.streams.state_dict(),
            "best_loss": self.best_loss if self.best_loss < math.inf else None,  # JSON has no infinity
            "seconds": self.seconds,
            "logged_at": self._logged_at,
            "loss_sum": self._loss_sum.item(),
            "losses": self._losses,
            "data": self.data,
            "rng": rng_info,
        }
        checkpoint.save(self.run.last_file, tensors, info)
        self._saved_at = self.step

    def load(self) -> None:
        """Go back to last.safetensors, and cut the metrics back to its step. Raises UserError where the data has changed."""
        tensors, info = checkpoint.load(self.run.last_file)
        if "streams" not in info:
            raise UserError(f"{self.run.last_file}: holds weights, but not the state of a training that could go on")
        if info["data"] != self.data:
            raise UserError(
                f"{self.run.path}: the data is not what this run was trained on (tokens {info['data']}, now {self.data});"
                " put it back to resume"
            )
        checkpoint.load_model(self.model, checkpoint.with_prefix("model", tensors), self.run.last_file)
        checkpoint.load_optimizer(self.optimizer, checkpoint.with_prefix("optimizer", tensors))
        state = checkpoint.with_prefix("state", tensors)
        self.state = {name: tensor.to(self.device) for name, tensor in state.items()} or None
        self.step = self._saved_at = info["step"]
        self.best_loss = math.inf if info["best_loss"] is None else info["best_loss"]
        self.seconds, self._logged_at, self._losses = info["seconds"], info["logged_at"], info["losses"]
        self._loss_sum.fill_(info["loss_sum"])
        self.streams.load_state_dict(info["streams"])
        self.run.cut_metrics(self.step)
        checkpoint.set_rng_state(checkpoint.with_prefix("rng", tensors), info["rng"])
