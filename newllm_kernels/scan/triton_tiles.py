"""Tiles of the recurrence h_s = a_s h_{s-1} + b_s in Triton: loading pairs, scanning them, storing results and gradients.

A tile (R, G, BD) is G groups of R consecutive steps of BD columns. Threads share out groups and columns, so a thread holds
whole groups: it scans them in its registers, and only the G totals go from thread to thread. (Scanning a (BT, BD) tile, whose
rows a thread holds in turns, sends R times as much through shuffles.) What a piece of the sequence does to any state is a
pair: first (a1, b1), then (a2, b2) is (a1 a2, b1 a2 + b2).

Names: p_ pointer, b_ tile, o_ offsets, m_ mask, i_ program index, s_ stride. "Step" s counts along the recurrence, 0 .. L - 1,
whatever its direction in time. The backward runs over u = L - 1 - s:
    g_s = grad_h_s + a_{s+1} g_{s+1},   grad_b_s = g_s,   grad_a_s = g_s h_{s-1},   grad_h0 = a_0 g_0
"""

from __future__ import annotations

import triton
import triton.language as tl

from newllm_kernels.triton_math import gated_write, sigmoid, sigmoid_slope, tanh


@triton.jit
def load(p, mask, EVEN: tl.constexpr):
    """A tile in float32; EVEN where all of it lies inside the tensor."""
    if EVEN:
        return tl.load(p).to(tl.float32)
    else:
        return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def then(a1, b1, a2, b2):
    return a1 * a2, b1 * a2 + b2


@triton.jit
def then_exclusive(a1, b1, x1, y1, a2, b2, x2, y2):
    """As then, and in (x, y) the pair of all but the last element."""
    return a1 * a2, b1 * a2 + b2, a1 * x2, b1 * x2 + y2


@triton.jit
def last_of(x, N: tl.constexpr):
    """Entry N - 1 of the first axis."""
    index = tl.arange(0, N)[:, None] if len(x.shape) == 2 else tl.arange(0, N)[:, None, None]
    return tl.sum(tl.where(index == N - 1, x, 0.0), axis=0)


@triton.jit
def scan_tile(b_a, b_b, R: tl.constexpr, G: tl.constexpr):
    """Pairs of steps (R, G, BD) -> their running pairs within each group (R, G, BD), running pairs of whole groups
    including (G, BD) and excluding (G, BD) the group itself."""
    b_a, b_b = tl.associative_scan((b_a, b_b), 0, then)
    g_a, g_b = last_of(b_a, R), last_of(b_b, R)
    g_a, g_b, x_a, x_b = tl.associative_scan(
        (g_a, g_b, tl.zeros_like(g_a) + 1.0, tl.zeros_like(g_b)), 0, then_exclusive
    )
    return b_a, b_b, g_a, g_b, x_a, x_b


@triton.jit
def steps(start, R: tl.constexpr, G: tl.constexpr):
    """Numbers of the steps of a tile: (R, G)."""
    return start + tl.arange(0, G)[None, :] * R + tl.arange(0, R)[:, None]


@triton.jit
def times(begin, steps, L, REVERSE: tl.constexpr):
    """Positions in time of steps of the recurrence."""
    if REVERSE:
        return (begin + (L - 1 - steps)).to(tl.int64)
    else:
        return (begin + steps).to(tl.int64)


@triton.jit
def sequence(p_cu, i_n, T, HAS_CU: tl.constexpr):
    """First time step, length and batch entry of a sequence."""
    if HAS_CU:
        begin = tl.load(p_cu + i_n)
        return begin, tl.load(p_cu + i_n + 1) - begin, i_n * 0
    else:
        return i_n * 0, T.to(tl.int64), i_n


@triton.jit
def store(p_out, stride, o_t, m_t, o_d, m_d, tile, EVEN: tl.constexpr):
    """A tile into rows of a contiguous output."""
    p_tile = p_out + o_t[:, :, None] * stride + o_d
    if EVEN:
        tl.store(p_tile, tile.to(p_out.dtype.element_ty))
    else:
        tl.store(p_tile, tile.to(p_out.dtype.element_ty), mask=m_t[:, :, None] & m_d)


