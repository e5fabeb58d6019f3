"""Who computes an operation, and why.

    cuda       CUDA C++ (csrc/cuda), CUDA tensors
    triton     Triton (newllm_kernels/<op>/triton.py), CUDA tensors
    cpu        C++ (csrc/cpu), CPU tensors
    reference  plain PyTorch (newllm_kernels/<op>/reference.py), any tensor: the definition, slow

`auto` takes the first of these, in this order, that can serve, unless a later one was measured faster (`rank`);
`use_backend` and the variable NEWLLM_KERNELS_BACKEND name one instead, and a named backend that cannot serve raises
`BackendError` with its reason. Where `auto` is left with the reference it says so once per operation and device.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm_kernels import native
from newllm_kernels.native import Verdict

BACKENDS = ("cuda", "triton", "cpu", "reference")
CHOICES = ("auto", *BACKENDS)


class BackendError(ValueError):
    """The backend that was asked for cannot serve this call."""


SMALL = 2**20  # elements: what a GPU computes in less time than the host needs for the call


class Call(NamedTuple):
    """What of a call decides who can serve it, and who does it best."""

    device: torch.device
    dtype: torch.dtype
    width: int  # D
    small: bool = False  # of no more than SMALL elements
    detail: Hashable = None  # what else an operation's implementations ask for, as `register_detail` says


@dataclass(frozen=True)
class Implementation:
    """The kernels of one backend for one operation: both take the arguments of the operators' schemas."""

    backend: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    supports: Callable[[Call], Verdict]
    rank: Callable[[Call], int] = lambda call: 0  # for `auto`, where measurement contradicts the order of BACKENDS
    plain: Callable[..., Any] | None = None  # forward without the outputs that only a backward reads


_registry: dict[str, dict[str, Implementation]] = {}
_details: dict[str, Callable[..., tuple[Tensor, int, Hashable]]] = {}
_cache: dict[tuple[Any, ...], Implementation] = {}
_warned: set[tuple[str, str]] = set()


