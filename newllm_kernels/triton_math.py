"""Activations on Triton tiles. EXACT: to float32's last digits; otherwise to some 3e-7, in half the instructions, for tensors
of 16 bits, whose own rounding is a thousand times that."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from newllm_kernels.triton_support import INTERPRETED

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_REST = tl.constexpr(1.925963033e-8)  # what float32 loses of it
LN_2 = tl.constexpr(0.6931471805599453)

if INTERPRETED:

    @triton.jit
    def _exp2(x):
        return tl.exp2(x)

else:

    @triton.jit
    def _exp2(x):
        """One instruction: results below 1e-38 are zero. tl.exp2 keeps those, for three more."""
        return libdevice.exp2(x)


@triton.jit
def _inverse(x, EXACT: tl.constexpr):
    """1 / x for finite x >= 1 (fast: infinite too). A division is some ten instructions; the square of rsqrt is two, and good
    to 3e-7; exact: and a step of Newton's, two more."""
    r = tl.rsqrt(x)
    r *= r
    if EXACT:
        r *= tl.fma(-x, r, 2.0)
    return r


@triton.jit
def _exp_minus(x, EXACT: tl.constexpr):
    """e^-x by the hardware's 2^x; exact: for |x| <= 87. The argument x log2(e) is rounded, which costs |x| units in the last
    place; exact: what the rounding lost comes back as a factor."""
    t = x * -LOG2_E
    e = _exp2(t)
    if EXACT:
        lost = tl.fma(x, -LOG2_E_REST, tl.fma(x, -LOG2_E, -t))
        e = tl.fma(e * LN_2, lost, e)
    return e


@triton.jit
def _within(x, limit: tl.constexpr):
    """x cut to +-limit; NaN stays."""
    x = tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    """1 / (1 + e^-x). Exact: beyond 87, where e^-x would overflow, its value at 87; fast: 1 / inf = 0."""
    if EXACT:
        x = _within(x, 87.0)
    return _inverse(1.0 + _exp_minus(x, EXACT), EXACT)


@triton.jit
def sigmoid_slope(x, s, EXACT: tl.constexpr):
    """Of s = sigmoid(x): s^2 e^-x, which keeps its digits where s (1 - s) cancels."""
    if EXACT:
        return s * s * _exp_minus(_within(x, 87.0), EXACT)
    else:
        return s * (1.0 - s)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """(1 - e) / (1 + e) with e = e^-2x; exact: without cancellation near zero, an odd polynomial there."""
    if EXACT:
        x2 = x * x
        small = x * (1.0 + x2 * (-0.333333333 + x2 * (0.133333333 + x2 * (-0.053968254 + x2 * 0.021869488))))
        e = _exp_minus(2.0 * _within(x, 15.0), EXACT)
        return tl.where(tl.abs(x) < 0.25, small, (1.0 - e) * _inverse(1.0 + e, EXACT))
    else:
        e = _exp2(tl.maximum(x, -15.0, propagate_nan=tl.PropagateNan.ALL) * (-2.0 * LOG2_E))
        return (1.0 - e) * _inverse(1.0 + e, EXACT)


@triton.jit
def gated_write(i, d, EXACT: tl.constexpr):
    """sigmoid(i) tanh(d); with one inverse for both where bits are few."""
    if EXACT:
        return sigmoid(i, EXACT) * tanh(d, EXACT)
    else:
        e = _exp2(tl.maximum(d, -15.0, propagate_nan=tl.PropagateNan.ALL) * (-2.0 * LOG2_E))
        return (1.0 - e) * _inverse((1.0 + _exp_minus(i, EXACT)) * (1.0 + e), EXACT)
