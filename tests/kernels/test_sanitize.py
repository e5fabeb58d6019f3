"""tools/sanitize.py, as far as it can be run where there is no GPU: what it covers and what it calls clean."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cases
import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "sanitize.py"


@pytest.fixture(scope="module")
def sanitize():
    spec = importlib.util.spec_from_file_location("sanitize", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_operation_is_left_out(sanitize):
    assert set(sanitize.OPERATIONS) == cases.TRUTH.keys() | {"decode_linear"}


ITSELF = (
    "========= Error: Race reported between Write access at _forward_narrow+0x6050 in triton.py:72\n"
    "=========     and Write access at _forward_narrow+0x6050 in triton.py:72 [2 hazards]\n========= \n"
)
OTHERS = ITSELF.replace("and Write", "and Read")
CUBLAS = OTHERS.replace("_forward_narrow", "nvjet_tst").replace("triton.py", "x.cu")
UNSET = "========= Uninitialized __global__ memory read of size 2 bytes\n=========     at {}+0x10 in x.cu:1\n"
COUNTED = "========= RACECHECK SUMMARY: {0} hazards displayed ({0} errors, 0 warnings)"


@pytest.mark.parametrize(
    ("returncode", "output", "verdict"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "ok"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "ok"),
        (86, "========= ERROR SUMMARY: 1 error", "1 error"),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", "1 hazard displayed (0 errors, 1 warning)"),
        (86, 2 * ITSELF + COUNTED.format(2), "ok (2 stores of one value by several threads)"),
        (86, ITSELF + OTHERS + COUNTED.format(2), "2 hazards displayed (2 errors, 0 warnings)"),
        (86, ITSELF + CUBLAS + COUNTED.format(2), "ok (1 stores of one value by several threads, 1 within others)"),
        (86, CUBLAS.replace("and Read access at nvjet", "and Read access at newllm") + COUNTED.format(1), "1 hazards displayed (1 errors, 0 warnings)"),
        (86, ITSELF + COUNTED.format(2), "2 hazards displayed (2 errors, 0 warnings)"),  # one was not printed
        (86, 2 * UNSET.format("at::native::add") + "========= ERROR SUMMARY: 2 errors", "ok (2 reads by others)"),
        (86, UNSET.format("newllm::cuda::k") + UNSET.format("gemm") + "========= ERROR SUMMARY: 2 errors", "2 errors"),
        (86, UNSET.format("gemm") + "========= ERROR SUMMARY: 2 errors", "2 errors"),  # one was not printed
        (1, "Traceback\n========= ERROR SUMMARY: 0 errors", "exit code 1"),
        (0, "nothing was checked", "exit code 0, no summary"),
    ],
)  # fmt: skip
def test_only_a_summary_without_errors_is_clean(sanitize, returncode, output, verdict):
    assert sanitize.verdict_of(returncode, output) == verdict


def test_racecheck_has_less_to_do(sanitize):
    everything, less = (sanitize.problems("cuda", "scan", for_racecheck) for for_racecheck in (False, True))
    assert sum(T * D for (_, T, D), _ in less) < 0.5 * sum(T * D for (_, T, D), _ in everything)
    assert {dtype for _, dtype in less} == {"float32", "bfloat16"}
