"""c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(d_t), step by step: the definition of `gated_scan`.

f, i, d, c (B, T, D)   c0, c_last (N, D), N = B, or the number of sequences that cu_seqlens packs into B = 1
"""

from __future__ import annotations

import torch
from torch import Tensor

from newllm_kernels import gates
from newllm_kernels.numerics import acc_dtype
from newllm_kernels.scan.reference import scan, scan_backward


def gated_scan(
    f: Tensor, i: Tensor | None, d: Tensor | None, c0: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(c, c_last); differentiable by PyTorch's own autograd."""
    dtype = f.dtype
    f, i, d = gates.split(f, i, d)
    c, c_last = scan(torch.sigmoid(f), torch.sigmoid(i) * torch.tanh(d), c0, False, cu_seqlens)
    return c.to(dtype), c_last


def gated_scan_backward(
    grad_c: Tensor | None,
    grad_c_last: Tensor | None,
    f: Tensor,
    i: Tensor | None,
    d: Tensor | None,
    c: Tensor,
    c0: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The adjoint of the scan, then the chain rule through the activations."""
    acc = acc_dtype(f.dtype)
    f_, i_, d_ = gates.split(f, i, d)
    forget, write, delta = torch.sigmoid(f_), torch.sigmoid(i_), torch.tanh(d_)
    grad_forget, grad_b, grad_c0 = scan_backward(
        None if grad_c is None else grad_c.to(acc), grad_c_last, forget, c.to(acc), c0, False, cu_seqlens
    )
    grad_f = grad_forget * forget * (1 - forget)
    grad_i = grad_b * delta * write * (1 - write)
    grad_d = grad_b * write * (1 - delta * delta)
    return *gates.join((grad_f, grad_i, grad_d), f, i, d), grad_c0
