"""`recurrent_context`: the whole cell over a sequence, its hidden layers and gates inside the loop."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm_kernels import backends, checks, native
from newllm_kernels.context_scan import seams
from newllm_kernels.native import Verdict
from newllm_kernels.numerics import acc_dtype
from newllm_kernels.operator import define
from newllm_kernels.recurrent_context import chunks as in_chunks
from newllm_kernels.recurrent_context import costs, products, reference


def recurrent_context(
    z: Tensor,
    context_weight: Tensor,
    c0: Tensor | None = None,
    hidden_weight: Tensor | None = None,
    hidden_bias: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    clamp: float | None = 10.0,
    *,
    activation: str = "silu",
    norm: str | None = "state",
    chunks: int = 1,
    tolerance: float | None = None,
    passes: int = 8,
    warm_up: int = 0,
) -> tuple[Tensor, Tensor]:
    """The full cell: hidden layers and gates see the context that they are about to change.

        a_1 = z_t + W_c r_{t-1},  h_k = act(a_k),  a_{k+1} = W_{k+1} h_k + b_{k+1}        k = 1 .. L
        f, i, d = W_g h_L + b_g                                                          (L = 0: f, i, d = a_1)
        u_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(d)
        c_t = clamp(LayerNorm(u_t)), r_t = c_t        where norm="state"
        c_t = u_t, r_t = clamp(LayerNorm(c_t))        where norm="output"
        c_t = r_t = u_t                               where norm=None

    Args:
        z: (B, T, Z), the first layer's part that sees the token stream, W_x x_t + b_1: one matrix product for all T,
            `F.linear(x, W[:, :E], b)` of a first layer W (Z, E + D). Z is H, or 3D where there is no hidden layer.
            float32, bfloat16, float16 or float64; B and T may be strided.
        context_weight: W_c (Z, D), the first layer's part that sees the context.
        c0: (B, D) start state in z's dtype or float32 (float64 beside float64); None is zero, from which LayerNorm in the
            loop divides by next to nothing: a learned start trains better.
        hidden_weight, hidden_bias: W_2 .. W_L (L - 1, H, H) and (L - 1, H) of the further hidden layers, or None.
        gate_weight, gate_bias: W_g (3D, H) and (3D,), the rows [f | i | d]; without gate_weight there is no hidden layer.
        weight, bias: (D,) of LayerNorm, or None for 1 and 0; not read where norm=None.
        eps: added to the variance.
        clamp: bound on what LayerNorm gives, or None for none; not read where norm=None.
        activation: "relu", "gelu" (the exact one), "silu" or "tanh".
        norm: where LayerNorm stands: "state", "output" or None.
        chunks: of time, run side by side in passes until they meet, in the backward too (newllm_kernels/recurrent_context/
            chunks.py); 1: all steps in order of time. For few, long sequences, which leave the device idle.
        tolerance: relative change of a chunk's start below which it rests; None: 1e-6 for float32, 1e-3 for bfloat16 (8e-3 in
            the adjoint, of which rounding keeps starts that far apart) and float16, 1e-13 for float64.
        passes: the most there are; what still moves then runs in order of time. `record_seams` tells how many it took.
        warm_up: steps before a chunk that its first start is read from, beginning with c0, for all chunks side by side. A cell that
            has forgotten c0 by then takes one pass.

        Weights may be of any dtype and are used in z's; biases stay float32 (float64 beside float64).

    Returns:
        c (B, T, D) in z's dtype, and the last state c_T (B, D) in float32 (float64 beside float64). The state is not
        rounded from step to step. Both are differentiable, as are all tensors among the arguments.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was wanted.

    Formula: the cell of docs/model.md under coupling "full".

    >>> import torch, newllm_kernels as nk
    >>> z, start = torch.zeros(1, 3, 6), torch.tensor([[-2.0, 2.0]])  # gates of zero, whatever the context
    >>> c, last = nk.recurrent_context(z, torch.zeros(6, 2), start, eps=0.0)
    >>> c.tolist(), last.tolist()
    ([[[-1.0, 1.0], [-1.0, 1.0], [-1.0, 1.0]]], [[-1.0, 1.0]])
    """
    checks.tensor("z", z, "BTZ")
    B, _, Z = z.shape
    checks.tensor("context_weight", context_weight, "ZD")
    D = context_weight.shape[1]
    context_weight = checks.parameter("context_weight", context_weight, (Z, D), "z", z).to(z.dtype)
    if gate_weight is None:
        if Z != 3 * D:
            raise ValueError(f"z: got shape {tuple(z.shape)}, wanted (B, T, {3 * D}), 3 * D, where gate_weight is None")
        for name, value in (("hidden_weight", hidden_weight), ("hidden_bias", hidden_bias), ("gate_bias", gate_bias)):
            if value is not None:
                raise ValueError(f"{name}: got a tensor, wanted None where gate_weight is None")
    else:
        gate_weight = checks.parameter("gate_weight", gate_weight, (3 * D, Z), "z", z).to(z.dtype)
        gate_bias = checks.parameter("gate_bias", gate_bias, (3 * D,), "z", z, optional=True)
    if hidden_weight is not None:
        checks.tensor("hidden_weight", hidden_weight, "LHH")
        further = hidden_weight.shape[0]
        hidden_weight = checks.parameter("hidden_weight", hidden_weight, (further, Z, Z), "z", z).to(z.dtype)
        hidden_bias = checks.parameter("hidden_bias", hidden_bias, (further, Z), "z", z, optional=True)
        if further == 0:
            hidden_weight = hidden_bias = None
    elif hidden_bias is not None:
        raise ValueError("hidden_bias: got a tensor, wanted None where hidden_weight is None")
    c0 = checks.state("c0", c0, (B, D), "z", z)
    if c0 is None:
        c0 = z.new_zeros((B, D), dtype=acc_dtype(z.dtype))
    weight, bias = checks.affine("weight", weight, D, "z", z), checks.affine("bias", bias, D, "z", z)
    eps, clamp = checks.eps(eps), checks.clamp(clamp)
    kinds = checks.choice("activation", activation, reference.ACTIVATIONS), checks.choice("norm", norm, reference.NORMS)
    way = (
        checks.count("chunks", chunks), *_seam(tolerance), checks.count("passes", passes),
        checks.count("warm_up", warm_up, least=0),
    )  # fmt: skip
    # On a CPU products cost more than memory, and fused steps in order have pre-activations in hand: these are kept for the
    # backward. The persistent kernel keeps none, and chunks would copy them: a GPU computes them again in no time.
    save = torch.is_grad_enabled() and (
        z.device.type == "cpu"
        or not (
            in_chunks.Plan(*way).applies(z.shape[1])
            or _select(z, c0, hidden_weight, gate_weight, kinds[1], way).backend == "cuda"
        )
    )
    weights = (context_weight, hidden_weight, hidden_bias, gate_weight, gate_bias, weight, bias)
    return _recurrent_context(z, c0, *weights, eps, clamp, *kinds, save, *way)[:2]


def _seam(tolerance: float | None) -> tuple[float]:
    if tolerance is None:
        return (in_chunks.OF_DTYPE,)
    if not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise ValueError(f"tolerance: got {tolerance!r}, wanted a number of at least 0 or None")
    return (float(tolerance),)


class Cell(NamedTuple):
    """What of the cell decides who can serve it, beside D."""

    H: int  # 0 where there is no hidden layer
    layers: int
    norm: str | None
    rows: int  # that go through time side by side


def _cell(
    z: Tensor, hidden_weight: Tensor | None, gate_weight: Tensor | None, norm: str | None, plan: in_chunks.Plan
) -> Cell:
    H = 0 if gate_weight is None else gate_weight.shape[1]
    layers = (gate_weight is not None) + (0 if hidden_weight is None else hidden_weight.shape[0])
    return Cell(H, layers, norm, z.shape[0] * (plan.chunks if plan.applies(z.shape[1]) else 1))


def _select(z, c0, hidden_weight, gate_weight, norm, way):
    # Who is fastest depends on the rows on a GPU alone; elsewhere a new batch size would only be looked up anew.
    cell = _cell(z, hidden_weight, gate_weight, reference.NORMS[norm], in_chunks.Plan(*way))
    cell = cell if z.is_cuda else cell._replace(rows=1)
    return backends.select("recurrent_context", z, c0.shape[1], cell)


def predicted(z: Tensor, D: int, cell: Cell) -> costs.Step:
    """What a step costs on a GPU, by whoever `select` chooses."""
    backend = backends.select("recurrent_context", z, D, cell).backend
    if backend == "cuda":
        return costs.persistent(D, cell.H, cell.rows, z.device.index)
    return costs.steps(D, cell.H, cell.layers, cell.rows) if backend == "triton" else costs.REFERENCE


def _described(
    z, context_weight=None, c0=None, hidden_weight=None, hidden_bias=None, gate_weight=None, *args, **kwargs
):
    D = z.shape[-1] if context_weight is None else context_weight.shape[1]
    plan = in_chunks.Plan(kwargs.get("chunks", 1), 0.0, 1, kwargs.get("warm_up", 0))
    return z, D, _cell(z, hidden_weight, gate_weight, kwargs.get("norm", "state"), plan)


def _kernel(z, c0, context_weight, hidden_weight, hidden_bias, gate_weight, gate_bias, weight, bias, eps, clamp,
            activation, norm, save, chunks, tolerance, passes, warm_up):  # fmt: skip
    plan = in_chunks.Plan(chunks, tolerance, passes, warm_up)
    chosen = _select(z, c0, hidden_weight, gate_weight, norm, plan)
    kernel = chosen.forward
    weights = (
        context_weight, hidden_weight, hidden_bias, gate_weight, gate_bias, weight, bias, eps, clamp, activation, norm
    )  # fmt: skip
    if save and chosen.backend == "cuda":  # a compiled call was traced where another backend was chosen
        raise backends.BackendError(
            "recurrent_context: was compiled for a backend that keeps pre-activations, and 'cuda' keeps none; compile it anew"
        )
    if plan.applies(z.shape[1]) and len(z):
        return in_chunks.forward(kernel, z, c0, weights, save, _width_of_pre(c0, hidden_weight, gate_weight), plan)
    seams.report("forward", z.shape[1])
    return kernel(z, c0, *weights, save, False)[:3]


def _width_of_pre(c0, hidden_weight, gate_weight):
    H = 0 if gate_weight is None else gate_weight.shape[1]
    return (1 + (0 if hidden_weight is None else hidden_weight.shape[0])) * H + 3 * c0.shape[1]


def _fake(z, c0, context_weight, hidden_weight, hidden_bias, gate_weight, gate_bias, weight, bias, eps, clamp,
          activation, norm, save, chunks, tolerance, passes, warm_up):  # fmt: skip
    B, T, _ = z.shape
    pre = z.new_empty((B, T, _width_of_pre(c0, hidden_weight, gate_weight)) if save else (0,))
    return z.new_empty((B, T, c0.shape[1])), c0.new_empty(c0.shape), pre


def _kernel_backward(grad_c, grad_c_last, z, c, pre, c0, context_weight, hidden_weight, hidden_bias, gate_weight,
                     gate_bias, weight, bias, eps, clamp, activation, norm, saved, chunks, tolerance, passes, warm_up):  # fmt: skip
    plan = in_chunks.Plan(chunks, tolerance, passes, warm_up)
    kernel = _select(z, c0, hidden_weight, gate_weight, norm, plan).backward
    acc_weight, acc_bias = (None if x is None else x.to(c0.dtype) for x in (weight, bias))
    context_read = products.contexts_read(c, c0, acc_weight, acc_bias, eps, clamp, norm)
    if not saved:
        pre = products.pre_activations(
            z, context_read, context_weight, hidden_weight, hidden_bias, gate_weight, gate_bias, activation
        )
    weights = (context_weight, hidden_weight, gate_weight, weight, bias, eps, clamp, activation, norm)
    if plan.applies(z.shape[1]) and len(z):
        hidden_width = pre.shape[2] - 3 * c0.shape[1]
        solved = in_chunks.backward(kernel, grad_c, grad_c_last, pre, c, c0, weights, hidden_width, plan)
        grad_pre, hidden, grad_c0, grad_norm = solved
    else:
        seams.report("backward", z.shape[1])
        grad_pre, hidden, grad_c0, grad_norm, _ = kernel(grad_c, grad_c_last, pre, c, c0, *weights, False)
    grad_z, *of_weights = products.gradients(
        grad_pre, hidden, context_read, hidden_weight, hidden_bias, gate_weight, gate_bias
    )
    grad_norm = grad_norm.sum(dim=0)
    return grad_z, grad_c0, *of_weights, grad_norm[0].clone(), grad_norm[1].clone()


def _fake_backward(grad_c, grad_c_last, z, c, pre, c0, context_weight, hidden_weight, hidden_bias, gate_weight,
                   gate_bias, weight, bias, eps, clamp, activation, norm, saved, chunks, tolerance, passes, warm_up):  # fmt: skip
    D = c0.shape[1]

    def like(x):
        return z.new_empty(0) if x is None else x.new_empty(x.shape)

    of_weights = (like(x) for x in (context_weight, hidden_weight, hidden_bias, gate_weight, gate_bias))
    return z.new_empty(z.shape), c0.new_empty(c0.shape), *of_weights, c0.new_empty(D), c0.new_empty(D)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, c0, *weights = inputs[:9]
    ctx.options = inputs[9:]  # eps, clamp, activation, norm, save, chunks, tolerance, passes, warm_up
    c, _, pre = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(pre)
    ctx.save_for_backward(z, c, pre, c0, *weights)


def _backward(
    ctx: Any, grad_c: Tensor | None, grad_c_last: Tensor | None, grad_pre: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_c is None and grad_c_last is None:
        return (None,) * 18
    tensors = ctx.saved_tensors
    grads = _recurrent_context_backward(grad_c, grad_c_last, *tensors, *ctx.options)
    parameters = tensors[4:]
    of_parameters = (None if p is None else g.to(p.dtype) for g, p in zip(grads[2:], parameters, strict=True))
    return grads[0], grads[1], *of_parameters, *((None,) * 9)


_WEIGHTS = (
    "Tensor context_weight, Tensor? hidden_weight, Tensor? hidden_bias, Tensor? gate_weight, Tensor? gate_bias, "
    "Tensor? weight, Tensor? bias, float eps, float clamp, int activation, int norm"
)
_recurrent_context_backward = define(
    f"recurrent_context_backward(Tensor? grad_c, Tensor? grad_c_last, Tensor z, Tensor c, Tensor pre, Tensor c0, {_WEIGHTS}"
    ", bool saved, int chunks, float tolerance, int passes, int warm_up) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel_backward,
    _fake_backward,
)
_recurrent_context = define(
    f"recurrent_context(Tensor z, Tensor c0, {_WEIGHTS}, bool save, int chunks, float tolerance, int passes, int warm_up) -> (Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)

backends.register(
    "recurrent_context",
    backends.Implementation(
        "reference", reference.recurrent_context, reference.recurrent_context_backward, backends.supports_reference
    ),
)
backends.register(
    "recurrent_context", backends.native_implementation("recurrent_context", "cpu", backends.supports_cpu)
)


def _supports_cuda(call: backends.Call) -> Verdict:
    verdict = backends.supports_cuda(call)
    if not verdict.ok:
        return verdict
    D, (H, layers, norm, rows) = call.width, call.detail
    if call.dtype == torch.float32:
        return Verdict(False, "multiplies 16-bit numbers: bfloat16 or float16, got torch.float32")
    if layers != 1 or norm != "state":
        return Verdict(False, f"has one hidden layer and LayerNorm in the loop, got {layers} and norm={norm!r}")
    if torch.cuda.get_device_capability(call.device) < (9, 0):
        return Verdict(False, f"needs compute capability 9.0, {torch.cuda.get_device_name(call.device)} has less")
    team = native.cuda_recurrent_team(D, H, call.device.index)
    if team == 0:
        return Verdict(
            False,
            f"D={D}, H={H} do not fit: D and H must be multiples of 32, and of eight times a number of blocks that gives each "
            "8 or 16 columns of D and at most 32 of H, whose weights fit into their shared memory (D=256, H=512 and D=768, "
            "H=1536 do)",
        )
    how = f"a cluster of {-team} blocks" if team < 0 else f"{team} blocks, or clusters of eight where that is faster,"
    cost = costs.persistent(D, H, rows, call.device.index)
    return Verdict(True, f"CUDA C++, {how} for 16 rows, {cost} for {rows} rows")


def _rank_of_cuda(call: backends.Call) -> int:
    H, layers, _, rows = call.detail
    ours = costs.persistent(call.width, H, rows, call.device.index)
    return 2 if ours.both < costs.steps(call.width, H, layers, rows).both else 0


WIDEST_STEPS = 16384  # columns of a row, which a program of the fused steps holds in registers


def _supports_steps(call: backends.Call) -> Verdict:
    verdict = backends.supports_triton(call)
    if not verdict.ok or call.device.type != "cuda":
        return verdict
    H, layers, _, rows = call.detail
    if call.width > WIDEST_STEPS:
        return Verdict(False, f"holds a row in registers: D up to {WIDEST_STEPS}, got {call.width}")
    cost = costs.steps(call.width, H, layers, rows)
    return Verdict(True, f"{verdict.reason}, fused steps between products of cuBLAS, {cost} for {rows} rows")


backends.register(
    "recurrent_context", backends.native_implementation("recurrent_context", "cuda", _supports_cuda, _rank_of_cuda)
)
backends.register(
    "recurrent_context", backends.triton_implementation("recurrent_context", None, _supports_steps, lambda call: 1)
)
backends.register_detail("recurrent_context", _described)
