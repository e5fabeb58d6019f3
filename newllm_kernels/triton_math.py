"""Activations on Triton tiles. EXACT: to float32's last digits; otherwise to some 3e-7, in half the instructions, for tensors
of 16 bits, whose own rounding is a thousand times that."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _inverse(x, EXACT: tl.constexpr):
    """1 / x for x >= 1. A division is some ten instructions; the square of rsqrt is two, and good to 3e-7."""
    if EXACT:
        return 1.0 / x
    else:
        r = tl.rsqrt(x)
        return r * r


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    """e^x by the hardware's 2^x. Its argument x log2(e) is rounded, which costs |x| units in the last place; exact: what
    the rounding lost comes back as a factor."""
    if EXACT:
        LOG2_E: tl.constexpr = 1.4426950408889634
        t = x * LOG2_E
        lost = tl.fma(x, tl.full([], LOG2_E, tl.float32), -t) + x * 1.925963033e-8  # log2(e) beyond float32
        return tl.exp2(t) * (1.0 + tl.where(tl.abs(t) < 1e30, lost, 0.0) * 0.6931471805599453)
    else:
        return tl.exp(x)


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    """Where e^-x overflows, 1 / inf = 0 is right."""
    return _inverse(1.0 + _exp(-x, EXACT), EXACT)


@triton.jit
def sigmoid_slope(x, s, EXACT: tl.constexpr):
    """Of s = sigmoid(x): s^2 e^-x, which keeps its digits where s (1 - s) cancels; past -87 e^-x would overflow."""
    if EXACT:
        return s * s * _exp(-tl.maximum(x, -87.0), EXACT)
    else:
        return s * (1.0 - s)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """(1 - e) / (1 + e) with e = e^-2x; exact: without cancellation near zero, an odd polynomial there."""
    if EXACT:
        x2 = x * x
        small = x * (1.0 + x2 * (-0.333333333 + x2 * (0.133333333 + x2 * (-0.053968254 + x2 * 0.021869488))))
        e = _exp(-2.0 * tl.abs(x), EXACT)
        large = (1.0 - e) / (1.0 + e)
        return tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0, -large, large))
    else:
        e = tl.exp(-2.0 * tl.maximum(x, -15.0, propagate_nan=tl.PropagateNan.ALL))
        return (1.0 - e) * _inverse(1.0 + e, EXACT)


@triton.jit
def gated_write(i, d, EXACT: tl.constexpr):
    """sigmoid(i) tanh(d); with one inverse for both where bits are few."""
    if EXACT:
        return sigmoid(i, EXACT) * tanh(d, EXACT)
    else:
        e = tl.exp(-2.0 * tl.maximum(d, -15.0, propagate_nan=tl.PropagateNan.ALL))
        return (1.0 - e) * _inverse((1.0 + tl.exp(-i)) * (1.0 + e), EXACT)
