"""`decode_linear`: a linear layer at one token, with what stands before and after it, in one pass over its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from newllm_kernels import backends, checks, native
from newllm_kernels.backends import BackendError
from newllm_kernels.decode_linear import reference
from newllm_kernels.decode_linear.reference import ACTIVATIONS, EPILOGUES
from newllm_kernels.numerics import DTYPES, acc_dtype
from newllm_kernels.operator import define

MOST_ROWS, MOST_PARTS = 16, 4
PARTS = {"linear": (1,), "gated": (2,), "context": (3, 4)}
NORMALIZE, X_IS_TABLE, RESIDUAL_IS_TABLE, BARRIER, PAIRS = 1, 2, 4, 8, 16  # flags of the native operators


class TooManyRows(BackendError):
    """x of that many rows does not fit into the shared memory of a block."""


def decode_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    norm: tuple[Tensor | None, Tensor | None] | None = None,
    eps: float = 1e-5,
    clamp: float | None = None,
    factor: Tensor | None = None,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    state: Tensor | None = None,
    epilogue: str = "linear",
    activation: str = "none",
) -> tuple[Tensor | None, Tensor | None]:
    """A linear layer for one token of up to 16 texts, fused with its neighbours. For generation: it has no gradient.

        p    = clamp(LayerNorm(x)) * factor, each where given; rounded to the dtype of the weights
        z_j  = W_j p + b_j + addend_j
        "linear"   y = residual + activation(z_0)
        "gated"    y = silu(z_0) * z_1
        "context"  context = sigmoid(z_0) * state + sigmoid(z_1) * tanh(z_2), and y = silu(z_3) where there is a W_3

    Args:
        x: (B, K), B from 0 to 16, in the dtype of the weights or float32 (float64 beside float64).
        weight: (N, K), or a sequence of as many as the epilogue takes (1; 2; 3 or 4), all of one dtype, shape and row
            stride, with contiguous rows.
        bias: (N,) beside every weight, or None.
        norm: LayerNorm's (weight, bias), (K,) each or None; norm=None: no LayerNorm, and then no clamp either.
        factor: (B, K). addend: (B, parts * N). residual, state: (B, N). In x's dtypes.
        activation: "none", "relu", "gelu", "silu" or "tanh"; of "linear" only.

    Returns:
        (y, context) (B, N), in float32 (float64 beside float64); None where the epilogue does not make it.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was wanted. RuntimeError where a gradient would have
        to be recorded.

    >>> import torch, newllm_kernels as nk
    >>> y, _ = nk.decode_linear(torch.ones(1, 3), torch.eye(3) * 2, residual=torch.ones(1, 3))
    >>> y.tolist()
    [[3.0, 3.0, 3.0]]
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    biases = [bias] if bias is None or isinstance(bias, Tensor) else list(bias)
    if len(biases) == 1 and biases[0] is None:
        biases *= len(weights)
    check_layer(weights, biases, epilogue, activation)
    N, K = weights[0].shape
    like = weights[0]
    if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != K or x.shape[0] > MOST_ROWS:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: got {got}, wanted (B, {K}) with B of at most {MOST_ROWS}")
    B = x.shape[0]
    widths = {"x": K, "factor": K, "addend": len(weights) * N, "residual": N, "state": N}
    given = {"x": x, "factor": factor, "addend": addend, "residual": residual, "state": state}
    given = {
        name: None if value is None else checks.state(name, value, (B, widths[name]), "weight", like).contiguous()
        for name, value in given.items()
    }
    if (state is None) == (epilogue == "context"):
        raise ValueError(f'state: got {type(state).__name__}, wanted a tensor with epilogue="context" and only there')
    if residual is not None and epilogue != "linear":
        raise ValueError(f'residual: wanted None, for it is added with epilogue="linear" only (it is {epilogue!r})')
    norm_weight, norm_bias = (None, None) if norm is None else norm
    norm_weight = checks.affine("norm weight", norm_weight, K, "weight", like)
    norm_bias = checks.affine("norm bias", norm_bias, K, "weight", like)
    tensors = [*weights, *biases, norm_weight, norm_bias, *given.values()]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError("decode_linear has no gradient: call it under torch.no_grad()")
    y, context = _decode_linear(
        given["x"], weights, biases, norm_weight, norm_bias, norm is not None, checks.eps(eps), checks.clamp(clamp),
        given["factor"], given["addend"], given["residual"], given["state"], epilogue, activation,
    )  # fmt: skip
    made_y = epilogue != "context" or len(weights) == 4
    return y if made_y else None, context if epilogue == "context" else None


