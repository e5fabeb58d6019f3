"""Triton kernels of one step of the full cell: what stands between its matrix products.

Rows are those of the batch. Products come in the dtype in which they are summed; what the next product reads goes out in that
of the tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from newllm_kernels.layer_norm.triton import clamped, row_statistics
from newllm_kernels.triton_math import gated_write, sigmoid, sigmoid_slope, tanh
from newllm_kernels.triton_support import INTERPRETED, kernel

# Of ACT, in the order of reference.ACTIVATIONS, and of NORM, in that of reference.NORMS.
RELU, GELU, SILU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NORM_NONE, NORM_STATE, NORM_OUTPUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

if INTERPRETED:

    @triton.jit
    def _erfc(x):
        return 1.0 - tl.erf(x)

else:

    @triton.jit
    def _erfc(x):
        """Keeps its digits where 1 - erf(x) has none left."""
        return libdevice.erfc(x)


@triton.jit
def _activated(a, ACT: tl.constexpr, EXACT: tl.constexpr):
    if ACT == RELU:
        return tl.where(a <= 0.0, 0.0, a)  # NaN stays
    elif ACT == GELU:
        return a * 0.5 * _erfc(a * -0.7071067811865476)
    elif ACT == SILU:
        return a * sigmoid(a, EXACT)
    else:
        return tanh(a, EXACT)


@triton.jit
def _activated_slope(a, ACT: tl.constexpr, EXACT: tl.constexpr):
    """The activation and its derivative."""
    if ACT == RELU:
        return tl.where(a <= 0.0, 0.0, a), tl.where(a <= 0.0, 0.0, 1.0)
    elif ACT == GELU:
        below = 0.5 * _erfc(a * -0.7071067811865476)
        return a * below, below + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)
    elif ACT == SILU:
        s = sigmoid(a, EXACT)
        return a * s, s + a * sigmoid_slope(a, s, EXACT)
    else:
        y = tanh(a, EXACT)
        return y, 1.0 - y * y


@triton.jit
def _load(p, offsets, mask):
    return tl.load(p + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(p, offsets, x, mask):
    tl.store(p + offsets, x.to(p.dtype.element_ty), mask=mask)


MOST_OPERAND = tl.constexpr(65504.0)  # of float16


@triton.jit
def _store_operand(p, offsets, x, mask):
    """What the next product reads: of what is finite, something finite."""
    if p.dtype.element_ty == tl.float16:
        x = tl.where(tl.abs(x) < float("inf"), clamped(x, MOST_OPERAND), x)
    _store(p, offsets, x, mask)


@kernel()
def hidden_forward(
    p_z, p_product, p_add, p_h, p_pre, Z, s_z, s_pre, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr,
    ACT: tl.constexpr, EXACT: tl.constexpr, BZ: tl.constexpr,
):  # fmt: skip
    """h = act(a), a = product [+ z] [+ bias]: a program has BZ units of one row."""
    row = tl.program_id(0).to(tl.int64)
    o_z = tl.program_id(1) * BZ + tl.arange(0, BZ)
    mask = o_z < Z
    a = _load(p_product, row * Z + o_z, mask)
    if HAS_Z:
        a += _load(p_z, row * s_z + o_z, mask)
    if HAS_BIAS:
        a += _load(p_add, o_z, mask)
    if SAVE:
        _store(p_pre, row * s_pre + o_z, a, mask)
    _store_operand(p_h, row * Z + o_z, _activated(a, ACT, EXACT), mask)


@kernel()
def hidden_backward(
    p_product, p_pre, p_grad, p_read, p_h, H, s_pre, s_grad, s_h, ACT: tl.constexpr, EXACT: tl.constexpr,
    BZ: tl.constexpr,
):  # fmt: skip
    """Gradient of a from that of h, once more as the next product reads it, and h again, from a."""
    row = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BZ + tl.arange(0, BZ)
    mask = o_h < H
    h, slope = _activated_slope(_load(p_pre, row * s_pre + o_h, mask), ACT, EXACT)
    grad = _load(p_product, row * H + o_h, mask) * slope
    _store(p_grad, row * s_grad + o_h, grad, mask)
    _store(p_read, row * H + o_h, grad, mask)
    _store(p_h, row * s_h + o_h, h, mask)


@triton.jit
def _parameter(p, o_d, m_d, PRESENT: tl.constexpr, absent: tl.constexpr):
    """A vector (1, BD) of weights or biases, or what stands for it."""
    if PRESENT:
        return tl.load(p + o_d, mask=m_d, other=0.0).to(tl.float32)
    else:
        return tl.full([1, o_d.shape[1]], absent, tl.float32)


@triton.jit
def _decay(keep, xhat, rstd, weight, D, NORM: tl.constexpr):
    """The diagonal of dc_t/dc_{t-1} along the direct path, clamp aside."""
    if NORM == NORM_STATE:
        return keep * weight * rstd[:, None] * (1.0 - (1.0 + xhat * xhat) * (1.0 / D))
    else:
        return keep


@kernel(do_not_specialize=("rows",))
def update_forward(
    p_product, p_z, p_add, p_state, p_weight, p_bias, p_c, p_read, p_pre, p_decay, rows, D, s_z, s_c, s_pre, eps,
    clamp, below, HAS_Z: tl.constexpr, HAS_ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, MARK: tl.constexpr, EXACT: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """f, i, d = product [+ z] [+ gate bias]. The state (rows, D) moves on in place; c is stored, with its mark where the clamp
    cut, and what the next step reads of it; p_decay gathers the product of the steps' decays."""
    o_d = tl.arange(0, BD)[None, :]
    m_d = o_d < D
    row = (tl.program_id(0) * BR + tl.arange(0, BR).to(tl.int64))[:, None]
    mask = (row < rows) & m_d
    own, packed = row * D + o_d, 3 * row * D + o_d
    f, i, d = _load(p_product, packed, mask), _load(p_product, packed + D, mask), _load(p_product, packed + 2 * D, mask)
    state = _load(p_state, own, mask)
    weight, bias = _parameter(p_weight, o_d, m_d, HAS_WEIGHT, 1.0), _parameter(p_bias, o_d, m_d, HAS_BIAS, 0.0)
    if HAS_Z:
        from_z = row * s_z + o_d
        f, i, d = f + _load(p_z, from_z, mask), i + _load(p_z, from_z + D, mask), d + _load(p_z, from_z + 2 * D, mask)
    if HAS_ADD:
        f += _load(p_add, o_d, m_d)
        i += _load(p_add, o_d + D, m_d)
        d += _load(p_add, o_d + 2 * D, m_d)
    if SAVE:
        kept = row * s_pre + o_d
        _store(p_pre, kept, f, mask)
        _store(p_pre, kept + D, i, mask)
        _store(p_pre, kept + 2 * D, d, mask)
    keep = sigmoid(f, EXACT)
    u = tl.where(mask, keep * state + gated_write(i, d, EXACT), 0.0)
    xhat, rstd = u, tl.sum(u, axis=1)  # where no norm needs them, nothing reads them
    if NORM != NORM_NONE:
        centred, _, rstd = row_statistics(u, tl.arange(0, BD) < D, D, eps, False)
        xhat = centred * rstd[:, None]
    normed = clamped(xhat * weight + bias, clamp)
    c = normed if NORM == NORM_STATE else u
    _store(p_state, own, c, mask)
    if DECAY:
        _store(p_decay, own, _load(p_decay, own, mask) * _decay(keep, xhat, rstd, weight, D, NORM), mask)
    if MARK:  # what the clamp cut keeps its magnitude, all else has a smaller
        c = tl.where(tl.abs(c) < clamp, clamped(c, below), c)
    _store(p_c, row * s_c + o_d, c, mask)
    _store_operand(p_read, own, u if NORM == NORM_NONE else normed, mask)


