"""The three gates of the cell, as separate tensors or as column blocks of one packed tensor.

    separate   f, i, d of (..., D) each
    packed     f of (..., 3D) and i = d = None: what one matrix product [f | i | d] = W_g h + b_g leaves behind

The operators take both forms through the same arguments; gradients come back in the form the gates had.
"""

from __future__ import annotations

import torch
from torch import Tensor

from newllm_kernels.numerics import acc_dtype


def gate_width(f: Tensor, i: Tensor | None) -> int:
    """D."""
    return f.shape[-1] if i is not None else f.shape[-1] // 3


def split(f: Tensor, i: Tensor | None, d: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """f, i, d of (..., D), in the accumulation type."""
    if i is None or d is None:
        f, i, d = f.chunk(3, dim=-1)
    acc = acc_dtype(f.dtype)
    return f.to(acc), i.to(acc), d.to(acc)


def join(
    grads: tuple[Tensor, Tensor, Tensor], f: Tensor, i: Tensor | None, d: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gates in the form and dtype of the gates; of packed gates the second and third are empty."""
    if i is None or d is None:
        return torch.cat(grads, dim=-1).to(f.dtype), f.new_empty(0), f.new_empty(0)
    grad_f, grad_i, grad_d = (grad.to(f.dtype).contiguous() for grad in grads)
    return grad_f, grad_i, grad_d


def fake_grads(f: Tensor, i: Tensor | None, d: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What `join` returns, without values."""
    if i is None or d is None:
        return f.new_empty(f.shape), f.new_empty(0), f.new_empty(0)
    return f.new_empty(f.shape), f.new_empty(f.shape), f.new_empty(f.shape)


def returned(grads: tuple[Tensor, Tensor, Tensor], i: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients as autograd wants them: None for the arguments that were None."""
    return grads if i is not None else (grads[0], None, None)
