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

SOLVERS = ("sequential", "chunked", "auto")
GUESSED_PASSES = 5  # before any have been seen
FORGET_AFTER = 1024  # calls: training changes the cell, so what was too slow is tried again
SHORTEST = 16  # steps of a chunk
CHUNKS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

Time = Callable[[int], float]  # of a step of so many rows


class Solver:
    """kind "sequential": one chunk. "chunked": `chunks`, or as many as are predicted to be fastest. "auto": in order or in
    chunks, by predicted time (costs.py) and the passes that earlier calls took; on a CPU, and wherever the batch alone fills
    the device, that is the order of time.
    """

    def __init__(self, kind: str, chunks: int | None = None, tolerance: float | None = None, passes: int = 8) -> None:
        if kind not in SOLVERS:
            raise ValueError(f"solver: got {kind!r}, wanted one of {', '.join(map(repr, SOLVERS))}")
        self.kind, self.chunks = kind, chunks
        self.options: dict[str, Any] = {"tolerance": tolerance, "passes": passes}
        self.seen: dict[tuple[int, int], float] = {}  # (steps of a chunk, chunks) -> passes, infinite where it gave up
        self.choices: dict[
            tuple[Any, ...], int
        ] = {}  # what was chosen for calls like one, as long as nothing new is seen
        self.calls = 0

    @contextmanager
    def way(self, z: Tensor, D: int, H: int, layers: int = 1, norm: str | None = "state") -> Iterator[dict[str, Any]]:
        """The arguments of `recurrent_context` that say how it goes through time; what it then tells is kept in mind.

        z (B, T, Z); the cell is one of `layers` hidden layers of H units, 0 without, and contexts (B, D).
        """
        if torch.compiler.is_compiling():  # which can neither measure nor ask the device
            yield {"chunks": self.chunks or 1 if self.kind == "chunked" else 1, **self.options}
            return
        K = self._decide(z, D, Cell(H, layers, norm, z.shape[0]))
        options = {"chunks": K, **self.options}
        if self.kind != "auto" or K == 1:
            yield options
            return
        with seams.record_seams() as records:
            yield options
        for record in records:
            if record.direction == "forward":
                self.seen[record.steps, record.chunks] = math.inf if record.in_order else record.passes
                self.choices.clear()

    def _decide(self, z: Tensor, D: int, cell: Cell) -> int:
        if self.kind == "auto":
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return 1  # a graph cannot ask what has moved
            self.calls += 1
            if self.calls % FORGET_AFTER == 0:
                self.seen.clear()
                self.choices.clear()
        # To predict takes some 200 microseconds, a twentieth of a call of 1024 steps.
        call = (z.shape[1], D, cell, z.dtype, z.device, torch.is_grad_enabled(), backends.current_backend())
        if call not in self.choices:
            if len(self.choices) >= 256:
                self.choices.clear()
            self.choices[call] = self._choose(z.shape[0], z.shape[1], *cost_of_steps(z, D, cell))
        return self.choices[call]

    def _choose(self, B: int, T: int, time: Time, overhead: float) -> int:
        if self.kind == "sequential" or B == 0 or T < 2 * SHORTEST:
            return 1
        if self.kind == "chunked" and self.chunks:
            return self.chunks
        best, least = (1, 0.9 * T * time(B)) if self.kind == "auto" else (2, math.inf)  # a tenth for what nobody knows
        for K in CHUNKS:
            steps = T // K
            if steps < SHORTEST:
                break
            needed = self._passes(steps, K) * (steps * time(B * K) + overhead) + T % K * time(B)
            if needed < least:
                best, least = K, needed
        return best

    def _passes(self, steps: int, chunks: int) -> float:
        """Expected of chunks of so many steps: longer ones forget more and never need more passes. Where some gave up, only much
        longer ones are worth a trial: a cell that does not forget, or rounding that keeps seams open, is to cost few calls."""
        if (steps, chunks) in self.seen:
            return self.seen[steps, chunks]
        gave_up = max((longest for (longest, _), passes in self.seen.items() if passes == math.inf), default=0)
        if steps < 4 * gave_up:
            return math.inf
        at_least = max((passes for (longer, _), passes in self.seen.items() if longer >= steps), default=0)
        at_most = min((passes for (shorter, _), passes in self.seen.items() if shorter <= steps), default=math.inf)
        return max(at_least, min(GUESSED_PASSES, at_most))


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
