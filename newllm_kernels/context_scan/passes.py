"""How `context_scan` cuts time on a GPU where B alone does not fill it: chunks that run side by side, in passes. Why that works
says triton.py; the kernels of both backends go by these numbers."""

from __future__ import annotations

import torch

PASSES = 4  # the first among them; then in order of time
MOST_CHUNKS = 64
LEAST_CHUNKS = 8  # passes walk a chunk two or three times
LEAST_STEPS = 64  # of a chunk: what it begins with should have faded at its end
# The part of itself by which a start may have moved, squared: less than rounding to the dtype does, and it fades.
TOLERANCE = {torch.float32: 2.5e-13, torch.bfloat16: 1e-6, torch.float16: 1e-8}


def chunks(B: int, T: int, multiprocessors: int) -> tuple[int, int]:
    """(chunks, steps of a chunk): one of all steps where rows fill the GPU or steps are few; else two a multiprocessor."""
    count = min(MOST_CHUNKS, 2 * multiprocessors // max(B, 1), T // LEAST_STEPS)
    if count < LEAST_CHUNKS or B == 0:
        return 1, T
    steps = -(-T // count)
    return -(-T // steps), steps
