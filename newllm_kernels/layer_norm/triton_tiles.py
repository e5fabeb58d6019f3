"""Tiles of whole rows, for the Triton kernels that normalise rows; which of a few to take where they are tried (tuning.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm_kernels import tuning
from newllm_kernels.triton_support import cdiv, multiprocessors, power_of_two


class RowTile(NamedTuple):
    """BR whole rows of up to BD columns; programs of one multiprocessor that stay and walk the rows, 0: one tile each."""

    BR: int
    BD: int
    warps: int
    resident: int
    stages: int

    def programs(self, rows: int, device: torch.device) -> int:
        tiles = cdiv(rows, self.BR)
        return min(tiles, self.resident * multiprocessors(device)) if self.resident else tiles


@functools.cache
def row_tile(D: int, elements: int, per_thread: int, resident: int = 0, stages: int = 1) -> RowTile:
    """About `elements` of whole rows; `per_thread` of them a thread, as far as there are 16 warps."""
    BD = power_of_two(D)
    BR = max(1, elements // BD)
    return RowTile(BR, BD, min(16, max(1, BR * BD // (32 * per_thread))), resident, stages)


def weights_tile(D: int) -> RowTile:
    """For kernels that sum weight gradients: few programs with many loads in flight, each leaves a row of partial sums."""
    return row_tile(D, *((2048, 32, 3, 3) if D <= 512 else (2048, 16, 3, 3) if D <= 2048 else (8192, 32, 1, 3)))


# What takes turns with the tile that was fastest on an H100, as arguments of row_tile: those that came within a few percent of
# it there (benchmarks/results/*-sweeps.txt), a thread holding few elements or many.
ONE_TILE_EACH = ((1024, 8), (1024, 16), (2048, 16), (2048, 32), (4096, 32))
# weights_tile's three and the next in the sweeps. The last loads nothing ahead: it fits every GPU, where three stages of wide
# float32 rows take 192 KiB of shared memory (an A100 has 163, most others 99).
WEIGHTS = ((2048, 32, 3, 3), (2048, 16, 3, 3), (8192, 32, 1, 3), (1024, 16, 4, 3), (2048, 16, 4, 1))


@functools.cache
def candidates(first: RowTile, D: int, others: tuple[tuple[int, ...], ...]) -> tuple[RowTile, ...]:
    """`first`, then what of the others is another tile at this width."""
    return tuple(dict.fromkeys((first, *(row_tile(D, *other) for other in others))))


def chosen(
    kind: tuple[Any, ...],
    first: RowTile,
    others: tuple[tuple[int, ...], ...],
    x: Tensor,
    run: Callable[[RowTile], Any],
) -> RowTile:
    """The tile found fastest on this GPU for calls of this kind, of x's dtype, and of about as many rows and columns as x,
    (rows, D). To be called where `tuning.tries`: elsewhere `first` is the tile, and nothing of this is worth the time."""
    rows, D = x.shape
    kind = (*kind, str(x.dtype), power_of_two(rows), power_of_two(D))
    return tuning.fastest(kind, candidates(first, D, others), run, x.device)
