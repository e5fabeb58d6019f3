"""What the Triton kernels share on the host side."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Kernel:
    """A Triton kernel that is launched as one, `kernel[grid](*arguments, num_warps=..., **constants)`, on the GPU of its first
    tensor, at a third of the host's time.

    `triton.jit` binds, specialises and looks up in some 45 microseconds (measured beside an H100), more than most kernels
    run. The same key is made here: per tensor its dtype and whether it starts at a multiple of 16 bytes, per integer whether
    it is one or a multiple of 16 and needs 64 bits. Triton compiles at the first call with a new key; later ones hand the
    arguments to what it compiled. Fused multiply-adds are asked for by name, because Triton's default is about to change.
    """

    def __init__(self, function: Callable[..., None], do_not_specialize: tuple[str, ...] = ()) -> None:
        self.jit = triton.jit(function, do_not_specialize=list(do_not_specialize))
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self.arg_names: list[str] = self.jit.arg_names
        self.specialised = [name not in do_not_specialize for name in self.arg_names]
        self.compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, num_warps: int, **constants: Any) -> None:
        if INTERPRETED:
            self.jit[grid](*arguments, num_warps=num_warps, **constants)
            return
        device = -1
        key: list[Any] = [num_warps, *constants, *constants.values()]
        values: list[Any] = []
        for argument, specialised in zip(arguments, self.specialised, strict=False):
            kind = type(argument)
            if kind is int:
                if specialised:
                    key.append((argument == 1, argument & 15 == 0, argument >= 2**31))
                else:
                    key.append(argument >= 2**31)
                values.append(argument)
            elif isinstance(argument, Tensor):
                if device < 0:
                    device = argument.device.index
                pointer = argument.data_ptr()
                key.append(argument.dtype)
                key.append(pointer & 15 == 0)
                values.append(pointer)
            else:
                key.append(kind)
                values.append(argument)
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(grid, *arguments, num_warps=num_warps, **constants)
            return
        key.append(device)
        entry = tuple(key)
        found = self.compiled.get(entry)
        if found is None:
            compiled = self.jit[grid](*arguments, num_warps=num_warps, enable_fp_fusion=True, **constants)
            in_order = tuple(constants[name] for name in self.arg_names[len(arguments) :])
            self.compiled[entry] = compiled, in_order
            return
        compiled, in_order = found
        x, y, z = (*grid, 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *in_order)


def kernel(*, do_not_specialize: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator: a function in Triton's language -> Kernel."""
    return functools.partial(Kernel, do_not_specialize=do_not_specialize)


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 under the interpreter, so that small shapes walk both ways through the code."""
    return _multiprocessors(device.index) if device.type == "cuda" else 4


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, called from the host, takes 8 microseconds."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two of at least n >= 1."""
    return 1 << (n - 1).bit_length()


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Small tensors (states, weights) as the kernels read them."""
    return tuple(x if x is None else x.contiguous() for x in tensors)
