"""`context_update`: one step of the cell; the small size is what a generation step costs."""

from __future__ import annotations

from typing import Any

import harness
from operations import Case
from peers import Provider


@harness.grid("context_update")
def test_context_update(
    benchmark: Any, recorder: harness.Recorder, case: Case, provider: Provider, direction: str
) -> None:
    harness.measure(benchmark, recorder, case, provider, direction)
