"""Triton kernels of the cell over a sequence, LayerNorm and clamp in the loop: one program a batch row walks all T steps
with the row's state in registers, while the gates of later steps are on their way.

A step needs two sums over the row, one after the other, so it takes as long as they do, some half a microsecond, and B rows
fill B multiprocessors at most. Chunks of time in parallel passes (docs/kernels.md) are to come.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm_kernels.context_update.triton import clamped
from newllm_kernels.layer_norm.triton import reduce_partials
from newllm_kernels.scan.triton import columns
from newllm_kernels.triton_math import gated_write, sigmoid, sigmoid_slope, tanh
from newllm_kernels.triton_support import contiguous, kernel, power_of_two

WIDEST = 8192


@triton.jit
def _normalised(u, m_d, D, eps):
    """xhat and rstd of one row u (BD), zero where masked."""
    centred = tl.where(m_d, u - tl.sum(tl.where(m_d, u, 0.0), axis=0) * (1.0 / D), 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) * (1.0 / D) + eps)
    return centred * rstd, rstd


@kernel(do_not_specialize=("T",))
def _forward(
    p_f,
    p_i,
    p_d,
    p_c0,
    p_weight,
    p_bias,
    p_c,
    p_last,
    T,
    D,
    s_fb,
    s_ft,
    s_ib,
    s_it,
    s_db,
    s_dt,
    s_c0,
    eps,
    clamp,
    below,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MARK: tl.constexpr,
    EXACT: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    weight, bias = tl.full([BD], 1.0, tl.float32), tl.zeros([BD], tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    state = tl.load(p_c0 + i_b * s_c0 + o_d, mask=m_d, other=0.0).to(tl.float32)
    p_f, p_i, p_d, p_c = p_f + i_b * s_fb + o_d, p_i + i_b * s_ib + o_d, p_d + i_b * s_db + o_d, p_c + i_b * T * D + o_d
    for _ in tl.range(0, T, num_stages=STAGES):
        f = tl.load(p_f, mask=m_d, other=0.0).to(tl.float32)
        i = tl.load(p_i, mask=m_d, other=0.0).to(tl.float32)
        d = tl.load(p_d, mask=m_d, other=0.0).to(tl.float32)
        u = sigmoid(f, EXACT) * state + gated_write(i, d, EXACT)
        xhat, _ = _normalised(u, m_d, D, eps)
        y = xhat * weight + bias
        state = clamped(y, clamp)
        kept = state
        if MARK:  # what the clamp cut keeps its magnitude, all else stays below (context_scan/reference.py)
            kept = tl.where((y > clamp) | (y < -clamp), state, clamped(y, below))
        tl.store(p_c, kept.to(p_c.dtype.element_ty), mask=m_d)
        p_f, p_i, p_d, p_c = p_f + s_ft, p_i + s_it, p_d + s_dt, p_c + D
    tl.store(p_last + i_b * D + o_d, state, mask=m_d)


@kernel(do_not_specialize=("T",))
def _backward(
    p_gc,
    p_glast,
    p_f,
    p_i,
    p_d,
    p_c,
    p_c0,
    p_weight,
    p_bias,
    p_gf,
    p_gi,
    p_gd,
    p_gc0,
    p_gweight,
    p_gbias,
    T,
    D,
    s_gcb,
    s_gct,
    s_fb,
    s_ft,
    s_ib,
    s_it,
    s_db,
    s_dt,
    s_cb,
    s_ct,
    s_c0,
    s_out,
    eps,
    clamp,
    edge,
    HAS_GC: tl.constexpr,
    HAS_GLAST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MARK: tl.constexpr,
    EXACT: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    weight, bias = tl.full([BD], 1.0, tl.float32), tl.zeros([BD], tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    start = tl.load(p_c0 + i_b * s_c0 + o_d, mask=m_d, other=0.0).to(tl.float32)
    carry = tl.zeros([BD], tl.float32)
    if HAS_GLAST:
        carry = tl.load(p_glast + i_b * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    gweight, gbias = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    p_f, p_i, p_d, p_c = p_f + i_b * s_fb + o_d, p_i + i_b * s_ib + o_d, p_d + i_b * s_db + o_d, p_c + i_b * s_cb + o_d
    p_gc += i_b * s_gcb + o_d
    row = i_b * T * s_out + o_d
    p_gf, p_gi, p_gd = p_gf + row, p_gi + row, p_gd + row
    for step in tl.range(0, T, num_stages=STAGES):
        t = (i_b * 0 + T - 1) - step
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
        y = xhat * weight + bias
        if MARK:
            y, limit = tl.load(p_c + t * s_ct, mask=m_d, other=0.0).to(tl.float32), edge
            g = tl.where((y >= limit) | (y <= -limit), 0.0, g)
        else:
            g = tl.where((y > clamp) | (y < -clamp), 0.0, g)
        gweight += g * xhat
        gbias += g
        g *= weight
        du = (g - tl.sum(g, axis=0) * (1.0 / D) - xhat * (tl.sum(g * xhat, axis=0) * (1.0 / D))) * rstd
        carry = tl.where(m_d, du * forget, 0.0)
        o_out = t * s_out
        tl.store(p_gf + o_out, (du * before * sigmoid_slope(f, forget, EXACT)).to(p_gf.dtype.element_ty), mask=m_d)
        tl.store(p_gi + o_out, (du * delta * sigmoid_slope(i, write, EXACT)).to(p_gi.dtype.element_ty), mask=m_d)
        tl.store(p_gd + o_out, (du * write * (1.0 - delta * delta)).to(p_gd.dtype.element_ty), mask=m_d)
    tl.store(p_gc0 + i_b * D + o_d, carry, mask=m_d)
    tl.store(p_gweight + i_b * D + o_d, gweight, mask=m_d)
    tl.store(p_gbias + i_b * D + o_d, gbias, mask=m_d)


# ---- host side ---------------------------------------------------------------------------------------------------------


def _edges(dtype: torch.dtype, clamp: float) -> tuple[bool, float, float]:
    """Whether contexts carry a mark of the clamp, the clamp as the dtype holds it, and the next smaller value."""
    if dtype == torch.float32 or clamp == math.inf:
        return False, clamp, clamp
    edge = torch.tensor(clamp, dtype=dtype)
    return True, edge.item(), (edge.view(torch.int16) - 1).view(dtype).item()


def _launch(
    D: int, dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None, loads: int
) -> dict[str, int | bool]:
    BD = max(16, power_of_two(D))
    return {
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "EXACT": dtype == torch.float32,
        "BD": BD,
        "num_warps": min(16, max(1, BD // 256)),
        # Rows on their way: as many as fit beside each other into half a multiprocessor's shared memory.
        "STAGES": max(1, min(4, 98304 // (BD * dtype.itemsize * loads))),
    }


def _gate_strides(f: Tensor, i: Tensor, d: Tensor) -> tuple[int, ...]:
    return tuple(stride for gate in (f, i, d) for stride in gate.stride()[:2])


def context_scan(
    f: Tensor,
    i: Tensor | None,
    d: Tensor | None,
    c0: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    clamp: float,
) -> tuple[Tensor, Tensor]:
    """newllm::context_scan"""
    f, i, d = columns(f, i, d)
    weight, bias = contiguous(weight, bias)
    B, T, D = f.shape
    c = torch.empty((B, T, D), dtype=f.dtype, device=f.device)
    last = torch.empty((B, D), dtype=torch.float32, device=f.device)
    if B == 0:
        return c, last
    c0 = c0 if c0.stride(1) == 1 else c0.contiguous()
    mark, _, below = _edges(f.dtype, clamp)
    _forward[(B,)](
        f, i, d, c0, weight, bias, c, last, T, D, *_gate_strides(f, i, d), c0.stride(0), eps, clamp, below,
        MARK=mark, **_launch(D, f.dtype, weight, bias, loads=3),
    )  # fmt: skip
    return c, last


def context_scan_backward(
    grad_c: Tensor | None,
    grad_c_last: Tensor | None,
    f: Tensor,
    i: Tensor | None,
    d: Tensor | None,
    c: Tensor,
    c0: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    clamp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """newllm::context_scan_backward"""
    packed = i is None or d is None
    first = torch.empty(f.shape, dtype=f.dtype, device=f.device)
    second, third = (first.new_empty(0 if packed else f.shape) for _ in range(2))
    gf, gi, gd = columns(first, None, None) if packed else (first, second, third)
    f, i, d = columns(f, i, d)
    weight, bias = contiguous(weight, bias)
    B, T, D = c.shape
    grad_c0 = torch.empty((B, D), dtype=torch.float32, device=c.device)
    if B == 0:
        return first, second, third, grad_c0, *(torch.zeros(D, device=c.device) for _ in range(2))
    c, c0 = (x if x.stride(-1) == 1 else x.contiguous() for x in (c, c0))
    if grad_c is not None and grad_c.stride(2) != 1:
        grad_c = grad_c.contiguous()
    grad_c_last = None if grad_c_last is None else grad_c_last.contiguous()
    gweight, gbias = (torch.empty((B, D), dtype=torch.float32, device=c.device) for _ in range(2))
    mark, edge, _ = _edges(f.dtype, clamp)
    gc_strides = (0, 0) if grad_c is None else grad_c.stride()[:2]
    strides = (*gc_strides, *_gate_strides(f, i, d), *c.stride()[:2], c0.stride(0), gf.stride(1))
    _backward[(B,)](
        grad_c if grad_c is not None else c, grad_c_last, f, i, d, c, c0, weight, bias, gf, gi, gd, grad_c0,
        gweight, gbias, T, D, *strides, eps, clamp, edge, HAS_GC=grad_c is not None,
        HAS_GLAST=grad_c_last is not None, MARK=mark, **_launch(D, f.dtype, weight, bias, loads=6),
    )  # fmt: skip
    return first, second, third, grad_c0, *reduce_partials(B, gweight, gbias)
