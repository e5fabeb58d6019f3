"""`layer_norm` against torch.nn.functional.layer_norm, and `add_layer_norm` against the sum and the norm apart."""

from __future__ import annotations

from typing import Any

import harness
from operations import Case
from peers import Provider


@harness.grid("layer_norm")
def test_layer_norm(benchmark: Any, recorder: harness.Recorder, case: Case, provider: Provider, direction: str) -> None:
    harness.measure(benchmark, recorder, case, provider, direction)


@harness.grid("add_layer_norm")
def test_add_layer_norm(
    benchmark: Any, recorder: harness.Recorder, case: Case, provider: Provider, direction: str
) -> None:
    harness.measure(benchmark, recorder, case, provider, direction)