@triton.jit
def forward_tile(
    p_a, p_b, p_c, s_at, s_bt, s_ct, o_t, m_t, o_d, m_d, GATED: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr
):
    """The pairs (a, b) of a tile; beyond the end of the sequence the identity (1, 0)."""
    mask = m_t[:, :, None] & m_d
    b_a = load(p_a + o_t[:, :, None] * s_at + o_d, mask, EVEN)
    b_b = load(p_b + o_t[:, :, None] * s_bt + o_d, mask, EVEN)
    if GATED:
        b_c = load(p_c + o_t[:, :, None] * s_ct + o_d, mask, EVEN)
        b_a, b_b = sigmoid(b_a, EXACT), gated_write(b_b, b_c, EXACT)
    if not EVEN:
        b_a, b_b = tl.where(m_t[:, :, None], b_a, 1.0), tl.where(m_t[:, :, None], b_b, 0.0)
    return b_a, b_b


@triton.jit
def backward_tile(
    p_gh, p_a, s_ght, s_at, begin, o_s, L, o_d, m_d, GATED: tl.constexpr, REVERSE: tl.constexpr, HAS_GH: tl.constexpr,
    EXACT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The pairs (a_{s+1}, grad_h_s); a is 1 after the last step, beyond the first step both are the identity."""
    m_next = (o_s + 1 < L) & (o_s >= 0)
    o_next = times(begin, o_s + 1, L, REVERSE)
    b_a = load(p_a + o_next[:, :, None] * s_at + o_d, m_next[:, :, None] & m_d, False)
    if GATED:
        b_a = sigmoid(b_a, EXACT)
    b_a = tl.where(m_next[:, :, None], b_a, 1.0)
    b_g = tl.zeros_like(b_a)
    if HAS_GH:
        o_t = times(begin, o_s, L, REVERSE)
        b_g = load(p_gh + o_t[:, :, None] * s_ght + o_d, (o_s >= 0)[:, :, None] & m_d, EVEN)
    return b_a, b_g


@triton.jit
def store_gradients(
    p_a, p_b, p_c, p_h, p_ga, p_gb, p_gc, s_at, s_bt, s_ct, s_ht, s_gt, begin, o_s, L, o_d, m_d, start_state, b_g,
    GATED: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """From the adjoint g of a tile to the gradients of a and b, or through the activations to those of f, i and d."""
    o_t = times(begin, o_s, L, REVERSE)
    o_before = times(begin, o_s - 1, L, REVERSE)
    b_h = load(p_h + o_before[:, :, None] * s_ht + o_d, (o_s > 0)[:, :, None] & m_d, False)
    b_h = tl.where((o_s == 0)[:, :, None], start_state[None, None, :], b_h)
    m_t = o_s >= 0
    if GATED:
        mask = m_t[:, :, None] & m_d
        f = load(p_a + o_t[:, :, None] * s_at + o_d, mask, EVEN)
        i = load(p_b + o_t[:, :, None] * s_bt + o_d, mask, EVEN)
        d = load(p_c + o_t[:, :, None] * s_ct + o_d, mask, EVEN)
        write, delta = sigmoid(i, EXACT), tanh(d, EXACT)
        slope = sigmoid_slope(f, sigmoid(f, EXACT), EXACT)
        store(p_ga, s_gt, o_t, m_t, o_d, m_d, b_g * b_h * slope, EVEN)
        store(p_gb, s_gt, o_t, m_t, o_d, m_d, b_g * delta * sigmoid_slope(i, write, EXACT), EVEN)
        store(p_gc, s_gt, o_t, m_t, o_d, m_d, b_g * write * (1.0 - delta * delta), EVEN)
    else:
        store(p_ga, s_gt, o_t, m_t, o_d, m_d, b_g * b_h, EVEN)
        store(p_gb, s_gt, o_t, m_t, o_d, m_d, b_g, EVEN)


@triton.jit
def store_start_gradient(p_gh0, p_a, s_at, begin, L, o_d, m_d, g, GATED: tl.constexpr, REVERSE: tl.constexpr):
    """grad_h0 = a_0 g_0; of a sequence without steps, the gradient of its last state."""
    if L > 0:
        o_first = times(begin, 0, L, REVERSE)
        a = tl.load(p_a + o_first * s_at + o_d, mask=m_d, other=0.0).to(tl.float32)
        if GATED:
            a = sigmoid(a, True)
        g = a * g
    tl.store(p_gh0 + o_d, g, mask=m_d)