def check_layer(weights: list[Tensor], biases: list[Tensor | None], epilogue: str, activation: str) -> None:
    """Raise TypeError or ValueError unless weights, biases and epilogue make a layer."""
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue: got {epilogue!r}, wanted one of {', '.join(EPILOGUES)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
    if activation != "none" and epilogue != "linear":
        raise ValueError(f'activation: got {activation!r}, wanted "none" with epilogue={epilogue!r}')
    if len(weights) not in PARTS[epilogue]:
        wanted = " or ".join(map(str, PARTS[epilogue]))
        raise ValueError(f"weight: got {len(weights)} of them, wanted {wanted} with epilogue={epilogue!r}")
    if len(biases) != len(weights):
        raise ValueError(f"bias: got {len(biases)} of them, wanted {len(weights)}, one beside each weight, or None")
    for weight in weights:
        first = weights[0]
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight: got {type(weight).__name__}, wanted a tensor")
        if weight.dtype not in DTYPES:
            raise TypeError(f"weight: got dtype {weight.dtype}, wanted one of {', '.join(map(str, DTYPES))}")
        if weight.dim() != 2 or weight.shape != first.shape or weight.dtype != first.dtype:
            raise ValueError(
                f"weight: got {tuple(weight.shape)} of {weight.dtype}, wanted (N, K) of one dtype, all alike"
            )
        if (weight.shape[1] > 1 and weight.stride(1) != 1) or weight.stride(0) != first.stride(0):
            raise ValueError(f"weight: got strides {weight.stride()}, wanted contiguous rows at one distance")
        if weight.device != first.device:
            raise ValueError(f"weight: got device {weight.device}, wanted {first.device}, that of the first")
    for bias in biases:
        if bias is not None and (bias.shape != weights[0].shape[:1] or bias.dtype != weights[0].dtype):
            got = f"{tuple(bias.shape)} of {bias.dtype}"
            raise ValueError(f"bias: got {got}, wanted ({weights[0].shape[0]},) of {weights[0].dtype}, as the weights")


def interleaved_norm(weight: Tensor | None, bias: Tensor | None, width: int, like: Tensor) -> Tensor | None:
    """LayerNorm's parameters as the CUDA kernel reads them: four weights, four biases, ..., zeros past the end."""
    if weight is None and bias is None:
        return None
    quads = (width + 3) // 4
    made = torch.zeros(quads * 4, 2, dtype=like.dtype, device=like.device)
    made[:width, 0] = 1.0 if weight is None else weight
    if bias is not None:
        made[:width, 1] = bias
    return made.view(quads, 4, 2).transpose(1, 2).contiguous()


def check_shared_memory(layers: int, rows: int, widest: int, widest_norm: int, like: Tensor) -> None:
    """Raise TooManyRows where x of that many rows does not fit into the shared memory of a block."""
    needs = native.cuda_decode_shared_memory(layers, rows, widest, widest_norm, like.element_size())
    has = torch.cuda.get_device_properties(like.device).shared_memory_per_block_optin
    if needs > has:
        raise TooManyRows(
            f"decode_linear: {rows} rows of {widest} take {needs} bytes of shared memory, this GPU has {has}; fewer rows fit"
        )


def _kernel(x, weights, biases, norm_weight, norm_bias, normalize, eps, clamp, *rest):
    implementation = backends.select("decode_linear", weights[0], weights[0].shape[1])
    return implementation.forward(x, weights, biases, None, norm_weight, norm_bias, normalize, eps, clamp, *rest)


def _fake(x, weights, biases, norm_weight, norm_bias, normalize, eps, clamp, factor, addend, residual, state, epilogue, activation):  # fmt: skip
    shape, acc = (x.shape[0], weights[0].shape[0]), acc_dtype(weights[0].dtype)
    makes_y = epilogue != "context" or len(weights) == 4
    return (
        x.new_empty(shape if makes_y else (0,), dtype=acc),
        x.new_empty(shape if epilogue == "context" else (0,), dtype=acc),
    )


def _cuda(x, weights, biases, tokens, norm_weight, norm_bias, normalize, eps, clamp, factor, addend, residual, state, epilogue, activation):  # fmt: skip
    check_shared_memory(1, x.shape[0], x.shape[1], 0, weights[0])
    shape, acc = (x.shape[0], weights[0].shape[0]), torch.float32
    y = x.new_empty(shape if epilogue != "context" or len(weights) == 4 else (0,), dtype=acc)
    context = x.new_empty(shape if epilogue == "context" else (0,), dtype=acc)
    norm = interleaved_norm(norm_weight, norm_bias, x.shape[1], weights[0])
    in_acc = [None if t is None else t.to(acc) for t in (factor, addend, residual, state)]
    factor, addend, residual, state = in_acc
    torch.ops.newllm_native.decode_linear(
        x.to(acc), None, factor, addend, residual, y if y.numel() else None, None, None, norm, None, weights, biases,
        state, context if state is not None else None, eps, clamp, NORMALIZE * normalize, [0, 0, 0, 0],
        EPILOGUES.index(epilogue), list(ACTIVATIONS).index(activation),
    )  # fmt: skip
    return y, context


_decode_linear = define(
    "decode_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? norm_weight, Tensor? norm_bias, bool normalize, "
    "float eps, float clamp, Tensor? factor, Tensor? addend, Tensor? residual, Tensor? state, str epilogue, "
    "str activation) -> (Tensor y, Tensor context)",
    _kernel,
    _fake,
)


def _no_backward(*args):
    raise RuntimeError("decode_linear has no gradient")


backends.register(
    "decode_linear",
    backends.Implementation("reference", reference.decode_linear, _no_backward, backends.supports_reference),
)


def _supports_cpu(call: backends.Call) -> native.Verdict:
    if call.device.type != "cpu":
        return native.Verdict(False, f"serves CPU tensors, these are on {call.device}")
    return native.Verdict(True, "PyTorch's own matrix products")


backends.register("decode_linear", backends.Implementation("cpu", reference.decode_linear, _no_backward, _supports_cpu))
backends.register("decode_linear", backends.Implementation("cuda", _cuda, _no_backward, backends.supports_cuda))
