"""Layers over the operations: `ContextUpdate`, the cell as a drop-in recurrent layer, and `LayerNorm`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from newllm_kernels.context_scan import context_scan_packed
from newllm_kernels.context_update import context_update_packed
from newllm_kernels.gated_scan import gated_scan_packed
from newllm_kernels.layer_norm import layer_norm
from newllm_kernels.numerics import acc_dtype

NORMS = ("state", "output", None)


class LayerNorm(nn.Module):
    """Drop-in for `torch.nn.LayerNorm`: same arguments, parameters, state_dict and results.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimensions, which must be `normalized_shape`.
    Unlike torch's it takes a bfloat16 or float16 input beside float32 parameters on any device and then returns the
    input's dtype.

    Args:
        normalized_shape: D, or the sizes of the last dimensions.
        eps: added to the variance.
        elementwise_affine: whether there are weight and bias at all; bias: whether there is a bias.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what was wanted.

    >>> import torch, newllm_kernels as nk
    >>> theirs, ours = torch.nn.LayerNorm(8), nk.LayerNorm(8)
    >>> _ = ours.load_state_dict(theirs.state_dict())
    >>> x = torch.randn(4, 8)
    >>> torch.allclose(ours(x), theirs(x), atol=1e-6)
    True
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if not sizes or not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise ValueError(f"normalized_shape: got {normalized_shape!r}, wanted one or more sizes of at least 1")
        self.normalized_shape = sizes
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        if elementwise_affine:
            self.weight = nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))
            if bias:
                self.bias = nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))
            else:
                self.register_parameter("bias", None)
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight one, bias zero."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., *normalized_shape) -> y, of its shape and dtype."""
        sizes = self.normalized_shape
        if tuple(x.shape[-len(sizes) :]) != sizes:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (..., {', '.join(map(str, sizes))})")
        if len(sizes) == 1:
            return layer_norm(x, self.weight, self.bias, self.eps)
        rows = x.flatten(-len(sizes))
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        return layer_norm(rows, weight, bias, self.eps).view(x.shape)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, bias={bias}"


class ContextUpdate(nn.Module):
    """New-LLM's context as a recurrent layer: a linear layer makes the gates, a fused kernel the update.

        f, i, d = W hidden + b
        u_t = sigmoid(f_t) * c_{t-1} + sigmoid(i_t) * tanh(d_t)

        norm="state"    c_t = clamp(LayerNorm(u_t), -clamp, clamp)     read(c) = c
        norm="output"   c_t = u_t                                      read(c) = clamp(LayerNorm(c), -clamp, clamp)
        norm=None       c_t = u_t                                      read(c) = c

    Called with one step it returns the new context; called with a whole sequence it returns all contexts and the last,
    computed in one pass over memory. Stepping through a sequence and passing it whole give the same contexts.

    Args:
        hidden_dim: H, width of the input.
        context_dim: D, width of the context.
        norm: where LayerNorm stands, see above.
        clamp: bound on what LayerNorm returns, or None for none.
        eps: of LayerNorm.
        bias: whether the linear layer has a bias. The forget gates' biases start spread over 0 to 4, which gives
            memories from two to some fifty steps.

    Shapes:
        hidden (B, H), context (B, D) -> context (B, D)
        hidden (B, T, H), context (B, D) or None -> contexts (B, T, D), last context (B, D)

    `context=None` starts from `initial_context`, a learned vector. Contexts come back in the dtype of the gates, the last
    one and that of a single step in float32 (float64 for a float64 layer), unless the context given is of the gates' dtype.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what was wanted.

    Formula: docs/model.md.

    >>> import torch, newllm_kernels as nk
    >>> layer = nk.ContextUpdate(hidden_dim=16, context_dim=8)
    >>> hidden = torch.randn(2, 5, 16)
    >>> contexts, last = layer(hidden)
    >>> contexts.shape, last.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 8]))
    >>> context = layer.initial_context(2)
    >>> for t in range(5):
    ...     context = layer(hidden[:, t], context)
    >>> torch.allclose(context, last, atol=1e-5)
    True
    """

    def __init__(
        self,
        hidden_dim: int,
        context_dim: int,
        *,
        norm: str | None = "state",
        clamp: float | None = 10.0,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_dim", hidden_dim), ("context_dim", context_dim)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: got {value!r}, wanted an integer of at least 1")
        if norm not in NORMS:
            raise ValueError(f"norm: got {norm!r}, wanted 'state', 'output' or None")
        if clamp is not None and not clamp > 0:
            raise ValueError(f"clamp: got {clamp!r}, wanted a number above 0 or None")
        self.hidden_dim, self.context_dim, self.norm_kind, self.clamp = hidden_dim, context_dim, norm, clamp
        self.gates = nn.Linear(hidden_dim, 3 * context_dim, bias=bias, device=device, dtype=dtype)
        self.norm = LayerNorm(context_dim, eps=eps, device=device, dtype=dtype) if norm else None
        self.start = nn.Parameter(torch.empty(context_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gates of unit variance for an input of unit variance; a start of unit variance, which LayerNorm can divide by."""
        D = self.context_dim
        nn.init.normal_(self.gates.weight, std=self.hidden_dim**-0.5)
        nn.init.normal_(self.start)
        if self.norm is not None:
            self.norm.reset_parameters()
        if self.gates.bias is not None:
            with torch.no_grad():
                self.gates.bias.zero_()
                self.gates.bias[:D] = torch.linspace(0.0, 4.0, D)

    def initial_context(self, batch_size: int) -> Tensor:
        """The context that None stands for: (B, D), float32 (float64 for a float64 layer)."""
        return self.start.to(acc_dtype(self.start.dtype)).expand(batch_size, -1)

    def forward(self, hidden: Tensor, context: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """One step (B, H) -> (B, D), or a sequence (B, T, H) -> ((B, T, D), (B, D)); see the class."""
        if not isinstance(hidden, Tensor) or hidden.dim() not in (2, 3) or hidden.shape[-1] != self.hidden_dim:
            got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(f"hidden: got {got}, wanted (B, {self.hidden_dim}) or (B, T, {self.hidden_dim})")
        if context is None:
            context = self.initial_context(hidden.shape[0])
        elif not isinstance(context, Tensor) or context.shape != (hidden.shape[0], self.context_dim):
            got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"context: got {got}, wanted ({hidden.shape[0]}, {self.context_dim})")
        gates = self.gates(hidden)  # (B, 3D) or (B, T, 3D)
        if self.norm_kind == "state":
            run = context_update_packed if hidden.dim() == 2 else context_scan_packed
            return run(gates, context, self.norm.weight, self.norm.bias, self.norm.eps, self.clamp)
        if hidden.dim() == 3:
            return gated_scan_packed(gates, context)
        return gated_scan_packed(gates[:, None], context)[1].to(context.dtype)

    def read(self, contexts: Tensor) -> Tensor:
        """What a layer above sees of contexts (..., D): normalised and clamped where norm="output", else as they are."""
        if self.norm_kind != "output":
            return contexts
        normalised = self.norm(contexts)
        return normalised if self.clamp is None else normalised.clamp(-self.clamp, self.clamp)

    def extra_repr(self) -> str:
        return f"norm={self.norm_kind!r}, clamp={self.clamp}"
