"""Validation of arguments. Every error names the argument, what it got and what was wanted.

The functions are on the path of every call, so the common case is one comparison and the words are only made on failure.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from newllm_kernels.numerics import DTYPES, acc_dtype


def tensor(name: str, value: object, letters: str | None) -> Tensor:
    """A dense floating-point tensor of a supported dtype with one dimension per letter ("BTD"); None: one or more."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a tensor {shape_of(letters)}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {value.dtype}, wanted one of {', '.join(map(str, DTYPES))}")
    shape = value.shape  # every look at an attribute of a tensor costs a tenth of a microsecond
    if len(shape) != len(letters) if letters else not shape:
        raise ValueError(f"{name}: got shape {tuple(shape)}, wanted {shape_of(letters)}")
    if shape[-1] == 0:
        raise ValueError(f"{name}: got shape {tuple(shape)}, wanted a last dimension of at least 1")
    return value


def shape_of(letters: str | None) -> str:
    if letters is None:
        return "(..., D)"
    return "(" + ", ".join(letters) + ("," if len(letters) == 1 else "") + ")"


def like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` has the shape, dtype and device of `other`."""
    if isinstance(value, Tensor) and value.dtype is other.dtype and value.shape == other.shape:
        if value.device == other.device:
            return
        raise ValueError(f"{name}: got device {value.device}, wanted {other.device}, that of {other_name}")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a tensor like {other_name}")
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {value.dtype}, wanted {other.dtype}, that of {other_name}")
    raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted {tuple(other.shape)}, that of {other_name}")


def packed(name: str, gates: Tensor, letters: str | None) -> int:
    """Gates f, i, d as column blocks; returns D."""
    width = tensor(name, gates, letters).shape[-1]
    if width % 3:
        raise ValueError(f"{name}: got shape {tuple(gates.shape)}, wanted a last dimension of 3 * D")
    return width // 3


def state(name: str, value: Tensor | None, shape: tuple[int, ...], beside_name: str, beside: Tensor) -> Tensor | None:
    """A state of `shape` beside a tensor, as `state_as_given` wants it. Comes back in the accumulation type."""
    if value is None:
        return None
    state_as_given(name, value, shape, beside_name, beside)
    acc = acc_dtype(beside.dtype)
    return value if value.dtype == acc else value.to(acc)


def state_as_given(name: str, value: Tensor, shape: tuple[int, ...], beside_name: str, beside: Tensor) -> None:
    """A state of `shape` beside a tensor: of its dtype or its accumulation type."""
    acc = acc_dtype(beside.dtype)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a tensor {shape} or None")
    if value.dtype != acc and value.dtype != beside.dtype:
        wanted = " or ".join(dict.fromkeys((str(acc), str(beside.dtype))))
        raise TypeError(f"{name}: got dtype {value.dtype}, wanted {wanted} beside {beside_name} of {beside.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted {tuple(shape)}")
    if value.device != beside.device:
        raise ValueError(f"{name}: got device {value.device}, wanted {beside.device}, that of {beside_name}")


def affine(name: str, value: Tensor | None, width: int, beside_name: str, beside: Tensor) -> Tensor | None:
    """A LayerNorm parameter (D,), of any supported dtype, whatever that of `beside`."""
    if value is None:
        return None
    if not (isinstance(value, Tensor) and value.dtype in DTYPES and value.shape == (width,)):
        tensor(name, value, "D")
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, wanted ({width},), the last dimension of {beside_name}"
        )
    if value.device != beside.device:
        raise ValueError(f"{name}: got device {value.device}, wanted {beside.device}, that of {beside_name}")
    return value


def parameter(
    name: str, value: Tensor | None, shape: tuple[int, ...], beside_name: str, beside: Tensor, *, optional: bool = False
) -> Tensor | None:
    """A weight of `shape`, of any supported dtype, on the device of `beside`."""
    if value is None and optional:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a tensor {shape}{' or None' if optional else ''}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {value.dtype}, wanted one of {', '.join(map(str, DTYPES))}")
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted {shape}")
    if value.device != beside.device:
        raise ValueError(f"{name}: got device {value.device}, wanted {beside.device}, that of {beside_name}")
    return value


def count(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, wanted an integer of at least {least}")
    return value


def choice(name: str, value: object, choices: tuple[str | None, ...]) -> int:
    """The index of one of a few words."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, choices))}")
    return choices.index(value)


def eps(value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"eps: got {type(value).__name__}, wanted a number of at least 0")
    if not 0 <= value < math.inf:
        raise ValueError(f"eps: got {value}, wanted a finite number of at least 0")
    return float(value)


def clamp(value: float | None) -> float:
    """None means no bound."""
    if value is None:
        return math.inf
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"clamp: got {type(value).__name__}, wanted a number above 0 or None")
    if not value > 0:
        raise ValueError(f"clamp: got {value}, wanted a number above 0 or None")
    return float(value)


def cu_seqlens(value: Tensor | None, beside_name: str, beside: Tensor) -> tuple[Tensor | None, int]:
    """(boundaries as int64 or None, number of sequences N). Their values are looked at when the kernel runs."""
    if value is None:
        return None, beside.shape[0]
    if not isinstance(value, Tensor):
        raise TypeError(f"cu_seqlens: got {type(value).__name__}, wanted an integer tensor (N + 1,) or None")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: got dtype {value.dtype}, wanted torch.int64 or torch.int32")
    if value.dim() != 1 or value.shape[0] < 2:
        raise ValueError(f"cu_seqlens: got shape {tuple(value.shape)}, wanted (N + 1,) with N of at least 1")
    if beside.shape[0] != 1:
        raise ValueError(f"{beside_name}: got batch {beside.shape[0]}, wanted 1 where cu_seqlens packs the sequences")
    if value.device != beside.device:
        raise ValueError(f"cu_seqlens: got device {value.device}, wanted {beside.device}, that of {beside_name}")
    return value.to(torch.int64), value.shape[0] - 1


def cu_seqlens_values(value: Tensor | None, total: int) -> None:
    """Boundaries that start at 0, never fall and end at T. Called where the kernel runs: it reads the values."""
    if value is None:
        return
    bounds = value.tolist()
    if bounds[0] != 0:
        _bad_bounds(bounds, total, f"begins with {bounds[0]}")
    for index in range(1, len(bounds)):
        if bounds[index] < bounds[index - 1]:
            _bad_bounds(bounds, total, f"element {index} is {bounds[index]}, below the {bounds[index - 1]} before it")
    if bounds[-1] != total:
        _bad_bounds(bounds, total, f"ends with {bounds[-1]}")


def _bad_bounds(bounds: list[int], total: int, what: str) -> NoReturn:
    shown = str(bounds) if len(bounds) <= 12 else f"{str(bounds[:6])[:-1]}, ..., {str(bounds[-3:])[1:]}"
    raise ValueError(f"cu_seqlens: got {shown}, which {what}; wanted numbers from 0 to T = {total} that never fall")
