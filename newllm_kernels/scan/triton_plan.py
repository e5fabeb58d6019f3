"""How the Triton kernels cut a recurrence: which way through time, and in which tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from newllm_kernels import tuning
from newllm_kernels.triton_support import cdiv, multiprocessors, power_of_two


class Plan(NamedTuple):
    """How a recurrence is cut: G follows from the rest (triton_tiles.py)."""

    way: str  # stream, chunks or look-back
    R: int
    G: int
    BD: int
    warps: int
    stages: int
    chunks: int

    @property
    def steps(self) -> int:
        """Of a tile."""
        return self.R * self.G


def _tile(x: Tensor, D: int, R: int, BD: int, warps: int) -> tuple[int, int, int, int]:
    """(R, G, BD, warps): G rows are what the threads hold at a time when each loads 16 bytes."""
    narrow = max(16, power_of_two(D))
    return R, 32 * warps * (16 // x.element_size()) // BD, min(BD, narrow), warps


# (R, BD, warps, stages), the fastest of some thirty each on an H100 (docs/performance.md): float32, 16 bits.
_STREAM = {
    ("scan", "forward"): ((8, 32, 1, 3), (8, 64, 4, 3)),
    ("scan", "backward"): ((4, 32, 4, 2), (4, 64, 4, 3)),
    ("gated_scan", "forward"): ((4, 32, 2, 3), (8, 64, 8, 3)),
    ("gated_scan", "backward"): ((2, 32, 2, 3), (4, 64, 4, 3)),
    ("gated_scan_layer_norm", "backward"): ((2, 32, 2, 3), (4, 64, 8, 3)),
}
# For 16 bits where blocks of 64 columns would be too few for the GPU.
_NARROW_STREAM = {
    ("scan", "forward"): (8, 32, 2, 3),
    ("scan", "backward"): (4, 32, 2, 3),
    ("gated_scan", "forward"): (8, 32, 4, 2),
    ("gated_scan", "backward"): (4, 32, 4, 2),
    ("gated_scan_layer_norm", "backward"): (4, 32, 8, 3),
}
_LOOK_BACK = {"forward": ((8, 32, 4, 1), (8, 32, 4, 1)), "backward": ((4, 32, 4, 1), (4, 32, 4, 1))}
_CHUNKS = ((8, 32, 2, 3), (8, 32, 4, 3))
MOST_CHUNKS = 256


def plan(x: Tensor, N: int, T: int, D: int, packed_sequences: bool, operation: str, direction: str) -> Plan:
    """Streams whole sequences where they keep the GPU busy; cuts time where they would leave multiprocessors idle."""
    sixteen_bits, present = x.element_size() == 2, multiprocessors(x.device)
    *tile, stages = _STREAM[operation, direction][sixteen_bits]
    tile = _tile(x, D, *tile)
    if sixteen_bits and 4 * N * cdiv(D, tile[2]) < 3 * present:
        *tile, stages = _NARROW_STREAM[operation, direction]
        tile = _tile(x, D, *tile)
    if packed_sequences or 4 * tile[0] * tile[1] >= T or 3 * N * cdiv(D, tile[2]) >= 2 * present:
        return Plan("stream", *tile, stages, 1)
    # A look-back hands on one state a group of chunks, which takes longer than so few columns do.
    if N * cdiv(D, 32) < 8:
        *tile, stages = _CHUNKS[sixteen_bits]
        tile = _tile(x, D, *tile)
        return Plan("chunks", *tile, stages, 2 * present // (N * cdiv(D, tile[2])))
    *tile, stages = _LOOK_BACK[direction][sixteen_bits]
    return Plan("look-back", *_tile(x, D, *tile), stages, 1)


# (R, BD, warps, stages) that take turns with the plan where configurations are tried (tuning.py): few registers and many,
# one warp a program and several, which is what the sweeps on the H100 turned on.
_ALTERNATIVES = ((4, 32, 1, 3), (4, 32, 2, 3), (8, 32, 2, 2), (2, 64, 4, 3), (4, 64, 4, 3))


def chosen(
    x: Tensor,
    N: int,
    T: int,
    D: int,
    packed_sequences: bool,
    operation: str,
    direction: str,
    run: Callable[[Plan], None],
) -> Plan:
    """The plan, or what was found faster on this GPU for such a dtype, so many columns and so long sequences."""
    first = plan(x, N, T, D, packed_sequences, operation, direction)
    if not tuning.tries(x.device):
        return first
    others = [Plan(first.way, *_tile(x, D, *tile), stages, first.chunks) for *tile, stages in _ALTERNATIVES]
    kind = (operation, direction, str(x.dtype), power_of_two(N * D), power_of_two(max(T, 1)), packed_sequences)
    return tuning.fastest(kind, [first, *others], run, x.device)


def chunks_of(p: Plan, T: int, D: int) -> tuple[int, int, bool]:
    """(chunks, steps of a chunk, whether all tiles are whole)."""
    even = T % p.steps == 0 and D % p.BD == 0
    if p.way == "stream":
        return 1, T, even
    if p.way == "look-back":
        return cdiv(T, p.steps), p.steps, even
    wanted = max(1, min(MOST_CHUNKS, p.chunks))
    chunk_steps = cdiv(cdiv(T, wanted), p.steps) * p.steps
    return cdiv(T, chunk_steps), chunk_steps, even
