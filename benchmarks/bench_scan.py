"""`scan`: h_t = a_t h_{t-1} + b_t. `--candidates` times every pure-PyTorch formulation at the headline size."""

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


@harness.grid("scan", peers.candidates(), only=operations.cases("scan", harness.DEVICE)[:2])
def test_scan_candidates(
    benchmark: Any, recorder: harness.Recorder, case: Case, provider: Provider, direction: str, pytestconfig: Any
) -> None:
    reason = peers.skip_candidate(provider, case, pytestconfig.getoption("candidates"))
    if reason is not None:
        pytest.skip(reason)
    harness.measure(benchmark, recorder, case, provider, direction)
