"""CUDA C++ kernels of the cell over a sequence (csrc/cuda/context_scan*.cuh): the same chunks and passes as Triton's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from newllm_kernels import backends
from newllm_kernels.context_scan.passes import PASSES, TOLERANCE, chunks
from newllm_kernels.context_scan.seams import report

_in_time = functools.cache(lambda: backends.native_operator("context_scan_in_time"))
_in_time_backward = functools.cache(lambda: backends.native_operator("context_scan_in_time_backward"))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def plan(device: torch.device, B: int, T: int) -> tuple[int, int]:
    """(chunks, steps of a chunk)"""
    return chunks(B, T, _multiprocessors(device))


def _time(f: Tensor, direction: str) -> tuple[int, float, Tensor | None]:
    """Steps of a chunk, the tolerance of its start, and room for what starts move by; reported to whoever records."""
    B, T = f.shape[:2]
    count, steps = plan(f.device, B, T)
    change = None if count == 1 else torch.empty((PASSES, B, count), dtype=torch.float32, device=f.device)
    tolerance = TOLERANCE[f.dtype]
    report(direction, steps, count, change, tolerance)
    return steps, tolerance, change


def context_scan(f: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """newllm::context_scan"""
    return _in_time()(f, *rest, *_time(f, "forward"))


def context_scan_backward(
    grad_c: Tensor | None, grad_c_last: Tensor | None, f: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """newllm::context_scan_backward"""
    return _in_time_backward()(grad_c, grad_c_last, f, *rest, *_time(f, "backward"))
