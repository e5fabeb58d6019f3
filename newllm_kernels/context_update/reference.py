"""One step of the cell, in plain PyTorch: the definition of `context_update`.

u = sigmoid(f) * c + sigmoid(i) * tanh(d)
c' = clamp(LayerNorm(u), -clamp, clamp)

f, i, d, c (B, D)   weight, bias (D,)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newllm_kernels import gates
from newllm_kernels.layer_norm.reference import affine, grad_normalise, normalise
from newllm_kernels.numerics import acc_dtype, in_acc

ContextGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def step(
    f: Tensor, i: Tensor, d: Tensor, c: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, clamp: float
) -> Tensor:
    """The formula itself; everything in the accumulation type."""
    u = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(d)
    xhat, _, _ = normalise(u, eps)
    return affine(xhat, weight, bias).clamp(-clamp, clamp)


def row_gradients(
    grad: Tensor,
    f: Tensor,
    i: Tensor,
    d: Tensor,
    c: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    clamp: float,
    cut: Tensor | None = None,
) -> ContextGradients:
    """Its chain rule, written out: gradients of f, i, d, c and, of every row its own, of weight and bias; everything in the
    accumulation type.

    `cut` says which components the clamp cut, where somebody knows better than this computation can.
    """
    forget, write, delta = torch.sigmoid(f), torch.sigmoid(i), torch.tanh(d)
    xhat, _, rstd = normalise(forget * c + write * delta, eps)
    y = affine(xhat, weight, bias)
    dy = grad.masked_fill((y > clamp) | (y < -clamp) if cut is None else cut, 0)
    du = grad_normalise(dy if weight is None else dy * weight, xhat, rstd)
    return (
        du * c * forget * (1 - forget),
        du * delta * write * (1 - write),
        du * write * (1 - delta * delta),
        du * forget,
        dy * xhat,
        dy,
    )


def step_backward(*args: Any, **kwargs: Any) -> ContextGradients:
    """As `row_gradients`, with those of weight and bias added up."""
    *of_rows, grad_weight, grad_bias = row_gradients(*args, **kwargs)
    return *of_rows, grad_weight.sum(dim=0), grad_bias.sum(dim=0)


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
    """The new context in c's dtype; differentiable by PyTorch's own autograd."""
    weight, bias = in_acc(weight, f.dtype), in_acc(bias, f.dtype)
    return step(*gates.split(f, i, d), c.to(acc_dtype(f.dtype)), weight, bias, eps, clamp).to(c.dtype).contiguous()


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
) -> ContextGradients:
    acc = acc_dtype(f.dtype)
    weight, bias = in_acc(weight, f.dtype), in_acc(bias, f.dtype)
    *grads, grad_c, grad_weight, grad_bias = step_backward(
        grad.to(acc), *gates.split(f, i, d), c.to(acc), weight, bias, eps, clamp
    )
    return *gates.join(tuple(grads), f, i, d), grad_c.to(c.dtype).contiguous(), grad_weight, grad_bias
