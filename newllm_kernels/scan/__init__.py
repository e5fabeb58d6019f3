"""`scan`: the linear recurrence h_t = a_t h_{t-1} + b_t over a whole sequence, one pass over memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from newllm_kernels import backends, checks
from newllm_kernels.numerics import acc_dtype
from newllm_kernels.operator import define
from newllm_kernels.scan import reference


def scan(
    a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Linear recurrence along time: h_t = a_t * h_{t-1} + b_t, elementwise.

    Args:
        a: (B, T, D) decay, float32, bfloat16, float16 or float64; B and T may be strided.
        b: (B, T, D) input, of a's dtype.
        h0: (N, D) start state in a's dtype or float32 (float64 beside float64); None is zero. N is B, or the number of
            packed sequences.
        reverse: run from t = T - 1 down to 0; h0 is then what comes after the last step.
        cu_seqlens: (N + 1,) int32 or int64 boundaries 0 = s_0 <= s_1 <= ... <= s_N = T of N sequences packed into B = 1.

    Returns:
        h (B, T, D) in a's dtype, and the last state h_T (N, D) in float32 (float64 beside float64): what h0 of the next
        piece must be. Both are differentiable, as are a, b and h0. Sums run in float32 or wider.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was wanted.

    Formula: the first-order linear recurrence of Blelloch, "Prefix sums and their applications" (1990), section 1.4.

    >>> import torch, newllm_kernels as nk
    >>> h, last = nk.scan(torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1))
    >>> h.flatten().tolist(), last.item()
    ([1.0, 1.5, 1.75], 1.75)
    """
    checks.tensor("a", a, "BTD")
    checks.like("b", b, "a", a)
    if h0 is not None or cu_seqlens is not None:
        cu_seqlens, sequences = checks.cu_seqlens(cu_seqlens, "a", a)
        h0 = checks.state("h0", h0, (sequences, a.shape[2]), "a", a)
    if not isinstance(reverse, bool):
        raise TypeError(f"reverse: got {type(reverse).__name__}, wanted True or False")
    return _scan(a, b, h0, reverse, cu_seqlens)


def _kernel(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    if cu_seqlens is not None:
        checks.cu_seqlens_values(cu_seqlens, a.shape[1])
    return backends.select("scan", a, a.shape[2]).forward(a, b, h0, reverse, cu_seqlens)


def _fake(a, b, h0, reverse, cu_seqlens):
    sequences = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return a.new_empty(a.shape), a.new_empty((sequences, a.shape[2]), dtype=acc_dtype(a.dtype))


def _kernel_backward(grad_h, grad_h_last, a, h, h0, reverse, cu_seqlens):
    kernel = backends.select("scan", a, a.shape[2]).backward
    return kernel(grad_h, grad_h_last, a, h, h0, reverse, cu_seqlens)


def _fake_backward(grad_h, grad_h_last, a, h, h0, reverse, cu_seqlens):
    grad_h0 = _fake(a, a, h0, reverse, cu_seqlens)[1]
    return a.new_empty(a.shape), a.new_empty(a.shape), grad_h0


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, h0, ctx.reverse, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, output[0], h0, cu_seqlens)


def _backward(ctx: Any, grad_h: Tensor | None, grad_h_last: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_h is None and grad_h_last is None:
        return None, None, None, None, None
    a, h, h0, cu_seqlens = ctx.saved_tensors
    grad_a, grad_b, grad_h0 = _scan_backward(grad_h, grad_h_last, a, h, h0, ctx.reverse, cu_seqlens)
    return grad_a, grad_b, None if h0 is None else grad_h0, None, None


_scan_backward = define(
    "scan_backward(Tensor? grad_h, Tensor? grad_h_last, Tensor a, Tensor h, Tensor? h0, bool reverse, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    _kernel_backward,
    _fake_backward,
)
_scan = define(
    "scan(Tensor a, Tensor b, Tensor? h0, bool reverse, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)

backends.register(
    "scan",
    backends.Implementation("reference", reference.scan, reference.scan_backward, backends.supports_reference),
)
backends.register("scan", backends.native_implementation("scan", "cpu", backends.supports_cpu))
backends.register("scan", backends.native_implementation("scan", "cuda", backends.supports_cuda_recurrence("scan")))
backends.register("scan", backends.triton_implementation("scan"))
