"""`context_update`: one step of the cell, gates to normalised context, in one pass over memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from newllm_kernels import backends, checks, gates, native
from newllm_kernels.context_update import reference
from newllm_kernels.native import Verdict
from newllm_kernels.numerics import acc_dtype
from newllm_kernels.operator import define


def context_update(
    f: Tensor,
    i: Tensor,
    d: Tensor,
    c: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    clamp: float | None = 10.0,
) -> Tensor:
    """One step of New-LLM's cell: clamp(LayerNorm(sigmoid(f) * c + sigmoid(i) * tanh(d)), -clamp, clamp).

    Args:
        f, i, d: (..., D) pre-activations of the forget and input gates and of the delta; float32, bfloat16, float16 or
            float64, all of one dtype; rows may be strided.
        c: (..., D) context, in f's dtype or float32 (float64 beside float64).
        weight, bias: (D,) of LayerNorm, or None for 1 and 0.
        eps: added to the variance.
        clamp: bound on the result, or None for none.

    Returns:
        The new context (..., D) in c's dtype. All arithmetic is in float32 (float64 beside float64). The gradient of a
        component that the clamp cut is zero.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was wanted.

    Formula: the cell of docs/model.md.

    >>> import torch, newllm_kernels as nk
    >>> f = i = d = torch.zeros(1, 2)
    >>> nk.context_update(f, i, d, torch.tensor([[-2.0, 2.0]]), eps=0.0).tolist()
    [[-1.0, 1.0]]
    """
    checks.tensor("f", f, None)
    checks.like("i", i, "f", f)
    checks.like("d", d, "f", f)
    return _checked(f, i, d, c, weight, bias, eps, clamp, "f", f.shape)


def context_update_packed(
    gates: Tensor,
    c: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    clamp: float | None = 10.0,
) -> Tensor:
    """`context_update` of f, i, d that are the column blocks of one tensor, read in place.

    Args:
        gates: (..., 3D), the output [f | i | d] of one linear layer.
        c, weight, bias, eps, clamp: as in `context_update`.

    >>> import torch, newllm_kernels as nk
    >>> nk.context_update_packed(torch.zeros(1, 6), torch.tensor([[-2.0, 2.0]]), eps=0.0).tolist()
    [[-1.0, 1.0]]
    """
    D = checks.packed("gates", gates, None)
    return _checked(gates, None, None, c, weight, bias, eps, clamp, "gates", (*gates.shape[:-1], D))


def _checked(f, i, d, c, weight, bias, eps, clamp, name, shape):
    if c is None:
        raise TypeError(f"c: got None, wanted a tensor {tuple(shape)}")
    checks.state_as_given("c", c, shape, name, f)
    D = shape[-1]
    weight, bias = checks.affine("weight", weight, D, name, f), checks.affine("bias", bias, D, name, f)
    eps, clamp = checks.eps(eps), checks.clamp(clamp)
    if f.dim() == 2:
        return _context_update(f, i, d, c, weight, bias, eps, clamp)
    rows = [None if gate is None else gate.reshape(-1, gate.shape[-1]) for gate in (f, i, d)]
    return _context_update(*rows, c.reshape(-1, D), weight, bias, eps, clamp).view(shape)


LARGE = 2**23  # elements of c from which a forward takes longer than its launch, whoever launches it


def _size(c: Tensor) -> str | None:
    """What of a forward decides beside width and dtype."""
    return "large" if c.numel() >= LARGE else None


def _described(*args, **kwargs):
    """For `explain`, which is also asked with the first tensor alone: all are of one size then."""
    first = args[0] if args else kwargs.get("gates", kwargs.get("f"))
    others = (*args[1:], *kwargs.values())
    packed = "gates" in kwargs or (len(others) > 0 and others[0].shape[-1] * 3 == first.shape[-1])
    c = kwargs.get("c", next(iter(others[0 if packed else 2 :]), first))
    return first, c.shape[-1], _size(c)


def _kernel(f, i, d, c, weight, bias, eps, clamp):
    return backends.select("context_update", f, c.shape[1], _size(c)).forward(f, i, d, c, weight, bias, eps, clamp)


def _fake(f, i, d, c, weight, bias, eps, clamp):
    return c.new_empty(c.shape)


def _kernel_backward(grad, f, i, d, c, weight, bias, eps, clamp):
    return backends.select("context_update", f, c.shape[1]).backward(grad, f, i, d, c, weight, bias, eps, clamp)


def _fake_backward(grad, f, i, d, c, weight, bias, eps, clamp):
    D, acc = c.shape[1], acc_dtype(f.dtype)
    return *gates.fake_grads(f, i, d), c.new_empty(c.shape), f.new_empty(D, dtype=acc), f.new_empty(D, dtype=acc)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.clamp = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    f, i, d, c, weight, bias = ctx.saved_tensors
    *grads, grad_c, grad_weight, grad_bias = _context_update_backward(
        grad, f, i, d, c, weight, bias, ctx.eps, ctx.clamp
    )
    return (
        *gates.returned(grads, i), grad_c, None if weight is None else grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype),
        None, None,
    )  # fmt: skip


_context_update_backward = define(
    "context_update_backward(Tensor grad, Tensor f, Tensor? i, Tensor? d, Tensor c, Tensor? weight, Tensor? bias, "
    "float eps, float clamp) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel_backward,
    _fake_backward,
)
_context_update = define(
    "context_update(Tensor f, Tensor? i, Tensor? d, Tensor c, Tensor? weight, Tensor? bias, float eps, float clamp) "
    "-> Tensor",
    _kernel,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _supports_cuda(call: backends.Call) -> Verdict:
    verdict = backends.supports_cuda(call)
    if verdict.ok:
        widest = native.cuda_max_width("context_update", call.device.index or 0)
        if call.width > widest:
            return Verdict(False, f"keeps a row in shared memory: D up to {widest} on this GPU, got {call.width}")
    return verdict


def _supports_triton(call: backends.Call) -> Verdict:
    if call.width > 8192:
        return Verdict(False, f"keeps a row in registers: D up to 8192, got {call.width}")
    return backends.supports_triton(call)


backends.register(
    "context_update",
    backends.Implementation(
        "reference", reference.context_update, reference.context_update_backward, backends.supports_reference
    ),
)
backends.register("context_update", backends.native_implementation("context_update", "cpu", backends.supports_cpu))
backends.register("context_update", backends.native_implementation("context_update", "cuda", _supports_cuda))
backends.register_detail("context_update", _described)
# Measured on an H100. 8192x8192 bfloat16: rows too wide for a block's registers are Triton's. 2^26 elements of bfloat16, widths of
# 128 to 4096: its forward takes 222 to 237 us, the one in CUDA C++ 242 to 259 where a power of two fits the row and 274 to 370
# where not; of float32 3 to 8% more at most widths. Backwards are alike at 1024 columns, and a launch costs less in C++.
backends.register(
    "context_update",
    backends.triton_implementation(
        "context_update", supports=_supports_triton, rank=lambda call: int(call.width > 4096 or call.detail == "large")
    ),
)