@triton.jit
def _through_norm(g, xhat, rstd, D):
    """Gradient of what LayerNorm saw from that of xhat: (BR, BD)."""
    mean_g, mean_gx = tl.sum(g, axis=1) * (1.0 / D), tl.sum(g * xhat, axis=1) * (1.0 / D)
    return (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None]


@kernel(do_not_specialize=("rows",))
def update_backward(
    p_pre, p_before, p_c, p_grad_c, p_product, p_carry, p_weight, p_bias, p_grad, p_read, p_norm, p_decay, rows, D, s_pre,
    s_before, s_c, s_grad_c, s_grad, eps, clamp, edge, HAS_GRAD: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, MARK: tl.constexpr, EXACT: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of f, i, d from that of c_t: `carry` (rows, D), what comes of step t + 1 directly, `product`, what comes through
    the first layer that read c_t, and grad_c; p_read has them once more as the next product reads them. carry moves on in place; p_norm (rows, 2, D) gathers those of weight and bias."""
    o_d = tl.arange(0, BD)[None, :]
    m_d = o_d < D
    row = (tl.program_id(0) * BR + tl.arange(0, BR).to(tl.int64))[:, None]
    mask = (row < rows) & m_d
    own, of_pre, of_norm = row * D + o_d, row * s_pre + o_d, 2 * row * D + o_d
    f, i, d = _load(p_pre, of_pre, mask), _load(p_pre, of_pre + D, mask), _load(p_pre, of_pre + 2 * D, mask)
    before, g = _load(p_before, row * s_before + o_d, mask), _load(p_carry, own, mask)
    through, stored = _load(p_product, own, mask), _load(p_c, row * s_c + o_d, mask)
    weight, bias = _parameter(p_weight, o_d, m_d, HAS_WEIGHT, 1.0), _parameter(p_bias, o_d, m_d, HAS_BIAS, 0.0)
    if HAS_GRAD:
        g += _load(p_grad_c, row * s_grad_c + o_d, mask)
    forget, write, delta = sigmoid(f, EXACT), sigmoid(i, EXACT), tanh(d, EXACT)
    seen = stored if NORM == NORM_OUTPUT else tl.where(mask, forget * before + write * delta, 0.0)
    xhat, rstd = seen, tl.sum(seen, axis=1)
    if NORM != NORM_NONE:
        centred, _, rstd = row_statistics(seen, tl.arange(0, BD) < D, D, eps, False)
        xhat = centred * rstd[:, None]
        y = xhat * weight + bias
        to_norm = g + through if NORM == NORM_STATE else through
        if MARK:
            to_norm = tl.where(tl.abs(stored) >= edge, 0.0, to_norm)
        else:
            to_norm = tl.where((y > clamp) | (y < -clamp), 0.0, to_norm)
        _store(p_norm, of_norm, _load(p_norm, of_norm, mask) + to_norm * xhat, mask)
        _store(p_norm, of_norm + D, _load(p_norm, of_norm + D, mask) + to_norm, mask)
        back = _through_norm(tl.where(mask, to_norm * weight, 0.0), xhat, rstd, D)
        du = back if NORM == NORM_STATE else g + back
    else:
        du = g + through
    df, di = du * before * sigmoid_slope(f, forget, EXACT), du * delta * sigmoid_slope(i, write, EXACT)
    dd = du * write * (1.0 - delta * delta)
    out, packed = row * s_grad + o_d, 3 * row * D + o_d
    _store(p_grad, out, df, mask)
    _store(p_grad, out + D, di, mask)
    _store(p_grad, out + 2 * D, dd, mask)
    _store(p_read, packed, df, mask)
    _store(p_read, packed + D, di, mask)
    _store(p_read, packed + 2 * D, dd, mask)
    _store(p_carry, own, du * forget, mask)
    if DECAY:
        _store(p_decay, own, _load(p_decay, own, mask) * _decay(forget, xhat, rstd, weight, D, NORM), mask)
