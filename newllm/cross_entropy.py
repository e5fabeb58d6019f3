"""Cross entropy of a linear layer over a large vocabulary, whose logits never set the memory.

    nll_n = logsumexp_v(w_v . x_n) - w_target(n) . x_n

or, where K words of a row share its target with it (distillation), with z_nv = w_v . x_n,

    nll_n = logsumexp_v(z_nv) - sum_k share_nk z_n,word(n,k) - (1 - sum_k share_nk) z_n,target(n)

Logits (N, V) of up to KEPT_BYTES are computed once, kept, and turned into their own gradient in place. Where they would be
more they are computed in blocks of rows, and once more in the backward: memory then depends on V, not on N.

On CUDA tensors rows are reduced by two Triton kernels (`cross_entropy_triton.py`), one read and one write of the logits.
Elsewhere, and where Triton is not installed, by PyTorch.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

KEPT_BYTES = 2**30
# Columns of logits on a GPU: with 33,278 of them cuBLAS and Triton fall back to narrow accesses, at a third of the speed.
COLUMN_STEP = 64
_HAS_TRITON = find_spec("triton") is not None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, words: Tensor | None = None, shares: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of the targets under softmax(x weight^T): (N,), float32 (float64 for float64).

    Args:
        x: (N, E), float32, bfloat16 or float64. Logits are rounded to its dtype, as those of a linear layer are.
        weight: (V, E), cast to x's dtype.
        targets: (N,) int64, from 0 to V - 1; not checked, because that would make a GPU wait.
        words, shares: (N, K) int64 and floating, or neither: further targets of every row, each word once in a row, and what they
            make up of it; the rest, 1 - sum of shares, is the target's. Not checked either. Shares get no gradient.

    Raises ValueError where shapes do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x, weight: got {tuple(x.shape)} and {tuple(weight.shape)}, wanted (N, E) and (V, E)")
    if targets.shape != x.shape[:1] or targets.dtype != torch.int64:
        wanted = f"({x.shape[0]},) of torch.int64"
        raise ValueError(f"targets: got {tuple(targets.shape)} of {targets.dtype}, wanted {wanted}")
    if (words is None) != (shares is None):
        raise ValueError("words, shares: got one without the other")
    if words is not None and shares is not None:
        if words.dim() != 2 or words.shape[0] != x.shape[0] or words.dtype != torch.int64:
            raise ValueError(
                f"words: got {tuple(words.shape)} of {words.dtype}, wanted ({x.shape[0]}, K) of torch.int64"
            )
        if shares.shape != words.shape or not shares.is_floating_point():
            raise ValueError(
                f"shares: got {tuple(shares.shape)} of {shares.dtype}, wanted {tuple(words.shape)}, floating"
            )
    return _LinearCrossEntropy.apply(x, weight.to(x.dtype), targets, words, shares)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, words: Tensor | None, shares: Tensor | None
    ) -> Tensor:
        V = weight.shape[0]
        weight = F.pad(weight, (0, 0, 0, _columns(V, weight.device) - V))
        rows = _rows_at_once(weight)
        accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
        nll, lse = (torch.empty(x.shape[0], dtype=accumulate, device=x.device) for _ in range(2))
        ctx.logits = None
        for block in _blocks(x.shape[0], rows):
            logits = x[block] @ weight.t()  # (rows, V and padding)
            row_losses(logits, V, targets[block], nll[block], lse[block])
            if words is not None and shares is not None:
                _share_losses(logits, targets[block], words[block], shares[block], nll[block])
            if x.shape[0] <= rows and any(ctx.needs_input_grad):
                ctx.logits = logits
        ctx.V = V
        ctx.save_for_backward(x, weight, targets, lse, words, shares)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, targets, lse, words, shares = ctx.saved_tensors
        grad = grad.to(lse.dtype).contiguous()
        kept, ctx.logits = ctx.logits, None  # overwritten below; a second backward computes them again
        blocks = _blocks(x.shape[0], _rows_at_once(weight))
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for block in blocks:
            logits = x[block] @ weight.t() if kept is None else kept
            logit_gradients_(logits, ctx.V, lse[block], targets[block], grad[block])
            if words is not None:
                _share_gradients_(logits, targets[block], words[block], shares[block], grad[block])
            if grad_x is not None:
                torch.mm(logits, weight, out=grad_x[block])
            if ctx.needs_input_grad[1]:
                part = (logits.t() @ x[block])[: ctx.V]  # (V, E)
                if len(blocks) == 1:
                    grad_weight = part
                else:  # summed in float32: blocks are many, and 16 bits would lose the later ones
                    part = part.to(lse.dtype)
                    grad_weight = part if grad_weight is None else grad_weight.add_(part)
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _rows_at_once(weight: Tensor) -> int:
    return max(1, KEPT_BYTES // (weight.shape[0] * weight.element_size()))


def _blocks(total: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, total)) for start in range(0, total, rows)]


def _columns(V: int, device: torch.device) -> int:
    return -(-V // COLUMN_STEP) * COLUMN_STEP if device.type == "cuda" else V


def row_losses(logits: Tensor, V: int, targets: Tensor, nll: Tensor, lse: Tensor) -> None:
    """logits (N, V and padding), targets (N,) -> writes nll (N,) and lse = logsumexp of every row (N,)."""
    if logits.is_cuda and _HAS_TRITON:
        from newllm import cross_entropy_triton

        cross_entropy_triton.row_losses(logits, V, targets, nll, lse)
        return
    wide = logits[:, :V].to(lse.dtype)
    torch.logsumexp(wide, dim=1, out=lse)
    torch.sub(lse, wide.gather(1, targets[:, None])[:, 0], out=nll)


def logit_gradients_(logits: Tensor, V: int, lse: Tensor, targets: Tensor, grad: Tensor) -> None:
    """Overwrite logits (N, V and padding) by their gradient, grad_n (softmax(logits_n) - onehot(target_n)), the padding's
    zero; lse, grad (N,)."""
    if logits.is_cuda and _HAS_TRITON:
        from newllm import cross_entropy_triton

        cross_entropy_triton.logit_gradients_(logits, V, lse, targets, grad)
        return
    p = logits[:, :V].to(lse.dtype).sub_(lse[:, None]).exp_()
    p.scatter_add_(1, targets[:, None], torch.full_like(lse, -1.0)[:, None])
    logits[:, :V] = p.mul_(grad[:, None])
    logits[:, V:] = 0


def _share_losses(logits: Tensor, targets: Tensor, words: Tensor, shares: Tensor, nll: Tensor) -> None:
    """nll (N,) of the targets becomes that of targets and words."""
    of_target = logits.gather(1, targets[:, None]).to(nll.dtype)
    nll += ((of_target - logits.gather(1, words).to(nll.dtype)) * shares.to(nll.dtype)).sum(1)


def _share_gradients_(logits: Tensor, targets: Tensor, words: Tensor, shares: Tensor, grad: Tensor) -> None:
    """Move shares of the gradient of `logit_gradients_` from the target to the words. Every word stands once in its row, so that
    nothing is added by two threads."""
    shares = shares.to(grad.dtype) * grad[:, None]  # (N, K)
    moved = logits.gather(1, words).to(grad.dtype) - shares
    logits.scatter_(1, words, moved.to(logits.dtype))
    kept = logits.gather(1, targets[:, None]).to(grad.dtype) + shares.sum(1, keepdim=True)
    logits.scatter_(1, targets[:, None], kept.to(logits.dtype))
