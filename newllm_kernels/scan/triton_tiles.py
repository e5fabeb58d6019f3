"""Tiles of the recurrence h_s = a_s h_{s-1} + b_s in Triton: loading pairs, scanning them, storing results and gradients.

A tile is R * G steps of BD columns, loaded as rows (R * G, BD) and scanned as (R, G, BD): G groups of R consecutive steps. Row
q holds step (q % G) * R + q // G. G is the number of rows that all threads together hold at a time, so a thread holds the R
steps of its groups: it scans them in its registers, and only the G totals go from thread to thread. (Rows in order of time
would send R times as much through shuffles. A tile loaded as (R, G, BD) leaves the order of the first two axes to the
compiler: Triton 3.9 takes the one, 3.6 the other.)

What a piece of the sequence does to any state is a pair: first (a1, b1), then (a2, b2) is (a1 a2, b1 a2 + b2).

Names: p_ pointer, b_ tile, o_ offsets, m_ mask, i_ program index, s_ stride. "Step" s counts along the recurrence, 0 .. L - 1,
whatever its direction in time. The backward runs over s = L - 1 .. 0 and carries v_s = a_s g_s, what step s hands to the
state before it, so that every input is read at its own step:
    g_s = grad_h_s + v_{s+1},   v_s = a_s g_s,   grad_b_s = g_s,   grad_a_s = g_s h_{s-1},   grad_h0 = v_0
"""

from __future__ import annotations

import triton
import triton.language as tl

from newllm_kernels.triton_math import gated_write, sigmoid, sigmoid_slope, tanh


@triton.jit
def load(p, stride, t, o_t, m_t, o_d, m_d, EVEN: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr):
    """The rows at times t + o_t in float32, as (R, G, BD); EVEN where all of them lie inside the tensor."""
    p_rows = p + t * stride + (o_t[:, None] * stride + o_d[None, :])
    tile = tl.load(p_rows) if EVEN else tl.load(p_rows, mask=m_t[:, None] & m_d[None, :], other=0.0)
    return tl.reshape(tile, (R, G, BD)).to(tl.float32)


@triton.jit
def store(
    p, stride, t, o_t, m_t, o_d, m_d, tile, EVEN: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr
):
    """The inverse of load."""
    rows = tl.reshape(tile.to(p.dtype.element_ty), (R * G, BD))
    p_rows = p + t * stride + (o_t[:, None] * stride + o_d[None, :])
    if EVEN:
        tl.store(p_rows, rows)
    else:
        tl.store(p_rows, rows, mask=m_t[:, None] & m_d[None, :])


@triton.jit
def inside(m_t, R: tl.constexpr, G: tl.constexpr):
    """A mask of rows as (R, G, 1)."""
    return tl.reshape(m_t, (R, G))[:, :, None]


@triton.jit
def then(a1, b1, a2, b2):
    return a1 * a2, b1 * a2 + b2


@triton.jit
def then_exclusive(a1, b1, x1, y1, a2, b2, x2, y2):
    """As then, and in (x, y) the pair of all but the last element."""
    return a1 * a2, b1 * a2 + b2, a1 * x2, b1 * x2 + y2


@triton.jit
def last_step(x, R: tl.constexpr):
    """(R, G, BD) -> the last entry of the first axis (1, G, BD). What is added to it is -0, which changes nothing and
    costs nothing where a thread holds the whole axis."""
    return tl.sum(tl.where(tl.arange(0, R)[:, None, None] == R - 1, x, -0.0), axis=0, keep_dims=True)


@triton.jit
def last_group(x, G: tl.constexpr):
    """(1, G, BD) -> the last entry of the second axis (1, 1, BD)."""
    return tl.sum(tl.where(tl.arange(0, G)[None, :, None] == G - 1, x, -0.0), axis=1, keep_dims=True)


@triton.jit
def before(x, first, G: tl.constexpr):
    """(1, G, BD) -> for every group the entry of the group before it, for the first one `first`."""
    o_g = tl.arange(0, G)[None, :, None]
    shifted = tl.gather(x, tl.broadcast_to(tl.maximum(o_g - 1, 0), x.shape), 1)
    return tl.where(o_g == 0, first, shifted)


