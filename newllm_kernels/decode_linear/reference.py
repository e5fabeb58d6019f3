"""The linear layers of one token in plain PyTorch: the definition of `decode_linear`.

x (B, K)   weights: one to four of (N, K)   addend (B, parts * N)   residual, state, y, context (B, N)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from newllm_kernels.numerics import acc_dtype

EPILOGUES = ("linear", "gated", "context")
ACTIVATIONS = {"none": lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def prepared(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    normalize: bool,
    eps: float,
    clamp: float,
    acc: torch.dtype,
) -> Tensor:
    """clamp(LayerNorm(x)) where asked for, else x: in the accumulation type."""
    x = x.to(acc)
    if not normalize:
        return x
    weight, bias = (None if p is None else p.to(acc) for p in (norm_weight, norm_bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).clamp(-clamp, clamp)


def decode_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    tokens: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    normalize: bool,
    eps: float,
    clamp: float,
    factor: Tensor | None,
    addend: Tensor | None,
    residual: Tensor | None,
    state: Tensor | None,
    epilogue: str,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(y, context), both in the accumulation type of the weights; what the epilogue does not make is empty."""
    acc = acc_dtype(weights[0].dtype)
    p = prepared(x if tokens is None else x[tokens], norm_weight, norm_bias, normalize, eps, clamp, acc)
    if factor is not None:
        p = p * factor.to(acc)
    p = p.to(weights[0].dtype).to(acc)  # what a layer before would have stored
    addends = [None] * len(weights) if addend is None else addend.to(acc).chunk(len(weights), dim=-1)
    z = []
    for weight, bias, extra in zip(weights, biases, addends, strict=True):
        product = F.linear(p, weight.to(acc), None if bias is None else bias.to(acc))
        z.append(product if extra is None else product + extra)
    empty = x.new_empty(0, dtype=acc)
    if epilogue == "linear":
        y = ACTIVATIONS[activation](z[0])
        return (y if residual is None else residual.to(acc) + y), empty
    if epilogue == "gated":
        return F.silu(z[0]) * z[1], empty
    context = torch.sigmoid(z[0]) * state.to(acc) + torch.sigmoid(z[1]) * torch.tanh(z[2])
    return (F.silu(z[3]) if len(z) == 4 else empty), context
