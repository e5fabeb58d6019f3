"""`gated_scan_layer_norm`: the gated recurrence and LayerNorm on what is read out of it, in as few passes as possible."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from newllm_kernels import backends, checks, gates
from newllm_kernels.gated_scan_layer_norm import composed, cuda, reference
from newllm_kernels.numerics import acc_dtype
from newllm_kernels.operator import define


def gated_scan_layer_norm(
    f: Tensor,
    i: Tensor,
    d: Tensor,
    c0: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    clamp: float | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_scan`, then `layer_norm` of its contexts: c_t = sigmoid(f_t) * c_{t-1} + sigmoid(i_t) * tanh(d_t),
    y_t = clamp(LayerNorm(c_t), -clamp, clamp).

    Args:
        f, i, d, c0, cu_seqlens: as in `gated_scan`.
        weight, bias: (D,) of any of these dtypes, or None for 1 and 0.
        eps: added to the variance.
        clamp: bound on y, or None for none.

    Returns:
        y and c (B, T, D) in f's dtype, and the last state c_T (N, D) in float32 (float64 beside float64); all differentiable.
        What is normalised is the stored c.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was wanted.

    Formula: the read-out of docs/model.md with norm="output".

    >>> import torch, newllm_kernels as nk
    >>> f = i = d = torch.zeros(1, 1, 2)
    >>> y, c, last = nk.gated_scan_layer_norm(f, i, d, torch.tensor([[2.0, 6.0]]), eps=0.0)
    >>> y.tolist(), c.tolist()
    ([[[-1.0, 1.0]]], [[[1.0, 3.0]]])
    """
    checks.tensor("f", f, "BTD")
    checks.like("i", i, "f", f)
    checks.like("d", d, "f", f)
    return _checked(f, i, d, c0, cu_seqlens, weight, bias, eps, clamp, "f", f.shape[2])


def gated_scan_layer_norm_packed(
    gates: Tensor,
    c0: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    clamp: float | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_scan_layer_norm` of f, i, d that are the column blocks of one tensor, read in place.

    Args:
        gates: (B, T, 3D), the output [f | i | d] of one linear layer.
        c0, weight, bias, eps, clamp, cu_seqlens: as in `gated_scan_layer_norm`.

    >>> import torch, newllm_kernels as nk
    >>> nk.gated_scan_layer_norm_packed(torch.zeros(1, 1, 6), torch.tensor([[2.0, 6.0]]), eps=0.0)[0].tolist()
    [[[-1.0, 1.0]]]
    """
    D = checks.packed("gates", gates, "BTD")
    return _checked(gates, None, None, c0, cu_seqlens, weight, bias, eps, clamp, "gates", D)


def _checked(f, i, d, c0, cu_seqlens, weight, bias, eps, clamp, name, D):
    cu_seqlens, sequences = checks.cu_seqlens(cu_seqlens, name, f)
    c0 = checks.state("c0", c0, (sequences, D), name, f)
    weight, bias = checks.affine("weight", weight, D, name, f), checks.affine("bias", bias, D, name, f)
    eps, clamp = checks.eps(eps), checks.clamp(clamp)
    return _gated_scan_layer_norm(f, i, d, c0, cu_seqlens, weight, bias, eps, clamp)[:3]


def _kernel(f, i, d, c0, cu_seqlens, weight, bias, eps, clamp):
    checks.cu_seqlens_values(cu_seqlens, f.shape[1])
    forward = backends.select("gated_scan_layer_norm", f, gates.gate_width(f, i)).forward
    return forward(f, i, d, c0, cu_seqlens, weight, bias, eps, clamp)


def _fake(f, i, d, c0, cu_seqlens, weight, bias, eps, clamp):
    B, T, _ = f.shape
    D, acc = gates.gate_width(f, i), acc_dtype(f.dtype)
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    contexts = f.new_empty((B, T, D)), f.new_empty((B, T, D))
    return *contexts, f.new_empty((sequences, D), dtype=acc), *(f.new_empty(B * T, dtype=acc) for _ in range(2))


def _kernel_backward(grad_y, grad_c, grad_c_last, f, i, d, c, c0, cu_seqlens, weight, bias, mean, rstd, clamp):
    backward = backends.select("gated_scan_layer_norm", f, c.shape[2]).backward
    return backward(grad_y, grad_c, grad_c_last, f, i, d, c, c0, cu_seqlens, weight, bias, mean, rstd, clamp)


def _fake_backward(grad_y, grad_c, grad_c_last, f, i, d, c, c0, cu_seqlens, weight, bias, mean, rstd, clamp):
    sequences = f.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    D = c.shape[2]
    return *gates.fake_grads(f, i, d), mean.new_empty((sequences, D)), mean.new_empty(D), mean.new_empty(D)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    f, i, d, c0, cu_seqlens, weight, bias, _, ctx.clamp = inputs
    _, c, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(f, i, d, c, c0, cu_seqlens, weight, bias, mean, rstd)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_c: Tensor | None, grad_c_last: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if grad_y is None and grad_c is None and grad_c_last is None:
        return (None,) * 9
    f, i, d, c, c0, cu_seqlens, weight, bias, mean, rstd = ctx.saved_tensors
    *grads, grad_c0, grad_weight, grad_bias = _gated_scan_layer_norm_backward(
        grad_y, grad_c, grad_c_last, f, i, d, c, c0, cu_seqlens, weight, bias, mean, rstd, ctx.clamp
    )
    return (
        *gates.returned(grads, i), None if c0 is None else grad_c0, None,
        None if weight is None else grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype),
        None, None,
    )  # fmt: skip


_gated_scan_layer_norm_backward = define(
    "gated_scan_layer_norm_backward(Tensor? grad_y, Tensor? grad_c, Tensor? grad_c_last, Tensor f, Tensor? i, Tensor? d, "
    "Tensor c, Tensor? c0, Tensor? cu_seqlens, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, float clamp) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel_backward,
    _fake_backward,
)
_gated_scan_layer_norm = define(
    "gated_scan_layer_norm(Tensor f, Tensor? i, Tensor? d, Tensor? c0, Tensor? cu_seqlens, Tensor? weight, Tensor? bias, "
    "float eps, float clamp) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _supports_triton(call: backends.Call) -> backends.Verdict:
    if call.width > 8192:
        return backends.Verdict(False, f"keeps a row in registers: D up to 8192, got {call.width}")
    return backends.supports_triton(call)


backends.register(
    "gated_scan_layer_norm",
    backends.Implementation(
        "reference", reference.gated_scan_layer_norm, reference.gated_scan_layer_norm_backward,
        backends.supports_reference,
    ),
)  # fmt: skip
backends.register(
    "gated_scan_layer_norm",
    backends.Implementation(
        "cpu", composed.gated_scan_layer_norm, composed.gated_scan_layer_norm_backward, backends.supports_cpu
    ),
)
_triton = backends.triton_implementation("gated_scan_layer_norm", supports=_supports_triton)
backends.register("gated_scan_layer_norm", _triton)
backends.register("gated_scan_layer_norm", cuda.implementation(_triton))
