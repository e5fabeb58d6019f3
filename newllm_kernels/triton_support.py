"""What the Triton kernels share on the host side."""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 under the interpreter, so that small shapes walk both ways through the code."""
    return _multiprocessors(device.index) if device.type == "cuda" else 4


def device_of(tensor: Tensor) -> Any:
    """Makes the tensor's GPU the current one while a kernel is launched; costs nothing where it is already."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Small tensors (states, weights) as the kernels read them."""
    return tuple(x if x is None else x.contiguous() for x in tensors)
