"""What the tests of all operations share: problems to solve, their float64 truth, and how far a kernel may be from it.

The truth is the reference function evaluated in float64 and differentiated by PyTorch's autograd; the backward functions
written out in reference.py are under test like any other backend. Packed gates are split, and packed sequences cut, here
and not by the code under test.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import newllm_kernels as nk
from newllm_kernels.context_scan.reference import context_scan as context_scan_reference
from newllm_kernels.context_update.reference import context_update as context_update_reference
from newllm_kernels.gated_scan.reference import gated_scan as gated_scan_reference
from newllm_kernels.gated_scan_layer_norm.reference import gated_scan_layer_norm as gated_scan_layer_norm_reference
from newllm_kernels.layer_norm.reference import layer_norm as layer_norm_reference
from newllm_kernels.numerics import acc_dtype
from newllm_kernels.recurrent_context import reference as recurrent
from newllm_kernels.scan.reference import scan as scan_reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Relative L2 error of an output, by its dtype. 16-bit: the result is rounded once, by at most u = 2^-8 (bfloat16) or 2^-11
# (float16), on average by less than half of that, which leaves room for the rounded sum inside add_layer_norm. float32:
# u = 6e-8, and a recurrence adds a rounding or two a step, which its decay forgets after some tens of steps: 32 u.
# float64: the same 32 u of 1.1e-16, and as much again for the truth, which is no more exact.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 8e-15, torch.bfloat16: 4e-3, torch.float16: 6e-4}

# Of a gradient: twice that, for it passes through a second recurrence and through outputs saved with the error above.
# float64: LayerNorm of a row of one divides the rounding of the truth by sqrt(eps), 316 u.
GRADIENT_TOLERANCE = {dtype: 2 * tolerance for dtype, tolerance in TOLERANCE.items()} | {torch.float64: 1e-13}

# Gradients of weight and bias are sums over all rows, of either sign: where D is 1 the only sum may cancel to a
# tenth of its terms' size.
SUM_FACTOR = 10

# The full cell turns its context into the next gates: what was rounded comes back through two matrices and LayerNorm before
# it fades, and the backward starts from pre-activations rounded as the contexts are. Seen: 1.6 times the bounds above.
LOOPED_FACTOR = 3

# These work from a value rounded to the tensors' dtype where everything else stays in float32: the saved contexts that the
# backward of context_scan starts each step from, the stored tensors that add_layer_norm and gated_scan_layer_norm normalise.
THROUGH_ROUNDED = (
    "context_scan", "context_scan_packed", "recurrent_context", "add_layer_norm", "gated_scan_layer_norm", "gated_scan_layer_norm_packed",
)  # fmt: skip


# ---- truth ---------------------------------------------------------------------------------------------------------


def _per_sequence(run: Callable[..., tuple[Tensor, Tensor]], tensors, state, cu_seqlens):
    bounds = cu_seqlens.tolist()
    parts = [
        run(*(x[:, begin:end] for x in tensors), None if state is None else state[n : n + 1])
        for n, (begin, end) in enumerate(itertools.pairwise(bounds))
    ]
    return torch.cat([whole for whole, _ in parts], dim=1), torch.cat([last for _, last in parts])


def true_scan(a, b, h0=None, *, reverse=False, cu_seqlens=None):
    if cu_seqlens is not None:
        return _per_sequence(lambda a, b, h0: true_scan(a, b, h0, reverse=reverse), (a, b), h0, cu_seqlens)
    return scan_reference(a, b, h0, reverse, None)


def true_gated_scan(f, i, d, c0=None, *, cu_seqlens=None):
    if cu_seqlens is not None:
        return _per_sequence(true_gated_scan, (f, i, d), c0, cu_seqlens)
    return gated_scan_reference(f, i, d, c0, None)


def true_gated_scan_layer_norm(f, i, d, c0=None, weight=None, bias=None, eps=1e-5, clamp=None, *, cu_seqlens=None):
    if cu_seqlens is not None:

        def one(f, i, d, c0):
            y, c, last = true_gated_scan_layer_norm(f, i, d, c0, weight, bias, eps, clamp)
            return torch.stack((y, c), dim=-1), last

        both, last = _per_sequence(one, (f, i, d), c0, cu_seqlens)
        return *both.unbind(-1), last
    clamp = math.inf if clamp is None else clamp
    return gated_scan_layer_norm_reference(f, i, d, c0, None, weight, bias, eps, clamp)[:3]


def true_context_update(f, i, d, c, weight=None, bias=None, eps=1e-5, clamp=10.0):
    return (context_update_reference(f, i, d, c, weight, bias, eps, math.inf if clamp is None else clamp),)


def true_context_scan(f, i, d, c0=None, weight=None, bias=None, eps=1e-5, clamp=10.0):
    c0 = f.new_zeros(f.shape[0], f.shape[2]) if c0 is None else c0
    return context_scan_reference(f, i, d, c0, weight, bias, eps, math.inf if clamp is None else clamp)


def true_recurrent_context(
    z, c0=None, context_weight=None, hidden_weight=None, hidden_bias=None, gate_weight=None, gate_bias=None, weight=None,
    bias=None, eps=1e-5, clamp=10.0, *, activation="silu", norm="state", **way,
):  # fmt: skip
    c0 = z.new_zeros(z.shape[0], context_weight.shape[1]) if c0 is None else c0
    return recurrent.recurrent_context(
        z, c0, context_weight, hidden_weight, hidden_bias, gate_weight, gate_bias, weight, bias, eps,
        math.inf if clamp is None else clamp, recurrent.ACTIVATIONS.index(activation), recurrent.NORMS.index(norm),
        False, False,
    )[:2]  # fmt: skip


def true_layer_norm(x, weight=None, bias=None, eps=1e-5):
    return (layer_norm_reference(x, None, weight, bias, eps)[0],)


def true_add_layer_norm(x, residual, weight=None, bias=None, eps=1e-5):
    return layer_norm_reference(x, residual, weight, bias, eps)[:2]


def _packed(truth):
    return lambda gates, *args, **kwargs: truth(*gates.chunk(3, dim=-1), *args, **kwargs)


TRUTH = {
    "scan": true_scan,
    "gated_scan": true_gated_scan,
    "gated_scan_packed": _packed(true_gated_scan),
    "gated_scan_layer_norm": true_gated_scan_layer_norm,
    "gated_scan_layer_norm_packed": _packed(true_gated_scan_layer_norm),
    "context_update": true_context_update,
    "context_update_packed": _packed(true_context_update),
    "context_scan": true_context_scan,
    "context_scan_packed": _packed(true_context_scan),
    "recurrent_context": true_recurrent_context,
    "layer_norm": true_layer_norm,
    "add_layer_norm": true_add_layer_norm,
}


# ---- problems ------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """One call: the public function's name, its differentiable tensors and its other arguments, both by name."""

    function: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, tensors: dict[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        outputs = getattr(nk, self.function)(**(self.tensors if tensors is None else tensors), **self.options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def truth(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return TRUTH[self.function](**tensors, **self.options)

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Problem:
        return replace(self, tensors={name: change(name, x) for name, x in self.tensors.items()})


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def make(
    function: str,
    B: int,
    T: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    *,
    state: str | None = "acc",
    affine: bool = True,
    affine_dtype: torch.dtype | None = None,
    **options: Any,
) -> Problem:
    """Random inputs (B, T, D) for a public function; `state` is "acc", "own" (of the gates' dtype) or None."""
    tensors: dict[str, Tensor] = {}
    base = function.removesuffix("_packed")
    if base == "scan":  # decays of either sign, most of them slow
        tensors["a"] = (torch.rand(B, T, D, dtype=torch.float64) * 1.3 - 0.3).to(dtype)
        tensors["b"] = randn(B, T, D, dtype=dtype)
    elif base == "recurrent_context":
        tensors |= _cell(B, T, D, dtype, options.pop("layers", 1), options.pop("H", D + 5))
    elif function.endswith("_packed"):
        tensors["gates"] = randn(B, T, 3 * D, dtype=dtype, scale=2)  # some gates saturate
    elif base in ("gated_scan", "gated_scan_layer_norm", "context_update", "context_scan"):
        tensors |= {name: randn(B, T, D, dtype=dtype, scale=2) for name in "fid"}
    else:
        tensors["x"] = randn(B, T, D, dtype=dtype)
        if base == "add_layer_norm":
            tensors["residual"] = randn(B, T, D, dtype=dtype)
    state_name = {
        "scan": "h0", "gated_scan": "c0", "gated_scan_layer_norm": "c0", "context_scan": "c0", "context_update": "c",
        "recurrent_context": "c0",
    }.get(base)  # fmt: skip
    if state_name and state:
        cu_seqlens = options.get("cu_seqlens")
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        shape = (B, T, D) if base == "context_update" else (N, D)
        tensors[state_name] = randn(*shape, dtype=acc_dtype(dtype) if state == "acc" else dtype)
    if affine and base not in ("scan", "gated_scan"):
        affine_dtype = affine_dtype or acc_dtype(dtype)
        tensors |= {"weight": 1 + randn(D, dtype=affine_dtype, scale=0.5), "bias": randn(D, dtype=affine_dtype)}
    return Problem(function, tensors, options)


def _cell(B: int, T: int, D: int, dtype: torch.dtype, layers: int, H: int) -> dict[str, Tensor]:
    """Inputs and matrices of the full cell. What it reads of its context is kept small enough for differences to
    fade: a cell that amplifies them has no answer to compare with. Gates of forgetting, rows [:D], lean to letting go, for
    LayerNorm in the loop divides by what is left."""
    tensors = {"z": randn(B, T, H if layers else 3 * D, dtype=dtype, scale=1.5)}
    tensors["context_weight"] = randn(H if layers else 3 * D, D, dtype=dtype, scale=0.4 * D**-0.5)
    if layers > 1:
        tensors["hidden_weight"] = randn(layers - 1, H, H, dtype=dtype, scale=H**-0.5)
        tensors["hidden_bias"] = randn(layers - 1, H, dtype=acc_dtype(dtype), scale=0.3)
    if layers:
        tensors["gate_weight"] = randn(3 * D, H, dtype=dtype, scale=H**-0.5)
        tensors["gate_bias"] = randn(3 * D, dtype=acc_dtype(dtype))
    return tensors


# Seven sequences in 33 steps: empty ones at both ends and inside, one of a single step.
BOUNDS = [0, 0, 1, 12, 12, 20, 33, 33]

# One of each way to call each function, for what must hold for all of them. All have room for B=2, T=33 but those of
# packed sequences, which are B=1, T=33 by nature. clamp=1 cuts a third of all components.
VARIANTS: dict[str, dict[str, Any]] = {
    "scan": {"state": None},
    "scan-reverse-h0": {"reverse": True},
    "scan-cu_seqlens": {"cu_seqlens": BOUNDS},
    "gated_scan": {"state": None},
    "gated_scan-c0": {},
    "gated_scan_packed-cu_seqlens": {"cu_seqlens": BOUNDS},
    "gated_scan_layer_norm": {},
    "gated_scan_layer_norm-plain": {"affine": False, "state": None},
    "gated_scan_layer_norm_packed-cu_seqlens": {"cu_seqlens": BOUNDS},
    "context_update": {"clamp": 1.0},
    "context_update-plain": {"affine": False, "clamp": None},
    "context_update_packed": {},
    "context_scan": {"clamp": 1.0},
    "context_scan-plain": {"affine": False, "clamp": None, "state": None},
    "context_scan_packed": {},
    "recurrent_context": {"clamp": 1.0},
    "recurrent_context-output": {"layers": 2, "norm": "output", "activation": "tanh", "clamp": 1.5},
    "recurrent_context-plain": {"layers": 0, "norm": None, "affine": False, "clamp": None, "state": None},
    "recurrent_context-chunks": {"chunks": 4, "tolerance": 1e-7, "passes": 3},
    "recurrent_context-deep": {"layers": 3, "activation": "relu", "affine": False},
    "layer_norm": {},
    "layer_norm-plain": {"affine": False},
    "add_layer_norm": {},
}


def variant(
    name: str, dtype: torch.dtype = torch.float32, B: int = 2, T: int = 33, D: int = 33, **more: Any
) -> Problem:
    options = VARIANTS[name] | more
    if "cu_seqlens" in options:
        B, T, options = 1, 33, options | {"cu_seqlens": torch.tensor(options["cu_seqlens"])}
    return make(name.partition("-")[0], B, T, D, dtype, **options)


def large_batch(T: int, D: int, dtype: torch.dtype) -> int:
    """The least B for which one (B, T, D) tensor exceeds 8 MiB, past which the kernels write around the caches."""
    return 8 * 2**20 // (T * D * dtype.itemsize) + 1


# ---- layouts -------------------------------------------------------------------------------------------------------


def _padded(x: Tensor) -> Tensor:
    """Every dimension inside a larger one, rows at unaligned addresses; NaN all around, so that reading it shows."""
    around = torch.full([2 * size + 3 for size in x.shape[:-1]] + [x.shape[-1] + 5], math.nan, dtype=x.dtype)
    inside = around.to(x.device)[(*(slice(1, 1 + 2 * size, 2) for size in x.shape[:-1]), slice(1, 1 + x.shape[-1]))]
    return inside.copy_(x)


def _strided_last(x: Tensor) -> Tensor:
    around = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype, device=x.device)
    return around[..., ::2].copy_(x)


# Functions from a tensor to one that lies differently in memory; the expanded ones repeat values instead.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "padded": _padded,
    "time_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "strided_last": _strided_last,
    "expanded_first": lambda x: x[:1].expand_as(x) if x.dim() > 1 else x,
    "expanded_last": lambda x: x[..., :1].expand_as(x),
}


# What LayerNorm sees must vary along a row: of a constant one only rounding is left, and 1/std blows that up.
# Weight, too: of constant weight times constant gradient LayerNorm's backward leaves only rounding.
VARIES_ALONG_ROWS = ("x", "c", "c0", "d", "weight")


def normalises(problem: Problem) -> bool:
    return problem.function not in ("scan", "gated_scan", "gated_scan_packed")


def laid_out(problem: Problem, layout: str) -> Problem:
    """With every tensor in the layout, as far as it leaves the problem well conditioned."""
    kept = VARIES_ALONG_ROWS if layout == "expanded_last" and normalises(problem) else ()
    if kept and problem.function in ("context_scan_packed", "gated_scan_layer_norm_packed"):
        kept = (*kept, "gates")  # constant gates never turn the context: its gradient, or all of it, cancels
    return problem.map(lambda name, x: x if name in kept else LAYOUTS[layout](x))


def gradient_layout(problem: Problem, layout: str) -> Callable[[Tensor], Tensor]:
    without_weight = normalises(problem) and "weight" not in problem.tensors
    return LAYOUTS["expanded_first" if layout == "expanded_last" and without_weight else layout]


# ---- comparison ----------------------------------------------------------------------------------------------------


def relative_error(got: Tensor, want: Tensor) -> float:
    """L2 norm of the difference over that of the truth: infinite where only the truth is zero, NaN where got is NaN."""
    assert got.shape == want.shape, (got.shape, want.shape)
    difference = (got.detach().to("cpu", torch.float64) - want).norm().item()
    return 0.0 if difference == 0 else difference / want.norm().item() if want.norm() > 0 else math.inf


def differentiate(run, tensors: dict[str, Tensor], grads: list[Tensor | None]):
    """(outputs, gradients of all tensors); an output whose gradient is None takes no part."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    outputs = run(leaves)
    taking_part = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    found = torch.autograd.grad(
        [output for output, _ in taking_part], list(leaves.values()), [grad for _, grad in taking_part],
        allow_unused=True,
    )  # fmt: skip
    zipped = zip(leaves.items(), found, strict=True)
    return outputs, {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in zipped}


def errors(
    problem: Problem,
    *,
    outputs: tuple[int, ...] | None = None,
    run=None,
    layout: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, tuple[float, torch.dtype]]:
    """Relative error and dtype of every output and of every tensor's gradient ("grad <name>").

    `outputs` are those that a gradient comes from (all), `run` calls something else than the function itself, and
    `layout` says how the incoming gradients lie in memory.
    """
    run = run or problem.run
    exact = {name: x.detach().to("cpu", torch.float64) for name, x in problem.tensors.items()}
    shapes = [(output.shape, output.dtype, output.device) for output in run(problem.tensors)]
    grads: list[Tensor | None] = []
    for k, (shape, dtype, device) in enumerate(shapes):
        grad = randn(*shape, dtype=dtype).to(device)
        grads.append((layout or (lambda x: x))(grad) if outputs is None or k in outputs else None)
    got, got_grads = differentiate(run, problem.tensors, grads)
    want, want_grads = differentiate(
        problem.truth, exact, [None if grad is None else grad.to("cpu", torch.float64) for grad in grads]
    )
    found = {
        f"output {k}": (relative_error(x, y.detach()), x.dtype) for k, (x, y) in enumerate(zip(got, want, strict=True))
    }
    for name, tensor in problem.tensors.items():
        grad = got_grads[name]
        assert grad.dtype == tensor.dtype, (name, grad.dtype)
        found[f"grad {name}"] = (relative_error(grad, want_grads[name]), grad.dtype)
    return found


def tolerance(problem: Problem, name: str, dtype: torch.dtype) -> float:
    """For the output or gradient `name`, which is of `dtype`: a float32 state beside bfloat16 gates is held to float32."""
    looped = LOOPED_FACTOR if problem.function == "recurrent_context" else 1
    if not name.startswith("grad"):
        return TOLERANCE[dtype] * (looped if dtype == acc_dtype(dtype) else 1)
    of = next(iter(problem.tensors.values())).dtype
    computed_in = of if problem.function in THROUGH_ROUNDED else acc_dtype(of)  # a float64 weight gains nothing by it
    bound = max(GRADIENT_TOLERANCE[dtype], GRADIENT_TOLERANCE[computed_in])
    return bound * looped * (SUM_FACTOR if name in ("grad weight", "grad bias") else 1)


def check(problem: Problem, **kwargs: Any) -> None:
    """Outputs and gradients are right; the arguments are those of `errors`."""
    for name, (error, dtype) in errors(problem, **kwargs).items():
        bound = tolerance(problem, name, dtype)
        assert error <= bound, f"{problem.function} {name} ({dtype}): relative error {error:.2e}, allowed {bound:.1e}"


def check_graph(problem: Problem) -> None:
    """A captured CUDA graph, replayed on new inputs, leaves the bits of a call."""
    with torch.no_grad():
        problem.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = problem.run()
        for x in problem.tensors.values():
            x.copy_(torch.randn_like(x).sigmoid())
        graph.replay()
        want = problem.run()
    for x, y in zip(captured, want, strict=True):
        assert torch.equal(x, y)


def check_streams(problem: Problem, without: tuple[int, ...] = ()) -> None:
    """Calls that share the GPU with others, and a call again, leave the bits of a call alone: nothing depends on the order of
    blocks. `without`: outputs that get no gradient."""
    grads = [None if k in without else torch.randn_like(x) for k, x in enumerate(problem.run())]
    want, want_grads = differentiate(problem.run, problem.tensors, grads)
    torch.cuda.synchronize()
    found = [differentiate(problem.run, problem.tensors, grads)]
    for _ in range(5):
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(differentiate(problem.run, problem.tensors, grads))
    torch.cuda.synchronize()
    for got, got_grads in found:
        for x, y in zip((*got, *got_grads.values()), (*want, *want_grads.values()), strict=True):
            assert torch.equal(x, y)
