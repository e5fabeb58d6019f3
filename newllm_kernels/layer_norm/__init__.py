"""`layer_norm` and `add_layer_norm`: LayerNorm over the last dimension, one pass over memory, statistics in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newllm_kernels import backends, checks, native
from newllm_kernels.layer_norm import reference
from newllm_kernels.native import Verdict
from newllm_kernels.numerics import acc_dtype
from newllm_kernels.operator import define


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension.

    Args:
        x: (..., D), float32, bfloat16, float16 or float64, of at least one dimension.
        weight, bias: (D,) of any of these dtypes, or None for 1 and 0.
        eps: added to the (biased) variance.

    Returns:
        y (..., D) in x's dtype. Mean, variance and sums are in float32 (float64 beside float64).

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was wanted.

    Formula: Ba, Kiros and Hinton, "Layer normalization" (2016), equation 3, per row.

    >>> import torch, newllm_kernels as nk
    >>> nk.layer_norm(torch.tensor([[1.0, 3.0]]), eps=0.0).tolist()
    [[-1.0, 1.0]]
    """
    checks.tensor("x", x, None)
    D = x.shape[-1]
    weight, bias = checks.affine("weight", weight, D, "x", x), checks.affine("bias", bias, D, "x", x)
    return _layer_norm(x, None, weight, bias, checks.eps(eps))[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The seam of a residual stack in one pass: sum = x + residual, y = LayerNorm(sum).

    Args:
        x, residual: (..., D) of one dtype.
        weight, bias, eps: as in `layer_norm`.

    Returns:
        (y, sum), both (..., D) in x's dtype, both differentiable. What is normalised is the stored sum.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was wanted.

    >>> import torch, newllm_kernels as nk
    >>> y, total = nk.add_layer_norm(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2.0]]), eps=0.0)
    >>> y.tolist(), total.tolist()
    ([[-1.0, 1.0]], [[1.0, 3.0]])
    """
    checks.tensor("x", x, None)
    checks.like("residual", residual, "x", x)
    D = x.shape[-1]
    weight, bias = checks.affine("weight", weight, D, "x", x), checks.affine("bias", bias, D, "x", x)
    return _layer_norm(x, residual, weight, bias, checks.eps(eps))[:2]


def _kernel(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backends.select("layer_norm", x, x.shape[-1]).forward(x, residual, weight, bias, eps)


def _plain(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    implementation = backends.select("layer_norm", x, x.shape[-1])
    return (implementation.plain or implementation.forward)(x, residual, weight, bias, eps)


def _fake(x, residual, weight, bias, eps):
    rows = x.numel() // x.shape[-1]
    statistics = x.new_empty(rows, dtype=acc_dtype(x.dtype)), x.new_empty(rows, dtype=acc_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), *statistics


def _kernel_backward(grad_y, grad_sum, x, mean, rstd, weight, as_weight=False):
    backward = backends.select("layer_norm", x, x.shape[-1]).backward
    return backward(grad_y, grad_sum, x, mean, rstd, weight, as_weight)


def _fake_backward(grad_y, grad_sum, x, mean, rstd, weight, as_weight=False):
    D, dtype = x.shape[-1], mean.dtype if weight is None or not as_weight else weight.dtype
    return x.new_empty(x.shape), mean.new_empty(D, dtype=dtype), mean.new_empty(D, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _ = inputs
    _, total, mean, rstd = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total if ctx.has_residual else x, weight, mean, rstd)


def _backward(ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if not ctx.has_residual:
        grad_sum = None  # of the empty placeholder
    if grad_y is None and grad_sum is None:
        return None, None, None, None, None
    x, weight, mean, rstd = ctx.saved_tensors
    # In the dtype of the parameters at once: two casts would be two more kernels.
    as_weight = weight is not None and ctx.bias_dtype in (None, weight.dtype)
    grad_x, grad_weight, grad_bias = _layer_norm_backward(grad_y, grad_sum, x, mean, rstd, weight, as_weight)
    return (
        grad_x, grad_x if ctx.has_residual else None, None if weight is None else grad_weight.to(weight.dtype),
        None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype), None,
    )  # fmt: skip


_layer_norm_backward = define(
    "layer_norm_backward(Tensor? grad_y, Tensor? grad_sum, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
    "bool as_weight=False) -> (Tensor, Tensor, Tensor)",
    _kernel_backward,
    _fake_backward,
)
_layer_norm = define(
    "layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    plain=_plain,
)

backends.register(
    "layer_norm",
    backends.Implementation(
        "reference", reference.layer_norm, reference.layer_norm_backward, backends.supports_reference
    ),
)
backends.register("layer_norm", backends.native_implementation("layer_norm", "cpu", backends.supports_cpu))


def _supports_cuda(call: backends.Call) -> Verdict:
    verdict = backends.supports_cuda(call)
    if verdict.ok:
        widest = native.cuda_layer_norm_max_width(call.device.index or 0)
        if call.width > widest:
            name = torch.cuda.get_device_name(call.device)
            return Verdict(False, f"keeps a row in registers: D up to {widest} on {name}, got {call.width}")
    return verdict


def _triton_rank(call: backends.Call) -> int:
    """Measured on an H100 in one process, bfloat16: at 65536x256 the CUDA kernels take 2% (forward) and 8% (backward) less time than
    Triton's, past 8192 columns 8 to 40% and 44 to 47% less, at 32768x1024 and 16384x4096 the same within 2%. Rows that do not
    begin at 16 bytes take them twice Triton's time. A small call is the host's, who is faster in calling the CUDA kernel."""
    faster = (call.width <= 512 or call.width > 8192) and call.width % 8 == 0 and call.dtype.itemsize == 2
    return 0 if call.small or faster else 1


backends.register(
    "layer_norm", backends.native_implementation("layer_norm", "cuda", _supports_cuda, plain="layer_norm_plain")
)
backends.register("layer_norm", backends.triton_implementation("layer_norm", rank=_triton_rank))
