"""Host overhead: one call so small that the kernel costs nothing, without and with gradients recorded.

The scale is torch.nn.functional.layer_norm, a C++ operator with a C++ autograd formula. The same inputs are used again and
again: caches are warm, which is what a host's overhead is about.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import harness
import operations
import peers
import pytest
import torch
from operations import Case

SMALL = {"scan": (1, 2, 16), "gated_scan": (1, 2, 16), "context_scan": (1, 2, 16)}  # else (2, 16)
ITERATIONS, ROUNDS = 500, 20


def _calls() -> dict[str, tuple[str, str, Callable[..., Any]]]:
    """Name of a row -> (operation, provider, function)."""
    calls = {name: (name, peers.NEWLLM, partial(operations.ours, name)) for name in operations.TENSORS_MOVED}
    return {"torch": ("layer_norm", "eager", peers.layer_norm), **calls}


@pytest.mark.parametrize("recording", [False, True], ids=["no_grad", "recorded"])
@pytest.mark.parametrize("name", list(_calls()))
def test_overhead(benchmark: Any, recorder: harness.Recorder, name: str, recording: bool) -> None:
    operation, provider, function = _calls()[name]
    case = Case(operation, SMALL.get(operation, (2, 16)), torch.float32, harness.DEVICE)
    inputs = operations.make_inputs(case)
    error = operations.relative_error(zip(function(*inputs), operations.truth(case)["forward"], strict=True))
    assert error <= operations.TOLERANCES[case.dtype], f"no figure for a wrong result: relative error {error:.1e}"

    def many() -> None:
        for _ in range(ITERATIONS):
            function(*inputs)

    with nullcontext() if recording else torch.no_grad():
        # A GPU's queue takes about a thousand launches before the host must wait: empty before every round, it never fills.
        benchmark.pedantic(many, setup=_drain, rounds=ROUNDS, warmup_rounds=1)
    if not benchmark.stats:
        return
    row = {
        "op": operation, "provider": provider, "direction": "overhead, recorded" if recording else "overhead",
        "shape": list(case.shape), "dtype": case.precision, "device": case.device, "error": error,
    }  # fmt: skip
    recorder.add(benchmark, [seconds / ITERATIONS for seconds in benchmark.stats.stats.data], row)


def _drain() -> None:
    if harness.DEVICE == "cuda":
        torch.cuda.synchronize()
