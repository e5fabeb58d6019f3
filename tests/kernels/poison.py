"""Poison for memory that was allocated and not written.

torch.utils.deterministic.fill_uninitialized_memory does not reach the kernels: it acts on torch.empty, while they
allocate through aoti_torch_empty_strided, below it. So the poison sits in the allocators themselves:

    libc10     its own switch fills every CPU tensor with 0x7fedbeef: NaN in float32, NaN in every other element of 16-bit
               types, 1.7e308 in float64
    glibc      M_PERTURB fills what malloc returns with 0x7f: 3e38 in float32, so scratch rows show too
    CUDA       NaN is written to blocks which are then freed, and the caching allocator hands them out again: to the gaps
               between tensors that are alive, and to fresh blocks of both of its pools
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

M_PERTURB = -6  # from malloc.h


def _junk_fill() -> ctypes.c_bool | None:
    for library in (Path(torch.__file__).parent / "lib").glob("libc10.*"):
        try:
            return ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_cpu_allocator_do_junk_fill")
        except (OSError, ValueError):  # no such library, no such symbol
            continue
    return None


JUNK_FILL = _junk_fill()
MALLOPT = getattr(ctypes.CDLL(None), "mallopt", None)


def _poison_cuda() -> None:
    torch.cuda.empty_cache()
    pieces = [block for segment in torch.cuda.memory_snapshot() for block in segment["blocks"]]
    # Largest first: each then finds the gap of its own size. The small pool hands out blocks up to 1 MiB, the large pool the rest.
    gaps = sorted((block["size"] for block in pieces if block["state"] == "inactive"), reverse=True)
    sizes = [*gaps, 1 << 28, *[1 << 20] * 64]
    blocks = [torch.full((size // 4,), float("nan"), device="cuda") for size in sizes]
    torch.cuda.synchronize()
    del blocks


@contextmanager
def poisoned() -> Iterator[None]:
    if JUNK_FILL is not None:
        JUNK_FILL.value = True
    if MALLOPT is not None:
        MALLOPT(M_PERTURB, 0x80)  # malloc writes the complement
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        _poison_cuda()
    try:
        yield
    finally:
        if JUNK_FILL is not None:
            JUNK_FILL.value = False
        if MALLOPT is not None:
            MALLOPT(M_PERTURB, 0)
