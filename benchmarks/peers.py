"""Who is measured: newllm_kernels and the baselines, each with the reason where it cannot take part.

    newllm     the auto backend; on a GPU also each of its backends, triton and cuda, by name
    eager      what a user writes without this package: torch.nn.functional.layer_norm, a composition of tensor operations,
               or, for a recurrence, a Python loop over T, tuned (activations hoisted, fused multiply-add);
               in gated_scan_norm the gates and the norm alone are eager, and the scan between them is the compiled one
    loop       that loop as the formula reads
    compiled   torch.compile of the best pure-PyTorch formulation known (formulations.py; bench_scan.py --candidates times
               the others too)
    liger, fla, accelerated-scan   other people's Triton and CUDA kernels, where they are installed (the extra "peers")

No peer is made to look bad: loops keep a float32 state and unbind the time dimension (indexing a[:, t] would fill a whole
zero tensor for every step of the backward), and what prepares inputs (a transposition, a logarithm) is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module

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
    backend: str = "auto"  # of newllm_kernels, while it is measured


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


def _eager_gated_scan_norm(case: Case) -> Function:
    scan = formulations.compiled("scan", formulations.FASTEST[case.device])
    return lambda f, i, d, weight, bias: layer_norm(
        *scan(torch.sigmoid(f), torch.sigmoid(i) * torch.tanh(d)), weight, bias
    )


def _compiled_gated_scan_norm(case: Case) -> Function:
    # Two graphs: the scan goes along T and the norm along D, which Inductor could not fuse in one.
    scan, norm = formulations.compiled("gated_scan", formulations.FASTEST[case.device]), compiled(layer_norm)
    return lambda f, i, d, weight, bias: norm(*scan(f, i, d), weight, bias)


def _too_many_steps(case: Case) -> str | None:
    """A Python loop over 65536 steps records a graph of 10**5 nodes and takes seconds a run: no news in it."""
    return None if case.shape[1] <= 8192 else f"a Python loop over {case.shape[1]} steps"


# ---- other libraries ------------------------------------------------------------------------------------------------
# Written against liger-kernel 0.8.5, fla-core 0.6.0 and accelerated-scan 0.3.1 (pip install -e ".[peers]").


@cache
def _import_failure(module: str) -> str | None:
    """Why a module cannot be used here. accelerated_scan.warp compiles CUDA when it is imported, which fails in many ways."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:
        return f"{module} cannot be imported: {first_line(error)}"
    return None


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _gpu_library(module: str, case: Case) -> str | None:
    return _on_a_gpu(case) or _import_failure(module)


LIGER, FLA_NORM, FLA_HGRN = "liger_kernel.ops.layer_norm", "fla.modules.layernorm", "fla.ops.hgrn"
ACCELERATED, ACCELERATED_TRITON = "accelerated_scan.warp", "accelerated_scan.scalar"


def _liger(case: Case) -> Function:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: (LigerLayerNormFunction.apply(x, weight, bias, EPS),)


def _fla_layer_norm(case: Case) -> Function:
    from fla.modules.layernorm import layer_norm as fla_layer_norm

    return lambda x, weight, bias: (fla_layer_norm(x, weight, bias, eps=EPS),)


def _fla_add_layer_norm(case: Case) -> Function:
    from fla.modules.layernorm import layer_norm as fla_layer_norm

    # prenorm: the sum comes back beside the normalised one, as ours does.
    return lambda x, residual, weight, bias: fla_layer_norm(x, weight, bias, residual, eps=EPS, prenorm=True)


def _chunk_hgrn() -> Callable[[Tensor, Tensor], Tensor]:
    """h_t = exp(g_t) h_{t-1} + x_t, all (B, T, D): any T and D, h in x's dtype, between its passes in float32."""
    from fla.ops.hgrn import chunk_hgrn

    return lambda x, g: chunk_hgrn(x, g)[0]


def _fla_scan(case: Case) -> Function:
    hgrn = _chunk_hgrn()
    return lambda log_a, b: (hgrn(b, log_a),)


def _log_decays(a: Tensor, b: Tensor) -> Outputs:
    """fla's decays are logarithms; 16 bits of one are as good as 16 bits of the decay (1.7e-3 off in bfloat16, both)."""
    return a.float().log().to(a.dtype), b


def _fla_gated_scan(case: Case) -> Function:
    hgrn = _chunk_hgrn()
    return lambda f, i, d: (hgrn(torch.sigmoid(i) * torch.tanh(d), F.logsigmoid(f)),)


def _fla_gated_scan_norm(case: Case) -> Function:
    scan = _fla_gated_scan(case)
    return lambda f, i, d, weight, bias: layer_norm(*scan(f, i, d), weight, bias)


# accelerated-scan: time comes last, (B, D, T) contiguous, a and b of one dtype. `warp` is CUDA C++, compiled at its import,
# for T a power of two from 32 to 65536, with states of the tensors' dtype. From T = 4096 on its 16-bit kernel takes four
# elements for 16 bytes (`class alignas(16) AlignedTuple` of warp.cuh): it reads and writes twice as far as its tensors reach.
# There the scan alone is given float32, the only way it can be used; its results come back rounded. `scalar` is Triton, any T.
WARP_SHORTEST, WARP_LONGEST, WARP_16_BIT = 32, 65536, 4096


