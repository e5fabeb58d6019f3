"""Gates, scan and the LayerNorm of what is read: the context mixer's path from pre-activations to normalised contexts."""

from __future__ import annotations

from typing import Any

import harness
from operations import Case
from peers import Provider


@harness.grid("gated_scan_norm")
def test_gated_scan_norm(
    benchmark: Any, recorder: harness.Recorder, case: Case, provider: Provider, direction: str
) -> None:
    harness.measure(benchmark, recorder, case, provider, direction)
