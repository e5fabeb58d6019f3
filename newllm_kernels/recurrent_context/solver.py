"""Which way through time a layer of full cells takes: in order, in chunks side by side, or whichever will be faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from newllm_kernels import backends, native
from newllm_kernels.context_scan import seams

SOLVERS = ("sequential", "chunked", "auto")
GUESSED_PASSES = 5  # before any have been seen
FORGET_AFTER = 256  # calls: training changes the cell, so what was too slow is tried again
OVERHEAD = 25  # steps' time that a pass costs beside its steps: choosing what moved, and asking the GPU
SHORTEST = 16  # steps of a chunk


class Solver:
    """kind "sequential": one chunk. "chunked": `chunks`, or as many as the device computes at once. "auto": by predicted time,
    from the passes that earlier calls took; on a CPU, and wherever the batch alone fills the device, that is the order of time.
    """

    def __init__(self, kind: str, chunks: int | None = None, tolerance: float | None = None, passes: int = 8) -> None:
        if kind not in SOLVERS:
            raise ValueError(f"solver: got {kind!r}, wanted one of {', '.join(map(repr, SOLVERS))}")
        self.kind, self.chunks = kind, chunks
        self.options: dict[str, Any] = {"tolerance": tolerance, "passes": passes}
        self.seen: dict[
            tuple[int, int], int
        ] = {}  # (chunks, steps of one) -> passes, or more than any where it gave up
        self.calls = 0

    @contextmanager
    def way(self, z: Tensor, D: int, H: int) -> Iterator[dict[str, Any]]:
        """The arguments of `recurrent_context` that say how it goes through time; what it then tells is kept in mind."""
        if torch.compiler.is_compiling():  # which can neither measure nor ask the device
            yield {"chunks": self.chunks or 1 if self.kind == "chunked" else 1, **self.options}
            return
        K = self._choose(z.shape[0], z.shape[1], at_once(z, D, H))
        options = {"chunks": K, **self.options}
        if self.kind != "auto" or K == 1:
            yield options
            return
        with seams.record_seams() as records:
            yield options
        for record in records:
            if record.direction == "forward":
                self.seen[record.chunks, record.steps] = record.chunks if record.in_order else record.passes

    def _choose(self, B: int, T: int, rows: int) -> int:
        if self.kind == "sequential" or B == 0 or T < 2 * SHORTEST:
            return 1
        if self.kind == "chunked":
            return self.chunks or max(2, min(T // SHORTEST, rows // B))
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():  # a graph cannot ask what has moved
            return 1
        self.calls += 1
        if self.calls % FORGET_AFTER == 0:
            self.seen.clear()
        time, best = 0.9 * T * waves(B, rows), 1  # a tenth, for what the prediction does not know
        for K in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
            steps = T // K
            if steps < SHORTEST:
                break
            passes = self.seen.get((K, steps), GUESSED_PASSES)
            predicted = passes * (steps * waves(B * K, rows) + OVERHEAD) + T % K
            if predicted < time:
                time, best = predicted, K
        return best


def waves(B: int, rows: int) -> int:
    return -(-B // rows)


def at_once(z: Tensor, D: int, H: int) -> int:
    """Rows that cost no more time than one. Where products take the time, as on a CPU, that is what the threads share out."""
    if not z.is_cuda:
        return torch.get_num_threads()
    if not native.has_cuda_kernels() or backends.current_backend() not in ("auto", "cuda"):
        return 1
    return max(1, 16 * native.cuda_recurrent_teams(D, H, z.device.index))
