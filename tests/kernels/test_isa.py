"""Every instruction set that the library was compiled for, not only the best one that this processor has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import VARIANTS, check, large_batch, make, variant

from newllm_kernels import native

pytestmark = pytest.mark.skipif(not native.library().ok, reason="the C++ kernels are not built")


def capability(isa):
    """Whether this processor has it, asked of PyTorch and not of the library under test."""
    return isa == "baseline" or isa.upper() in torch.backends.cpu.get_cpu_capability() or (
        isa == "avx2" and "AVX512" in torch.backends.cpu.get_cpu_capability()
    )  # fmt: skip


def python(*arguments, **variables):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=Path(__file__).parent,
        env=os.environ | variables, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_operation_on(isa):
    """This file's checks_of_one_isa, all in one process, as starting one costs seconds. The best set is the one all other
    tests run on."""
    if not capability(isa):
        pytest.skip(f"this processor has no {isa}")
    done = python(__file__, NEWLLM_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-2:] == ["checked", isa]


def test_the_best_one_is_in_use_by_default():
    if "NEWLLM_CPU_ISA" in os.environ:
        pytest.skip("NEWLLM_CPU_ISA caps the choice")
    best = next(isa for isa in ("avx512", "avx2", "baseline") if capability(isa))
    assert native.active_isa() == best


def test_an_unknown_one_is_refused():
    code = "import torch, newllm_kernels as nk; nk.layer_norm(torch.ones(2, 3))"
    done = python("-c", code, NEWLLM_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "NEWLLM_CPU_ISA must be baseline, avx2 or avx512, got sse9" in done.stderr


def checks_of_one_isa():
    """Each way to call each operation, in each dtype, with widths below, at and beside whole vectors of every set (4 to 16
    floats), and one output large enough to be written past the caches. T is short: it only repeats the same code."""
    isa = os.environ["NEWLLM_CPU_ISA"]
    assert native.active_isa() == isa, native.active_isa()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as conftest.py does, and why
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for name in VARIANTS:
            for D in (1, 11, 16, 67):
                # A gradient jumps where the clamp cuts, which the test_clamp tests look at; D=1 leaves LayerNorm nothing.
                unclamped = {"clamp": None} if name.startswith("context") else {}
                check(variant(name, dtype, T=7, D=D, **unclamped))
        check(make("gated_scan_packed", large_batch(50, 1024, dtype), 50, 1024, dtype))
    print("checked", isa)


if __name__ == "__main__":
    import poison

    with poison.poisoned():
        checks_of_one_isa()
