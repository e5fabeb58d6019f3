"""`context_scan`: the cell over a sequence, LayerNorm and clamp in the loop."""

from __future__ import annotations

from typing import Any

import harness
from operations import Case
from peers import Provider


@harness.grid("context_scan")
def test_context_scan(
    benchmark: Any, recorder: harness.Recorder, case: Case, provider: Provider, direction: str
) -> None:
    harness.measure(benchmark, recorder, case, provider, direction)
