"""Who is measured: newllm_kernels and the baselines, each with the reason where it cannot take part.

    newllm     the auto backend
    eager      what a user writes without this package: torch.nn.functional.layer_norm, a composition of tensor operations,
               or, for a recurrence, a Python loop over T, tuned (activations hoisted, fused multiply-add)
    loop       that loop as the formula reads
    compiled   torch.compile of the best pure-PyTorch formulation known (formulations.py; bench_scan.py --candidates times
               the others too)
    liger, fla, accelerated-scan   other people's Triton and CUDA kernels, where they are installed

No peer is made to look bad: loops keep a float32 state and unbind the time dimension (indexing a[:, t] would fill a whole
zero tensor for every step of the backward), and what prepares inputs (a transposition, a logarithm) is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec

import formulations
import operations
import torch
import torch.nn.functional as F
from operations import CLAMP, EPS, Case
from torch import Tensor

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]


def _same(*tensors: Tensor) -> Outputs:
    return tensors


def _anywhere(case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """`build(case)` makes the function that is timed; `unavailable(case)` says why it cannot be, or None.

    Layouts of its own: `prepare` turns our inputs into the provider's and `restore` its outputs into ours, both untimed.
    """

    name: str
    build: Callable[[Case], Function]
    unavailable: Callable[[Case], str | None] = _anywhere
    prepare: Function = _same
    restore: Function = _same


# ---- eager ----------------------------------------------------------------------------------------------------------


def written_scan(a: Tensor, b: Tensor) -> Outputs:
    """The loop as the formula reads; only the time dimension is unbound, or its backward would be quadratic in T."""
    state, steps = torch.zeros_like(b[:, 0], dtype=torch.float32), []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        state = a_t * state + b_t
        steps.append(state)
    return (torch.stack(steps, dim=1).to(a.dtype),)


def written_gated_scan(f: Tensor, i: Tensor, d: Tensor) -> Outputs:
    """The loop as the formula reads, gates and all."""
    state, steps = torch.zeros_like(d[:, 0], dtype=torch.float32), []
    for f_t, i_t, d_t in zip(*(gate.float().unbind(1) for gate in (f, i, d)), strict=True):
        state = torch.sigmoid(f_t) * state + torch.sigmoid(i_t) * torch.tanh(d_t)
        steps.append(state)
    return (torch.stack(steps, dim=1).to(f.dtype),)


def loop_scan(a: Tensor, b: Tensor) -> Outputs:
    state = torch.zeros_like(b[:, 0], dtype=torch.float32)
    steps = []
    for decay, value in zip(a.float().unbind(1), b.float().unbind(1), strict=True):
        state = torch.addcmul(value, decay, state)
        steps.append(state)
    return (torch.stack(steps, dim=1).to(a.dtype),)


def loop_gated_scan(f: Tensor, i: Tensor, d: Tensor) -> Outputs:
    h = loop_scan(f.float().sigmoid(), i.float().sigmoid() * d.float().tanh())[0]
    return (h.to(f.dtype),)


def cell(f: Tensor, i: Tensor, d: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    u = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(d)
    return F.layer_norm(u, u.shape[-1:], weight, bias, EPS).clamp(-CLAMP, CLAMP)


def one_cell(*inputs: Tensor) -> Outputs:
    return (cell(*inputs),)


def loop_cell(
    step: Callable[..., Tensor], f: Tensor, i: Tensor, d: Tensor, c0: Tensor, weight: Tensor, bias: Tensor
) -> Outputs:
    state, weight, bias, steps = c0.float(), weight.float(), bias.float(), []
    for gates in zip(*(gate.float().unbind(1) for gate in (f, i, d)), strict=True):
        state = step(*gates, state, weight, bias)
        steps.append(state)
    return (torch.stack(steps, dim=1).to(f.dtype),)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    return (F.layer_norm(x, x.shape[-1:], weight, bias, EPS),)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    total = x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias, EPS), total


# ---- compiled -------------------------------------------------------------------------------------------------------


@cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _compiled_recurrence(case: Case, candidate: str = "") -> Function:
    return formulations.compiled(case.operation, candidate or formulations.FASTEST[case.device])


def _too_many_steps(case: Case) -> str | None:
    """A Python loop over 65536 steps records a graph of 10**5 nodes and takes seconds a run: no news in it."""
    return None if case.shape[1] <= 8192 else f"a Python loop over {case.shape[1]} steps"


# ---- other libraries ------------------------------------------------------------------------------------------------


def _gpu_library(module: str, case: Case) -> str | None:
    if case.device != "cuda":
        return "runs on CUDA tensors only"
    return None if find_spec(module) else f"{module} is not installed"


def _liger(case: Case) -> Function:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: (LigerLayerNormFunction.apply(x, weight, bias, EPS),)


def _fla_layer_norm(case: Case) -> Function:
    from fla.modules.layernorm import layer_norm as fla_layer_norm

    return lambda x, weight, bias: (fla_layer_norm(x, weight, bias, eps=EPS),)


def _fla_scan(case: Case) -> Function:
    from fla.ops.hgrn import chunk_hgrn

    return lambda log_a, b: chunk_hgrn(b, log_a)[:1]


def _accelerated_scan(case: Case) -> Function:
    from accelerated_scan.warp import scan

    return lambda a, b: (scan(a, b),)


def _accelerated_unavailable(case: Case) -> str | None:
    T = case.shape[1]
    if T & (T - 1):
        return f"wants T a power of two, not {T}"
    return _gpu_library("accelerated_scan", case)


def _time_last(*tensors: Tensor) -> Outputs:
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


NEWLLM, COMPILED = "newllm", "compiled:"


def _ours(operation: str) -> Provider:
    return Provider(NEWLLM, lambda case: partial(operations.ours, operation))


PROVIDERS: dict[str, list[Provider]] = {
    "scan": [
        _ours("scan"),
        Provider("loop", lambda case: written_scan, _too_many_steps),
        Provider("eager", lambda case: loop_scan, _too_many_steps),
        Provider("compiled", _compiled_recurrence),
        Provider(
            "fla", _fla_scan, partial(_gpu_library, "fla"),
            prepare=lambda a, b: (a.float().log(), b),  # its decays come as logarithms
        ),
        Provider("accelerated-scan", _accelerated_scan, _accelerated_unavailable, _time_last, _time_last),
    ],
    "gated_scan": [
        _ours("gated_scan"),
        Provider("loop", lambda case: written_gated_scan, _too_many_steps),
        Provider("eager", lambda case: loop_gated_scan, _too_many_steps),
        Provider("compiled", _compiled_recurrence),
    ],
    "context_update": [
        _ours("context_update"),
        Provider("eager", lambda case: one_cell),
        Provider("compiled", lambda case: compiled(one_cell)),
    ],
    "context_scan": [
        _ours("context_scan"),
        Provider("eager", lambda case: partial(loop_cell, cell), _too_many_steps),
        # LayerNorm in the loop leaves nothing to parallelise in time: the step is compiled, the loop stays.
        Provider("compiled", lambda case: partial(loop_cell, compiled(cell)), _too_many_steps),
    ],
    "layer_norm": [
        _ours("layer_norm"),
        Provider("eager", lambda case: layer_norm),
        Provider("compiled", lambda case: compiled(layer_norm)),
        Provider("liger", _liger, partial(_gpu_library, "liger_kernel")),
        Provider("fla", _fla_layer_norm, partial(_gpu_library, "fla")),
    ],
    "add_layer_norm": [
        _ours("add_layer_norm"),
        Provider("eager", lambda case: add_layer_norm),
        Provider("compiled", lambda case: compiled(add_layer_norm)),
    ],
}  # fmt: skip


def candidates() -> list[Provider]:
    """Every formulation of a recurrence, so that "compiled" is shown to be the best there is."""
    return [
        Provider(f"{COMPILED}{name}", partial(_compiled_recurrence, candidate=name)) for name in formulations.CANDIDATES
    ]


def skip_candidate(provider: Provider, case: Case, everything: bool) -> str | None:
    """Why a candidate is not timed: it is "compiled" itself, or known to be far behind."""
    name = provider.name.removeprefix(COMPILED)
    if name == formulations.FASTEST[case.device]:
        return "timed as compiled"
    return None if everything or name in formulations.RIVALS[case.device] else "timed with --candidates only"
