"""LayerNorm over the last dimension, in plain PyTorch: the definition of `layer_norm` and `add_layer_norm`.

x, residual, y, sum (..., D)   weight, bias (D,)   mean, rstd: one number a row, (rows,)
"""

from __future__ import annotations

import torch
from torch import Tensor

from newllm_kernels.numerics import acc_dtype, in_acc


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(xhat, mean, rstd) of rows x (..., D), which must be in the accumulation type already."""
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    rstd = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, mean, rstd


def affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = xhat if weight is None else xhat * weight
    return y if bias is None else y + bias


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, sum, mean, rstd); sum is empty without a residual. Differentiable by PyTorch's own autograd."""
    acc = acc_dtype(x.dtype)
    total = x if residual is None else (x.to(acc) + residual.to(acc)).to(x.dtype)  # what is kept is what is normalised
    xhat, mean, rstd = normalise(total.to(acc), eps)
    y = affine(xhat, in_acc(weight, x.dtype), in_acc(bias, x.dtype)).to(x.dtype).contiguous()
    kept = x.new_empty(0) if residual is None else total.contiguous()
    return y, kept, mean.reshape(-1), rstd.reshape(-1)


def grad_normalise(g: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of the normalised rows' input: rstd * (g - mean(g) - xhat * mean(g * xhat))."""
    return rstd * (g - g.mean(dim=-1, keepdim=True) - xhat * (g * xhat).mean(dim=-1, keepdim=True))


def layer_norm_backward(
    grad_y: Tensor | None,
    grad_sum: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    as_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias) of normalised rows x (x + residual where there was one); the last two in the dtype of
    weight if `as_weight`, else in the accumulation type."""
    dtype = acc_dtype(x.dtype) if weight is None or not as_weight else weight.dtype
    acc = acc_dtype(x.dtype)
    rows = (*x.shape[:-1], 1)
    rstd = rstd.view(rows)
    xhat = (x.to(acc) - mean.view(rows)) * rstd
    grad_x = torch.zeros_like(xhat)
    grad_weight, grad_bias = xhat.new_zeros(x.shape[-1]), xhat.new_zeros(x.shape[-1])
    weight = in_acc(weight, x.dtype)
    if grad_y is not None:
        dy = grad_y.to(acc)
        grad_x = grad_normalise(dy if weight is None else dy * weight, xhat, rstd)
        grad_weight, grad_bias = (dy * xhat).flatten(0, -2).sum(dim=0), dy.flatten(0, -2).sum(dim=0)
    if grad_sum is not None:
        grad_x = grad_x + grad_sum.to(acc)
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(dtype), grad_bias.to(dtype)
