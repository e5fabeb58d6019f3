"""Triton kernels of one step of the cell: tiles of whole rows (BR, BD), as in layer_norm/triton.py."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm_kernels import tuning
from newllm_kernels.layer_norm.triton import clamped, reduce_partials, row_statistics
from newllm_kernels.layer_norm.triton_tiles import ONE_TILE_EACH, RowTile, chosen, row_tile
from newllm_kernels.scan.triton import columns
from newllm_kernels.triton_math import gated_write, sigmoid, sigmoid_slope, tanh
from newllm_kernels.triton_support import contiguous, kernel


@triton.jit
def load_gates(p_f, p_i, p_d, o_f, o_i, o_d, mask):
    f = tl.load(p_f + o_f, mask=mask, other=0.0).to(tl.float32)
    i = tl.load(p_i + o_i, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(p_d + o_d, mask=mask, other=0.0).to(tl.float32)
    return f, i, d


@kernel(do_not_specialize=("rows",))
def _forward(
    p_f, p_i, p_d, p_c, p_weight, p_bias, p_out, rows, D, s_f, s_i, s_d, s_c, eps, clamp, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    o_r = (tl.program_id(0) * BR + tl.arange(0, BR).to(tl.int64))[:, None]
    mask = o_r < rows if EVEN else (o_r < rows) & m_d[None, :]
    f, i, d = load_gates(p_f, p_i, p_d, o_r * s_f + o_d, o_r * s_i + o_d, o_r * s_d + o_d, mask)
    c = tl.load(p_c + o_r * s_c + o_d, mask=mask, other=0.0).to(tl.float32)
    u = sigmoid(f, EXACT) * c + gated_write(i, d, EXACT)  # zero where all are
    centred, _, rstd = row_statistics(u, m_d, D, eps, EVEN)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    tl.store(p_out + o_r * D + o_d, clamped(y, clamp).to(p_out.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=("rows",))
def _backward(
    p_grad, p_f, p_i, p_d, p_c, p_weight, p_bias, p_gf, p_gi, p_gd, p_gc, p_gweight, p_gbias, rows, D, s_grad, s_f,
    s_i, s_d, s_c, s_out, eps, clamp, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    EVEN: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    if HAS_WEIGHT:
        weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    gweight, gbias = tl.zeros([BR, BD], tl.float32), tl.zeros([BR, BD], tl.float32)
    for i_r in tl.range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0), num_stages=STAGES):
        o_r = (i_r * BR + tl.arange(0, BR).to(tl.int64))[:, None]
        mask = o_r < rows if EVEN else (o_r < rows) & m_d[None, :]
        f, i, d = load_gates(p_f, p_i, p_d, o_r * s_f + o_d, o_r * s_i + o_d, o_r * s_d + o_d, mask)
        c = tl.load(p_c + o_r * s_c + o_d, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(p_grad + o_r * s_grad + o_d, mask=mask, other=0.0).to(tl.float32)
        forget, write, delta = sigmoid(f, EXACT), sigmoid(i, EXACT), tanh(d, EXACT)
        centred, _, rstd = row_statistics(forget * c + write * delta, m_d, D, eps, EVEN)
        xhat = centred * rstd[:, None]
        y = xhat
        if HAS_WEIGHT:
            y *= weight
        if HAS_BIAS:
            y += bias
        g = tl.where((y > clamp) | (y < -clamp), 0.0, g)
        gweight += g * xhat
        gbias += g
        if HAS_WEIGHT:
            g *= weight
        mean_g, mean_gx = tl.sum(g, axis=1) * (1.0 / D), tl.sum(g * xhat, axis=1) * (1.0 / D)
        du = (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None]
        o_out = o_r * s_out + o_d
        tl.store(p_gf + o_out, (du * c * sigmoid_slope(f, forget, EXACT)).to(p_gf.dtype.element_ty), mask=mask)
        tl.store(p_gi + o_out, (du * delta * sigmoid_slope(i, write, EXACT)).to(p_gi.dtype.element_ty), mask=mask)
        tl.store(p_gd + o_out, (du * write * (1.0 - delta * delta)).to(p_gd.dtype.element_ty), mask=mask)
        tl.store(p_gc + o_r * D + o_d, (du * forget).to(p_gc.dtype.element_ty), mask=mask)
    row = tl.program_id(0) * D + o_d
    tl.store(p_gweight + row, tl.sum(gweight, axis=0), mask=m_d)
    tl.store(p_gbias + row, tl.sum(gbias, axis=0), mask=m_d)


# As those of layer_norm/triton_tiles.py: the fastest in the H100's sweeps, with loads ahead and without. A tile is five tensors
# read and four written, so it is small, and threads with 8 elements need half the registers.
_BACKWARD_TILES = ((1024, 16, 4, 2), (1024, 16, 8, 2), (2048, 16, 2, 2), (1024, 16, 4, 1), (1024, 8, 4, 1))


def gate_rows(f: Tensor, i: Tensor | None, d: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The gates (B, D) as three tensors with contiguous rows."""
    unsqueezed = (None if x is None else x[:, None] for x in (f, i, d))
    return tuple(x[:, 0] for x in columns(*unsqueezed))


