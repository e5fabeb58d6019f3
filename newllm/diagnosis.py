"""What the full cells of a trained model do along a text: how long they remember, whether they are chaotic, how many passes
chunks of time would take, how many dimensions their contexts fill, how open their gates stand.

Shapes: from_x (1, T, Z) and contexts (1, T, D) of one text, in float64 where differences are followed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import newllm_kernels as nk
from newllm.errors import UserError
from newllm.model import LanguageModel
from newllm.model.mixer import ContextCell, shift

TOLERANCE = 1e-3  # of the seams, as the issue of the full cell counts its passes
CHUNK_STEPS = (16, 32, 64, 128, 256)
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
LEVELS = (0.1, 0.01, 0.001)  # of a perturbation's size, relative to the context's
STARTS = 8  # other starts that the memory horizon is the median over
PLACES = 16  # of the text, at which another start is looked back on


@dataclass(frozen=True)
class Diagnosis:
    """Of one cell."""

    layer: str
    steps: int
    lyapunov: float  # nats per step
    horizon: dict[str, int | None]  # steps until a start's trace is below a level for good; None: longer than the text
    trace: list[float]  # relative distance of contexts from another start, step by step, median over starts
    forgetting: list[dict[str, float]]  # {"steps", "median", "worst"}, see `forgetting`
    passes: list[dict[str, int]]  # {"T", "chunk", "chunks", "passes"}; as many as chunks: they never met before
    effective_rank: float
    participation: float
    variances: list[float]  # of the principal components, descending, as shares
    gates: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(model: LanguageModel, tokens: Tensor, *, progress: bool = False) -> list[Diagnosis]:
    """tokens (T,) of one text -> a diagnosis for every cell; `progress` draws bars, on a terminal. Raises UserError where the model has no full cell."""
    if model.config.architecture == "transformer" or model.config.coupling != "full":
        raise UserError(
            "diagnose looks at cells that see their own context: train with --coupling full (or --preset classic)"
        )
    if tokens.numel() < 2 * CHUNK_STEPS[0]:
        raise UserError(
            f"a text of {tokens.numel()} tokens is too short to diagnose; give at least {2 * CHUNK_STEPS[0]}"
        )
    cells = {name or "cell": cell for name, cell in model.named_modules() if isinstance(cell, ContextCell)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        cell.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[:2]))
        for name, cell in cells.items()
    ]
    try:
        with torch.no_grad():
            model.features(tokens[None])
            return [_of_cell(name, cells[name], *args, progress) for name, args in seen.items()]
    finally:
        for hook in hooks:
            hook.remove()


def _of_cell(name: str, cell: ContextCell, from_x: Tensor, state: Tensor, progress: bool) -> Diagnosis:
    exact = copy.deepcopy(cell).to("cpu", torch.float64).eval()
    from_x, start = from_x.to("cpu", torch.float64), state[:, 0].to("cpu", torch.float64)
    contexts, _ = _run(exact, from_x, start)
    trace, horizon = memory(exact, from_x, start, contexts)
    shares = variances(contexts[0])
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
    return Diagnosis(
        name, from_x.shape[1], lyapunov(exact, from_x, start, progress=progress), horizon, trace,
        forgetting(exact, from_x, start, contexts), passes(exact, from_x, start, progress=progress),
        math.exp(entropy), (1 / shares.square().sum()).item(), shares.tolist(),
        gate_statistics(exact, from_x, start, contexts),
    )  # fmt: skip


def _run(cell: ContextCell, from_x: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    contexts, end = cell(from_x, start[:, None])
    return contexts, end[:, 0]


def lyapunov(cell: ContextCell, from_x: Tensor, start: Tensor, size: float = 1e-6, *, progress: bool = False) -> float:
    """Largest Lyapunov exponent, nats per step: mean growth of a small difference, made small again after every step.

    The first tenth of the text is not counted: the difference is still turning into the direction that grows fastest.
    """
    direction = torch.randn(start.shape, dtype=start.dtype, generator=torch.Generator().manual_seed(0))
    difference = direction * (size / direction.norm())
    c, growth = start, []
    for from_x_t in _bar(from_x.split(1, dim=1), "Lyapunov exponent", "step", progress):
        _, both = _run(cell, from_x_t.expand(2, -1, -1), torch.cat((c, c + difference)))
        c, difference = both[:1], both[1:] - both[:1]
        norm = difference.norm()
        if norm == 0:
            return -math.inf
        growth.append(math.log(norm / size))
        difference = difference * (size / norm)
    counted = growth[len(growth) // 10 :]
    return sum(counted) / len(counted)


def memory(
    cell: ContextCell, from_x: Tensor, start: Tensor, contexts: Tensor
) -> tuple[list[float], dict[str, int | None]]:
    """How long another start is remembered: the trace (T,) it leaves, relative to the context, and when it is below a level
    for good. Medians over random starts of the learned one's size."""
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(STARTS, start.shape[1], dtype=start.dtype, generator=generator) * start.std()
    elsewhere, _ = _run(cell, from_x.expand(STARTS, -1, -1), others)
    distance = (elsewhere - contexts).norm(dim=-1) / contexts.norm(dim=-1)  # (STARTS, T)
    trace = distance.median(dim=0).values
    horizon: dict[str, int | None] = {}
    for level in LEVELS:
        above = (trace > level).nonzero()
        last = int(above[-1]) + 1 if len(above) else 0
        horizon[f"{level:g}"] = None if last == len(trace) else last
    return trace.tolist(), horizon


