"""Triton kernels of `gated_scan`: those of `scan`, with the activations computed on the tile."""

from __future__ import annotations

import torch
from torch import Tensor

from newllm_kernels.scan.triton import columns, run_backward, run_forward


def gated_scan(
    f: Tensor, i: Tensor | None, d: Tensor | None, c0: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """newllm::gated_scan"""
    return run_forward(*columns(f, i, d), c0, False, cu_seqlens, "gated_scan")


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
    """newllm::gated_scan_backward; the gradient of packed gates is written in one piece."""
    packed = i is None or d is None
    first = torch.empty(f.shape, dtype=f.dtype, device=f.device)
    if packed:
        second = third = torch.empty(0, dtype=f.dtype, device=f.device)
        grads = columns(first, None, None)
    else:
        second, third = torch.empty_like(first), torch.empty_like(first)
        grads = (first, second, third)
    grad_c0 = run_backward(grad_c, grad_c_last, *columns(f, i, d), c, c0, False, cu_seqlens, grads, "gated_scan")
    return first, second, torch.empty_like(third) if packed else third, grad_c0
