"""`context_scan`: the cell over a whole sequence whose gates are known, LayerNorm and clamp in the loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from newllm_kernels import backends, checks, gates, native
from newllm_kernels.context_scan import cuda, reference, seams
from newllm_kernels.native import Verdict
from newllm_kernels.numerics import acc_dtype
from newllm_kernels.operator import define


def context_scan(
    f: Tensor,
    i: Tensor,
    d: Tensor,
    c0: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    clamp: float | None = 10.0,
) -> tuple[Tensor, Tensor]:
    """`context_update` step after step: c_t = clamp(LayerNorm(sigmoid(f_t) * c_{t-1} + sigmoid(i_t) * tanh(d_t))).

    Args:
        f, i, d: (B, T, D) pre-activations of the forget and input gates and of the delta; float32, bfloat16, float16 or
            float64, all of one dtype; B and T may be strided.
        c0: (B, D) start state in f's dtype or float32 (float64 beside float64); None is zero. From a zero state the
            first LayerNorm divides by the spread of sigmoid(i) * tanh(d) alone: a learned start trains better.
        weight, bias: (D,) of LayerNorm, or None for 1 and 0.
        eps: added to the variance.
        clamp: bound on every context, or None for none.

    Returns:
        c (B, T, D) in f's dtype, and the last state c_T (B, D) in float32 (float64 beside float64). The state is not
        rounded from step to step; on a GPU few long sequences are computed in chunks whose seams close to a tolerance
        (docs/numerics.md; `record_seams` tells how many passes that took). Both are differentiable, as are all tensors
        among the arguments.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was wanted.

    Formula: the cell of docs/model.md.

    >>> import torch, newllm_kernels as nk
    >>> f = i = d = torch.zeros(1, 3, 2)
    >>> c, last = nk.context_scan(f, i, d, torch.tensor([[-2.0, 2.0]]), eps=0.0)
    >>> c.tolist(), last.tolist()
    ([[[-1.0, 1.0], [-1.0, 1.0], [-1.0, 1.0]]], [[-1.0, 1.0]])
    """
    checks.tensor("f", f, "BTD")
    checks.like("i", i, "f", f)
    checks.like("d", d, "f", f)
    return _checked(f, i, d, c0, weight, bias, eps, clamp, "f", f.shape[2])


def context_scan_packed(
    gates: Tensor,
    c0: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    clamp: float | None = 10.0,
) -> tuple[Tensor, Tensor]:
    """`context_scan` of f, i, d that are the column blocks of one tensor, read in place.

    Args:
        gates: (B, T, 3D), the output [f | i | d] of one linear layer.
        c0, weight, bias, eps, clamp: as in `context_scan`.

    >>> import torch, newllm_kernels as nk
    >>> nk.context_scan_packed(torch.zeros(1, 3, 6), torch.tensor([[-2.0, 2.0]]), eps=0.0)[1].tolist()
    [[-1.0, 1.0]]
    """
    D = checks.packed("gates", gates, "BTD")
    return _checked(gates, None, None, c0, weight, bias, eps, clamp, "gates", D)


def _checked(f, i, d, c0, weight, bias, eps, clamp, name, D):
    c0 = checks.state("c0", c0, (f.shape[0], D), name, f)
    if c0 is None:
        c0 = f.new_zeros((f.shape[0], D), dtype=acc_dtype(f.dtype))
    weight, bias = checks.affine("weight", weight, D, name, f), checks.affine("bias", bias, D, name, f)
    return _context_scan(f, i, d, c0, weight, bias, checks.eps(eps), checks.clamp(clamp))


def _reporting(direction: str, f: Tensor, D: int) -> backends.Implementation:
    implementation = backends.select("context_scan", f, D)
    if implementation.backend not in ("cuda", "triton"):  # which alone have chunks, and report them themselves
        seams.report(direction, f.shape[1])
    return implementation


def _kernel(f, i, d, c0, weight, bias, eps, clamp):
    kernel = _reporting("forward", f, c0.shape[1]).forward
    return kernel(f, i, d, c0, weight, bias, eps, clamp)


def _fake(f, i, d, c0, weight, bias, eps, clamp):
    return f.new_empty((f.shape[0], f.shape[1], c0.shape[1])), c0.new_empty(c0.shape)


def _kernel_backward(grad_c, grad_c_last, f, i, d, c, c0, weight, bias, eps, clamp):
    kernel = _reporting("backward", f, c0.shape[1]).backward
    return kernel(grad_c, grad_c_last, f, i, d, c, c0, weight, bias, eps, clamp)


def _fake_backward(grad_c, grad_c_last, f, i, d, c, c0, weight, bias, eps, clamp):
    D = c0.shape[1]
    return *gates.fake_grads(f, i, d), c0.new_empty(c0.shape), c0.new_empty(D), c0.new_empty(D)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    f, i, d, c0, weight, bias, ctx.eps, ctx.clamp = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(f, i, d, output[0], c0, weight, bias)


def _backward(ctx: Any, grad_c: Tensor | None, grad_c_last: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_c is None and grad_c_last is None:
        return (None,) * 8
    f, i, d, c, c0, weight, bias = ctx.saved_tensors
    *grads, grad_c0, grad_weight, grad_bias = _context_scan_backward(
        grad_c, grad_c_last, f, i, d, c, c0, weight, bias, ctx.eps, ctx.clamp
    )
    return (
        *gates.returned(grads, i), grad_c0, None if weight is None else grad_weight.to(weight.dtype),
        None if bias is None else grad_bias.to(bias.dtype), None, None,
    )  # fmt: skip


_context_scan_backward = define(
    "context_scan_backward(Tensor? grad_c, Tensor? grad_c_last, Tensor f, Tensor? i, Tensor? d, Tensor c, Tensor c0, "
    "Tensor? weight, Tensor? bias, float eps, float clamp) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel_backward,
    _fake_backward,
)
_context_scan = define(
    "context_scan(Tensor f, Tensor? i, Tensor? d, Tensor c0, Tensor? weight, Tensor? bias, float eps, float clamp) "
    "-> (Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)

backends.register(
    "context_scan",
    backends.Implementation(
        "reference", reference.context_scan, reference.context_scan_backward, backends.supports_reference
    ),
)
backends.register("context_scan", backends.native_implementation("context_scan", "cpu", backends.supports_cpu))


def _supports_cuda(call: backends.Call) -> Verdict:
    verdict = backends.supports_cuda(call)
    if verdict.ok:
        widest = native.cuda_max_width("context_scan", call.device.index or 0)
        if call.width > widest:
            return Verdict(False, f"keeps steps in shared memory: D up to {widest} on this GPU, got {call.width}")
    return verdict


def _supports_triton(call: backends.Call) -> Verdict:
    if call.width > 8192:
        return Verdict(False, f"keeps a row in registers: D up to 8192, got {call.width}")
    return backends.supports_triton(call)


backends.register(
    "context_scan", backends.Implementation("cuda", cuda.context_scan, cuda.context_scan_backward, _supports_cuda)
)
# Rows of more than 2048 columns cost the CUDA kernels spilled registers, and were not measured against Triton's.
backends.register(
    "context_scan",
    backends.triton_implementation("context_scan", supports=_supports_triton, rank=lambda call: int(call.width > 2048)),
)
