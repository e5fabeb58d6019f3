"""The linear recurrence h_t = a_t h_{t-1} + b_t, step by step: the definition of `scan`.

a, b, h (B, T, D)   h0, h_last (N, D), N = B, or the number of sequences that cu_seqlens packs into B = 1
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from newllm_kernels.numerics import acc_dtype


def scan(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h, h_last); differentiable by PyTorch's own autograd."""
    if cu_seqlens is not None:
        parts = [
            scan(a[:, begin:end], b[:, begin:end], None if h0 is None else h0[n : n + 1], reverse, None)
            for n, (begin, end) in enumerate(segments(cu_seqlens))
        ]
        return torch.cat([h for h, _ in parts], dim=1), torch.cat([last for _, last in parts])
    B, T, D = a.shape
    acc = acc_dtype(a.dtype)
    state = a.new_zeros(B, D, dtype=acc) if h0 is None else h0.to(acc)
    steps: list[Tensor] = [state] * T
    decay, added = a.unbind(1), b.unbind(1)  # unlike indexing, differentiates in time linear in T
    for t in reversed(range(T)) if reverse else range(T):
        state = decay[t].to(acc) * state + added[t].to(acc)
        steps[t] = state
    h = torch.stack(steps, dim=1) if T else a.new_empty(B, 0, D)
    return h.to(a.dtype), state.clone() if T == 0 else state.contiguous()


def scan_backward(
    grad_h: Tensor | None,
    grad_h_last: Tensor | None,
    a: Tensor,
    h: Tensor,
    h0: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint g_t = grad_h_t + a_{t+1} g_{t+1}, written out: grad_b_t = g_t, grad_a_t = g_t h_{t-1}."""
    if cu_seqlens is not None:
        parts = []
        for n, (begin, end) in enumerate(segments(cu_seqlens)):
            row = slice(n, n + 1)
            grad, last, start = (
                None if grad_h is None else grad_h[:, begin:end],
                None if grad_h_last is None else grad_h_last[row],
                None if h0 is None else h0[row],
            )
            parts.append(scan_backward(grad, last, a[:, begin:end], h[:, begin:end], start, reverse, None))
        grad_a, grad_b, grad_h0 = zip(*parts, strict=True)
        return torch.cat(grad_a, dim=1), torch.cat(grad_b, dim=1), torch.cat(grad_h0)
    B, T, D = a.shape
    acc = acc_dtype(a.dtype)
    start = a.new_zeros(B, D, dtype=acc) if h0 is None else h0.to(acc)
    carry = a.new_zeros(B, D, dtype=acc) if grad_h_last is None else grad_h_last.to(acc)
    grad_a, grad_b = torch.empty_like(a, memory_format=torch.contiguous_format), a.new_empty(a.shape)
    order = list(range(T - 1, -1, -1) if reverse else range(T))  # of the forward recurrence
    for step in reversed(range(T)):
        t = order[step]
        g = carry if grad_h is None else carry + grad_h[:, t].to(acc)
        before = h[:, order[step - 1]].to(acc) if step > 0 else start
        grad_a[:, t], grad_b[:, t] = g * before, g
        carry = a[:, t].to(acc) * g
    return grad_a, grad_b, carry.clone() if T == 0 else carry.contiguous()


def segments(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """First and last-plus-one time step of every packed sequence."""
    bounds = cu_seqlens.tolist()
    return list(pairwise(bounds))
