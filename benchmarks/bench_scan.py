"""`scan`: h_t = a_t h_{t-1} + b_t. `--candidates` times every pure-PyTorch formulation on the headline size."""

from __future__ import annotations

from typing import Any

import harness
import operations
import peers
import pytest
from operations import Case
from peers import Provider


@harness.grid("scan")
def test_scan(benchmark: Any, recorder: harness.Recorder, case: Case, provider: Provider, direction: str) -> None:
    harness.measure(benchmark, recorder, case, provider, direction)


@harness.grid("scan", peers.candidates(), only=operations.cases("scan", harness.DEVICE)[:1])
def test_candidates(
    benchmark: Any, recorder: harness.Recorder, case: Case, provider: Provider, direction: str, request: Any
) -> None:
    if not request.config.getoption("candidates"):
        pytest.skip("asked for with --candidates")
    harness.measure(benchmark, recorder, case, provider, direction)
