"""Triton kernels of the recurrences `scan` and `gated_scan`, forward and backward.

    stream      one program walks a whole sequence tile by tile, its state in registers: few bytes, no waiting, but only
                N * D / BD programs
    look-back   time is cut into chunks that run in parallel; a chunk publishes what it does to any start state (a pair
                A, H), then looks back over its predecessors until it finds a finished state (Merrill and Garland,
                "Single-pass parallel prefix scan with decoupled look-back", 2016)

Names: p_ pointer, b_ tile, o_ offsets, m_ mask, i_ program index. A tile (R, G, BD) is G groups of R consecutive steps of
BD columns. Threads share out groups and columns, so a thread holds whole groups: it scans them in its registers, and only
the G totals go from thread to thread. (Scanning a (BT, BD) tile, whose rows a thread holds in turns, sends R times as much
through shuffles and took up to twice as long.) What a piece of the sequence does to any state is a pair: first (a1, b1),
then (a2, b2) is (a1 a2, b1 a2 + b2).

"Step" s counts along the recurrence, 0 .. L - 1, whatever its direction in time. The backward runs over u = L - 1 - s:
    g_s = grad_h_s + a_{s+1} g_{s+1},   grad_b_s = g_s,   grad_a_s = g_s h_{s-1},   grad_h0 = a_0 g_0
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm_kernels.triton_support import device_of, multiprocessors

WINDOW = tl.constexpr(16)  # predecessors whose pairs a look-back takes in at a time


@triton.jit
def _load(p, mask, EVEN: tl.constexpr):
    """A tile in float32; EVEN where all of it lies inside the tensor."""
    if EVEN:
        return tl.load(p).to(tl.float32)
    else:
        return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _then(a1, b1, a2, b2):
    return a1 * a2, b1 * a2 + b2


@triton.jit
def _inverse(x, EXACT: tl.constexpr):
    """1 / x for x >= 1. A division is some ten instructions; the square of rsqrt is two, and good to 3e-7."""
    if EXACT:
        return 1.0 / x
    else:
        r = tl.rsqrt(x)
        return r * r


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    """e^x by the hardware's 2^x. Its argument x log2(e) is rounded, which costs |x| units in the last place; exact: what
    the rounding lost comes back as a factor."""
    if EXACT:
        LOG2_E: tl.constexpr = 1.4426950408889634
        t = x * LOG2_E
        lost = tl.fma(x, tl.full([], LOG2_E, tl.float32), -t) + x * 1.925963033e-8  # log2(e) beyond float32
        return tl.exp2(t) * (1.0 + tl.where(tl.abs(t) < 1e30, lost, 0.0) * 0.6931471805599453)
    else:
        return tl.exp(x)


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    """Where e^-x overflows, 1 / inf = 0 is right."""
    return _inverse(1.0 + _exp(-x, EXACT), EXACT)


@triton.jit
def sigmoid_slope(x, s, EXACT: tl.constexpr):
    """Of s = sigmoid(x): s^2 e^-x, which keeps its digits where s (1 - s) cancels; past -87 e^-x would overflow."""
    if EXACT:
        return s * s * _exp(-tl.maximum(x, -87.0), EXACT)
    else:
        return s * (1.0 - s)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """(1 - e) / (1 + e) with e = e^-2x; exact: without cancellation near zero, an odd polynomial there."""
    if EXACT:
        x2 = x * x
        small = x * (1.0 + x2 * (-0.333333333 + x2 * (0.133333333 + x2 * (-0.053968254 + x2 * 0.021869488))))
        e = _exp(-2.0 * tl.abs(x), EXACT)
        large = (1.0 - e) / (1.0 + e)
        return tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0, -large, large))
    else:
        e = tl.exp(-2.0 * tl.maximum(x, -15.0, propagate_nan=tl.PropagateNan.ALL))
        return (1.0 - e) * _inverse(1.0 + e, EXACT)


@triton.jit
def gated_write(i, d, EXACT: tl.constexpr):
    """sigmoid(i) tanh(d); with one inverse for both where bits are few."""
    if EXACT:
        return sigmoid(i, EXACT) * tanh(d, EXACT)
    else:
        e = tl.exp(-2.0 * tl.maximum(d, -15.0, propagate_nan=tl.PropagateNan.ALL))
        return (1.0 - e) * _inverse((1.0 + tl.exp(-i)) * (1.0 + e), EXACT)


@triton.jit
def _then_exclusive(a1, b1, x1, y1, a2, b2, x2, y2):
    """As _then, and in (x, y) the pair of all but the last element."""
    return a1 * a2, b1 * a2 + b2, a1 * x2, b1 * x2 + y2


@triton.jit
def _last(x, N: tl.constexpr):
    """Entry N - 1 of the first axis."""
    index = tl.arange(0, N)[:, None] if len(x.shape) == 2 else tl.arange(0, N)[:, None, None]
    return tl.sum(tl.where(index == N - 1, x, 0.0), axis=0)


@triton.jit
def _scan_tile(b_a, b_b, R: tl.constexpr, G: tl.constexpr):
    """Pairs of steps (R, G, BD) -> their running pairs within each group (R, G, BD), running pairs of whole groups
    including (G, BD) and excluding (G, BD) the group itself."""
    b_a, b_b = tl.associative_scan((b_a, b_b), 0, _then)
    g_a, g_b = _last(b_a, R), _last(b_b, R)
    g_a, g_b, x_a, x_b = tl.associative_scan(
        (g_a, g_b, tl.zeros_like(g_a) + 1.0, tl.zeros_like(g_b)), 0, _then_exclusive
    )
    return b_a, b_b, g_a, g_b, x_a, x_b


@triton.jit
def _steps(start, R: tl.constexpr, G: tl.constexpr):
    """Numbers of the steps of a tile: (R, G)."""
    return start + tl.arange(0, G)[None, :] * R + tl.arange(0, R)[:, None]


@triton.jit
def _times(begin, steps, L, REVERSE: tl.constexpr):
    """Positions in time of steps of the recurrence."""
    if REVERSE:
        return (begin + (L - 1 - steps)).to(tl.int64)
    else:
        return (begin + steps).to(tl.int64)


@triton.jit
def _sequence(p_cu, i_n, T, HAS_CU: tl.constexpr):
    """First time step, length and batch entry of a sequence."""
    if HAS_CU:
        begin = tl.load(p_cu + i_n)
        return begin, tl.load(p_cu + i_n + 1) - begin, i_n * 0
    else:
        return i_n * 0, T.to(tl.int64), i_n


@triton.jit
def _store(p_out, stride, o_t, m_t, o_d, m_d, tile, EVEN: tl.constexpr):
    """A tile into rows of a contiguous output."""
    p_tile = p_out + o_t[:, :, None] * stride + o_d
    if EVEN:
        tl.store(p_tile, tile.to(p_out.dtype.element_ty))
    else:
        tl.store(p_tile, tile.to(p_out.dtype.element_ty), mask=m_t[:, :, None] & m_d)


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
    pair_a, pair_h = _last(g_a, G), _last(g_h, G)
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
            w_a, w_h = tl.associative_scan((w_a, w_h), 0, _then, reverse=True)
            m_w = (o_w == 0)[:, None]
            w_a, w_h = tl.sum(tl.where(m_w, w_a, 0.0), axis=0), tl.sum(tl.where(m_w, w_h, 0.0), axis=0)
            b_a, b_h = _then(w_a, w_h, b_a, b_h)
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


@triton.jit
def _backward_tile(
    p_gh, p_a, s_ght, s_at, begin, o_s, L, o_d, m_d, GATED: tl.constexpr, REVERSE: tl.constexpr, HAS_GH: tl.constexpr,
    EXACT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The pairs (a_{s+1}, grad_h_s); a is 1 after the last step, beyond the first step both are the identity."""
    m_next = (o_s + 1 < L) & (o_s >= 0)
    o_next = _times(begin, o_s + 1, L, REVERSE)
    b_a = _load(p_a + o_next[:, :, None] * s_at + o_d, m_next[:, :, None] & m_d, False)
    if GATED:
        b_a = sigmoid(b_a, EXACT)
    b_a = tl.where(m_next[:, :, None], b_a, 1.0)
    b_g = tl.zeros_like(b_a)
    if HAS_GH:
        o_t = _times(begin, o_s, L, REVERSE)
        b_g = _load(p_gh + o_t[:, :, None] * s_ght + o_d, (o_s >= 0)[:, :, None] & m_d, EVEN)
    return b_a, b_g