def _valid(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{source}: got {name!r}, wanted one of {', '.join(CHOICES)}")
    return name


_chosen = _valid(os.environ.get("NEWLLM_KERNELS_BACKEND", "auto"), "NEWLLM_KERNELS_BACKEND")


def current_backend() -> str:
    """ "auto", or the backend that `use_backend` or NEWLLM_KERNELS_BACKEND names."""
    return _chosen


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with one backend inside the block, forward and backward alike, in every thread of the process.

    A backward pass that runs after the block runs on what is chosen then. Raises ValueError for an unknown name; a call
    that the backend cannot serve raises BackendError.

    >>> import torch, newllm_kernels as nk
    >>> with nk.use_backend("reference"):
    ...     y = nk.layer_norm(torch.ones(2, 3))
    """
    global _chosen
    before, _chosen = _chosen, _valid(name, "use_backend")
    try:
        yield
    finally:
        _chosen = before


def register(operation: str, implementation: Implementation) -> None:
    """Put an implementation behind an operation."""
    _registry.setdefault(operation, {})[implementation.backend] = implementation
    _cache.clear()


def register_detail(operation: str, describe: Callable[..., tuple[Tensor, int, Hashable]]) -> None:
    """For `explain`: describe(arguments of the public function) -> what the operation gives `select`."""
    _details[operation] = describe


def operations() -> tuple[str, ...]:
    """Names of all operations."""
    return tuple(_registry)


def select(operation: str, like: Tensor, width: int, detail: Hashable = None) -> Implementation:
    """The implementation that serves this call; `like` is the tensor whose device and dtype decide."""
    key = (operation, _chosen, like.device, like.dtype, width, like.numel() <= SMALL, detail)
    found = _cache.get(key)
    if found is None:
        if len(_cache) > 4096:  # widths are few in practice; a process that sees thousands must not grow without end
            _cache.clear()
        found = _cache[key] = _choose(operation, Call(*key[2:]))
    return found


def verdicts(operation: str, call: Call) -> dict[str, Verdict]:
    """What every backend answers to a call, in the order of preference."""
    answers = {}
    for backend in BACKENDS:
        implementation = _registry[operation].get(backend)
        if implementation is None:
            answers[backend] = Verdict(False, f"has no kernel for {operation}")
        else:
            answers[backend] = implementation.supports(call)
    return answers


def _best(operation: str, call: Call, answers: dict[str, Verdict]) -> str:
    able = [backend for backend in BACKENDS if answers[backend].ok]
    return max(able, key=lambda backend: _registry[operation][backend].rank(call))  # the first of equals


def _choose(operation: str, call: Call) -> Implementation:
    answers = verdicts(operation, call)
    if _chosen != "auto":
        if not answers[_chosen].ok:
            raise BackendError(
                f"{operation}: the backend {_chosen!r} cannot serve this call: {answers[_chosen].reason}"
            )
        return _registry[operation][_chosen]
    best = _best(operation, call, answers)
    if best == "reference" and (operation, call.device.type) not in _warned:
        _warned.add((operation, call.device.type))
        reasons = "; ".join(f"{backend}: {answer.reason}" for backend, answer in answers.items() if not answer.ok)
        warnings.warn(
            f"newllm_kernels.{operation} runs on the slow reference backend for {call.dtype} on {call.device} ({reasons})",
            stacklevel=3,
        )
    return _registry[operation][best]


def explain(operation: str, *args: Any, **kwargs: Any) -> str:
    """Print, and return, which backend a call would take and why the others are passed over.

    `operation` is the name of a public function, the rest are its arguments.

    >>> import torch, newllm_kernels as nk
    >>> text = nk.explain("layer_norm", torch.ones(2, 3))
    layer_norm of torch.float32 on cpu, width 3 ...
    """
    name = "layer_norm" if operation == "add_layer_norm" else operation.removesuffix("_packed")
    if name not in _registry:
        raise ValueError(f"operation: got {operation!r}, wanted one of {', '.join(_registry)}")
    tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if tensor is None:
        raise TypeError("explain: wanted the arguments of the call, at least one tensor among them")
    width, detail = tensor.shape[-1] // 3 if operation.endswith("_packed") else tensor.shape[-1], None
    if name in _details:
        tensor, width, detail = _details[name](*args, **kwargs)
    call = Call(tensor.device, tensor.dtype, width, tensor.numel() <= SMALL, detail)
    answers = verdicts(name, call)
    taken = _best(name, call, answers) if _chosen == "auto" else _chosen if answers[_chosen].ok else None
    lines = [f"{operation} of {call.dtype} on {call.device}, width {call.width} (choice: {_chosen})"]
    for backend, answer in answers.items():
        mark = "->" if backend == taken else "  "
        earlier = taken is not None and answer.ok and BACKENDS.index(backend) < BACKENDS.index(taken)
        why = "; measured slower for this call" if _chosen == "auto" and earlier else ""
        lines.append(f"{mark} {backend:<10} {'yes' if answer.ok else 'no '}  {answer.reason}{why}")
    if taken is None:
        lines.append(f"   the call would raise: {_chosen!r} cannot serve it")
    text = "\n".join(lines)
    print(text)
    return text


# ---- predicates of the backends that every operation shares --------------------------------------------------------


def supports_reference(call: Call) -> Verdict:
    return Verdict(True, "plain PyTorch, any device")


def supports_cpu(call: Call) -> Verdict:
    if call.device.type != "cpu":
        return Verdict(False, f"serves CPU tensors, these are on {call.device}")
    return Verdict(True, f"C++, {native.active_isa()}") if native.library().ok else native.library()


def supports_cuda(call: Call) -> Verdict:
    if call.device.type != "cuda":
        return Verdict(False, f"serves CUDA tensors, these are on {call.device}")
    if not native.library().ok:
        return native.library()
    if not native.has_cuda_kernels():
        return Verdict(False, "was left out of this build (no nvcc, or NEWLLM_CUDA=off)")
    if call.dtype == torch.float64:
        return Verdict(False, "has no float64 kernels")
    capability = torch.cuda.get_device_capability(call.device)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(call.device)
        return Verdict(False, f"needs compute capability 8.0, {name} has {capability[0]}.{capability[1]}")
    return Verdict(True, f"CUDA C++, {torch.cuda.get_device_name(call.device)}")


def supports_cuda_recurrence(operation: str) -> Callable[[Call], Verdict]:
    """Of "scan" and "gated_scan", whose windows of time wait in shared memory: 99 KB a block, as GeForces have, are too few."""

    def supports(call: Call) -> Verdict:
        verdict = supports_cuda(call)
        if verdict.ok:
            needs = native.cuda_shared_memory(operation)
            has = torch.cuda.get_device_properties(call.device).shared_memory_per_block_optin
            if has < needs:
                return Verdict(
                    False,
                    f"needs {needs} bytes of shared memory a block, {torch.cuda.get_device_name(call.device)} has {has}",
                )
        return verdict

    return supports


@functools.cache
def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def supports_triton(call: Call) -> Verdict:
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if call.device.type == "cpu" and interpreted and _chosen == "triton":
        return Verdict(True, "Triton's interpreter (TRITON_INTERPRET=1), for tests")
    if call.device.type != "cuda":
        return Verdict(False, f"serves CUDA tensors, these are on {call.device}")
    version = _triton_version()
    if version is None:
        return Verdict(False, "triton is not installed: pip install triton")
    if call.dtype == torch.float64:
        return Verdict(False, "has no float64 kernels")
    capability = torch.cuda.get_device_capability(call.device)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(call.device)
        return Verdict(False, f"needs compute capability 8.0, {name} has {capability[0]}.{capability[1]}")
    return Verdict(True, f"Triton {version}, {torch.cuda.get_device_name(call.device)}")


def triton_implementation(
    operation: str,
    module: str | None = None,
    supports: Callable[[Call], Verdict] = supports_triton,
    rank: Callable[[Call], int] = lambda call: 0,
) -> Implementation:
    """Functions <operation> and <operation>_backward of newllm_kernels.<operation>.triton, imported at their first call."""

    @functools.cache
    def load(name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(module or f"newllm_kernels.{operation}.triton"), name)

    backward = f"{operation}_backward"
    return Implementation(
        "triton", lambda *args: load(operation)(*args), lambda *args: load(backward)(*args), supports, rank
    )


def native_implementation(
    operation: str,
    backend: str,
    supports: Callable[[Call], Verdict],
    rank: Callable[[Call], int] = lambda call: 0,
    plain: str | None = None,
) -> Implementation:
    """The compiled operator newllm_native::<operation>; its device decides between CPU and CUDA."""
    if native.library().ok:
        forward, backward = native_operator(operation), native_operator(f"{operation}_backward")
    else:

        def forward(*args: Any) -> Any:
            raise BackendError(native.library().reason)

        backward = forward
    without = native_operator(plain) if plain and native.library().ok else None
    return Implementation(backend, forward, backward, supports, rank, without)


def native_operator(name: str) -> Callable[..., Any]:
    """newllm_native::<name>, as what its OpOverload calls: a frame of Python less."""
    overload = getattr(torch.ops.newllm_native, name).default
    return getattr(overload, "_op", overload)
