"""What is measured: sizes, inputs, float64 truth and the one byte model that every provider is held to.

B batch, T time steps, D width   rows are (rows, D)   n elements of one tensor
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import formulations
import torch
from torch import Tensor

import newllm_kernels as nk

DIRECTIONS = ("forward", "backward")
EPS, CLAMP = 1e-5, 10.0
FUSED = hasattr(nk, "gated_scan_layer_norm")

# Whole tensors that must move, in elements of the tensor dtype: what the operation reads and writes if nothing is read
# twice and nothing is stored besides the results. Vectors of D elements and float32 row statistics are not counted.
TENSORS_MOVED = {
    #                  forward, backward
    "scan": (3, 5),  # a b -> h; grad_h a h -> grad_a grad_b
    "gated_scan": (4, 8),  # f i d -> c; grad_c f i d c -> grad_f grad_i grad_d
    "context_scan": (4, 8),  # the same
    "context_update": (5, 9),  # f i d c -> c'; grad f i d c -> grad_f grad_i grad_d grad_c
    "layer_norm": (2, 3),  # x -> y; grad_y x -> grad_x
    "add_layer_norm": (4, 4),  # x residual -> y sum; grad_y grad_sum sum -> grad_x (one tensor for both arguments)
    "gated_scan_norm": (5, 8),  # f i d -> c y; grad_y f i d c -> grad_f grad_i grad_d
}

# Relative L2 error against float64 above which a provider's time is not reported. float32: a hundred units of rounding
# (6e-8), room for any order of summing thousands of terms; a wrong index or a dropped carry is off by 1e-3 and more.
# 16 bits: inputs and truth are exact, but results and what the forward stores are rounded (up to 4e-3 in bfloat16), and
# eager compositions round every intermediate.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Of peers only: what people run is timed, and the table says how far off it was; ours are held to the line above.
# accelerated-scan keeps its states in the tensors' dtype (emulated, bfloat16: 5e-3 forward, the backward of the gates 1e-2).
PEERS_TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# Gradients of weight and bias: PyTorch's CPU LayerNorm sums them over the rows in bfloat16 and ends 7% off.
PEERS_PARAMETER_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Case:
    """One operation at one size on one device. A `series` is drawn as a line of its own and left out of the tables."""

    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str = "cpu"
    series: str | None = None

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def bytes(self, direction: str) -> int:
        return self.tensor_bytes * TENSORS_MOVED[self.operation][DIRECTIONS.index(direction)]

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.size}-{self.precision}"


F32, BF16 = torch.float32, torch.bfloat16
HEADLINE = (8, 1024, 512)
_RECURRENCES = [(HEADLINE, F32), (HEADLINE, BF16), ((1, 4096, 512), F32), ((33, 1000, 129), F32)]
_RECURRENCES_GPU = [((8, 4096, 1024), F32), ((8, 4096, 1024), BF16), ((1, 65536, 1024), BF16)]
_NORMS = [((8192, D), dtype) for D in (256, 1024, 4096) for dtype in (F32, BF16)]
_NORMS_GPU = [((32768, 1024), BF16), ((16384, 4096), BF16), ((65536, 256), BF16)]
SIZES: dict[str, dict[str, list[tuple[tuple[int, ...], torch.dtype]]]] = {
    "cpu": {
        "scan": _RECURRENCES,
        "gated_scan": _RECURRENCES,
        "context_scan": _RECURRENCES[:2],
        "context_update": [((rows, D), dtype) for rows, D in ((4096, 512), (8, 256)) for dtype in (F32, BF16)],
        "layer_norm": _NORMS,
        "add_layer_norm": _NORMS,
        "gated_scan_norm": _RECURRENCES[:1],
    },
    "cuda": {
        "scan": _RECURRENCES_GPU,
        "gated_scan": _RECURRENCES_GPU,
        "context_scan": [((256, 1024, 1024), BF16), ((8, 4096, 1024), BF16)],
        "context_update": [((65536, 1024), BF16)],
        "layer_norm": _NORMS_GPU,
        "add_layer_norm": _NORMS_GPU,
        "gated_scan_norm": [((8, 4096, 1024), BF16)],
    },
}
SCALING = "scaling"  # one sequence, ever longer: (1, T, D) for these T, and D
SCALING_SIZES = {"cpu": ([2**k for k in (10, 12, 14, 16)], 64), "cuda": ([4**k for k in range(5, 11)], 1024)}


def cases(operation: str, device: str) -> list[Case]:
    return [Case(operation, shape, dtype, device) for shape, dtype in SIZES[device][operation]]


def scaling_cases(operation: str, device: str) -> list[Case]:
    lengths, D = SCALING_SIZES[device]
    return [Case(operation, (1, T, D), BF16, device, SCALING) for T in lengths]


def make_inputs(case: Case, seed: int = 0) -> tuple[Tensor, ...]:
    """Leaves that require gradients, of unit variance; decays spread around 0.85, as trained forget gates are."""
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device) + mean

    shape, D = case.shape, case.shape[-1]
    weight, bias = normal(D, mean=4.0) / 4, normal(D) / 4
    match case.operation:
        case "scan":
            inputs = [normal(*shape, mean=2.0).sigmoid_(), normal(*shape)]
        case "gated_scan":
            inputs = [normal(*shape, mean=2.0), normal(*shape), normal(*shape)]
        case "context_scan":
            start = normal(shape[0], D)
            inputs = [normal(*shape, mean=2.0), normal(*shape), normal(*shape), start, weight, bias]
        case "context_update":
            inputs = [normal(*shape, mean=2.0), normal(*shape), normal(*shape), normal(*shape), weight, bias]
        case "gated_scan_norm":
            inputs = [normal(*shape, mean=2.0), normal(*shape), normal(*shape), weight, bias]
        case "layer_norm":
            inputs = [normal(*shape), weight, bias]
        case "add_layer_norm":
            inputs = [normal(*shape), normal(*shape), weight, bias]
        case _:
            raise ValueError(f"operation: got {case.operation!r}, wanted one of {', '.join(TENSORS_MOVED)}")
    return tuple(x.to(case.dtype).requires_grad_() for x in inputs)


def output_gradients(outputs: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return tuple(torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in outputs)


def ours(operation: str, *inputs: Tensor) -> tuple[Tensor, ...]:
    """newllm_kernels' operation as a tuple of the outputs that are differentiated; last states are left aside."""
    match operation:
        case "scan" | "gated_scan":
            return getattr(nk, operation)(*inputs)[:1]
        case "context_scan":
            return nk.context_scan(*inputs, EPS, CLAMP)[:1]
        case "context_update":
            return (nk.context_update(*inputs, EPS, CLAMP),)
        case "gated_scan_norm":
            return (gated_scan_norm(*inputs),)
        case "layer_norm":
            return (nk.layer_norm(*inputs, EPS),)
        case _:
            return nk.add_layer_norm(*inputs, EPS)


