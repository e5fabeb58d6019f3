"""What surrounds the recurrence: matrix products over all of time at once, before its backward and after it.

Contexts are known by then, so the pre-activations of every step can be computed again in whole products where nobody kept
them, and the gradients of the matrices are products of what the adjoint left behind. Shapes as in reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from newllm_kernels.numerics import acc_dtype
from newllm_kernels.recurrent_context import reference


def product_dtype(like: Tensor) -> torch.dtype:
    """GPUs multiply 16-bit matrices with float32 sums; on a CPU the accumulation type does what that does."""
    return like.dtype if like.is_cuda else acc_dtype(like.dtype)


def contexts_read(
    c: Tensor, c0: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, clamp: float, norm: int
) -> Tensor:
    """What the first layer read at every step: (B, T, D), in the dtype of the products."""
    before = torch.cat((c0[:, None].to(c.dtype), c), dim=1)[:, :-1]
    if reference.NORMS[norm] == "output":
        before = reference.read(before.to(c0.dtype), weight, bias, eps, clamp, norm)
    return before.to(product_dtype(c))


def pre_activations(
    z: Tensor,
    context_read: Tensor,
    context_weight: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    activation: int,
) -> Tensor:
    """[a_1 | ... | a_L | f | i | d] of all steps (B, T, S), from the contexts that the steps read."""
    dtype = context_read.dtype
    a = z + F.linear(context_read, context_weight.to(dtype))
    kept = [a]
    if gate_weight is not None:
        for k in range(0 if hidden_weight is None else hidden_weight.shape[0]):
            bias = None if hidden_bias is None else hidden_bias[k].to(dtype)
            a = F.linear(reference.activate(a, activation), hidden_weight[k].to(dtype), bias)
            kept.append(a)
        bias = None if gate_bias is None else gate_bias.to(dtype)
        kept.append(F.linear(reference.activate(a, activation), gate_weight.to(dtype), bias))
    return torch.cat(kept, dim=-1).to(z.dtype)


def gradients(
    grad_pre: Tensor,
    hidden: Tensor,
    context_read: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of z, context_weight, hidden_weight, hidden_bias, gate_weight, gate_bias; empty for what is absent."""
    dtype = context_read.dtype
    H = 0 if gate_weight is None else gate_weight.shape[1]
    L = hidden.shape[-1] // H if H else 0
    layers = grad_pre.split([H] * L + [grad_pre.shape[-1] - L * H], dim=-1)

    def outer(left: Tensor, right: Tensor) -> Tensor:
        return left.to(dtype).flatten(0, 1).mT @ right.to(dtype).flatten(0, 1)

    def rows(grad: Tensor) -> Tensor:
        return grad.sum(dim=(0, 1), dtype=acc_dtype(grad.dtype))

    of_hidden, of_hidden_bias, of_gates, of_gates_bias = (grad_pre.new_empty(0) for _ in range(4))
    if gate_weight is not None:
        h = hidden.split([H] * L, dim=-1)
        of_gates = outer(layers[-1], h[-1]).to(gate_weight.dtype)
        if gate_bias is not None:
            of_gates_bias = rows(layers[-1]).to(gate_bias.dtype)
        if hidden_weight is not None:
            of_hidden = torch.stack([outer(layers[k + 1], h[k]) for k in range(L - 1)]).to(hidden_weight.dtype)
            if hidden_bias is not None:
                of_hidden_bias = torch.stack([rows(layers[k + 1]) for k in range(L - 1)]).to(hidden_bias.dtype)
    of_context = outer(layers[0], context_read).to(grad_pre.dtype)
    return layers[0].contiguous(), of_context, of_hidden, of_hidden_bias, of_gates, of_gates_bias