@triton.jit
def _store_gradients(
    p_a, p_b, p_c, p_h, p_ga, p_gb, p_gc, s_at, s_bt, s_ct, s_ht, s_gt, begin, o_s, L, o_d, m_d, start_state, b_g,
    GATED: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """From the adjoint g of a tile to the gradients of a and b, or through the activations to those of f, i and d."""
    o_t = _times(begin, o_s, L, REVERSE)
    o_before = _times(begin, o_s - 1, L, REVERSE)
    b_h = _load(p_h + o_before[:, :, None] * s_ht + o_d, (o_s > 0)[:, :, None] & m_d, False)
    b_h = tl.where((o_s == 0)[:, :, None], start_state[None, None, :], b_h)
    m_t = o_s >= 0
    if GATED:
        mask = m_t[:, :, None] & m_d
        f = _load(p_a + o_t[:, :, None] * s_at + o_d, mask, EVEN)
        i = _load(p_b + o_t[:, :, None] * s_bt + o_d, mask, EVEN)
        d = _load(p_c + o_t[:, :, None] * s_ct + o_d, mask, EVEN)
        write, delta = sigmoid(i, EXACT), tanh(d, EXACT)
        slope = sigmoid_slope(f, sigmoid(f, EXACT), EXACT)
        _store(p_ga, s_gt, o_t, m_t, o_d, m_d, b_g * b_h * slope, EVEN)
        _store(p_gb, s_gt, o_t, m_t, o_d, m_d, b_g * delta * sigmoid_slope(i, write, EXACT), EVEN)
        _store(p_gc, s_gt, o_t, m_t, o_d, m_d, b_g * write * (1.0 - delta * delta), EVEN)
    else:
        _store(p_ga, s_gt, o_t, m_t, o_d, m_d, b_g * b_h, EVEN)
        _store(p_gb, s_gt, o_t, m_t, o_d, m_d, b_g, EVEN)


@triton.jit
def _store_start_gradient(p_gh0, p_a, s_at, begin, L, o_d, m_d, g, GATED: tl.constexpr, REVERSE: tl.constexpr):
    """grad_h0 = a_0 g_0; of a sequence without steps, the gradient of its last state."""
    if L > 0:
        o_first = _times(begin, 0, L, REVERSE)
        a = tl.load(p_a + o_first * s_at + o_d, mask=m_d, other=0.0).to(tl.float32)
        if GATED:
            a = sigmoid(a, True)
        g = a * g
    tl.store(p_gh0 + o_d, g, mask=m_d)


@triton.jit
def _forward_tile(
    p_a, p_b, p_c, s_at, s_bt, s_ct, o_t, m_t, o_d, m_d, GATED: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr
):
    """The pairs (a, b) of a tile; beyond the end of the sequence the identity (1, 0)."""
    mask = m_t[:, :, None] & m_d
    b_a = _load(p_a + o_t[:, :, None] * s_at + o_d, mask, EVEN)
    b_b = _load(p_b + o_t[:, :, None] * s_bt + o_d, mask, EVEN)
    if GATED:
        b_c = _load(p_c + o_t[:, :, None] * s_ct + o_d, mask, EVEN)
        b_a, b_b = sigmoid(b_a, EXACT), gated_write(b_b, b_c, EXACT)
    if not EVEN:
        b_a, b_b = tl.where(m_t[:, :, None], b_a, 1.0), tl.where(m_t[:, :, None], b_b, 0.0)
    return b_a, b_b


@triton.jit(do_not_specialize=["T"])
def _forward_stream(
    p_a, p_b, p_c, p_h0, p_h, p_last, p_cu, T, D, s_ab, s_at, s_bb, s_bt, s_cb, s_ct, d_blocks,
    GATED: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr, HAS_H0: tl.constexpr,
    HAS_CU: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_n = (tl.program_id(0) // d_blocks).to(tl.int64)
    o_d = (tl.program_id(0) % d_blocks) * BD + tl.arange(0, BD)
    m_d = o_d < D
    begin, L, i_b = _sequence(p_cu, i_n, T, HAS_CU)
    state = tl.zeros([BD], tl.float32)
    if HAS_H0:
        state = tl.load(p_h0 + i_n * D + o_d, mask=m_d, other=0.0)
    p_a, p_b, p_c, p_h = p_a + i_b * s_ab, p_b + i_b * s_bb, p_c + i_b * s_cb, p_h + i_b * T * D
    for start in tl.range(0, L, R * G, num_stages=STAGES):
        o_s = _steps(start, R, G)
        o_t = _times(begin, o_s, L, REVERSE)
        b_a, b_b = _forward_tile(p_a, p_b, p_c, s_at, s_bt, s_ct, o_t, o_s < L, o_d, m_d, GATED, EXACT, EVEN)
        b_a, b_h, g_a, g_h, x_a, x_h = _scan_tile(b_a, b_b, R, G)
        b_h += b_a * (x_h + x_a * state[None, :])[None, :, :]
        _store(p_h, D, o_t, o_s < L, o_d, m_d, b_h, EVEN)
        state = _last(g_h + g_a * state[None, :], G)
    tl.store(p_last + i_n * D + o_d, state, mask=m_d)


@triton.jit(do_not_specialize=["T", "chunks"])
def _forward_look_back(
    p_a, p_b, p_c, p_h0, p_h, p_last, p_flag, p_pair, p_state, T, D, s_ab, s_at, s_bb, s_bt, s_cb, s_ct, d_blocks,
    chunks, groups, GATED: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr,
    HAS_H0: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    i_c, i_n, i_g, o_d = _ticket(p_flag, d_blocks, groups, BD)
    m_d = o_d < D
    p_flag += 1 + i_g * chunks
    L = T.to(tl.int64)
    o_s = _steps(i_c.to(tl.int64) * (R * G), R, G)
    o_t = _times(i_n * 0, o_s, L, REVERSE)
    b_a, b_b = _forward_tile(
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
    b_a, b_h, g_a, g_h, x_a, x_h = _scan_tile(b_a, b_b, R, G)
    state = tl.zeros([BD], tl.float32)
    if HAS_H0:
        if i_c == 0:
            state = tl.load(p_h0 + i_n * D + o_d, mask=m_d, other=0.0)
    state, end = _carry(p_flag, p_pair, p_state, i_c, i_n * chunks, D, o_d, m_d, g_a, g_h, state, G, BD, FLAGS)
    b_h += b_a * (x_h + x_a * state[None, :])[None, :, :]
    _store(p_h + i_n * T * D, D, o_t, o_s < L, o_d, m_d, b_h, EVEN)
    if i_c == chunks - 1:
        tl.store(p_last + i_n * D + o_d, end, mask=m_d)


@triton.jit(do_not_specialize=["T"])
def _backward_stream(
    p_gh, p_glast, p_a, p_b, p_c, p_h, p_h0, p_ga, p_gb, p_gc, p_gh0, p_cu, T, D, s_ghb, s_ght, s_ab, s_at, s_bb, s_bt,
    s_cb, s_ct, s_hb, s_ht, s_gt, d_blocks, GATED: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr,
    HAS_GH: tl.constexpr,
    HAS_GLAST: tl.constexpr, HAS_H0: tl.constexpr, HAS_CU: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    i_n = (tl.program_id(0) // d_blocks).to(tl.int64)
    o_d = (tl.program_id(0) % d_blocks) * BD + tl.arange(0, BD)
    m_d = o_d < D
    begin, L, i_b = _sequence(p_cu, i_n, T, HAS_CU)
    state, start_state = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    if HAS_GLAST:
        state = tl.load(p_glast + i_n * D + o_d, mask=m_d, other=0.0)
    if HAS_H0:
        start_state = tl.load(p_h0 + i_n * D + o_d, mask=m_d, other=0.0)
    p_gh, p_h = p_gh + i_b * s_ghb, p_h + i_b * s_hb
    p_a, p_b, p_c = p_a + i_b * s_ab, p_b + i_b * s_bb, p_c + i_b * s_cb
    p_ga, p_gb, p_gc = p_ga + i_b * T * s_gt, p_gb + i_b * T * s_gt, p_gc + i_b * T * s_gt
    for start in tl.range(0, L, R * G, num_stages=STAGES):
        o_s = L - 1 - _steps(start, R, G)
        b_a, b_g = _backward_tile(p_gh, p_a, s_ght, s_at, begin, o_s, L, o_d, m_d, GATED, REVERSE, HAS_GH, EXACT, EVEN)
        b_a, b_g, g_a, g_g, x_a, x_g = _scan_tile(b_a, b_g, R, G)
        b_g += b_a * (x_g + x_a * state[None, :])[None, :, :]
        _store_gradients(
            p_a, p_b, p_c, p_h, p_ga, p_gb, p_gc, s_at, s_bt, s_ct, s_ht, s_gt, begin, o_s, L, o_d, m_d, start_state,
            b_g, GATED, REVERSE, EXACT, EVEN,
        )  # fmt: skip
        state = _last(g_g + g_a * state[None, :], G)
    _store_start_gradient(p_gh0 + i_n * D, p_a, s_at, begin, L, o_d, m_d, state, GATED, REVERSE)


@triton.jit(do_not_specialize=["T", "chunks"])
def _backward_look_back(
    p_gh, p_glast, p_a, p_b, p_c, p_h, p_h0, p_ga, p_gb, p_gc, p_gh0, p_flag, p_pair, p_state, T, D, s_ghb, s_ght,
    s_ab, s_at, s_bb, s_bt, s_cb, s_ct, s_hb, s_ht, s_gt, d_blocks, chunks, groups, GATED: tl.constexpr,
    REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr, HAS_GH: tl.constexpr, HAS_GLAST: tl.constexpr, HAS_H0: tl.constexpr, R: tl.constexpr,
    G: tl.constexpr, BD: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    i_c, i_n, i_g, o_d = _ticket(p_flag, d_blocks, groups, BD)
    m_d = o_d < D
    p_flag += 1 + i_g * chunks
    L = T.to(tl.int64)
    o_s = L - 1 - _steps(i_c.to(tl.int64) * (R * G), R, G)
    p_a, p_b, p_c = p_a + i_n * s_ab, p_b + i_n * s_bb, p_c + i_n * s_cb
    b_a, b_g = _backward_tile(
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
    b_a, b_g, g_a, g_g, x_a, x_g = _scan_tile(b_a, b_g, R, G)
    state, start_state = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    if HAS_GLAST:
        if i_c == 0:
            state = tl.load(p_glast + i_n * D + o_d, mask=m_d, other=0.0)
    if HAS_H0:
        start_state = tl.load(p_h0 + i_n * D + o_d, mask=m_d, other=0.0)
    state, end = _carry(p_flag, p_pair, p_state, i_c, i_n * chunks, D, o_d, m_d, g_a, g_g, state, G, BD, FLAGS)
    b_g += b_a * (x_g + x_a * state[None, :])[None, :, :]
    rows = i_n * T * s_gt
    _store_gradients(
        p_a, p_b, p_c, p_h + i_n * s_hb, p_ga + rows, p_gb + rows, p_gc + rows, s_at, s_bt, s_ct, s_ht, s_gt, i_n * 0, o_s, L,
        o_d, m_d, start_state, b_g, GATED, REVERSE, EXACT, EVEN,
    )  # fmt: skip
    if i_c == chunks - 1:
        _store_start_gradient(p_gh0 + i_n * D, p_a, s_at, i_n * 0, L, o_d, m_d, end, GATED, REVERSE)


# ---- host side ---------------------------------------------------------------------------------------------------------


def _tiles(dtype: torch.dtype, gated: bool, backward: bool, look_back: bool) -> tuple[int, int, int, int, int]:
    """(R, G, BD, warps, stages), each the fastest of some twenty on an H100 (docs/performance.md).

    G groups are what the threads hold at a time when each loads 16 bytes: 32 * warps * (16 / itemsize) / BD.
    """
    if look_back:
        return (8, 16, 32, 4, 1) if dtype == torch.float32 else (8, 32, 32, 4, 1)
    if dtype == torch.float32:
        return 4, 8, 32, 2, 3 if backward or gated else 4
    if gated:
        return (2, 32, 64, 8, 3) if backward else (2, 32, 32, 4, 3)
    return 4, 32, 64, 8, 3


def _plan(
    x: Tensor, N: int, T: int, D: int, packed_sequences: bool, gated: bool, backward: bool
) -> tuple[bool, int, int, int, int, int, int]:
    """Whether to look back, the tile, and the number of programs side by side. Looks back where whole sequences would
    leave most multiprocessors idle."""
    R, G, BD, warps, stages = _tiles(x.dtype, gated, backward, look_back=False)
    BD = min(BD, max(16, triton.next_power_of_2(D)))
    programs = N * triton.cdiv(D, BD)
    # A third of the multiprocessors streaming moves as much as all of them looking back.
    if packed_sequences or T <= 2 * R * G or 3 * programs >= multiprocessors(x.device):
        return False, R, G, BD, warps, stages, programs
    R, G, BD, warps, stages = _tiles(x.dtype, gated, backward, look_back=True)
    BD = min(BD, max(16, triton.next_power_of_2(D)))
    return True, R, G, BD, warps, stages, N * triton.cdiv(D, BD)


def _workspace(x: Tensor, N: int, D: int, chunks: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ticket counter and flags (zeroed), pairs, states."""
    flags = torch.zeros(1 + groups * chunks, dtype=torch.int32, device=x.device)
    return flags, x.new_empty((N, chunks, 2, D), dtype=torch.float32), x.new_empty((N, chunks, D), dtype=torch.float32)


def columns(f: Tensor, i: Tensor | None, d: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The gates as three tensors with contiguous rows; views where they are packed."""
    if i is None or d is None:
        f = f if f.stride(-1) == 1 else f.contiguous()
        D = f.shape[2] // 3
        return f[..., :D], f[..., D : 2 * D], f[..., 2 * D :]
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (f, i, d))


def run_forward(
    a: Tensor, b: Tensor, c: Tensor, h0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None, gated: bool
) -> tuple[Tensor, Tensor]:
    """(h, h_last) of h_t = a_t h_{t-1} + b_t; gated: a, b, c are f, i, d."""
    B, T, D = a.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h = torch.empty((B, T, D), dtype=a.dtype, device=a.device)
    h_last = torch.empty((N, D), dtype=torch.float32, device=a.device)
    if N == 0:
        return h, h_last
    h0 = None if h0 is None else h0.contiguous()
    look_back, R, G, BD, warps, stages, programs = _plan(a, N, T, D, cu_seqlens is not None, gated, False)
    strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(1), c.stride(0), c.stride(1))
    d_blocks = triton.cdiv(D, BD)
    exact, even = a.dtype == torch.float32, T % (R * G) == 0 and D % BD == 0 and cu_seqlens is None
    with device_of(a):
        if look_back:
            chunks = triton.cdiv(T, R * G)
            flags, pairs, states = _workspace(a, N, D, chunks, programs)
            _forward_look_back[(programs * chunks,)](
                a, b, c, h0, h, h_last, flags, pairs, states, T, D, *strides, d_blocks, chunks, programs, GATED=gated,
                REVERSE=reverse, EXACT=exact, EVEN=even,
                HAS_H0=h0 is not None, R=R, G=G, BD=BD, FLAGS=32 * warps, num_warps=warps,
            )  # fmt: skip
        else:
            _forward_stream[(programs,)](
                a, b, c, h0, h, h_last, cu_seqlens, T, D, *strides, d_blocks, GATED=gated, REVERSE=reverse,
                EXACT=exact, EVEN=even,
                HAS_H0=h0 is not None, HAS_CU=cu_seqlens is not None, R=R, G=G, BD=BD, STAGES=stages, num_warps=warps,
            )  # fmt: skip
    return h, h_last


def run_backward(
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    h: Tensor,
    h0: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    gated: bool,
) -> Tensor:
    """Fills `grads` (of a, b, and gated of c; rows of one stride) and returns grad_h0 (N, D)."""
    B, T, D = h.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grad_h0 = torch.empty((N, D), dtype=torch.float32, device=h.device)
    if N == 0:
        return grad_h0
    if grad_h is not None and grad_h.stride(2) != 1:
        grad_h = grad_h.contiguous()
    h = h if h.stride(2) == 1 else h.contiguous()
    h0, grad_last = (None if x is None else x.contiguous() for x in (h0, grad_last))
    look_back, R, G, BD, warps, stages, programs = _plan(a, N, T, D, cu_seqlens is not None, gated, True)
    ghs = (0, 0) if grad_h is None else (grad_h.stride(0), grad_h.stride(1))
    strides = (
        *ghs, a.stride(0), a.stride(1), b.stride(0), b.stride(1), c.stride(0), c.stride(1), h.stride(0), h.stride(1),
        grads[0].stride(1),
    )  # fmt: skip
    d_blocks = triton.cdiv(D, BD)
    exact, even = a.dtype == torch.float32, T % (R * G) == 0 and D % BD == 0 and cu_seqlens is None
    tensors = (grad_h, grad_last, a, b, c, h, h0, *grads, grad_h0)
    has = {"HAS_GH": grad_h is not None, "HAS_GLAST": grad_last is not None, "HAS_H0": h0 is not None}
    with device_of(a):
        if look_back:
            chunks = triton.cdiv(T, R * G)
            flags, pairs, states = _workspace(a, N, D, chunks, programs)
            _backward_look_back[(programs * chunks,)](
                *tensors, flags, pairs, states, T, D, *strides, d_blocks, chunks, programs, GATED=gated,
                REVERSE=reverse, EXACT=exact, EVEN=even, **has, R=R, G=G, BD=BD, FLAGS=32 * warps, num_warps=warps,
            )  # fmt: skip
        else:
            _backward_stream[(programs,)](
                *tensors, cu_seqlens, T, D, *strides, d_blocks, GATED=gated, REVERSE=reverse, EXACT=exact, EVEN=even, **has,
                HAS_CU=cu_seqlens is not None, R=R, G=G, BD=BD, STAGES=stages, num_warps=warps,
            )  # fmt: skip
    return grad_h0


def scan(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """newllm::scan"""
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
    return run_forward(a, b, b, h0, reverse, cu_seqlens, gated=False)


def scan_backward(
    grad_h: Tensor | None,
    grad_h_last: Tensor | None,
    a: Tensor,
    h: Tensor,
    h0: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """newllm::scan_backward"""
    a = a if a.stride(-1) == 1 else a.contiguous()
    grad_a, grad_b = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for _ in range(2))
    grads = (grad_a, grad_b, grad_b)
    grad_h0 = run_backward(grad_h, grad_h_last, a, a, a, h, h0, reverse, cu_seqlens, grads, gated=False)
    return grad_a, grad_b, grad_h0
