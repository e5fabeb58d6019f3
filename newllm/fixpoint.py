"""Fixed-point training: repeat a token, or a phrase, until the context stops moving.

The project's first idea. Read over and over, a phrase drives a cell that sees its own context, c' = F(c, phrase), and where F
contracts there is one context c* = F(c*, phrase) at the end of it, whatever the start: what the phrase means to the model. A
fresh cell is trained for two things, without a word of what comes next in a text:

    move   mean of |c_r - c_{r-1}|^2 / |c_r|^2 over the passes r of the second half        the context comes to rest
    alike  mean of cos^2(c*_i, c*_j) over pairs of different phrases                        and not at the same place for all

    objective = move + diversity * alike

`alike` is what keeps the cell from collapse: 1/alike is the participation ratio of the (unit) fixed points, the effective number of
dimensions they fill, and no set in D dimensions has one above D. The first half of the passes is free: there the context may
remember what came before.

Shapes: phrases (N, P) int64; contexts at the ends of R passes over them (N, R, D), one such tensor for every cell of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from newllm import checkpoint
from newllm.config import ModelConfig
from newllm.diagnosis import variances
from newllm.errors import UserError
from newllm.graphs import Graphs
from newllm.model import LanguageModel, State
from newllm.model.mixer import ContextCell
from newllm.training import catching_signals
from newllm.training_config import TrainingConfig, learning_rate
from newllm.weights import Weights

PASSES = 64  # over a phrase, of a measurement
MEASURED = 4096  # phrases, where they are not the whole vocabulary
COMPARED = 2048  # fixed points whose similarities are looked at
AT_ONCE = 2**24  # numbers of the contexts that are measured together
SAVED_EVERY = 100  # steps
FLOOR = 1e-5  # of a relative change, below which float32 has nothing to say about the rate


@dataclass(frozen=True)
class FixpointConfig:
    """Everything that decides fixed-point training beside the model. Raises UserError naming the option."""

    steps: int = 300
    batch_size: int = 256  # phrases of a step
    phrase: int = 1  # P, tokens; 1: the vocabulary, each token as often as any other
    repeats: int = 16  # R, passes over a phrase
    diversity: float = 0.3  # weight of `alike`
    tolerance: float = 1e-3  # relative change of a context that counts as rest
    lr: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 2), ("phrase", 1), ("repeats", 4)):
            if getattr(self, name) < least:
                raise self._error(name, f"an integer of at least {least}")
        for name in ("lr", "tolerance"):
            if not 0 < getattr(self, name) < math.inf:
                raise self._error(name, "a number above 0")
        if not 0 <= self.diversity < math.inf:
            raise self._error("diversity", "a number of at least 0")

    def _error(self, name: str, wanted: str) -> UserError:
        return UserError(f"--{name.replace('_', '-')}: got {getattr(self, name)!r}, wanted {wanted}")


@dataclass(frozen=True)
class FixedPoints:
    """Of one cell: what becomes of its context under phrases that are repeated PASSES times."""

    layer: str
    phrases: int
    converged: float  # share whose context changes by no more than the tolerance from some pass on to the last
    settled: list[int]  # phrases that came to rest at pass 1, 2, ... PASSES - 1
    passes: dict[str, int | None]  # by which so many of all phrases have; None: not within PASSES
    rate: float  # factor by which a change shrinks a pass, median
    unique: float  # share that end in the same place from a random start, within ten times the tolerance
    effective_rank: float  # exponential of the entropy of the fixed points' principal variances
    participation: float
    similarity: dict[str, float]  # cosine of pairs; "closest": of a point and the one most like it, mean
    variances: list[float]  # of the principal components, descending, as shares

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(config: ModelConfig) -> None:
    """Raise UserError where a model has no cell that could have a fixed point of its own."""
    if config.architecture == "transformer" or config.coupling != "full":
        has = config.architecture if config.architecture == "transformer" else f"coupling {config.coupling}"
        raise UserError(
            f"fixpoint trains cells that see their own context, and {has} has none: give --coupling full (or --preset classic)"
        )


def phrases_of(tokens: np.ndarray, vocab_size: int, length: int, count: int, seed: int) -> np.ndarray:
    """`count` different phrases (count, P): tokens of the vocabulary, or pieces of a text. All there are, where those are fewer."""
    draw = np.random.default_rng(seed)
    if length == 1:
        return draw.permutation(vocab_size)[:count, None]
    if tokens.size < length:
        raise UserError(f"--phrase {length}: the text has only {tokens.size} tokens")
    starts = draw.permutation(tokens.size - length + 1)[:count]
    return tokens[starts[:, None] + np.arange(length)].astype(np.int64)


def passes_over(model: LanguageModel, phrases: Tensor, repeats: int, start: State | None = None) -> dict[str, Tensor]:
    """Contexts of every cell at the ends of `repeats` passes: phrases (N, P) -> by name (N, R, D)."""
    seen: dict[str, Tensor] = {}
    cells = {name or "cell": cell for name, cell in model.named_modules() if isinstance(cell, ContextCell)}
    hooks = [
        cell.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output[0]))
        for name, cell in cells.items()
    ]
    try:
        model.features(phrases.repeat(1, repeats), start)
    finally:
        for hook in hooks:
            hook.remove()
    P = phrases.shape[1]
    return {name: contexts[:, P - 1 :: P] for name, contexts in seen.items()}


def changes(contexts: Tensor) -> Tensor:
    """|c_r - c_{r-1}| / |c_r|: (N, R, D) -> (N, R - 1)."""
    after = contexts[:, 1:]
    return (after - contexts[:, :-1]).norm(dim=-1) / after.norm(dim=-1)


def objective(contexts: Tensor, diversity: float) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts (N, R, D) -> move + diversity * alike, move, alike."""
    N, R, _ = contexts.shape
    late = contexts[:, R // 2 - 1 :]
    after = late[:, 1:]
    move = ((after - late[:, :-1]).square().sum(-1) / after.square().sum(-1)).mean()
    rest = torch.nn.functional.normalize(contexts[:, -1], dim=-1)
    alike = ((rest @ rest.mT).square().sum() - N) / (N * (N - 1))
    return move + diversity * alike, move, alike


class FixpointTrainer:
    """Trains a model's embedding and cells, in float32; on a GPU a step is one CUDA graph."""

    def __init__(self, model: LanguageModel, tokens: np.ndarray, config: FixpointConfig) -> None:
        check(model.config)
        self.model, self.tokens, self.config = model, tokens, config
        self.device = next(model.parameters()).device
        self.training = TrainingConfig(
            steps=config.steps, lr=config.lr, warmup=min(20, config.steps), weight_decay=0.0, seed=config.seed
        )
        self.weights = Weights(model, self.training, torch.float32)
        self.graphs = Graphs(self.device, enabled=True)
        N = len(phrases_of(tokens, model.config.vocab_size, config.phrase, config.batch_size, config.seed))
        if N < 2:
            raise UserError(
                f"--phrase {config.phrase}: the text has one such phrase; wanted at least two to keep apart"
            )
        self._phrases = torch.zeros(N, config.phrase, dtype=torch.int64, device=self.device)
        self._figures = torch.zeros(3, device=self.device)  # objective, move, alike
        self.step = 0

    def train(
        self,
        log: Callable[[dict[str, Any]], None],
        *,
        every: int = 10,
        save: Callable[[], None] | None = None,
        stop_after: int | None = None,
    ) -> int | None:
        """To the last step, for `stop_after` steps, or to a signal, whose number is returned; save() is called now and then. Raises
        UserError where the objective is no number."""
        self.model.train()
        last = self.config.steps if stop_after is None else min(self.config.steps, self.step + stop_after)
        bar = tqdm(total=self.config.steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True)
        with catching_signals() as caught, bar:
            while self.step < last and not caught:
                self._train_step()
                bar.update()
                if save is not None and self.step % SAVED_EVERY == 0:
                    save()
                if self.step % every == 0 or self.step == self.config.steps:
                    loss, move, alike = self._figures.tolist()
                    if not math.isfinite(loss):
                        raise UserError(f"the objective is {loss} at step {self.step}: it has diverged. Lower --lr")
                    log({"step": self.step, "loss": loss, "move": move, "alike": alike})
                    bar.set_postfix_str(f"move {move:.2e}, alike {alike:.4f}")
        return caught[0] if caught else None

    def save(self, file: Path, info: dict[str, Any]) -> None:
        """All that decides how training goes on, and `info`."""
        rng_tensors, rng_info = checkpoint.rng_state()  # of dropout; phrases are drawn by the step's number
        tensors = (
            checkpoint.prefixed("model", checkpoint.model_tensors(self.model))
            | checkpoint.prefixed("optimizer", checkpoint.optimizer_tensors(self.weights.optimizer))
            | checkpoint.prefixed("rng", rng_tensors)
        )
        checkpoint.save(file, tensors, info | {"fixpoint_step": self.step, "rng": rng_info})

    def load(self, file: Path) -> dict[str, Any]:
        """Go back to what `save` wrote, and return its `info`."""
        tensors, info = checkpoint.load(file)
        if "fixpoint_step" not in info:
            raise UserError(f"{file}: not a checkpoint of newllm fixpoint")
        checkpoint.load_model(self.model, checkpoint.with_prefix("model", tensors), file)
        checkpoint.load_optimizer(self.weights.optimizer, checkpoint.with_prefix("optimizer", tensors))
        checkpoint.set_rng_state(checkpoint.with_prefix("rng", tensors), info["rng"])
        self.step = info["fixpoint_step"]
        return info

    def _train_step(self) -> None:
        config = self.config
        found = phrases_of(
            self.tokens, self.model.config.vocab_size, config.phrase, len(self._phrases), config.seed + self.step
        )
        with self.graphs.stream():
            self._phrases.copy_(torch.from_numpy(found))
            self.weights.set_rates(learning_rate(self.training, self.step), self.step)
            self.graphs.run("step", self._gradient_step)
        self.step += 1

    def _gradient_step(self) -> None:
        contexts = passes_over(self.model, self._phrases, self.config.repeats)
        figures = [torch.stack(objective(one, self.config.diversity)) for one in contexts.values()]
        mean = torch.stack(figures).mean(dim=0)
        mean[0].backward()
        self.weights.collect_gradients(True)
        self.weights.update(False)
        self._figures.copy_(mean.detach())


@torch.inference_mode()
def measure(
    model: LanguageModel, phrases: np.ndarray, tolerance: float, seed: int = 0, *, progress: str | None = None
) -> list[FixedPoints]:
    """Of every cell, under phrases (N, P) that are repeated PASSES times; `progress` labels a bar, on a terminal."""
    device, config = next(model.parameters()).device, model.config
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    N, P = phrases.shape
    share = max(1, AT_ONCE // (PASSES * P * max(config.context_dim, config.hidden_dim)))
    moved: dict[str, list[Tensor]] = {}
    ends: dict[str, list[Tensor]] = {}
    apart: dict[str, list[Tensor]] = {}
    with tqdm(total=N, desc=progress, unit="phrase", leave=False, disable=None if progress else True) as bar:
        for some in torch.from_numpy(phrases).split(share):
            here = some.to(device)
            other = {
                key: (torch.randn(value.shape, generator=generator) * value.std().cpu()).to(value)
                if key.endswith("context")  # tables of recall begin empty whatever the context
                else value
                for key, value in model.initial_state(len(here), device).items()
            }
            again = passes_over(model, here, PASSES, other)
            for name, contexts in passes_over(model, here, PASSES).items():
                end = contexts[:, -1]
                moved.setdefault(name, []).append(changes(contexts).cpu())
                ends.setdefault(name, []).append(end.cpu())
                apart.setdefault(name, []).append(((again[name][:, -1] - end).norm(dim=-1) / end.norm(dim=-1)).cpu())
            bar.update(len(here))
    model.train(was_training)
    return [
        _fixed_points(name, torch.cat(moved[name]), torch.cat(ends[name]), torch.cat(apart[name]), tolerance)
        for name in moved
    ]


def _fixed_points(name: str, moved: Tensor, ends: Tensor, apart: Tensor, tolerance: float) -> FixedPoints:
    """moved (N, R - 1), ends (N, D), apart (N,): changes a pass, last contexts, how far from those of another start."""
    N, last = moved.shape
    restless = moved > tolerance
    # The pass after the last one that moved it further; `last` + 1 where that was the very last.
    settled = torch.where(restless.any(dim=1), last - restless.flip(1).int().argmax(dim=1) + 1, 1)
    counts = torch.bincount(settled, minlength=last + 2)[1:]  # of passes 1 .. last + 1
    by = counts[:last].cumsum(0) / N
    reached = {f"{share:.0%}": (by >= share).nonzero() for share in (0.5, 0.9, 0.99)}
    shares = variances(ends.double())
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
    return FixedPoints(
        name, N, by[-1].item(), counts[:last].tolist(),
        {share: int(found[0]) + 1 if len(found) else None for share, found in reached.items()},
        _rate(moved), (apart <= 10 * tolerance).double().mean().item(),
        math.exp(entropy), (1 / shares.square().sum()).item(), _similarity(ends), shares.tolist(),
    )  # fmt: skip


def _rate(moved: Tensor) -> float:
    """Median over phrases of the factor by which a change shrinks a pass, from the first to the last one above FLOOR."""
    above = (moved > FLOOR).cumprod(dim=1).sum(dim=1).clamp_min(2)  # changes until the first below
    last = moved.gather(1, above[:, None] - 1)[:, 0].clamp_min(1e-30)
    return ((last / moved[:, 0].clamp_min(1e-30)).log() / (above - 1)).exp().median().item()


def _similarity(ends: Tensor) -> dict[str, float]:
    unit = torch.nn.functional.normalize(
        ends[torch.linspace(0, len(ends) - 1, min(len(ends), COMPARED)).long()], dim=-1
    )
    cosine = unit @ unit.mT
    pairs = cosine[torch.ones_like(cosine, dtype=torch.bool).triu(1)]
    quantiles = torch.quantile(pairs[:: max(1, len(pairs) // 10**6)], torch.tensor([0.1, 0.5, 0.9])).tolist()
    closest = cosine.fill_diagonal_(-1.0).max(dim=1).values.mean().item()
    return {"mean": pairs.mean().item(), **dict(zip(("10%", "50%", "90%"), quantiles, strict=True)), "closest": closest}
