"""The numerics contract: what is computed in which precision. See docs/numerics.md."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of states, statistics and sums: float32 for 16- and 32-bit tensors, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_acc(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A parameter in the accumulation type of tensors of `dtype`."""
    return None if value is None else value.to(acc_dtype(dtype))
