"""How `context_scan` and `recurrent_context` went through time: passes over chunks, and what they left at the seams between."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

_open: tuple[list[Seams], ...] = ()  # a list of every block that is open


@dataclass(frozen=True, eq=False, repr=False)
class Seams:
    """One way through time. `passes`, `mismatch` and `in_order` wait for the GPU, when first read."""

    direction: str
    """ "forward", or "backward", whose chunks are counted from the end of time."""
    steps: int
    """Of a chunk; the last may have fewer."""
    chunks: int = 1
    """1: all steps in order of time, without a seam."""
    _change: Tensor | None = field(default=None)  # (passes, B, chunks), see `_look`
    _tolerance: float = 0.0  # squared, as the kernels take it
    _known: tuple[int, float, bool] = (1, 0.0, False)  # passes, mismatch, in_order where no kernel left a change

    @property
    def passes(self) -> int:
        """In how many passes chunks were computed; those in which all rested do not count, nor does what `in_order` tells."""
        return self._found[0]

    @property
    def mismatch(self) -> float:
        """The largest part of itself by which the start of a chunk moved after the chunk was computed for the last time.

        0.0 without chunks. Where a chunk let several moves pass this is their sum, so no seam is open by more. Moves are not
        kept of what ran `in_order`: there the tolerance, the most that such a move may be, is added instead.
        """
        return self._found[1]

    @property
    def in_order(self) -> bool:
        """Whether the last pass left a seam open, so that the rest of its row had to be computed in order of time."""
        return self._found[2]

    @functools.cached_property
    def _found(self) -> tuple[int, float, bool]:
        if self._change is None:
            return self._known
        if self._change.is_cuda:
            torch.cuda.synchronize(self._change.device)  # the call may have run on another stream
        return _look(self._change.cpu(), self._tolerance)

    def __repr__(self) -> str:
        names = ("direction", "chunks", "steps", "passes", "mismatch", "in_order")
        return f"Seams({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def _look(change: Tensor, tolerance: float) -> tuple[int, float, bool]:
    """(passes, mismatch, in_order) from the squared relative change of every pass, row and chunk's start.

    A chunk is computed in the first two passes, and again after each that moved its start by more than the tolerance.
    """
    change = change[1:, :, 2:]  # starts of chunks 0 and 1 are final, and the first pass has none to compare with
    moved = ~(change <= tolerance)  # by NaN too
    again = moved.flatten(1).any(1).tolist()  # by pass: whether it made the next one compute a chunk
    computed_since = moved.flip(0).cumsum(0).flip(0) > 0
    left = change.double().sqrt().masked_fill(computed_since, 0.0).sum(0)
    mismatch = max(left.flatten().tolist(), default=0.0)
    return 2 + sum(again[:-1]), mismatch + math.sqrt(tolerance) * again[-1], again[-1]


@contextmanager
def record_seams() -> Iterator[list[Seams]]:
    """Gather how every `context_scan` and `recurrent_context` inside the block goes through time, forward and backward, in order
    of the calls.

    Yields a list of one record a call, on whatever backend, with
        direction   "forward" or "backward"
        chunks      of time, computed side by side; 1: all steps in order of time
        steps       of a chunk
        passes      int, in which chunks were computed; 1 without chunks
        mismatch    float, the largest relative change (L2 over D) of a chunk's start that the chunk has not seen; 0.0 without
                    chunks
        in_order    bool, whether the passes left a seam open and the rest was computed in order of time, which leaves none by
                    more than the tolerance (docs/numerics.md); that is added to mismatch then

    Recording keeps a small tensor of the call and launches nothing; the last three wait for the GPU when they are first read.
    Blocks nest, and each gathers what runs inside it, in every thread of the process. A compiled call is recorded when it
    runs, if the block is outside the compiled function; one captured into a CUDA graph is not.

    >>> import torch, newllm_kernels as nk
    >>> f = i = d = torch.zeros(1, 3, 2)
    >>> with nk.record_seams() as seams:
    ...     c, last = nk.context_scan(f, i, d, torch.tensor([[-2.0, 2.0]]))
    >>> seams
    [Seams(direction='forward', chunks=1, steps=3, passes=1, mismatch=0.0, in_order=False)]
    """
    global _open
    before, seams = _open, []
    _open = (*before, seams)
    try:
        yield seams
    finally:
        _open = before


def report(direction: str, steps: int, chunks: int = 1, change: Tensor | None = None, tolerance: float = 0.0) -> None:
    """Tell whoever records. `change` may be filled later, by kernels still to be launched."""
    # Of a graph that is being captured nothing has run yet, and a replay overwrites what an earlier one left.
    if _open and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        _tell(Seams(direction, steps, chunks, change, tolerance))


def report_known(direction: str, steps: int, chunks: int, passes: int, mismatch: float, in_order: bool) -> None:
    """Tell whoever records, where the host has led the passes and knows already."""
    if _open:
        _tell(Seams(direction, steps, chunks, _known=(passes, mismatch, in_order)))


def _tell(record: Seams) -> None:
    for seams in _open:
        seams.append(record)
