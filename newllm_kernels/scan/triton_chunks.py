"""The recurrence in three launches: what every chunk of time does to any state (it reads the inputs and writes a row a chunk), the
state before every chunk, then the stream of triton.py over all chunks at once. Names: triton_tiles.py."""

from __future__ import annotations

import triton
import triton.language as tl

from newllm_kernels.scan.triton_tiles import (
    backward_tile,
    forward_tile,
    last_group,
    rows_left,
    scan_groups,
    sequence,
    store_columns,
    then,
    tile_rows,
    tile_times,
)
from newllm_kernels.triton_support import kernel


@triton.jit
def piece(p_cu, i_p, T, chunks, chunk_steps, HAS_CU: tl.constexpr, CHUNKED: tl.constexpr):
    """Sequence, chunk of it, first step and length of the chunk, length of the sequence, its first time, batch entry."""
    if CHUNKED:
        i_n, i_c = i_p // chunks, i_p % chunks
        first = i_c * chunk_steps.to(tl.int64)
        return i_n, i_c, first, tl.minimum(chunk_steps.to(tl.int64), T - first), T.to(tl.int64), i_n * 0, i_n
    else:
        begin, L, i_b = sequence(p_cu, i_p, T, HAS_CU)
        return i_p, i_p * 0, i_p * 0, L, L, begin, i_b


@triton.jit
def _store_pair(p_pair, i_p, D, o_d, m_d, pair_a, pair_b, BD: tl.constexpr):
    store_columns(p_pair + i_p * 2 * D, o_d, m_d, pair_a, BD)
    store_columns(p_pair + i_p * 2 * D + D, o_d, m_d, pair_b, BD)


@triton.jit
def _take_in(pair_a, pair_b, b_a, b_b, R: tl.constexpr, G: tl.constexpr):
    """The pair (1, 1, BD) of all steps so far, and then those of a tile."""
    _a, _b, g_a, g_b = scan_groups(b_a, b_b, R)
    g_a, g_b = tl.associative_scan((g_a, g_b), 1, then)
    return then(pair_a, pair_b, last_group(g_a, G), last_group(g_b, G))


@kernel(do_not_specialize=("T", "chunks", "chunk_steps"))
def forward_pairs(
    p_a, p_b, p_c, p_pair, T, D, s_ab, s_at, s_bb, s_bt, s_cb, s_ct, d_blocks, chunks, chunk_steps,
    GATED: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
    G: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What every chunk does to any state, (N, chunks, 2, D)."""
    i_p = (tl.program_id(0) // d_blocks).to(tl.int64)
    o_d = (tl.program_id(0) % d_blocks) * BD + tl.arange(0, BD)
    m_d = o_d < D
    _n, _c, first, steps, L, _begin, i_b = piece(p_pair, i_p, T, chunks, chunk_steps, False, True)
    pair_a, pair_b = tl.full([1, 1, BD], 1.0, tl.float32), tl.zeros([1, 1, BD], tl.float32)
    p_a, p_b, p_c = p_a + i_b * s_ab, p_b + i_b * s_bb, p_c + i_b * s_cb
    rows = tile_rows(R, G)
    o_t = tile_times(rows, REVERSE, WIDE)
    for start in tl.range(0, steps, R * G, num_stages=STAGES):
        t = L - 1 - first - start if REVERSE else first + start
        m_t = rows < rows_left(start, steps)
        b_a, b_b = forward_tile(p_a, p_b, p_c, s_at, s_bt, s_ct, t, o_t, m_t, o_d, m_d, GATED, EXACT, EVEN, R, G, BD)
        pair_a, pair_b = _take_in(pair_a, pair_b, b_a, b_b, R, G)
    _store_pair(p_pair, i_p, D, o_d, m_d, pair_a, pair_b, BD)


@kernel(do_not_specialize=("T", "chunks", "chunk_steps"))
def backward_pairs(
    p_gh, p_a, p_pair, T, D, s_ghb, s_ght, s_ab, s_at, d_blocks, chunks, chunk_steps, GATED: tl.constexpr,
    REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr, HAS_GH: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
    G: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What every chunk, counted from the end, does to what comes back from after it, (N, chunks, 2, D)."""
    i_p = (tl.program_id(0) // d_blocks).to(tl.int64)
    o_d = (tl.program_id(0) % d_blocks) * BD + tl.arange(0, BD)
    m_d = o_d < D
    _n, _c, first, steps, L, _begin, i_b = piece(p_pair, i_p, T, chunks, chunk_steps, False, True)
    pair_a, pair_b = tl.full([1, 1, BD], 1.0, tl.float32), tl.zeros([1, 1, BD], tl.float32)
    p_gh, p_a = p_gh + i_b * s_ghb, p_a + i_b * s_ab
    rows = tile_rows(R, G)
    o_t = tile_times(rows, not REVERSE, WIDE)
    for start in tl.range(0, steps, R * G, num_stages=STAGES):
        t = first + start if REVERSE else L - 1 - first - start
        m_t = rows < rows_left(start, steps)
        b_a, _slope, b_g = backward_tile(
            p_gh, p_a, s_ght, s_at, t, o_t, m_t, o_d, m_d, GATED, HAS_GH, EXACT, EVEN, R, G, BD
        )
        pair_a, pair_b = _take_in(pair_a, pair_b, b_a, b_a * b_g, R, G)
    _store_pair(p_pair, i_p, D, o_d, m_d, pair_a, pair_b, BD)


@kernel(do_not_specialize=("chunks",))
def chunk_starts(
    p_pair, p_state0, p_start, D, d_blocks, chunks, HAS_STATE: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr
):
    """The state before every chunk (N, chunks, D), from the state before the first (N, D) and all pairs; BC >= chunks."""
    i_n = (tl.program_id(0) // d_blocks).to(tl.int64)
    o_d = (tl.program_id(0) % d_blocks) * BD + tl.arange(0, BD)
    o_c = tl.arange(0, BC)
    m_d = o_d < D
    state = tl.zeros([BD], tl.float32)
    if HAS_STATE:
        state = tl.load(p_state0 + i_n * D + o_d, mask=m_d, other=0.0)
    # Row c takes in the pair of chunk c - 1, and row 0 starts from the state.
    p_row = p_pair + (i_n * chunks + o_c - 1)[:, None] * 2 * D + o_d[None, :]
    mask = ((o_c > 0) & (o_c < chunks))[:, None] & m_d[None, :]
    b_a = tl.load(p_row, mask=mask, other=0.0)
    b_b = tl.load(p_row + D, mask=mask, other=0.0)
    b_b = tl.where((o_c == 0)[:, None], state[None, :], b_b)
    b_a, b_b = tl.associative_scan((b_a, b_b), 0, then)
    p_out = p_start + (i_n * chunks + o_c)[:, None] * D + o_d[None, :]
    tl.store(p_out, b_b, mask=(o_c < chunks)[:, None] & m_d[None, :])
