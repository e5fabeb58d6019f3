"""Triton kernels of LayerNorm, with and without a residual, forward and backward.

    narrow   a tile of BR whole rows (BR, BD) in registers: every input is read once. Backward, programs stay and walk the
             rows with a stride of the grid, so that weight gradients are summed in registers and written once a program.
    wide     D > WIDEST: a row does not fit, it is walked in blocks of BD columns, three times forward and twice backward;
             it comes from the second-level cache after the first time.

Weight gradients go in two stages, both in a fixed order: partial sums (programs, D), then their sum.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm_kernels import tuning
from newllm_kernels.layer_norm.triton_tiles import ONE_TILE_EACH, WEIGHTS, RowTile, chosen, row_tile, weights_tile
from newllm_kernels.triton_support import cdiv, contiguous, kernel

WIDEST = 8192  # columns of a row that is kept in registers


@triton.jit
def clamped(y, limit):
    """NaN passes through, as in torch.clamp."""
    y = tl.where(y > limit, limit, y)
    return tl.where(y < -limit, -limit, y)


@triton.jit
def row_statistics(x, m_d, D, eps, EVEN: tl.constexpr):
    """x (BR, BD) float32 -> centred x, zero where masked, mean (BR), rstd (BR). EVEN: no column is masked."""
    mean = tl.sum(x, axis=1) * (1.0 / D)
    centred = x - mean[:, None]
    if not EVEN:
        centred = tl.where(m_d[None, :], centred, 0.0)
    return centred, mean, tl.rsqrt(tl.sum(centred * centred, axis=1) * (1.0 / D) + eps)


@kernel(do_not_specialize=("rows",))
def _forward_narrow(
    p_x, p_residual, p_weight, p_bias, p_y, p_sum, p_mean, p_rstd, rows, D, s_x, s_residual, eps, clamp,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CLAMP: tl.constexpr,
    EVEN: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BD)
    o_r = tl.program_id(0) * BR + tl.arange(0, BR).to(tl.int64)
    m_d, m_r = o_d < D, o_r < rows
    mask = m_r[:, None] if EVEN else m_r[:, None] & m_d[None, :]
    x = tl.load(p_x + o_r[:, None] * s_x + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    p_row = o_r[:, None] * D + o_d[None, :]
    if HAS_RESIDUAL:
        x += tl.load(p_residual + o_r[:, None] * s_residual + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        kept = x.to(p_sum.dtype.element_ty)  # what is normalised is what is kept
        tl.store(p_sum + p_row, kept, mask=mask)
        x = kept.to(tl.float32)
    centred, mean, rstd = row_statistics(x, m_d, D, eps, EVEN)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if HAS_CLAMP:
        y = clamped(y, clamp)
    tl.store(p_y + p_row, y.to(p_y.dtype.element_ty), mask=mask)
    tl.store(p_mean + o_r, mean, mask=m_r)
    tl.store(p_rstd + o_r, rstd, mask=m_r)


@kernel(do_not_specialize=("rows",))
def _backward_narrow(
    p_gy, p_gsum, p_x, p_mean, p_rstd, p_weight, p_gx, p_gweight, p_gbias, rows, D, s_gy, s_gsum, s_x,
    HAS_GY: tl.constexpr, HAS_GSUM: tl.constexpr, HAS_WEIGHT: tl.constexpr, EVEN: tl.constexpr, BR: tl.constexpr,
    BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    if HAS_WEIGHT:
        weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    gweight, gbias = tl.zeros([BR, BD], tl.float32), tl.zeros([BR, BD], tl.float32)
    for i_r in tl.range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0), num_stages=STAGES):
        o_r = i_r * BR + tl.arange(0, BR).to(tl.int64)
        m_r = o_r < rows
        mask = m_r[:, None] if EVEN else m_r[:, None] & m_d[None, :]
        gx = tl.zeros([BR, BD], tl.float32)
        if HAS_GY:
            gy = tl.load(p_gy + o_r[:, None] * s_gy + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
            x = tl.load(p_x + o_r[:, None] * s_x + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(p_mean + o_r, mask=m_r, other=0.0)[:, None]
            rstd = tl.load(p_rstd + o_r, mask=m_r, other=0.0)[:, None]
            xhat = (x - mean) * rstd  # of a row that is not there 0; of a column that is not, times gy = 0 below
            gweight += gy * xhat
            gbias += gy
            if HAS_WEIGHT:
                gy *= weight
            mean_g = tl.sum(gy, axis=1) * (1.0 / D)
            mean_gx = tl.sum(gy * xhat, axis=1) * (1.0 / D)
            gx = (gy - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd
        if HAS_GSUM:
            gx += tl.load(p_gsum + o_r[:, None] * s_gsum + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(p_gx + o_r[:, None] * D + o_d[None, :], gx.to(p_gx.dtype.element_ty), mask=mask)
    row = tl.program_id(0) * D + o_d
    tl.store(p_gweight + row, tl.sum(gweight, axis=0), mask=m_d)
    tl.store(p_gbias + row, tl.sum(gbias, axis=0), mask=m_d)


@kernel(do_not_specialize=("parts",))
def _reduce(p_gweight, p_gbias, p_out_weight, p_out_bias, parts, D, BP: tl.constexpr, BD: tl.constexpr):
    """Sums of partial weight gradients (parts, D), in an order that depends on the shape alone."""
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    m_d = o_d < D
    weight, bias = tl.zeros([BP, BD], tl.float32), tl.zeros([BP, BD], tl.float32)
    for start in range(0, parts, BP):
        o_p = start + tl.arange(0, BP)
        mask = (o_p < parts)[:, None] & m_d[None, :]
        weight += tl.load(p_gweight + o_p[:, None].to(tl.int64) * D + o_d[None, :], mask=mask, other=0.0)
        bias += tl.load(p_gbias + o_p[:, None].to(tl.int64) * D + o_d[None, :], mask=mask, other=0.0)
    tl.store(p_out_weight + o_d, tl.sum(weight, axis=0).to(p_out_weight.dtype.element_ty), mask=m_d)
    tl.store(p_out_bias + o_d, tl.sum(bias, axis=0).to(p_out_bias.dtype.element_ty), mask=m_d)


@kernel()
def _forward_wide(
    p_x, p_residual, p_weight, p_bias, p_y, p_sum, p_mean, p_rstd, D, s_x, s_residual, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    p_x, p_y, p_sum = p_x + i_r * s_x, p_y + i_r * D, p_sum + i_r * D
    total = tl.zeros([BD], tl.float32)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        x = tl.load(p_x + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(p_residual + i_r * s_residual + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            kept = x.to(p_sum.dtype.element_ty)
            tl.store(p_sum + o_d, kept, mask=o_d < D)
            x = kept.to(tl.float32)
        total += x
    if HAS_RESIDUAL:
        tl.debug_barrier()  # the loops below read what other threads of this program have stored
        p_x = p_sum
    mean = tl.sum(total, axis=0) / D
    squares = tl.zeros([BD], tl.float32)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        x = tl.load(p_x + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        centred = tl.where(o_d < D, x - mean, 0.0)
        squares += centred * centred
    rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / D + eps)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        y = (tl.load(p_x + o_d, mask=o_d < D, other=0.0).to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(p_bias + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        tl.store(p_y + o_d, y.to(p_y.dtype.element_ty), mask=o_d < D)
    tl.store(p_mean + i_r, mean)
    tl.store(p_rstd + i_r, rstd)


@kernel()
def _backward_wide(
    p_gy, p_gsum, p_x, p_mean, p_rstd, p_weight, p_gx, D, s_gy, s_gsum, s_x, HAS_GSUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """grad_x of one row."""
    i_r = tl.program_id(0).to(tl.int64)
    mean, rstd = tl.load(p_mean + i_r), tl.load(p_rstd + i_r)
    sum_g, sum_gx = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        gy = tl.load(p_gy + i_r * s_gy + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        xhat = (tl.load(p_x + i_r * s_x + o_d, mask=o_d < D, other=0.0).to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            gy *= tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        sum_g += gy
        sum_gx += tl.where(o_d < D, gy * xhat, 0.0)
    mean_g, mean_gx = tl.sum(sum_g, axis=0) / D, tl.sum(sum_gx, axis=0) / D
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        gy = tl.load(p_gy + i_r * s_gy + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        xhat = (tl.load(p_x + i_r * s_x + o_d, mask=o_d < D, other=0.0).to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            gy *= tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        gx = (gy - mean_g - xhat * mean_gx) * rstd
        if HAS_GSUM:
            gx += tl.load(p_gsum + i_r * s_gsum + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        tl.store(p_gx + i_r * D + o_d, gx.to(p_gx.dtype.element_ty), mask=o_d < D)


@kernel(do_not_specialize=("rows",))
def _backward_wide_weights(
    p_gy, p_x, p_mean, p_rstd, p_gweight, p_gbias, rows, D, s_gy, s_x, per_program, BD: tl.constexpr
):
    """Partial weight gradients of per_program rows and BD columns."""
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    m_d = o_d < D
    gweight, gbias = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    first = tl.program_id(1).to(tl.int64) * per_program
    for i_r in range(first, tl.minimum(first + per_program, rows)):
        gy = tl.load(p_gy + i_r * s_gy + o_d, mask=m_d, other=0.0).to(tl.float32)
        x = tl.load(p_x + i_r * s_x + o_d, mask=m_d, other=0.0).to(tl.float32)
        gweight += gy * (x - tl.load(p_mean + i_r)) * tl.load(p_rstd + i_r)
        gbias += gy
    row = tl.program_id(1).to(tl.int64) * D + o_d
    tl.store(p_gweight + row, gweight, mask=m_d)
    tl.store(p_gbias + row, gbias, mask=m_d)


# ---- host side ---------------------------------------------------------------------------------------------------------


def as_rows(x: Tensor) -> Tensor:
    """(..., D) -> (rows, D) with contiguous elements; a view where the rows lie at one distance."""
    x = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return x if x.stride(1) == 1 else x.contiguous()


def reduce_partials(
    parts: int, gweight: Tensor, gbias: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(parts, D) twice -> (D,) twice, in `dtype`."""
    D = gweight.shape[1]
    out_weight, out_bias = (torch.empty(D, dtype=dtype, device=gweight.device) for _ in range(2))
    BD = 8 if D <= 2048 else 32  # columns of a program: 32 bytes at least, and programs enough for the GPU
    _reduce[(cdiv(D, BD),)](gweight, gbias, out_weight, out_bias, parts, D, BP=4096 // BD, BD=BD, num_warps=8)
    return out_weight, out_bias


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """newllm::layer_norm"""
    return normalise_rows(x, residual, weight, bias, eps, math.inf)


def normalise_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, clamp: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, sum, mean, rstd), y within +-clamp; infinity for none, which rows of more than WIDEST columns must have."""
    D = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    rows = x.numel() // D
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows == 0:
        return y, total, mean, rstd
    x = as_rows(x)
    weight, bias = contiguous(weight, bias)
    residual = None if residual is None else as_rows(residual)
    tensors = (x, residual, weight, bias, y, total, mean, rstd)
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    has = {"HAS_RESIDUAL": residual is not None, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    if D > WIDEST:
        _forward_wide[(rows,)](*tensors, D, *strides, eps, **has, BD=4096, num_warps=8)
        return y, total, mean, rstd
    tile = row_tile(D, 2048, 16 if D > 2048 else 32)
    if tuning.tries(x.device):
        run = functools.partial(_narrow_forward, tensors, strides, eps, clamp, has)
        tile = chosen(("layer_norm", "forward", residual is not None), tile, ONE_TILE_EACH, x, run)
    _narrow_forward(tensors, strides, eps, clamp, has, tile)
    return y, total, mean, rstd


def _narrow_forward(
    tensors: tuple[Tensor, ...], strides: tuple[int, int], eps: float, clamp: float, has: dict[str, bool], tile: RowTile
) -> None:
    rows, D = tensors[0].shape
    _forward_narrow[(tile.programs(rows, tensors[0].device),)](
        *tensors, rows, D, *strides, eps, clamp, **has, HAS_CLAMP=clamp != math.inf, EVEN=tile.BD == D, BR=tile.BR,
        BD=tile.BD, num_warps=tile.warps,
    )  # fmt: skip


def layer_norm_backward(
    grad_y: Tensor | None,
    grad_sum: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    as_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """newllm::layer_norm_backward"""
    D = x.shape[-1]
    dtype = weight.dtype if as_weight and weight is not None else torch.float32
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.numel() // D
    if rows == 0:
        return grad_x, *(torch.zeros(D, dtype=dtype, device=x.device) for _ in range(2))
    x = as_rows(x)
    mean, rstd, weight = contiguous(mean, rstd, weight)
    grad_y, grad_sum = (None if g is None else as_rows(g) for g in (grad_y, grad_sum))
    strides = (0 if grad_y is None else grad_y.stride(0), 0 if grad_sum is None else grad_sum.stride(0), x.stride(0))
    arguments = (grad_y, grad_sum, x, mean, rstd, weight, grad_x, dtype, strides)
    if D > WIDEST and grad_y is not None:
        return grad_x, *_wide_backward(*arguments)
    tile = weights_tile(D)
    if tuning.tries(x.device):
        kind = ("layer_norm", "backward", grad_y is not None, grad_sum is not None)
        tile = chosen(kind, tile, WEIGHTS, x, functools.partial(_narrow_backward, *arguments))
    return grad_x, *_narrow_backward(*arguments, tile)


def _narrow_backward(
    grad_y, grad_sum, x, mean, rstd, weight, grad_x, dtype, strides, tile: RowTile
) -> tuple[Tensor, Tensor]:
    rows, D = x.shape
    parts = tile.programs(rows, x.device)
    gweight, gbias = torch.empty((2, parts, D), dtype=torch.float32, device=x.device)
    _backward_narrow[(parts,)](
        grad_y, grad_sum, x, mean, rstd, weight, grad_x, gweight, gbias, rows, D, *strides, HAS_GY=grad_y is not None,
        HAS_GSUM=grad_sum is not None, HAS_WEIGHT=weight is not None, EVEN=tile.BD == D, BR=tile.BR, BD=tile.BD,
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return reduce_partials(parts, gweight, gbias, dtype)


def _wide_backward(grad_y, grad_sum, x, mean, rstd, weight, grad_x, dtype, strides) -> tuple[Tensor, Tensor]:
    rows, D = x.shape
    _backward_wide[(rows,)](
        grad_y, grad_sum, x, mean, rstd, weight, grad_x, D, *strides, HAS_GSUM=grad_sum is not None,
        HAS_WEIGHT=weight is not None, BD=4096, num_warps=8,
    )  # fmt: skip
    parts = min(rows, 64)
    per_program = cdiv(rows, parts)
    parts = cdiv(rows, per_program)
    gweight, gbias = (torch.empty((parts, D), dtype=torch.float32, device=x.device) for _ in range(2))
    _backward_wide_weights[(cdiv(D, 1024), parts)](
        grad_y, x, mean, rstd, gweight, gbias, rows, D, strides[0], strides[2], per_program, BD=1024, num_warps=4
    )
    return reduce_partials(parts, gweight, gbias, dtype)
