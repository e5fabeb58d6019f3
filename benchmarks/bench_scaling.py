"""Scaling: one sequence, ever longer, in bfloat16. Kernels that are parallel in time keep their rate; one that walks a
sequence in order has D columns to share among a whole GPU, however long it is.

What is checked of results so long says operations.py. On a CPU a short version runs.
"""

from __future__ import annotations

from typing import Any

import harness
import operations
import peers
import pytest
from operations import Case
from peers import Provider

# Compiled formulations are left out: a compilation for every length takes longer than all the rest.
SHOWN = {
    "cpu": (peers.NEWLLM, "eager"),
    "cuda": (peers.NEWLLM, "triton", "fla", "accelerated-scan", "accelerated-scan-triton"),
}[harness.DEVICE]


def _grid(operation: str) -> pytest.MarkDecorator:
    providers = [provider for provider in peers.PROVIDERS[operation] if provider.name in SHOWN]
    return harness.grid(operation, providers, only=operations.scaling_cases(operation, harness.DEVICE))


@_grid("scan")
def test_scan_scaling(
    benchmark: Any, recorder: harness.Recorder, case: Case, provider: Provider, direction: str
) -> None:
    harness.measure(benchmark, recorder, case, provider, direction)


@_grid("gated_scan")
def test_gated_scan_scaling(
    benchmark: Any, recorder: harness.Recorder, case: Case, provider: Provider, direction: str
) -> None:
    harness.measure(benchmark, recorder, case, provider, direction)
