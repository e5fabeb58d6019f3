"""Steps of the cell on one row in Triton, LayerNorm and clamp in the loop: a row's state in registers, the gates of later steps
on their way. Which steps a program walks says triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from newllm_kernels.layer_norm.triton import clamped
from newllm_kernels.triton_math import gated_write, sigmoid, sigmoid_slope, tanh


@triton.jit
def _add_both(a1, b1, a2, b2):
    return a1 + a2, b1 + b2


@triton.jit
def _sums(x, y):
    """Sums of two rows in one exchange between threads: a step is as long as its exchanges."""
    return tl.reduce((x, y), 0, _add_both)


@triton.jit
def _normalised(u, m_d, D, eps):
    """xhat and rstd of one row u (BD), zero where masked. The variance is that of the squares, unless the mean would eat its
    digits: then it is summed again, centred."""
    total, squares = _sums(u, u * u)
    mean = total * (1.0 / D)
    variance = squares * (1.0 / D) - mean * mean
    centred = tl.where(m_d, u - mean, 0.0)
    if variance < mean * mean:
        variance = tl.sum(centred * centred, axis=0) * (1.0 / D)
    rstd = tl.rsqrt(variance + eps)
    return centred * rstd, rstd


@triton.jit
def affine(p_weight, p_bias, o_d, m_d, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BD: tl.constexpr):
    weight, bias = tl.full([BD], 1.0, tl.float32), tl.zeros([BD], tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def forward_steps(
    p_f, p_i, p_d, p_c, begin, end, D, s_ft, s_it, s_dt, m_d, m_store, state, weight, bias, eps, clamp, below,
    MARK: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state after the steps begin .. end - 1; pointers are those of a row's columns."""
    p_f, p_i, p_d, p_c = p_f + begin * s_ft, p_i + begin * s_it, p_d + begin * s_dt, p_c + begin * D
    for _ in tl.range(begin, end, num_stages=STAGES):
        f = tl.load(p_f, mask=m_d, other=0.0).to(tl.float32)
        i = tl.load(p_i, mask=m_d, other=0.0).to(tl.float32)
        d = tl.load(p_d, mask=m_d, other=0.0).to(tl.float32)
        u = sigmoid(f, EXACT) * state + gated_write(i, d, EXACT)
        xhat, _rstd = _normalised(u, m_d, D, eps)
        y = xhat * weight + bias
        state = clamped(y, clamp)
        kept = state
        if MARK:  # what the clamp cut keeps its magnitude, all else stays below (context_scan/reference.py)
            kept = tl.where((y > clamp) | (y < -clamp), state, clamped(y, below))
        tl.store(p_c, kept.to(p_c.dtype.element_ty), mask=m_store)
        p_f, p_i, p_d, p_c = p_f + s_ft, p_i + s_it, p_d + s_dt, p_c + D
    return state


@triton.jit
def backward_steps(
    p_gc, p_f, p_i, p_d, p_c, p_gf, p_gi, p_gd, start, first, end, D, s_gct, s_ft, s_it, s_dt, s_ct, s_out, m_d,
    m_store, carry, weight, bias, eps, clamp, edge, HAS_GC: tl.constexpr, MARK: tl.constexpr, EXACT: tl.constexpr,
    BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Steps end - 1 .. first: what comes back from before them, and their share of the gradients of weight and bias."""
    gweight, gbias = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    o_d = tl.arange(0, BD)
    for step in tl.range(0, end - first, num_stages=STAGES):
        t = end - 1 - step
        f = tl.load(p_f + t * s_ft, mask=m_d, other=0.0).to(tl.float32)
        i = tl.load(p_i + t * s_it, mask=m_d, other=0.0).to(tl.float32)
        d = tl.load(p_d + t * s_dt, mask=m_d, other=0.0).to(tl.float32)
        before = tl.load(p_c + (t - 1) * s_ct, mask=m_d & (o_d * 0 + t > 0), other=0.0).to(tl.float32)
        before = tl.where(t > 0, before, start)
        g = carry
        if HAS_GC:
            g += tl.load(p_gc + t * s_gct, mask=m_d, other=0.0).to(tl.float32)
        forget, write, delta = sigmoid(f, EXACT), sigmoid(i, EXACT), tanh(d, EXACT)
        xhat, rstd = _normalised(forget * before + write * delta, m_d, D, eps)
        if MARK:
            y, limit = tl.load(p_c + t * s_ct, mask=m_d, other=0.0).to(tl.float32), edge
            g = tl.where((y >= limit) | (y <= -limit), 0.0, g)
        else:
            y = xhat * weight + bias
            g = tl.where((y > clamp) | (y < -clamp), 0.0, g)
        gweight += g * xhat
        gbias += g
        g *= weight
        sum_g, sum_gx = _sums(g, g * xhat)
        du = (g - sum_g * (1.0 / D) - xhat * (sum_gx * (1.0 / D))) * rstd
        carry = tl.where(m_d, du * forget, 0.0)
        o_out = t * s_out
        gf, gi = du * before * sigmoid_slope(f, forget, EXACT), du * delta * sigmoid_slope(i, write, EXACT)
        tl.store(p_gf + o_out, gf.to(p_gf.dtype.element_ty), mask=m_store)
        tl.store(p_gi + o_out, gi.to(p_gi.dtype.element_ty), mask=m_store)
        tl.store(p_gd + o_out, (du * write * (1.0 - delta * delta)).to(p_gd.dtype.element_ty), mask=m_store)
    return carry, gweight, gbias
