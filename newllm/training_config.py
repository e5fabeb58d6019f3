"""Everything that decides a training run beside model and data, and what each preset trains with."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from newllm.errors import UserError

SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "muon", "sgd")
PRECISIONS = ("auto", "float32", "bfloat16")

_AT_LEAST_ONE = (
    "steps", "batch_size", "segment", "grad_accum", "eval_every", "eval_tokens", "checkpoint_every", "log_every",
    "average_every", "teacher_words",
)  # fmt: skip
MAX_THREADS = 1024  # far more ends in a crash of the threads' library
_AT_LEAST_ZERO = ("warmup", "seed", "threads", "average_start", "spelling")


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides a training run beside model and data. Raises UserError naming the option."""

    steps: int = 1000
    batch_size: int = 16  # B, streams side by side
    segment: int = 128  # T, tokens a stream reads per forward pass
    random_segments: bool = False  # segments of T/2, 7T/8, T and 9T/8 tokens, drawn
    restart: float = 0.0  # probability that a stream begins a segment from the start context instead of the carried one
    grad_accum: int = 1  # segments per optimizer step
    optimizer: str = "adamw"  # "adamw" | "muon" | "sgd"
    lr: float = 1e-3  # at the top of the schedule
    min_lr: float = 0.1  # at its end, as a fraction of lr
    warmup: int = 50  # steps
    schedule: str = "cosine"  # "cosine" | "linear" | "constant" after the warm-up
    weight_decay: float = 0.1  # on matrices only
    spelling: int = 0  # features of spelling that tokens share in their embeddings (newllm/spelling.py)
    noise: float = 0.0  # share of words replaced by others, weighted as Kneser-Ney smoothing does
    teacher_share: float = 0.0  # of the loss that is what teachers expect (newllm/teacher.py)
    teacher_words: int = 256  # the likeliest that a teacher is asked for at each token
    teacher_temperature: float = 1.0  # teachers' logits are divided by it
    beta1: float = 0.9  # of AdamW, and the momentum of sgd
    beta2: float = 0.99
    clip: float = 1.0  # norm that gradients are clipped to
    average: float = 0.0  # decay of the running average of weights that is evaluated; 1: plain mean; 0: none
    average_start: int = 0  # step from which weights are averaged
    average_every: int = 1  # steps between weights that are averaged; the decay is per step all the same
    activation_penalty: float = 0.0  # AR: times the mean square of the features
    change_penalty: float = 0.0  # TAR: times the mean square of their change from step to step
    eval_every: int = 100
    eval_tokens: int = 65536  # validation tokens of an evaluation during training
    checkpoint_every: int = 100
    log_every: int = 10
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"  # "auto" | "float32" | "bfloat16"
    threads: int = 0  # of the CPU; 0: as PyTorch chooses
    compile: bool = False  # torch.compile every layer
    cuda_graph: bool = True  # capture the step in CUDA graphs, on a GPU

    def __post_init__(self) -> None:
        for name in (*_AT_LEAST_ONE, *_AT_LEAST_ZERO):
            minimum = 1 if name in _AT_LEAST_ONE else 0
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise self._error(name, f"an integer of at least {minimum}")
        if self.seed >= 2**63:
            raise self._error("seed", "an integer below 2**63")
        for name, wanted, fits in (
            ("lr", "a number above 0", lambda x: x > 0),
            ("clip", "a number above 0", lambda x: x > 0),
            ("teacher_temperature", "a number above 0", lambda x: x > 0),
            ("weight_decay", "a number of at least 0", lambda x: x >= 0),
            ("noise", "a number from 0 to 1", lambda x: 0 <= x <= 1),
            ("teacher_share", "a number from 0 to 1", lambda x: 0 <= x <= 1),
            ("activation_penalty", "a number of at least 0", lambda x: x >= 0),
            ("change_penalty", "a number of at least 0", lambda x: x >= 0),
            ("min_lr", "a fraction from 0 to 1", lambda x: 0 <= x <= 1),
            ("average", "a number from 0 to 1", lambda x: 0 <= x <= 1),
            ("restart", "a number from 0 to 1", lambda x: 0 <= x <= 1),
            ("beta1", "a number from 0 to below 1", lambda x: 0 <= x < 1),
            ("beta2", "a number from 0 to below 1", lambda x: 0 <= x < 1),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not fits(value):
                raise self._error(name, wanted)
            object.__setattr__(self, name, float(value))  # 0 in a recipe is an integer, which AdamW does not take
        for name, choices in (("precision", PRECISIONS), ("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in choices:
                raise self._error(name, f"{', '.join(choices[:-1])} or {choices[-1]}")
        for name in ("compile", "cuda_graph", "random_segments"):
            if not isinstance(getattr(self, name), bool):
                raise self._error(name, "true or false")
        if self.threads > MAX_THREADS:
            raise self._error("threads", f"0 to {MAX_THREADS}")
        if not isinstance(self.device, str):
            raise self._error("device", "the name of one")

    def _error(self, name: str, wanted: str) -> UserError:
        return UserError(f"--{name.replace('_', '-')}: got {getattr(self, name)!r}, wanted {wanted}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"unknown training setting {', '.join(unknown)}")
        return cls(**values)

    @property
    def tokens_per_step(self) -> int:
        """Of a step whose segments have their full length."""
        return self.batch_size * self.segment * self.grad_accum


# What each preset of newllm.config trains with unless options say otherwise.
TRAINING_PRESETS: dict[str, TrainingConfig] = {
    # 600 steps read the built-in text 13 times: with 1000, validation was at its best half-way and rose after.
    # Spelling, noise, weight decay and the higher rate are for texts as small as that: perplexity 43 where it was 61 without them.
    "tiny": TrainingConfig(steps=600, lr=2e-3, weight_decay=1.0, spelling=1024, noise=0.2),
    "classic": TrainingConfig(steps=2000, batch_size=16, segment=64, lr=2e-3),
    "40m": TrainingConfig(
        steps=20000, batch_size=32, segment=256, restart=0.05, lr=1e-3, warmup=500, eval_every=500, checkpoint_every=500
    ),
    "100m": TrainingConfig(
        steps=50000,
        batch_size=32,
        segment=512,
        restart=0.05,
        lr=6e-4,
        warmup=1000,
        eval_every=1000,
        checkpoint_every=500,
    ),
    "1b": TrainingConfig(
        steps=100000,
        batch_size=32,
        segment=1024,
        restart=0.05,
        lr=3e-4,
        warmup=2000,
        eval_every=2000,
        checkpoint_every=1000,
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


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU, unless the precision is named."""
    if precision == "bfloat16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return torch.float32


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Of step 0, 1, ...: linear warm-up to lr, then by the schedule down to min_lr * lr at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup) / max(1, config.steps - 1 - config.warmup))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr + (1 - config.min_lr) * left)
