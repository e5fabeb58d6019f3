"""Which way through time a layer of full cells takes: in order, in chunks side by side, or whichever will be faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from newllm_kernels import backends
from newllm_kernels.context_scan import seams
from newllm_kernels.recurrent_context import Cell, costs, predicted
from newllm_kernels.recurrent_context.chunks import Plan, adjoints

SOLVERS = ("sequential", "chunked", "auto")
GUESSED_MEMORY = 128  # steps, before anything has been seen
FORGET_AFTER = 1024  # calls: training changes the cell, so what was too slow is tried again
SHORTEST = 16  # steps of a chunk
MOST_COPIES = 8  # of every step, in the warm-ups of chunks: several sequences' windows are copied
CHUNKS = (2, 3, 4, 6, 7, 8, 12, 14, 16, 24, 28, 32, 48, 56, 64, 96, 112, 128, 192, 256, 384, 512, 768, 1024)

Time = Callable[[int], float]  # of a step of so many rows


class Memory:
    """How many steps a cell takes to forget a start to within the tolerance, by the passes that chunks of time took: where p passes
    over chunks of C steps met after W of warm-up, W + (p - 1) C steps are enough, and W + (p - 2) C are too few."""

    def __init__(self) -> None:
        self.too_few, self.enough = 0, math.inf

    def learn(self, warm_up: int, steps: int, passes: int, met: bool) -> None:
        reached = warm_up + (passes - 1) * steps
        if not met:
            self.too_few = max(self.too_few, reached)
            if self.enough <= self.too_few:  # of other text
                self.enough = math.inf
            return
        short = reached - steps if passes > 1 else 0
        self.enough = reached if short >= self.enough else min(self.enough, reached)
        self.too_few = short if reached <= self.too_few else max(self.too_few, short)

    def guess(self) -> int:
        """Half-way between the bounds while they are far apart, then what is known to be enough."""
        if self.enough == math.inf:
            return 2 * self.too_few or GUESSED_MEMORY
        return self.enough if 4 * self.too_few > 3 * self.enough else (self.enough + self.too_few) // 2


class Solver:
    """kind "sequential": one chunk. "chunked": `chunks`, each warmed up for `warm_up` steps, or as many as are predicted to be fastest.
    "auto": in order or in chunks, by predicted time (costs.py) and what earlier calls told of the cell's memory; on a CPU, and
    wherever the batch alone fills the device, that is the order of time.
    """

    def __init__(
        self, kind: str, chunks: int | None = None, tolerance: float | None = None, passes: int = 8, warm_up: int = 0
    ) -> None:
        if kind not in SOLVERS:
            raise ValueError(f"solver: got {kind!r}, wanted one of {', '.join(map(repr, SOLVERS))}")
        self.kind, self.chunks, self.warm_up, self.tolerance, self.passes = kind, chunks, warm_up, tolerance, passes
        self.memory = Memory()
        # What was chosen for calls like one, as long as nothing new is seen: (chunks, warm-up, passes).
        self.choices: dict[tuple[Any, ...], tuple[int, int, int]] = {}
        self.calls = 0

    @contextmanager
    def way(self, z: Tensor, D: int, H: int, layers: int = 1, norm: str | None = "state") -> Iterator[dict[str, Any]]:
        """The arguments of `recurrent_context` that say how it goes through time; what it then tells is kept in mind.

        z (B, T, Z); the cell is one of `layers` hidden layers of H units, 0 without, and contexts (B, D).
        """
        if torch.compiler.is_compiling():  # which can neither measure nor ask the device
            K, W, passes = self.chunks or 1 if self.kind == "chunked" else 1, self.warm_up, self.passes
        else:
            K, W, passes = self._decide(z, D, Cell(H, layers, norm, z.shape[0]))
        options = {"chunks": K, "tolerance": self.tolerance, "passes": passes, "warm_up": W}
        if self.kind != "auto" or K == 1 or torch.compiler.is_compiling():
            yield options
            return
        with seams.record_seams() as records:
            yield options
        plan = Plan(K, 0.0, passes, W)
        told = [(record.passes, record.in_order) for record in records if record.chunks > 1]
        last = adjoints.pop((z.shape[1], D, plan), None)  # of an earlier call: this one's comes later
        self._learn(*plan.steps(z.shape[1]), told if last is None else [*told, last])

    def _learn(self, warm_up: int, steps: int, told: list[tuple[int, bool]]) -> None:
        """told: (passes, whether it ended in order of time), the adjoint's with those of the forward: the longer memory counts."""
        before = vars(self.memory).copy()
        if told:
            passes, in_order = max(told, key=lambda one: (one[1], one[0]))
            self.memory.learn(warm_up, steps, passes, not in_order)
        if vars(self.memory) != before:
            self.choices.clear()

    def _decide(self, z: Tensor, D: int, cell: Cell) -> tuple[int, int, int]:
        if self.kind == "auto":
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return 1, 0, self.passes  # a graph cannot ask what has moved
            self.calls += 1
            if self.calls % FORGET_AFTER == 0:
                self.memory = Memory()
                self.choices.clear()
        # To predict takes some 200 microseconds, a twentieth of a call of 1024 steps.
        call = (z.shape[1], D, cell, z.dtype, z.device, torch.is_grad_enabled(), backends.current_backend())
        if call not in self.choices:
            if len(self.choices) >= 256:
                self.choices.clear()
            self.choices[call] = self._choose(z.shape[0], z.shape[1], *cost_of_steps(z, D, cell))
        return self.choices[call]

    def _choose(self, B: int, T: int, time: Time, overhead: float) -> tuple[int, int, int]:
        """(chunks, warm-up, the most passes). One pass, after a warm-up as long as the cell is thought to remember: p passes over
        longer chunks take as many steps."""
        if self.kind == "sequential" or B == 0 or T < 2 * SHORTEST:
            return 1, 0, self.passes
        if self.kind == "chunked" and self.chunks:
            return self.chunks, self.warm_up, self.passes
        in_order, W = T * time(B), self.memory.guess()
        # "auto" asks for a tenth more, for what nobody knows.
        best, least = ((1, 0, self.passes), 0.9 * in_order) if self.kind == "auto" else ((2, 0, self.passes), math.inf)
        for K in CHUNKS:
            if T - W < K * SHORTEST:
                break
            warm_up, steps = Plan(K, 0.0, 1, W).steps(T)
            if B > 1 and warm_up > MOST_COPIES * steps:
                break
            once, warm = steps * time(B * K) + overhead, warm_up * time(B * K) + overhead
            if warm + once < least:
                # No more than order of time would have taken: what does not meet by then has cost a call's time.
                most = min(self.passes, int((in_order - warm) / once)) if self.kind == "auto" else self.passes
                best, least = (K, W, max(1, most)), warm + once
        return best


def cost_of_steps(z: Tensor, D: int, cell: Cell) -> tuple[Time, float]:
    """Time of a step by its number of rows, and of what a pass costs beside its steps. On a GPU in microseconds, of forward and,
    where gradients are recorded, backward; on a CPU in steps of as many rows as there are threads, which products fill."""
    if not z.is_cuda:
        threads = torch.get_num_threads()
        return lambda rows: -(-rows // threads), costs.PASS_ON_CPU
    both = torch.is_grad_enabled()

    def time(rows: int) -> float:
        cost = predicted(z, D, cell._replace(rows=rows))
        return cost.both if both else cost.forward

    return time, costs.PASS.both if both else costs.PASS.forward
