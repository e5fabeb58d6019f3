"""`context_update` over a whole sequence, step by step: the definition of `context_scan`.

    f, i, d, c (B, T, D)   c0, c_last (B, D)   weight, bias (D,)
"""

from __future__ import annotations

import torch
from torch import Tensor

from newllm_kernels import gates
from newllm_kernels.context_update.reference import ContextGradients, step, step_backward
from newllm_kernels.numerics import acc_dtype


def context_scan(
    f: Tensor, i: Tensor | None, d: Tensor | None, c0: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    clamp: float,
) -> tuple[Tensor, Tensor]:
    """(c, c_last); the state goes from step to step unrounded. Differentiable by PyTorch's own autograd."""
    dtype, B = f.dtype, f.shape[0]
    f, i, d = gates.split(f, i, d)
    state = c0.to(f.dtype)
    steps = []
    for gates_t in zip(f.unbind(1), i.unbind(1), d.unbind(1), strict=True):  # indexing would cost autograd T squared
        state = step(*gates_t, state, weight, bias, eps, clamp)
        steps.append(state)
    c = torch.stack(steps, dim=1).to(dtype) if steps else f.new_empty((B, 0, c0.shape[1]), dtype=dtype)
    return c, state.clone() if not steps else state.contiguous()


def context_scan_backward(
    grad_c: Tensor | None, grad_c_last: Tensor | None, f: Tensor, i: Tensor | None, d: Tensor | None, c: Tensor,
    c0: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, clamp: float,
) -> ContextGradients:
    """Backpropagation through time: the gradient of c_t is what came from outside plus what step t + 1 hands back."""
    acc, (B, T, D) = acc_dtype(f.dtype), c.shape
    f_, i_, d_ = gates.split(f, i, d)
    grads = tuple(torch.empty(B, T, D, dtype=acc, device=f.device) for _ in range(3))
    grad_weight, grad_bias = f_.new_zeros(D), f_.new_zeros(D)
    carry = f_.new_zeros(B, D) if grad_c_last is None else grad_c_last.to(acc)
    for t in reversed(range(T)):
        g = carry if grad_c is None else carry + grad_c[:, t].to(acc)
        before = (c[:, t - 1] if t > 0 else c0).to(acc)
        *of_gates, carry, w, b = step_backward(g, f_[:, t], i_[:, t], d_[:, t], before, weight, bias, eps, clamp)
        for target, grad in zip(grads, of_gates, strict=True):
            target[:, t] = grad
        grad_weight, grad_bias = grad_weight + w, grad_bias + b
    return *gates.join(grads, f, i, d), carry.clone() if T == 0 else carry.contiguous(), grad_weight, grad_bias
