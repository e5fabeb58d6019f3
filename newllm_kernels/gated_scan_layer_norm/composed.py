"""`gated_scan_layer_norm` by the kernels of `gated_scan` and `layer_norm`, one after the other."""

from __future__ import annotations

import math

from torch import Tensor

from newllm_kernels import backends, gates
from newllm_kernels.gated_scan_layer_norm.reference import uncut


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
    D = gates.gate_width(f, i)
    c, c_last = backends.select("gated_scan", f, D).forward(f, i, d, c0, cu_seqlens)
    y, _, mean, rstd = backends.select("layer_norm", f, D).forward(c, None, weight, bias, eps)
    return y if clamp == math.inf else y.clamp_(-clamp, clamp), c, c_last, mean, rstd


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
    D = c.shape[2]
    if grad_y is not None and clamp != math.inf:
        grad_y = uncut(grad_y, c, weight, bias, mean, rstd, clamp)
    through_norm = backends.select("layer_norm", f, D).backward
    grad_c, grad_weight, grad_bias = through_norm(grad_y, grad_c, c, mean, rstd, weight)
    through_scan = backends.select("gated_scan", f, D).backward
    return *through_scan(grad_c, grad_c_last, f, i, d, c, c0, cu_seqlens), grad_weight, grad_bias