def gated_scan_norm(f: Tensor, i: Tensor, d: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What is read of the contexts, LayerNorm of `gated_scan`: in one operation where there is one, else in two."""
    if FUSED:
        return nk.gated_scan_layer_norm(f, i, d, weight=weight, bias=bias, eps=EPS)[0]
    return nk.layer_norm(nk.gated_scan(f, i, d)[0], weight, bias, EPS)


# ---- truth ----------------------------------------------------------------------------------------------------------

# A series grows to sizes whose float64 truth would fill a GPU, by a loop of a million steps. Columns do not see each other,
# so some of them are compared over the whole of time, with the doubling scan of formulations.py in float32: far more exact
# than 16 bits, and itself held against the reference in tests/benchmarks. The error is that of the worst stretch of SEGMENT
# steps: a carry dropped once shows in full, which a norm over all of time would dilute.
COLUMNS, SEGMENT = 16, 64


def checked(case: Case, tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The part of results that is compared with `truth`: all of it, or of a series the columns that stand for it."""
    if case.series is None:
        return tuple(tensors)
    step = case.shape[-1] // COLUMNS | 1  # odd: the columns lie at every place of a vector and a tile
    return tuple(x[..., ::step] for x in tensors)


@lru_cache(maxsize=1)
def truth(case: Case) -> dict[str, tuple[Tensor, ...]]:
    """Outputs and input gradients by the reference backend in float64, of the inputs as rounded to the case's dtype."""
    if case.series is not None:
        return _truth_of_columns(case)
    inputs = tuple(x.detach().double().requires_grad_() for x in make_inputs(case))
    with nk.use_backend("reference"):
        outputs = ours(case.operation, *inputs)
        # Drawn in the case's dtype, so that all providers get the very same numbers.
        grads = tuple(g.double() for g in output_gradients(tuple(y.detach().to(case.dtype) for y in outputs)))
        gradients = torch.autograd.grad(outputs, inputs, grads)
    return {"forward": tuple(y.detach() for y in outputs), "backward": gradients}


def _truth_of_columns(case: Case) -> dict[str, tuple[Tensor, ...]]:
    """The `checked` part of a scan or gated scan whose inputs and output are all (B, T, D)."""
    forward, backward = formulations.PASSES[case.operation]
    like = torch.empty(case.shape, dtype=case.dtype, device=case.device)
    inputs = [x.detach().float() for x in checked(case, make_inputs(case))]
    (grad,) = checked(case, output_gradients((like,)))
    h = forward(formulations.doubling, *inputs)
    return {"forward": (h,), "backward": backward(formulations.doubling, grad.float(), *inputs, h)}


def relative_error(pairs: Iterable[tuple[Tensor, Tensor]], segment: int | None = None) -> float:
    """The worst relative L2 error among (got, wanted), or among their stretches of `segment` time steps; NaN counts as
    infinitely wrong, no pairs as exact."""
    worst = 0.0
    for got, want in pairs:
        difference, want = got.detach().double() - want, want.double()
        if segment is not None:  # (B, T, D) -> (B, stretches, segment * D)
            difference, want = (x.unflatten(1, (-1, segment)).flatten(2) for x in (difference, want))
        ratio = difference.norm(dim=-1) / want.norm(dim=-1) if segment else difference.norm() / want.norm()
        error = float(ratio.max())
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst
