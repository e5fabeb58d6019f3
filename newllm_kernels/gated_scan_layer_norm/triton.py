"""Triton kernels of `gated_scan_layer_norm`.

Forward the scan writes c and LayerNorm reads it again: the statistics of a row need all columns, and a program of the scan
holds few of them. Backward no gradient of c goes through memory: a first pass over grad_y and c leaves two sums a row, and the
scan's backward makes the gradient of c from them as it goes. That is 10 tensors moved instead of 11, and 6 forward.
"""

from __future__ import annotations

import functools
import math

import torch
import triton.language as tl
from torch import Tensor

from newllm_kernels import backends, tuning
from newllm_kernels.gated_scan_layer_norm import composed
from newllm_kernels.layer_norm.triton import as_rows, normalise_rows, reduce_partials
from newllm_kernels.layer_norm.triton_tiles import WEIGHTS, RowTile, chosen, weights_tile
from newllm_kernels.scan.triton import NormGradient, columns, run_backward
from newllm_kernels.scan.triton_plan import plan
from newllm_kernels.triton_support import contiguous, kernel


@kernel(do_not_specialize=("rows",))
def _row_sums(
    p_gy, p_c, p_mean, p_rstd, p_weight, p_bias, p_mean_g, p_mean_gx, p_gweight, p_gbias, rows, D, s_gy, s_c, clamp,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CLAMP: tl.constexpr, EVEN: tl.constexpr, BR: tl.constexpr,
    BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of g = grad_y * weight, zero where the clamp cut: mean(g) and mean(g xhat) of every row, shares of weight's and
    bias's gradients."""
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    weight, bias = tl.full([1, BD], 1.0, tl.float32), tl.zeros([1, BD], tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    gweight, gbias = tl.zeros([BR, BD], tl.float32), tl.zeros([BR, BD], tl.float32)
    for i_r in tl.range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0), num_stages=STAGES):
        o_r = i_r * BR + tl.arange(0, BR).to(tl.int64)
        m_r = o_r < rows
        mask = m_r[:, None] if EVEN else m_r[:, None] & m_d[None, :]
        g = tl.load(p_gy + o_r[:, None] * s_gy + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        c = tl.load(p_c + o_r[:, None] * s_c + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(p_mean + o_r, mask=m_r, other=0.0)[:, None]
        rstd = tl.load(p_rstd + o_r, mask=m_r, other=0.0)[:, None]
        xhat = (c - mean) * rstd
        if HAS_CLAMP:
            y = xhat * weight + bias
            g = tl.where((y > clamp) | (y < -clamp), 0.0, g)
        gweight += g * xhat
        gbias += g
        g *= weight
        tl.store(p_mean_g + o_r, tl.sum(g, axis=1) * (1.0 / D), mask=m_r)
        tl.store(p_mean_gx + o_r, tl.sum(g * xhat, axis=1) * (1.0 / D), mask=m_r)
    row = tl.program_id(0) * D + o_d
    tl.store(p_gweight + row, tl.sum(gweight, axis=0), mask=m_d)
    tl.store(p_gbias + row, tl.sum(gbias, axis=0), mask=m_d)


def gated_scan_layer_norm(
    f: Tensor,
    i: Tensor | None,
    d: Tensor | None,
    c0: Tensor | None,
    cu_seqlens: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    clamp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """newllm::gated_scan_layer_norm"""
    # The scan by whoever is best at it, as nothing of it is fused here.
    D = f.shape[2] if i is not None else f.shape[2] // 3
    c, c_last = backends.select("gated_scan", f, D).forward(f, i, d, c0, cu_seqlens)
    y, _, mean, rstd = normalise_rows(c, None, weight, bias, eps, clamp)
    return y, c, c_last, mean, rstd


def gated_scan_layer_norm_backward(
    grad_y: Tensor | None,
    grad_c: Tensor | None,
    grad_c_last: Tensor | None,
    f: Tensor,
    i: Tensor | None,
    d: Tensor | None,
    c: Tensor,
    c0: Tensor | None,
    cu_seqlens: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    clamp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """newllm::gated_scan_layer_norm_backward"""
    B, T, D = c.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    streams = plan(c, sequences, T, D, cu_seqlens is not None, "gated_scan_layer_norm", "backward").way == "stream"
    if grad_y is None or c.numel() == 0 or not streams:  # few, long sequences: LayerNorm's backward, then the scan's
        return composed.gated_scan_layer_norm_backward(
            grad_y, grad_c, grad_c_last, f, i, d, c, c0, cu_seqlens, weight, bias, mean, rstd, clamp
        )
    weight, bias, mean, rstd = contiguous(weight, bias, mean, rstd)
    grad_y = grad_y.contiguous()
    rows = B * T
    mean_g, mean_gx = (torch.empty(rows, dtype=torch.float32, device=c.device) for _ in range(2))
    tensors = (as_rows(grad_y), as_rows(c), mean, rstd, weight, bias, mean_g, mean_gx)
    tile = weights_tile(D)
    if tuning.tries(c.device):
        run = functools.partial(_launch_row_sums, *tensors, clamp)
        tile = chosen(("gated_scan_layer_norm", "row sums"), tile, WEIGHTS, tensors[1], run)
    of_affine = _launch_row_sums(*tensors, clamp, tile)
    packed = i is None or d is None
    first = torch.empty(f.shape, dtype=f.dtype, device=f.device)
    second, third = (first.new_empty(0 if packed else f.shape) for _ in range(2))
    grads = columns(first, None, None) if packed else (first, second, third)
    norm = NormGradient(grad_y, mean, rstd, mean_g, mean_gx, weight, bias, clamp)
    grad_c0 = run_backward(grad_c, grad_c_last, *columns(f, i, d), c, c0, False, cu_seqlens, grads, "gated_scan", norm)
    return first, second, third, grad_c0, *of_affine


def _launch_row_sums(
    grad_y, c, mean, rstd, weight, bias, mean_g, mean_gx, clamp, tile: RowTile
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias."""
    rows, D = c.shape
    parts = tile.programs(rows, c.device)
    gweight, gbias = torch.empty((2, parts, D), dtype=torch.float32, device=c.device)
    _row_sums[(parts,)](
        grad_y, c, mean, rstd, weight, bias, mean_g, mean_gx, gweight, gbias, rows, D, grad_y.stride(0), c.stride(0),
        clamp, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_CLAMP=clamp != math.inf,
        EVEN=tile.BD == D, BR=tile.BR, BD=tile.BD, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return reduce_partials(parts, gweight, gbias)
