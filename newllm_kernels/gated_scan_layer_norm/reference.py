"""`gated_scan`, then LayerNorm of what it returns, then a clamp: the definition of `gated_scan_layer_norm`.

f, i, d, y, c (B, T, D)   c0, c_last (N, D)   weight, bias (D,)   mean, rstd (B * T,)
"""

from __future__ import annotations

import torch
from torch import Tensor

from newllm_kernels.gated_scan.reference import gated_scan, gated_scan_backward
from newllm_kernels.layer_norm.reference import affine, layer_norm, layer_norm_backward
from newllm_kernels.numerics import acc_dtype, in_acc


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
    """(y, c, c_last, mean, rstd); differentiable by PyTorch's own autograd."""
    c, c_last = gated_scan(f, i, d, c0, cu_seqlens)
    y, _, mean, rstd = layer_norm(c, None, weight, bias, eps)
    return y.clamp(-clamp, clamp), c, c_last, mean, rstd


def uncut(
    grad_y: Tensor, c: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, clamp: float
) -> Tensor:
    """grad_y, zero where the clamp cut y, which is computed again: rounded to 16 bits it would answer by chance."""
    rows, acc = (*c.shape[:-1], 1), acc_dtype(c.dtype)
    xhat = (c.to(acc) - mean.view(rows)) * rstd.view(rows)
    y = affine(xhat, in_acc(weight, c.dtype), in_acc(bias, c.dtype))
    return torch.where(y.abs() > clamp, 0.0, grad_y)


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
    """The chain rule: LayerNorm's backward adds to grad_c, and that goes through the scan's."""
    if grad_y is not None:
        grad_y = uncut(grad_y, c, weight, bias, mean, rstd, clamp)
    grad_c, grad_weight, grad_bias = layer_norm_backward(grad_y, grad_c, c, mean, rstd, weight)
    return *gated_scan_backward(grad_c, grad_c_last, f, i, d, c, c0, cu_seqlens), grad_weight, grad_bias