def _accelerated_scan(module: str, case: Case) -> Function:
    scan = import_module(module).scan
    return lambda a, b: (scan(a, b),)


def _accelerated_gated_scan(module: str, case: Case) -> Function:
    scan = import_module(module).scan
    return lambda f, i, d: (scan(torch.sigmoid(f), torch.sigmoid(i) * torch.tanh(d)),)


def _warp(case: Case) -> str | None:
    T = case.shape[1]
    if T & (T - 1) or not WARP_SHORTEST <= T <= WARP_LONGEST:
        return f"wants T a power of two from {WARP_SHORTEST} to {WARP_LONGEST}, not {T}"
    return _gpu_library(ACCELERATED, case)


def _warp_16_bit(case: Case) -> str | None:
    if case.dtype.itemsize == 2 and case.shape[1] >= WARP_16_BIT:
        return f"its 16-bit kernel leaves its tensors' memory from T = {WARP_16_BIT} on"
    return _warp(case)


def _time_last(*tensors: Tensor) -> Outputs:
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


def _time_last_for_warp(*tensors: Tensor) -> Outputs:
    return _time_last(*(x.float() if x.shape[1] >= WARP_16_BIT else x for x in tensors))


NEWLLM, COMPILED = "newllm", "compiled:"


def _ours(operation: str, *backends: str) -> list[Provider]:
    def build(case: Case) -> Function:
        return partial(operations.ours, operation)

    return [Provider(NEWLLM, build), *(Provider(name, build, _on_a_gpu, backend=name) for name in backends)]


def _on_a_gpu(case: Case) -> str | None:
    return None if case.device == "cuda" else "runs on CUDA tensors only"


PROVIDERS: dict[str, list[Provider]] = {
    "scan": [
        *_ours("scan", "cuda", "triton"),
        Provider("loop", lambda case: written_scan, _too_many_steps),
        Provider("eager", lambda case: loop_scan, _too_many_steps),
        Provider("compiled", _compiled_recurrence),
        Provider("fla", _fla_scan, partial(_gpu_library, FLA_HGRN), _log_decays),
        Provider(
            "accelerated-scan", partial(_accelerated_scan, ACCELERATED), _warp, _time_last_for_warp, _time_last
        ),
        Provider(
            "accelerated-scan-triton", partial(_accelerated_scan, ACCELERATED_TRITON),
            partial(_gpu_library, ACCELERATED_TRITON), _time_last, _time_last,
        ),
    ],
    "gated_scan": [
        *_ours("gated_scan", "cuda", "triton"),
        Provider("loop", lambda case: written_gated_scan, _too_many_steps),
        Provider("eager", lambda case: loop_gated_scan, _too_many_steps),
        Provider("compiled", _compiled_recurrence),
        Provider("fla", _fla_gated_scan, partial(_gpu_library, FLA_HGRN)),
        Provider(
            "accelerated-scan", partial(_accelerated_gated_scan, ACCELERATED), _warp_16_bit, _time_last, _time_last
        ),
        Provider(
            "accelerated-scan-triton", partial(_accelerated_gated_scan, ACCELERATED_TRITON),
            partial(_gpu_library, ACCELERATED_TRITON), _time_last, _time_last,
        ),
    ],
    "gated_scan_norm": [
        *_ours("gated_scan_norm", "cuda", "triton"),
        Provider("eager", _eager_gated_scan_norm),
        Provider("compiled", _compiled_gated_scan_norm),
        Provider("fla", _fla_gated_scan_norm, partial(_gpu_library, FLA_HGRN)),
    ],
    "context_update": [
        *_ours("context_update", "cuda", "triton"),
        Provider("eager", lambda case: one_cell),
        Provider("compiled", lambda case: compiled(one_cell)),
    ],
    "context_scan": [
        *_ours("context_scan", "cuda", "triton"),
        Provider("eager", lambda case: partial(loop_cell, cell), _too_many_steps),
        # LayerNorm in the loop leaves nothing to parallelise in time: the step is compiled, the loop stays.
        Provider("compiled", lambda case: partial(loop_cell, compiled(cell)), _too_many_steps),
    ],
    "layer_norm": [
        *_ours("layer_norm", "cuda", "triton"),
        Provider("eager", lambda case: layer_norm),
        Provider("compiled", lambda case: compiled(layer_norm)),
        Provider("liger", _liger, partial(_gpu_library, LIGER)),
        Provider("fla", _fla_layer_norm, partial(_gpu_library, FLA_NORM)),
    ],
    "add_layer_norm": [
        *_ours("add_layer_norm", "cuda", "triton"),
        Provider("eager", lambda case: add_layer_norm),
        Provider("compiled", lambda case: compiled(add_layer_norm)),
        Provider("fla", _fla_add_layer_norm, partial(_gpu_library, FLA_NORM)),
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
