"""The poison itself: memory that nobody wrote must show, or the other tests prove less than they say."""

from __future__ import annotations

import ctypes

import poison
import pytest
import torch
from cases import DTYPES

import newllm_kernels  # noqa: F401  loads newllm_native

ABSURD = 1e30  # no test computes anything near it; NaN fails the comparison too

needs_poison = pytest.mark.skipif(poison.JUNK_FILL is None, reason="this libc10 has no switch to fill new memory")


def shows(x):
    """Whether unwritten memory cannot be taken for results: at least every other element is NaN or absurd."""
    return (~(x.double().abs() < ABSURD)).double().mean().item() >= 0.4


@needs_poison
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [40, 100_000])  # a block that malloc keeps at hand, and one fresh from the system
def test_rows_that_a_kernel_leaves_out_show(dtype, steps):
    a = torch.zeros(1, steps, 7, dtype=dtype)
    # The Python side refuses boundaries that end before T; the kernel then has nothing to write after them.
    h, _ = torch.ops.newllm_native.scan(a, a, None, False, torch.tensor([0, 2]))
    assert (h[:, :2] == 0).all()
    assert shows(h[:, 2:])


@needs_poison
def test_without_poison_they_would_not():
    if poison.MALLOPT is not None:
        poison.MALLOPT(poison.M_PERTURB, 0)
    poison.JUNK_FILL.value = False
    a = torch.zeros(1, 1_000_000, 7)  # large enough to come fresh, hence zeroed, from the system
    h, _ = torch.ops.newllm_native.scan(a, a, None, False, torch.tensor([0, 2]))
    assert not shows(h)


@pytest.mark.skipif(poison.MALLOPT is None, reason="this C library has no mallopt")
def test_scratch_rows_show():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    block = libc.malloc(4096)  # past the few hundred bytes that malloc recycles without filling
    assert ctypes.string_at(block, 4096) == b"\x7f" * 4096
    libc.free(block)


@pytest.mark.gpu
def test_rows_that_a_cuda_kernel_would_leave_out_show():
    torch.zeros(1, device="cuda")
    for size in (100, 100_000, 10_000_000):
        with poison.poisoned():
            assert shows(torch.empty_strided((size,), (1,), device="cuda"))