def forgetting(cell: ContextCell, from_x: Tensor, start: Tensor, contexts: Tensor) -> list[dict[str, float]]:
    """What is left, after 16, 32, 64 ... steps, of having begun in the middle of the text with the start context instead of that of the
    text before: relative distance of contexts, median and largest of PLACES places. Chunks of time that are warmed up for so many
    steps fit together as well as the largest, their worst seam."""
    T, steps, found = from_x.shape[1], CHUNK_STEPS[0], []
    while 2 * steps <= T:
        ends = [steps + (T - steps) * k // PLACES for k in range(1, PLACES + 1)]
        windows = torch.cat([from_x[:, end - steps : end] for end in ends])
        _, got = _run(cell, windows, start.expand(PLACES, -1))
        true = contexts[0, [end - 1 for end in ends]]
        distance = (got - true).norm(dim=-1) / true.norm(dim=-1)
        found.append({"steps": steps, "median": distance.median().item(), "worst": distance.max().item()})
        steps *= 2
    return found


def passes(cell: ContextCell, from_x: Tensor, start: Tensor, *, progress: bool = False) -> list[dict[str, int]]:
    """Passes until all seams are within TOLERANCE, for lengths of text and of chunks."""
    whole, found = from_x.shape[1], []
    lengths = sorted({T for T in LENGTHS if whole > T} | {whole})
    cuts = [(T, steps) for T in lengths for steps in CHUNK_STEPS if 2 * steps <= T]
    for T, steps in _bar(cuts, "passes over chunks", "cut", progress):
        K = T // steps
        with nk.record_seams() as seams:
            cell.full(from_x[:, :T], start, cell.from_context.weight, chunks=K, tolerance=TOLERANCE, passes=K + 1)
        found.append({"T": T, "chunk": steps, "chunks": K, "passes": seams[0].passes})
    return found


def _bar(items: Sequence[Any], label: str, unit: str, progress: bool) -> tqdm:
    return tqdm(items, desc=label, unit=unit, leave=False, disable=None if progress else True)


def variances(contexts: Tensor) -> Tensor:
    """Shares of the variance of contexts (T, D) along their principal components, descending."""
    values = torch.linalg.svdvals(contexts - contexts.mean(dim=0)).square()
    return values / values.sum()


def gate_statistics(cell: ContextCell, from_x: Tensor, start: Tensor, contexts: Tensor) -> dict[str, dict[str, float]]:
    """Of forget, input and |delta|: mean, quantiles over steps and columns, and the share within 1% of either end."""
    before = shift(contexts, start)
    f, i, d = cell.gates(cell.with_context(from_x, before, cell.from_context.weight)).chunk(3, dim=-1)
    result = {}
    for name, values in (("forget", torch.sigmoid(f)), ("input", torch.sigmoid(i)), ("delta", torch.tanh(d).abs())):
        flat = values.flatten()
        flat = flat[:: max(1, flat.numel() // 10**6)]  # quantile() takes no more than some millions
        low, middle, high = torch.quantile(flat, torch.tensor([0.1, 0.5, 0.9], dtype=flat.dtype)).tolist()
        shut = ((flat < 0.01) | (flat > 0.99)).double().mean().item()
        result[name] = {"mean": flat.mean().item(), "10%": low, "50%": middle, "90%": high, "saturated": shut}
    return result