def context_update(
    f: Tensor,
    i: Tensor | None,
    d: Tensor | None,
    c: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    clamp: float,
) -> Tensor:
    """newllm::context_update"""
    f, i, d = gate_rows(f, i, d)
    weight, bias = contiguous(weight, bias)
    rows, D = c.shape
    out = torch.empty((rows, D), dtype=c.dtype, device=c.device)
    if rows == 0:
        return out
    c = c if c.stride(1) == 1 else c.contiguous()
    tensors = (f, i, d, c, weight, bias, out)
    tile = row_tile(D, 2048, 16)
    if tuning.tries(c.device):
        run = functools.partial(_launch_forward, *tensors, eps, clamp)
        tile = chosen(("context_update", "forward", str(c.dtype)), tile, ONE_TILE_EACH, f, run)
    _launch_forward(*tensors, eps, clamp, tile)
    return out


def _launch_forward(f, i, d, c, weight, bias, out, eps, clamp, tile: RowTile) -> None:
    rows, D = c.shape
    _forward[(tile.programs(rows, c.device),)](
        f, i, d, c, weight, bias, out, rows, D, f.stride(0), i.stride(0), d.stride(0), c.stride(0), eps, clamp,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, EXACT=f.dtype == torch.float32, EVEN=tile.BD == D,
        BR=tile.BR, BD=tile.BD, num_warps=tile.warps,
    )  # fmt: skip


def context_update_backward(
    grad: Tensor,
    f: Tensor,
    i: Tensor | None,
    d: Tensor | None,
    c: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    clamp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """newllm::context_update_backward"""
    packed = i is None or d is None
    first = torch.empty(f.shape, dtype=f.dtype, device=f.device)
    second, third = (first.new_empty(0 if packed else f.shape) for _ in range(2))
    gf, gi, gd = gate_rows(first, None, None) if packed else (first, second, third)
    f, i, d = gate_rows(f, i, d)
    weight, bias = contiguous(weight, bias)
    rows, D = c.shape
    grad_c = torch.empty((rows, D), dtype=c.dtype, device=c.device)
    if rows == 0:
        return first, second, third, grad_c, *(torch.zeros(D, device=c.device) for _ in range(2))
    c, grad = (x if x.stride(1) == 1 else x.contiguous() for x in (c, grad))
    tensors = (grad, f, i, d, c, weight, bias, gf, gi, gd, grad_c)
    tile = row_tile(D, 1024, 16, resident=4, stages=2 if D * c.element_size() <= 8192 else 1)
    if tuning.tries(c.device):
        run = functools.partial(_launch_backward, *tensors, eps, clamp)
        tile = chosen(("context_update", "backward", str(c.dtype)), tile, _BACKWARD_TILES, f, run)
    return first, second, third, grad_c, *_launch_backward(*tensors, eps, clamp, tile)


def _launch_backward(
    grad, f, i, d, c, weight, bias, gf, gi, gd, grad_c, eps, clamp, tile: RowTile
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias."""
    rows, D = c.shape
    parts = tile.programs(rows, c.device)
    gweight, gbias = torch.empty((2, parts, D), dtype=torch.float32, device=c.device)
    _backward[(parts,)](
        grad, f, i, d, c, weight, bias, gf, gi, gd, grad_c, gweight, gbias, rows, D, grad.stride(0), f.stride(0),
        i.stride(0), d.stride(0), c.stride(0), gf.stride(0), eps, clamp, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, EXACT=f.dtype == torch.float32, EVEN=tile.BD == D, BR=tile.BR, BD=tile.BD,
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return reduce_partials(parts, gweight, gbias)
