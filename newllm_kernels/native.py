"""The compiled kernels: whether they are there, and what they hold.

Two files are built beside this one: libnewllm_kernels (operators `newllm_native::*`, any Python, any PyTorch from 2.11
on) and _C (what the build holds). Where they are missing, everything still runs on the `reference` backend.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import torch


class Verdict(NamedTuple):
    """Whether something can serve, and why (not)."""

    ok: bool
    reason: str


LIBRARY = Path(__file__).with_name("libnewllm_kernels.so")


@functools.cache
def library() -> Verdict:
    """Load the compiled kernels, once per process."""
    if not LIBRARY.exists():
        return Verdict(False, "the C++ kernels are not built; build them with: pip install -e .")
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return Verdict(False, f"{LIBRARY.name} does not load into PyTorch {torch.__version__}: {error}")
    return Verdict(True, f"{LIBRARY.name} is loaded")


def active_isa() -> str:
    """The CPU instruction set in use: "baseline", "avx2" or "avx512"; capped by the variable NEWLLM_CPU_ISA."""
    function = _handle().newllm_active_isa
    function.restype = ctypes.c_char_p
    return function().decode()


def has_cuda_kernels() -> bool:
    """Whether the library was built with nvcc."""
    return library().ok and hasattr(_handle(), "newllm_context_update_max_width")


@functools.cache
def cuda_max_width(operation: str, device: int) -> int:
    """Widest D that the CUDA kernels of "context_update" or "context_scan" take on this device."""
    function = getattr(_handle(), f"newllm_{operation}_max_width")
    function.restype = ctypes.c_int64
    return function(ctypes.c_int(device))


@functools.cache
def cuda_layer_norm_max_width(device: int) -> int:
    """Widest D that LayerNorm's CUDA kernels take on this device."""
    function = _handle().newllm_layer_norm_max_width
    function.restype = ctypes.c_int64
    return function(ctypes.c_int(device))


@functools.cache
def cuda_shared_memory(operation: str) -> int:
    """Bytes of shared memory that a block of the CUDA kernels of "scan" or "gated_scan" may take."""
    function = getattr(_handle(), f"newllm_{operation}_shared_memory")
    function.restype = ctypes.c_int64
    return function()


def cuda_decode_shared_memory(layers: int, rows: int, widest: int, widest_norm: int, element_size: int) -> int:
    """Bytes of shared memory that a block of decode_linear's kernel takes at least."""
    function = _handle().newllm_decode_shared_memory
    function.restype = ctypes.c_int64
    return function(*(ctypes.c_int64(value) for value in (layers, rows, widest, widest_norm, element_size)))


@functools.cache
def cuda_recurrent_team(D: int, H: int, device: int) -> int:
    """Blocks that compute recurrent_context's rows of these widths together; negative: as one cluster; 0: they do not fit."""
    function = _handle().newllm_recurrent_team
    function.restype = ctypes.c_int64
    return function(ctypes.c_int64(D), ctypes.c_int64(H), ctypes.c_int(device))


@functools.cache
def cuda_recurrent_teams(D: int, H: int, device: int) -> int:
    """How many groups of 16 rows recurrent_context computes at once there."""
    function = _handle().newllm_recurrent_teams
    function.restype = ctypes.c_int64
    return function(ctypes.c_int64(D), ctypes.c_int64(H), ctypes.c_int(device))


@functools.cache
def cuda_recurrent_meshes(D: int, H: int, device: int) -> int:
    """The same for meshes of clusters, which take the place of teams where they need no more turns; 0: there are none."""
    function = _handle().newllm_recurrent_meshes
    function.restype = ctypes.c_int64
    return function(ctypes.c_int64(D), ctypes.c_int64(H), ctypes.c_int(device))


@functools.cache
def cuda_gated_scan_layer_norm_teams(device: int, is_float: bool, backward: bool, width: int) -> int:
    """Sequences that its CUDA kernel works on at a time: one for every set of blocks of all columns that the device holds."""
    function = _handle().newllm_gated_scan_layer_norm_teams
    function.restype = ctypes.c_int64
    return function(ctypes.c_int(device), ctypes.c_bool(is_float), ctypes.c_bool(backward), ctypes.c_int64(width))


def build_info() -> dict[str, str]:
    """What the build says of itself; raises ImportError where `_C` is missing or belongs to another Python."""
    try:
        from newllm_kernels import _C
    except ImportError as error:
        version = ".".join(map(str, sys.version_info[:2]))
        raise ImportError(f"newllm_kernels._C is not built for Python {version}: pip install -e .") from error
    return _C.build_info()


@functools.cache
def _handle() -> ctypes.CDLL:
    return ctypes.CDLL(str(LIBRARY))
