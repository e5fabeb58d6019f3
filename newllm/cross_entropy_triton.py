"""Triton kernels of `cross_entropy.py`: a program walks a row of logits, or a block of it, BV columns at once.

Masks compare with `columns`, the width with its padding, a multiple of 16 where the caller pads: then Triton reads 16 bytes at
once. What lies past V counts as minus infinity.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from newllm_kernels.triton_support import cdiv, kernel, power_of_two


@kernel()
def _row_losses(p_logits, p_targets, p_nll, p_lse, V, columns, BV: tl.constexpr):
    """Maximum and sum of exponentials in one pass: the sum so far is rescaled whenever the maximum rises."""
    i_n = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_n * columns
    o_v = tl.arange(0, BV)
    x = tl.load(p_row + o_v, mask=o_v < columns, other=0.0).to(tl.float32)
    x = tl.where(o_v < V, x, -float("inf"))
    largest = tl.max(x, axis=0)
    total = tl.sum(tl.exp(x - largest), axis=0)
    for start in range(BV, columns, BV):
        x = tl.load(p_row + start + o_v, mask=start + o_v < columns, other=0.0).to(tl.float32)
        x = tl.where(start + o_v < V, x, -float("inf"))
        above = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(x - above), axis=0)
        largest = above
    lse = largest + tl.log(total)
    tl.store(p_lse + i_n, lse)
    tl.store(p_nll + i_n, lse - tl.load(p_row + tl.load(p_targets + i_n)).to(tl.float32))


@kernel()
def _logit_gradients(p_logits, p_lse, p_targets, p_grad, V, columns, BV: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    p_x = p_logits + i_n * columns + o_v
    p = tl.exp(tl.load(p_x, mask=o_v < columns, other=0.0).to(tl.float32) - tl.load(p_lse + i_n))
    p = tl.where(o_v == tl.load(p_targets + i_n), p - 1.0, p) * tl.load(p_grad + i_n)
    tl.store(p_x, tl.where(o_v < V, p, 0.0).to(p_logits.dtype.element_ty), mask=o_v < columns)


def row_losses(logits: Tensor, V: int, targets: Tensor, nll: Tensor, lse: Tensor) -> None:
    """As `cross_entropy.row_losses`; logits contiguous."""
    N, columns = logits.shape
    if N:
        BV = min(power_of_two(columns), 4096)
        _row_losses[(N,)](logits, targets, nll, lse, V, columns, num_warps=8, BV=BV)


def logit_gradients_(logits: Tensor, V: int, lse: Tensor, targets: Tensor, grad: Tensor) -> None:
    """As `cross_entropy.logit_gradients_`; logits contiguous."""
    N, columns = logits.shape
    if N:
        BV = min(power_of_two(columns), 4096)
        grid = (N, cdiv(columns, BV))
        _logit_gradients[grid](logits, lse, targets, grad, V, columns, num_warps=8, BV=BV)
