"""`gated_scan`: the gated context recurrence over a whole sequence, activations fused, one pass over memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from newllm_kernels import backends, checks, gates
from newllm_kernels.gated_scan import reference
from newllm_kernels.numerics import acc_dtype
from newllm_kernels.operator import define


def gated_scan(
    f: Tensor, i: Tensor, d: Tensor, c0: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated recurrence along time: c_t = sigmoid(f_t) * c_{t-1} + sigmoid(i_t) * tanh(d_t), elementwise.

    Args:
        f, i, d: (B, T, D) pre-activations of the forget and input gates and of the delta; float32, bfloat16, float16 or
            float64, all of one dtype; B and T may be strided.
        c0: (N, D) start state in f's dtype or float32 (float64 beside float64); None is zero. N is B, or the number of
            packed sequences.
        cu_seqlens: (N + 1,) int32 or int64 boundaries 0 = s_0 <= s_1 <= ... <= s_N = T of N sequences packed into B = 1.

    Returns:
        c (B, T, D) in f's dtype, and the last state c_T (N, D) in float32 (float64 beside float64). Both are
        differentiable, as are f, i, d and c0. The backward computes the activations again instead of storing them.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was wanted.

    Formula: the cell state of the LSTM (Hochreiter and Schmidhuber, 1997; Gers et al., 2000) with gates that do not
    see it; docs/kernels.md.

    >>> import torch, newllm_kernels as nk
    >>> f = i = d = torch.zeros(1, 2, 1)
    >>> nk.gated_scan(f, i, d, torch.ones(1, 1))[0].flatten().tolist()
    [0.5, 0.25]
    """
    checks.tensor("f", f, "BTD")
    checks.like("i", i, "f", f)
    checks.like("d", d, "f", f)
    return _checked(f, i, d, c0, cu_seqlens, "f", f.shape[2])


def gated_scan_packed(
    gates: Tensor, c0: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`gated_scan` of f, i, d that are the column blocks of one tensor, read in place.

    Args:
        gates: (B, T, 3D), the output [f | i | d] of one linear layer.
        c0, cu_seqlens: as in `gated_scan`.

    Returns:
        c (B, T, D) and c_T (N, D), as `gated_scan` does. The gradient of `gates` is written in one piece too.

    >>> import torch, newllm_kernels as nk
    >>> nk.gated_scan_packed(torch.zeros(1, 2, 3), torch.ones(1, 1))[1].item()
    0.25
    """
    return _checked(gates, None, None, c0, cu_seqlens, "gates", checks.packed("gates", gates, "BTD"))


def _checked(
    f: Tensor, i: Tensor | None, d: Tensor | None, c0: Tensor | None, cu_seqlens: Tensor | None, name: str, width: int
) -> tuple[Tensor, Tensor]:
    if c0 is not None or cu_seqlens is not None:
        cu_seqlens, sequences = checks.cu_seqlens(cu_seqlens, name, f)
        c0 = checks.state("c0", c0, (sequences, width), name, f)
    return _gated_scan(f, i, d, c0, cu_seqlens)


def _kernel(
    f: Tensor, i: Tensor | None, d: Tensor | None, c0: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is not None:
        checks.cu_seqlens_values(cu_seqlens, f.shape[1])
    return backends.select("gated_scan", f, gates.gate_width(f, i)).forward(f, i, d, c0, cu_seqlens)


def _fake(f, i, d, c0, cu_seqlens):
    B, T, _ = f.shape
    D = gates.gate_width(f, i)
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return f.new_empty((B, T, D)), f.new_empty((sequences, D), dtype=acc_dtype(f.dtype))


def _kernel_backward(grad_c, grad_c_last, f, i, d, c, c0, cu_seqlens):
    kernel = backends.select("gated_scan", f, c.shape[2]).backward
    return kernel(grad_c, grad_c_last, f, i, d, c, c0, cu_seqlens)


def _fake_backward(grad_c, grad_c_last, f, i, d, c, c0, cu_seqlens):
    return *gates.fake_grads(f, i, d), _fake(f, i, d, c0, cu_seqlens)[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    f, i, d, c0, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(f, i, d, output[0], c0, cu_seqlens)


def _backward(ctx: Any, grad_c: Tensor | None, grad_c_last: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_c is None and grad_c_last is None:
        return None, None, None, None, None
    f, i, d, c, c0, cu_seqlens = ctx.saved_tensors
    *grads, grad_c0 = _gated_scan_backward(grad_c, grad_c_last, f, i, d, c, c0, cu_seqlens)
    return *gates.returned(grads, i), None if c0 is None else grad_c0, None


_gated_scan_backward = define(
    "gated_scan_backward(Tensor? grad_c, Tensor? grad_c_last, Tensor f, Tensor? i, Tensor? d, Tensor c, Tensor? c0, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor)",
    _kernel_backward,
    _fake_backward,
)
_gated_scan = define(
    "gated_scan(Tensor f, Tensor? i, Tensor? d, Tensor? c0, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)

backends.register(
    "gated_scan",
    backends.Implementation(
        "reference", reference.gated_scan, reference.gated_scan_backward, backends.supports_reference
    ),
)
backends.register("gated_scan", backends.native_implementation("gated_scan", "cpu", backends.supports_cpu))
backends.register(
    "gated_scan", backends.native_implementation("gated_scan", "cuda", backends.supports_cuda_recurrence("gated_scan"))
)
backends.register("gated_scan", backends.triton_implementation("gated_scan"))
