"""The recurrence in one pass over memory, time cut into chunks that run in parallel.

A chunk publishes what it does to any start state (a pair A, H) and needs the state before it. A decoupled look-back (Merrill and
Garland, "Single-pass parallel prefix scan with decoupled look-back", 2016) takes in predecessors' pairs up to whichever finished
state it finds, so its rounding depends on timing. Here the order is fixed, and with it the bits: chunks form groups of GROUP;
a chunk takes in the state before its group and the pairs of the group before it. States wait for one another once a group, not
once a chunk.

A group has GROUP rows of words in the workspace: the state before it, published by the last chunk of the group before, then the
pairs of all its chunks but the last. A word is a pair in 64 bits, which memory never tears, a state S the pair (0, S). It says
itself whether it is there: all ones, a NaN that no arithmetic makes, is what the workspace starts from. So a reader gets data
and flag in one round trip, without fences. Names: triton_tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from newllm_kernels.scan.triton_tiles import (
    backward_tile,
    forward_tile,
    last_group,
    rows_left,
    scan_groups,
    scan_groups_exclusive,
    state_of,
    states_before,
    store,
    store_columns,
    store_gradients,
    then,
    then_exclusive,
    tile_rows,
    tile_times,
)
from newllm_kernels.triton_support import kernel

GROUP = tl.constexpr(16)  # chunks
NOTHING = tl.constexpr(-1)  # of the half of a word that holds A: not yet published


@triton.jit
def _ticket(p_ticket, d_blocks, groups, BD: tl.constexpr):
    """Chunk, sequence and columns of a program. Tickets are drawn as programs start, so all predecessors of a chunk
    have started before it, in whatever order the GPU starts blocks."""
    ticket = tl.atomic_add(p_ticket, 1, sem="relaxed", scope="gpu") + 1  # it starts as -1
    i_c, i_g = ticket // groups, (ticket % groups).to(tl.int64)
    return i_c, i_g // d_blocks, (i_g % d_blocks) * BD + tl.arange(0, BD)


@triton.jit
def _publish(p_row, o_d, m_d, pair_a, pair_b, BD: tl.constexpr):
    """A pair (1, 1, BD) as words; every NaN as the same one, which is not NOTHING."""
    a, b = tl.reshape(pair_a, (BD,)), tl.reshape(pair_b, (BD,))
    a = tl.where(a == a, a, float("nan")).to(tl.int32, bitcast=True)
    b = b.to(tl.int32, bitcast=True)
    tl.store(p_row + o_d, (b.to(tl.int64) << 32) | (a.to(tl.int64) & 0xFFFFFFFF), mask=m_d)


@triton.jit
def _carry(p_words, i_n, i_c, chunks, D, o_d, m_d, g_a, g_b, state, G: tl.constexpr, BD: tl.constexpr):
    """State before each group of steps (1, G, BD) and after the chunk (1, 1, BD). The first chunk starts from `state`."""
    i_w = (i_n * tl.cdiv(chunks, GROUP) + i_c // GROUP) * GROUP  # the first row of the chunk's group
    place = i_c % GROUP
    p_group = p_words.to(tl.pointer_type(tl.int64)) + i_w * D
    ones, zeros = tl.full(g_a.shape, 1.0, tl.float32), tl.full(g_b.shape, -0.0, tl.float32)
    g_a, g_b, x_a, x_b = tl.associative_scan((g_a, g_b, ones, zeros), 1, then_exclusive)
    pair_a, pair_b = last_group(g_a, G), last_group(g_b, G)
    if place < GROUP - 1:
        _publish(p_group + (place + 1) * D, o_d, m_d, pair_a, pair_b, BD)
    if i_c > 0:
        state = _look_back(p_group, i_c, place, D, o_d, m_d, state, BD)
    end = pair_b + pair_a * state
    if place == GROUP - 1:
        if i_c < chunks - 1:
            _publish(p_group + GROUP * D, o_d, m_d, tl.zeros_like(end), end, BD)
    return x_b + x_a * state, end


@triton.jit
def _look_back(p_group, i_c, place, D, o_d, m_d, state, BD: tl.constexpr):
    """The state before chunk i_c > 0; `state` is that before chunk 0.

    A chunk that has started waits only for chunks that have started before it (_ticket), so there is always one that can go
    on. All threads take the same way: they decide by reductions over words each of which one thread has read, once. (A tile
    of fewer words than threads would be read by several, who could part ways: triton.py keeps to at most 8 warps.)
    """
    o_w = tl.arange(0, GROUP)
    of_first_group = i_c == place
    mask = ((o_w <= place) & (o_w + i_c - place > 0))[:, None] & m_d[None, :]
    rows = p_group + o_w[:, None].to(tl.int64) * D + o_d[None, :]
    words = tl.full([GROUP, BD], 0x3F800000, tl.int64)  # A = 1, H = 0
    waiting = i_c > 0
    while waiting:
        words = tl.load(rows, mask=mask, other=0x3F800000, volatile=True)
        waiting = tl.max(tl.max((words.to(tl.int32) == NOTHING).to(tl.int32), axis=1), axis=0) == 1
    w_a, w_b = words.to(tl.int32).to(tl.float32, bitcast=True), (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    w_a, w_b = tl.associative_scan((w_a, w_b), 0, then)
    last = (o_w == GROUP - 1)[:, None]
    w_a, w_b = tl.sum(tl.where(last, w_a, 0.0), axis=0), tl.sum(tl.where(last, w_b, 0.0), axis=0)
    if of_first_group:
        w_b += w_a * tl.reshape(state, (BD,))
    return w_b[None, None, :]


@kernel(do_not_specialize=("T", "chunks"))
def forward_look_back(
    p_a, p_b, p_c, p_h0, p_h, p_last, p_ticket, p_words, T, D, s_ab, s_at, s_bb, s_bt, s_cb, s_ct, d_blocks,
    chunks, groups, GATED: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr,
    HAS_H0: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_c, i_n, o_d = _ticket(p_ticket, d_blocks, groups, BD)
    m_d = o_d < D
    L = T.to(tl.int64)
    start = i_c.to(tl.int64) * (R * G)
    rows = tile_rows(R, G)
    o_t, m_t = tile_times(rows, REVERSE, WIDE), rows < rows_left(start, L)
    t = L - 1 - start if REVERSE else start
    b_a, b_b = forward_tile(
        p_a + i_n * s_ab, p_b + i_n * s_bb, p_c + i_n * s_cb, s_at, s_bt, s_ct, t, o_t, m_t, o_d, m_d, GATED, EXACT,
        EVEN, R, G, BD,
    )  # fmt: skip
    b_a, b_h, g_a, g_h = scan_groups(b_a, b_b, R)
    state = state_of(p_h0, i_n, D, o_d, m_d, HAS_H0, BD)
    state, end = _carry(p_words, i_n, i_c, chunks, D, o_d, m_d, g_a, g_h, state, G, BD)
    store(p_h + i_n * T * D, D, t, o_t, m_t, o_d, m_d, b_h + b_a * state, EVEN, R, G, BD)
    if i_c == chunks - 1:
        store_columns(p_last + i_n * D, o_d, m_d, end, BD)


@kernel(do_not_specialize=("T", "chunks"))
def backward_look_back(
    p_gh, p_glast, p_a, p_b, p_c, p_h, p_h0, p_ga, p_gb, p_gc, p_gh0, p_ticket, p_words, T, D, s_ghb, s_ght,
    s_ab, s_at, s_bb, s_bt, s_cb, s_ct, s_hb, s_ht, s_gt, d_blocks, chunks, groups, GATED: tl.constexpr,
    REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr, HAS_GH: tl.constexpr, HAS_GLAST: tl.constexpr,
    HAS_H0: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_c, i_n, o_d = _ticket(p_ticket, d_blocks, groups, BD)
    m_d = o_d < D
    L = T.to(tl.int64)
    start = i_c.to(tl.int64) * (R * G)
    rows = tile_rows(R, G)
    left = rows_left(start, L)
    o_t, m_t = tile_times(rows, not REVERSE, WIDE), rows < left
    t = start if REVERSE else L - 1 - start
    b_a, b_slope, b_g = backward_tile(
        p_gh + i_n * s_ghb, p_a + i_n * s_ab, s_ght, s_at, t, o_t, m_t, o_d, m_d, GATED, HAS_GH, EXACT, EVEN, R, G, BD
    )
    # On their way while the chunk looks back.
    start_state = state_of(p_h0, i_n, D, o_d, m_d, HAS_H0, BD)
    t_before = t + 1 if REVERSE else t - 1
    b_h = states_before(p_h + i_n * s_hb, s_ht, t_before, o_t, rows, left, o_d, m_d, start_state, HAS_H0, R, G, BD)
    x_a, x_v, g_a, g_v = scan_groups_exclusive(b_a, b_a * b_g, R)
    state = state_of(p_glast, i_n, D, o_d, m_d, HAS_GLAST, BD)
    state, end = _carry(p_words, i_n, i_c, chunks, D, o_d, m_d, g_a, g_v, state, G, BD)
    b_g += x_v + x_a * state
    out = i_n * T * s_gt
    store_gradients(
        p_b + i_n * s_bb, p_c + i_n * s_cb, p_ga + out, p_gb + out, p_gc + out, s_bt, s_ct, s_gt, t, o_t, m_t, o_d, m_d,
        b_slope, b_h, b_g, GATED, EXACT, EVEN, R, G, BD,
    )  # fmt: skip
    if i_c == chunks - 1:
        store_columns(p_gh0 + i_n * D, o_d, m_d, end, BD)
