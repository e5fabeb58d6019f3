"""Triton kernels of `cross_entropy.py`: a program walks one row of logits, in blocks of BV columns."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from newllm_kernels.triton_support import cdiv, kernel, power_of_two


@kernel()
def _row_losses(p_logits, p_targets, p_nll, p_lse, V, s_logits, BV: tl.constexpr):
    """Maximum and sum of exponentials in one pass: the sum so far is rescaled whenever the maximum rises."""
    i_n = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_n * s_logits
    o_v = tl.arange(0, BV)
    x = tl.load(p_row + o_v, mask=o_v < V, other=-float("inf")).to(tl.float32)
    largest = tl.max(x, axis=0)
    total = tl.sum(tl.exp(x - largest), axis=0)
    for start in range(BV, V, BV):
        x = tl.load(p_row + start + o_v, mask=start + o_v < V, other=-float("inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(x - above), axis=0)
        largest = above
    lse = largest + tl.log(total)
    tl.store(p_lse + i_n, lse)
    tl.store(p_nll + i_n, lse - tl.load(p_row + tl.load(p_targets + i_n)).to(tl.float32))


@kernel()
def _logit_gradients(p_logits, p_lse, p_targets, p_grad, V, s_logits, BV: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    p_x = p_logits + i_n * s_logits + o_v
    p = tl.exp(tl.load(p_x, mask=o_v < V, other=0.0).to(tl.float32) - tl.load(p_lse + i_n))
    p = tl.where(o_v == tl.load(p_targets + i_n), p - 1.0, p) * tl.load(p_grad + i_n)
    tl.store(p_x, p.to(p_logits.dtype.element_ty), mask=o_v < V)


def row_losses(logits: Tensor, targets: Tensor, nll: Tensor, lse: Tensor) -> None:
    N, V = logits.shape
    if N:
        BV = min(power_of_two(V), 4096)
        _row_losses[(N,)](logits, targets, nll, lse, V, logits.stride(0), num_warps=8, BV=BV)


def logit_gradients_(logits: Tensor, lse: Tensor, targets: Tensor, grad: Tensor) -> None:
    N, V = logits.shape
    if N:
        BV = min(power_of_two(V), 4096)
        grid = (N, cdiv(V, BV))
        _logit_gradients[grid](logits, lse, targets, grad, V, logits.stride(0), num_warps=8, BV=BV)
