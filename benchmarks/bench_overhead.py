"""Host overhead: one call so small that the kernel costs nothing: without gradients, recorded, and its backward.

The scale is torch.nn.functional.layer_norm, a C++ operator with a C++ autograd formula. The same inputs are used again and
again: caches are warm, which is what a host's overhead is about. A backward is torch.autograd.grad on one retained graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import operations
import peers
import pytest
import torch
from operations import Case

SMALL = dict.fromkeys(("scan", "gated_scan", "context_scan", "gated_scan_norm"), (1, 2, 16))  # else (2, 16)
# Calls a round, with nothing that waits for a GPU between them. Its queue takes about a thousand launches before the host
# must wait: 100 calls of a few kernels stay below, and it is empty again before every round.
ITERATIONS, ROUNDS = 100, 100
KINDS = {"no_grad": "overhead", "recorded": "overhead, recorded", "backward": "overhead, backward"}


def _calls() -> dict[str, tuple[str, str, Callable[..., Any]]]:
    """Name of a row -> (operation, provider, function)."""
    names = [name for name in operations.TENSORS_MOVED if name != "gated_scan_norm" or operations.FUSED]
    calls = {name: (name, peers.NEWLLM, partial(operations.ours, name)) for name in names}
    return {"torch": ("layer_norm", "eager", peers.layer_norm), **calls}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(_calls()))
def test_overhead(benchmark: Any, recorder: harness.Recorder, name: str, kind: str) -> None:
    operation, provider, function = _calls()[name]
    case = Case(operation, SMALL.get(operation, (2, 16)), torch.float32, harness.DEVICE)
    inputs = operations.make_inputs(case)
    outputs = function(*inputs)
    grads = operations.output_gradients(outputs)
    results = torch.autograd.grad(outputs, inputs, grads, retain_graph=True) if kind == "backward" else outputs
    wanted = operations.truth(case)["backward" if kind == "backward" else "forward"]
    error = operations.relative_error(zip(results, wanted, strict=True))
    assert error <= operations.TOLERANCES[case.dtype], f"no figure for a wrong result: relative error {error:.1e}"

    def calls() -> None:
        for _ in range(ITERATIONS):
            function(*inputs)

    def backwards() -> None:
        for _ in range(ITERATIONS):
            torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    with torch.set_grad_enabled(kind != "no_grad"):
        benchmark.pedantic(backwards if kind == "backward" else calls, setup=_drain, rounds=ROUNDS, warmup_rounds=2)
    if not benchmark.stats:
        return
    row = {
        "op": operation, "provider": provider, "direction": KINDS[kind], "shape": list(case.shape),
        "dtype": case.precision, "device": case.device, "error": error,
    }  # fmt: skip
    recorder.add(benchmark, [seconds / ITERATIONS for seconds in benchmark.stats.stats.data], row)


def _drain() -> None:
    if harness.DEVICE == "cuda":
        torch.cuda.synchronize()
