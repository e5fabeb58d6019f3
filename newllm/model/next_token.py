"""What follows the logits in a step of generation, as one kernel instead of ten: draw, check, remember. In Triton.

logits (B, V)   rates (B, V) float32 or None: probabilities, if they are not softmax(logits / temperature)
clocks (B, V) float32 or None: when a clock of rate 1 rings; without, the likeliest token is taken
tokens (B,) int64: in, out   written (BLOCK, B) int64   number (B,) int64, broken (B,) int32: in, out
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MOST = 32768  # columns in work at a time: all of a row's loads are on their way at once


@triton.jit
def _next_token(
    logits, rates, clocks, tokens, written, number, broken, temperature, eos, V, rows,
    RATES: tl.constexpr, CLOCKS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the first column of the highest score. Of softmax only the exponentials matter for that."""
    row = tl.program_id(0)
    at = row.to(tl.int64) * V
    highest = -float("inf")
    if CLOCKS and not RATES:
        for start in range(0, V, BLOCK):
            k = start + tl.arange(0, BLOCK)
            logit = tl.load(logits + at + k, k < V, -float("inf")).to(tl.float32)
            highest = tl.maximum(highest, tl.max(logit, 0))
    best, token, insane = -float("inf"), V, 0
    for start in range(0, V, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < V
        logit = tl.load(logits + at + k, inside, -float("inf"))
        insane = tl.maximum(insane, tl.max(tl.where(logit < float("inf"), 0, 1), 0))  # NaN is not below
        score = logit.to(tl.float32)
        if RATES:
            score = tl.load(rates + at + k, inside, 0.0)
        elif CLOCKS:
            score = tl.exp((score - highest) / temperature)
        if CLOCKS:
            score = tl.where(inside, score / tl.load(clocks + at + k, inside, 1.0), -1.0)
        top = tl.max(score, 0)
        first = tl.min(tl.where(score == top, k, V), 0)
        token = tl.where(top > best, first, tl.minimum(token, tl.where(top == best, first, V)))
        best = tl.maximum(best, top)
    token = tl.minimum(token, V - 1).to(tl.int64)  # of a row of NaN it is any
    token = tl.where(tl.load(tokens + row) == eos, eos, token)
    n = tl.load(number + row)
    tl.store(tokens + row, token)
    tl.store(written + n * rows + row, token)
    tl.store(number + row, (n + 1) % STEPS)
    tl.store(broken + row, tl.load(broken + row) | insane)


def next_token(
    logits: Tensor,
    rates: Tensor | None,
    clocks: Tensor | None,
    temperature: float,
    tokens: Tensor,
    written: Tensor,
    number: Tensor,
    broken: Tensor,
    eos_id: int | None,
) -> None:
    """tokens, and row `number` of `written`: the column whose clock rings first, eos_id where tokens already was that.

    number moves on, modulo the rows of `written`; broken becomes 1 for a row with a logit that is NaN or +inf.
    """
    rows, V = logits.shape
    _next_token[(rows,)](
        logits, logits if rates is None else rates, logits if clocks is None else clocks, tokens, written, number, broken,
        temperature, -1 if eos_id is None else eos_id, V, rows, RATES=rates is not None, CLOCKS=clocks is not None,
        STEPS=written.shape[0], BLOCK=min(triton.next_power_of_2(V), MOST), num_warps=32 if V > 8192 else 8 if V > 1024 else 1,
    )  # fmt: skip
