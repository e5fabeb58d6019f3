"""The recurrence in one pass over memory, time cut into chunks that run in parallel.

A chunk publishes what it does to any start state (a pair A, H), then looks back over its predecessors until it finds a finished
state (Merrill and Garland, "Single-pass parallel prefix scan with decoupled look-back", 2016). Names: triton_tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from newllm_kernels.scan.triton_tiles import (
    backward_tile,
    forward_tile,
    last_of,
    scan_tile,
    steps,
    store,
    store_gradients,
    store_start_gradient,
    then,
    times,
)

WINDOW = tl.constexpr(16)  # predecessors whose pairs a look-back takes in at a time


@triton.jit
def _ticket(p_flag, d_blocks, groups, BD: tl.constexpr):
    """Chunk, sequence, group and columns of a program. Tickets are drawn as programs start, so all predecessors of a chunk
    have started before it, in whatever order the GPU starts blocks."""
    ticket = tl.atomic_add(p_flag, 1, sem="relaxed", scope="gpu")
    i_c, i_g = ticket // groups, (ticket % groups).to(tl.int64)
    return i_c, i_g // d_blocks, i_g, (i_g % d_blocks) * BD + tl.arange(0, BD)


@triton.jit
def _carry(
    p_flag, p_pair, p_state, i_c, row0, D, o_d, m_d, g_a, g_h, state, G: tl.constexpr, BD: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """(state before the chunk, state after it). Chunk 0 starts from `state`; the others look back."""
    pair_a, pair_h = last_of(g_a, G), last_of(g_h, G)
    if i_c > 0:
        p_row = p_pair + (row0 + i_c) * 2 * D + o_d
        tl.store(p_row, pair_a, mask=m_d)
        tl.store(p_row + D, pair_h, mask=m_d)
        _publish(p_flag + i_c, 1)
        state = _look_back(p_flag, p_pair, p_state, i_c, row0, D, o_d, m_d, BD, FLAGS)
    end = pair_h + pair_a * state
    tl.store(p_state + (row0 + i_c) * D + o_d, end, mask=m_d)
    _publish(p_flag + i_c, 2)
    return state, end


@triton.jit
def _look_back(p_flag, p_pair, p_state, i_c, row0, D, o_d, m_d, BD: tl.constexpr, FLAGS: tl.constexpr):
    """The state before chunk i_c > 0: walks back over the pairs of its predecessors to the nearest finished state.

    Flags (one a chunk): 0 nothing yet, 1 the pair is there, 2 the state after the chunk is there (chunk 0 goes from 0 to 2).
    p_pair holds A and H of a chunk in two rows, p_state its end. A chunk that has started waits only for chunks that have
    started before it, so there is always one that can go on.

    FLAGS is the number of threads: each reads one flag, and the reductions give all of them the same answer. Were one flag
    read by several threads, they could see it change in between and part ways.
    """
    b_a, b_h = tl.full([BD], 1.0, tl.float32), tl.zeros([BD], tl.float32)  # what happens after `last`, up to i_c
    last = i_c - 1  # the nearest chunk not yet taken in
    found = last < 0
    while not found:
        o_f = tl.arange(0, FLAGS)  # nearest first
        flags = tl.load(p_flag + last - o_f, mask=o_f <= last, other=0, volatile=True)
        nearest = tl.min(tl.where(flags == 2, o_f, FLAGS), axis=0)  # the first finished state
        missing = tl.min(tl.where(flags == 0, o_f, FLAGS), axis=0)  # the first chunk that has nothing yet
        count = tl.minimum(tl.minimum(nearest, missing), WINDOW)  # pairs to take in now
        if count > 0:
            # An acquire on the farthest flag in use; what the flags guard is then read past the first-level cache.
            tl.atomic_add(p_flag + last - (count - 1), 0, sem="acquire", scope="gpu")
            o_w = tl.arange(0, WINDOW)
            m_w = (o_w < count)[:, None]
            p_w = p_pair + (row0 + last - o_w)[:, None] * 2 * D + o_d[None, :]
            w_a = tl.load(p_w, mask=m_w & m_d[None, :], other=1.0, cache_modifier=".cg")
            w_h = tl.load(p_w + D, mask=m_w & m_d[None, :], other=0.0, cache_modifier=".cg")
            # What lies farther back happened first.
            w_a, w_h = tl.associative_scan((w_a, w_h), 0, then, reverse=True)
            m_w = (o_w == 0)[:, None]
            w_a, w_h = tl.sum(tl.where(m_w, w_a, 0.0), axis=0), tl.sum(tl.where(m_w, w_h, 0.0), axis=0)
            b_a, b_h = then(w_a, w_h, b_a, b_h)
            last -= count
        found = (nearest < missing) & (nearest == count)
    tl.atomic_add(p_flag + last, 0, sem="acquire", scope="gpu")
    state = tl.load(p_state + (row0 + last) * D + o_d, mask=m_d, other=0.0, cache_modifier=".cg")
    return b_h + b_a * state


@triton.jit
def _publish(p_flag, value):
    """Everything this program has stored is visible to whoever acquires the flag."""
    tl.debug_barrier()
    tl.atomic_xchg(p_flag, value, sem="release", scope="gpu")


@triton.jit(do_not_specialize=["T", "chunks"])
def forward_look_back(
    p_a, p_b, p_c, p_h0, p_h, p_last, p_flag, p_pair, p_state, T, D, s_ab, s_at, s_bb, s_bt, s_cb, s_ct, d_blocks,
    chunks, groups, GATED: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr,
    HAS_H0: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    i_c, i_n, i_g, o_d = _ticket(p_flag, d_blocks, groups, BD)
    m_d = o_d < D
    p_flag += 1 + i_g * chunks
    L = T.to(tl.int64)
    o_s = steps(i_c.to(tl.int64) * (R * G), R, G)
    o_t = times(i_n * 0, o_s, L, REVERSE)
    b_a, b_b = forward_tile(
        p_a + i_n * s_ab,
        p_b + i_n * s_bb,
        p_c + i_n * s_cb,
        s_at,
        s_bt,
        s_ct,
        o_t,
        o_s < L,
        o_d,
        m_d,
        GATED,
        EXACT,
        EVEN,
    )
    b_a, b_h, g_a, g_h, x_a, x_h = scan_tile(b_a, b_b, R, G)
    state = tl.zeros([BD], tl.float32)
    if HAS_H0:
        if i_c == 0:
            state = tl.load(p_h0 + i_n * D + o_d, mask=m_d, other=0.0)
    state, end = _carry(p_flag, p_pair, p_state, i_c, i_n * chunks, D, o_d, m_d, g_a, g_h, state, G, BD, FLAGS)
    b_h += b_a * (x_h + x_a * state[None, :])[None, :, :]
    store(p_h + i_n * T * D, D, o_t, o_s < L, o_d, m_d, b_h, EVEN)
    if i_c == chunks - 1:
        tl.store(p_last + i_n * D + o_d, end, mask=m_d)


@triton.jit(do_not_specialize=["T", "chunks"])
def backward_look_back(
    p_gh, p_glast, p_a, p_b, p_c, p_h, p_h0, p_ga, p_gb, p_gc, p_gh0, p_flag, p_pair, p_state, T, D, s_ghb, s_ght,
    s_ab, s_at, s_bb, s_bt, s_cb, s_ct, s_hb, s_ht, s_gt, d_blocks, chunks, groups, GATED: tl.constexpr,
    REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr, HAS_GH: tl.constexpr, HAS_GLAST: tl.constexpr, HAS_H0: tl.constexpr, R: tl.constexpr,
    G: tl.constexpr, BD: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    i_c, i_n, i_g, o_d = _ticket(p_flag, d_blocks, groups, BD)
    m_d = o_d < D
    p_flag += 1 + i_g * chunks
    L = T.to(tl.int64)
    o_s = L - 1 - steps(i_c.to(tl.int64) * (R * G), R, G)
    p_a, p_b, p_c = p_a + i_n * s_ab, p_b + i_n * s_bb, p_c + i_n * s_cb
    b_a, b_g = backward_tile(
        p_gh + i_n * s_ghb,
        p_a,
        s_ght,
        s_at,
        i_n * 0,
        o_s,
        L,
        o_d,
        m_d,
        GATED,
        REVERSE,
        HAS_GH,
        EXACT,
        EVEN,
    )
    b_a, b_g, g_a, g_g, x_a, x_g = scan_tile(b_a, b_g, R, G)
    state, start_state = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    if HAS_GLAST:
        if i_c == 0:
            state = tl.load(p_glast + i_n * D + o_d, mask=m_d, other=0.0)
    if HAS_H0:
        start_state = tl.load(p_h0 + i_n * D + o_d, mask=m_d, other=0.0)
    state, end = _carry(p_flag, p_pair, p_state, i_c, i_n * chunks, D, o_d, m_d, g_a, g_g, state, G, BD, FLAGS)
    b_g += b_a * (x_g + x_a * state[None, :])[None, :, :]
    rows = i_n * T * s_gt
    store_gradients(
        p_a, p_b, p_c, p_h + i_n * s_hb, p_ga + rows, p_gb + rows, p_gc + rows, s_at, s_bt, s_ct, s_ht, s_gt, i_n * 0, o_s, L,
        o_d, m_d, start_state, b_g, GATED, REVERSE, EXACT, EVEN,
    )  # fmt: skip
    if i_c == chunks - 1:
        store_start_gradient(p_gh0 + i_n * D, p_a, s_at, i_n * 0, L, o_d, m_d, end, GATED, REVERSE)