@triton.jit
def scan_groups(b_a, b_b, R: tl.constexpr):
    """Pairs of steps (R, G, BD) -> their running pairs within each group, and the pairs of whole groups (1, G, BD)."""
    b_a, b_b = tl.associative_scan((b_a, b_b), 0, then)
    return b_a, b_b, last_step(b_a, R), last_step(b_b, R)


@triton.jit
def scan_groups_exclusive(b_a, b_b, R: tl.constexpr):
    """As scan_groups, but each running pair without its own step. Within a thread that only renames registers: one, times
    and minus zero, plus are known to change nothing."""
    ones, zeros = tl.full(b_a.shape, 1.0, tl.float32), tl.full(b_a.shape, -0.0, tl.float32)
    b_a, b_b, x_a, x_b = tl.associative_scan((b_a, b_b, ones, zeros), 0, then_exclusive)
    return x_a, x_b, last_step(b_a, R), last_step(b_b, R)


@triton.jit
def carry_through(g_a, g_b, state, G: tl.constexpr):
    """State before each group (1, G, BD) and after the last (1, 1, BD), from the groups' pairs and the state before all."""
    ones, zeros = tl.full(g_a.shape, 1.0, tl.float32), tl.full(g_b.shape, -0.0, tl.float32)
    g_a, g_b, x_a, x_b = tl.associative_scan((g_a, g_b, ones, zeros), 1, then_exclusive)
    return x_b + x_a * state, last_group(g_b + g_a * state, G)


@triton.jit
def tile_rows(R: tl.constexpr, G: tl.constexpr):
    """Steps within a tile that its rows hold, (R * G)."""
    o_q = tl.arange(0, R * G)
    return (o_q % G) * R + o_q // G


@triton.jit
def tile_times(rows, BACKWARDS: tl.constexpr, WIDE: tl.constexpr):
    """Times of a tile's rows, counted from that of its first step; WIDE where offsets within a tile need 64 bits."""
    o_t = rows.to(tl.int64) if WIDE else rows
    return -o_t if BACKWARDS else o_t


@triton.jit
def rows_left(start, L):
    """Steps from `start` to the end of the sequence, in 32 bits: a tile has far fewer rows than that."""
    return tl.minimum(L - start, 1 << 30).to(tl.int32)


@triton.jit
def sequence(p_cu, i_n, T, HAS_CU: tl.constexpr):
    """First time step, length and batch entry of a sequence."""
    if HAS_CU:
        begin = tl.load(p_cu + i_n)
        return begin, tl.load(p_cu + i_n + 1) - begin, i_n * 0
    else:
        return i_n * 0, T.to(tl.int64), i_n


@triton.jit
def state_of(p, i_row, D, o_d, m_d, HAS: tl.constexpr, BD: tl.constexpr):
    """A row of the states (rows, D) in float32, as (1, 1, BD); zero where there are none."""
    state = tl.zeros([BD], tl.float32)
    if HAS:
        state = tl.load(p + i_row * D + o_d, mask=m_d, other=0.0)
    return state[None, None, :]


@triton.jit
def store_columns(p, o_d, m_d, state, BD: tl.constexpr):
    tl.store(p + o_d, tl.reshape(state, (BD,)), mask=m_d)


