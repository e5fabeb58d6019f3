"""`gated_scan`: c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(d_t)."""

from __future__ import annotations

from typing import Any

import harness
from operations import Case
from peers import Provider


@harness.grid("gated_scan")
def test_gated_scan(benchmark: Any, recorder: harness.Recorder, case: Case, provider: Provider, direction: str) -> None:
    harness.measure(benchmark, recorder, case, provider, direction)
