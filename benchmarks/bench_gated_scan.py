"""`gated_scan`: c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(d_t). `--candidates` as for the scan."""

from __future__ import annotations

from typing import Any

import harness
import operations
import peers
import pytest
from operations import Case
from peers import Provider


@harness.grid("gated_scan")
def test_gated_scan(benchmark: Any, recorder: harness.Recorder, case: Case, provider: Provider, direction: str) -> None:
    harness.measure(benchmark, recorder, case, provider, direction)


@harness.grid("gated_scan", peers.candidates(), only=operations.cases("gated_scan", harness.DEVICE)[:2])
def test_gated_scan_candidates(
    benchmark: Any, recorder: harness.Recorder, case: Case, provider: Provider, direction: str, pytestconfig: Any
) -> None:
    reason = peers.skip_candidate(provider, case, pytestconfig.getoption("candidates"))
    if reason is not None:
        pytest.skip(reason)
    harness.measure(benchmark, recorder, case, provider, direction)