@triton.jit
def forward_tile(
    p_a, p_b, p_c, s_at, s_bt, s_ct, t, o_t, m_t, o_d, m_d, GATED: tl.constexpr, EXACT: tl.constexpr,
    EVEN: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The pairs (a, b) of the tile at times t + o_t; beyond the end of the sequence the identity (1, 0)."""
    b_a = load(p_a, s_at, t, o_t, m_t, o_d, m_d, EVEN, R, G, BD)
    b_b = load(p_b, s_bt, t, o_t, m_t, o_d, m_d, EVEN, R, G, BD)
    if GATED:
        b_c = load(p_c, s_ct, t, o_t, m_t, o_d, m_d, EVEN, R, G, BD)
        b_a, b_b = sigmoid(b_a, EXACT), gated_write(b_b, b_c, EXACT)
    if not EVEN:
        b_a, b_b = tl.where(inside(m_t, R, G), b_a, 1.0), tl.where(inside(m_t, R, G), b_b, 0.0)
    return b_a, b_b


@triton.jit
def backward_tile(
    p_gh, p_a, s_ght, s_at, t, o_t, m_t, o_d, m_d, GATED: tl.constexpr, HAS_GH: tl.constexpr, EXACT: tl.constexpr,
    EVEN: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """a, its slope by the pre-activation (gated) and grad_h of a tile; before the first step 1, anything and 0."""
    b_a = load(p_a, s_at, t, o_t, m_t, o_d, m_d, EVEN, R, G, BD)
    b_slope = b_a
    if GATED:
        b_a = sigmoid(b_slope, EXACT)
        b_slope = sigmoid_slope(b_slope, b_a, EXACT)
    if not EVEN:
        b_a = tl.where(inside(m_t, R, G), b_a, 1.0)
    b_g = tl.zeros_like(b_a)
    if HAS_GH:
        b_g = load(p_gh, s_ght, t, o_t, m_t, o_d, m_d, EVEN, R, G, BD)
    return b_a, b_slope, b_g


@triton.jit
def _of_rows(p, t, o_t, m_t, R: tl.constexpr, G: tl.constexpr):
    """One number a row as (R, G, 1)."""
    return tl.reshape(tl.load(p + t + o_t, mask=m_t, other=0.0), (R, G))[:, :, None]


@triton.jit
def norm_gradient(
    p_gy, p_h, p_mean, p_rstd, p_mean_g, p_mean_gx, D, s_ht, t, o_t, m_t, o_d, m_d, weight, bias, clamp,
    HAS_CLAMP: tl.constexpr, EVEN: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What y = clamp(xhat * weight + bias) hands back to h: (g - mean(g) - xhat * mean(g * xhat)) / std, g = grad_y * weight."""
    g = load(p_gy, D, t, o_t, m_t, o_d, m_d, EVEN, R, G, BD)
    h = load(p_h, s_ht, t, o_t, m_t, o_d, m_d, EVEN, R, G, BD)
    rstd = _of_rows(p_rstd, t, o_t, m_t, R, G)
    xhat = (h - _of_rows(p_mean, t, o_t, m_t, R, G)) * rstd
    if HAS_CLAMP:
        y = xhat * weight + bias
        g = tl.where((y > clamp) | (y < -clamp), 0.0, g)
    return (g * weight - _of_rows(p_mean_g, t, o_t, m_t, R, G) - xhat * _of_rows(p_mean_gx, t, o_t, m_t, R, G)) * rstd


@triton.jit
def states_before(
    p_h, s_ht, t_before, o_t, rows, left, o_d, m_d, start_state, HAS_H0: tl.constexpr, R: tl.constexpr,
    G: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """h_{s-1}; before the first step, which is `left` - 1 rows away, the start state."""
    b_h = load(p_h, s_ht, t_before, o_t, rows < left - 1, o_d, m_d, False, R, G, BD)
    if HAS_H0:
        b_h = tl.where(inside(rows == left - 1, R, G), start_state, b_h)
    return b_h


@triton.jit
def store_gradients(
    p_b, p_c, p_ga, p_gb, p_gc, s_bt, s_ct, s_gt, t, o_t, m_t, o_d, m_d, b_slope, b_h, b_g, GATED: tl.constexpr,
    EXACT: tl.constexpr, EVEN: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """From the adjoint g to the gradients of a and b, or through the activations to those of f, i and d."""
    if GATED:
        i = load(p_b, s_bt, t, o_t, m_t, o_d, m_d, EVEN, R, G, BD)
        d = load(p_c, s_ct, t, o_t, m_t, o_d, m_d, EVEN, R, G, BD)
        write, delta = sigmoid(i, EXACT), tanh(d, EXACT)
        gf = b_g * b_h * b_slope
        gi = b_g * delta * sigmoid_slope(i, write, EXACT)
        gd = b_g * write * (1.0 - delta * delta)
        store(p_ga, s_gt, t, o_t, m_t, o_d, m_d, gf, EVEN, R, G, BD)
        store(p_gb, s_gt, t, o_t, m_t, o_d, m_d, gi, EVEN, R, G, BD)
        store(p_gc, s_gt, t, o_t, m_t, o_d, m_d, gd, EVEN, R, G, BD)
    else:
        store(p_ga, s_gt, t, o_t, m_t, o_d, m_d, b_g * b_h, EVEN, R, G, BD)
        store(p_gb, s_gt, t, o_t, m_t, o_d, m_d, b_g, EVEN, R, G, BD)
