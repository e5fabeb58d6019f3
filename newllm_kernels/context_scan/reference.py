"""`context_update` over a whole sequence, step by step: the definition of `context_scan`.

f, i, d, c (B, T, D)   c0, c_last (B, D)   weight, bias (D,)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from newllm_kernels import gates
from newllm_kernels.context_update.reference import ContextGradients, step, step_backward
from newllm_kernels.numerics import acc_dtype, in_acc


def _edge(dtype: torch.dtype, clamp: float) -> tuple[Tensor, Tensor] | None:
    """The clamp as a 16-bit dtype holds it, and the next smaller value; None where no mark is needed."""
    if dtype not in (torch.bfloat16, torch.float16) or clamp == math.inf:
        return None
    edge = torch.tensor(clamp, dtype=dtype)
    return edge, (edge.view(torch.int16) - 1).view(dtype)


def mark_cut(c: Tensor, dtype: torch.dtype, clamp: float) -> Tensor:
    """Contexts in their storage type, a mark in those of 16 bits: what the clamp cut has its magnitude, all else a smaller.

    The backward must know what was cut and computes it again from stored contexts; close to the clamp rounded ones would
    answer by chance.
    """
    stored = c.to(dtype)
    edges = _edge(dtype, clamp)
    if edges is None:
        return stored
    edge, below = (value.to(c.device) for value in edges)
    rounded_up = (c.abs() < clamp) & (stored.abs() >= edge)
    return stored + (torch.where(rounded_up, below.copysign(stored), stored) - stored).detach()


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
    """(c, c_last); the state goes from step to step unrounded. Differentiable by PyTorch's own autograd."""
    dtype, B = f.dtype, f.shape[0]
    weight, bias = in_acc(weight, dtype), in_acc(bias, dtype)
    f, i, d = gates.split(f, i, d)
    state = c0.to(f.dtype)
    steps = []
    for gates_t in zip(f.unbind(1), i.unbind(1), d.unbind(1), strict=True):  # indexing would cost autograd T squared
        state = step(*gates_t, state, weight, bias, eps, clamp)
        steps.append(state)
    if not steps:
        return f.new_empty((B, 0, c0.shape[1]), dtype=dtype), state.clone()
    c = mark_cut(torch.stack(steps, dim=1), dtype, clamp)
    return c, state.contiguous()


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
) -> ContextGradients:
    """Backpropagation through time: the gradient of c_t is what came from outside plus what step t + 1 hands back."""
    acc, (B, T, D) = acc_dtype(f.dtype), c.shape
    weight, bias = in_acc(weight, f.dtype), in_acc(bias, f.dtype)
    f_, i_, d_ = gates.split(f, i, d)
    grads = tuple(torch.empty(B, T, D, dtype=acc, device=f.device) for _ in range(3))
    grad_weight, grad_bias = f_.new_zeros(D), f_.new_zeros(D)
    carry = f_.new_zeros(B, D) if grad_c_last is None else grad_c_last.to(acc)
    edges = _edge(c.dtype, clamp)
    for t in reversed(range(T)):
        cut = None if edges is None else c[:, t].abs() >= edges[0].to(c.device)
        g = carry if grad_c is None else carry + grad_c[:, t].to(acc)
        before = (c[:, t - 1] if t > 0 else c0).to(acc)
        *of_gates, carry, w, b = step_backward(g, f_[:, t], i_[:, t], d_[:, t], before, weight, bias, eps, clamp, cut)
        for target, grad in zip(grads, of_gates, strict=True):
            target[:, t] = grad
        grad_weight, grad_bias = grad_weight + w, grad_bias + b
    return *gates.join(grads, f, i, d), carry.clone() if T == 0 else carry.contiguous(), grad_weight, grad_bias
