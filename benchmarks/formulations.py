"""Pure-PyTorch formulations of the linear recurrence h_t = a_t h_{t-1} + b_t, for torch.compile to make the best of.

    chunked     time cut in chunks of C steps, all chunks side by side: first what each chunk does to a state (product of
                its decays, end from zero), then the scan of those few, recursively, then a second sweep from the true start
    doubling    Hillis-Steele: log2(T) rounds over the whole tensor
    odd_even    Blelloch's reduction: half the work a level, strided accesses
    associative torch._higher_order_ops.associative_scan; its fast form ("pointwise") exists on GPUs alone

A fifth, cumsum(b / cumprod(a)) * cumprod(a), is left out: the quotient overflows for ordinary decays and T.

All take float32 a, b (B, T, D) and return h (B, T, D). The backward of every one is the same recurrence run the other way
(`Recurrence` below), as somebody who cares would write it: autograd through the graphs above is slower, and saves every intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Scan = Callable[[Tensor, Tensor, bool], Tensor]


def chunked(a: Tensor, b: Tensor, reverse: bool, C: int = 16) -> Tensor:
    B, T, D = a.shape
    chunks = -(-T // C)
    if chunks * C != T and chunks > 1:  # steps that keep the state as it is
        a, b = F.pad(a, (0, 0, 0, chunks * C - T), value=1.0), F.pad(b, (0, 0, 0, chunks * C - T))
    a, b = (x.view(B, chunks, C if chunks > 1 else T, D) for x in (a, b))
    order = range(a.shape[2])[::-1] if reverse else range(a.shape[2])
    if chunks == 1:
        state = torch.zeros_like(b[:, :, 0])
    else:
        state, product = torch.zeros_like(b[:, :, 0]), torch.ones_like(a[:, :, 0])
        for t in order:
            state, product = a[:, :, t] * state + b[:, :, t], product * a[:, :, t]
        state = shifted(chunked(product, state, reverse, C), reverse)
    steps = {}
    for t in order:
        steps[t] = state = a[:, :, t] * state + b[:, :, t]
    return torch.stack([steps[t] for t in sorted(steps)], dim=2).reshape(B, -1, D)[:, :T]


def doubling(a: Tensor, b: Tensor, reverse: bool) -> Tensor:
    if reverse:
        return doubling(a.flip(1), b.flip(1), False).flip(1)
    span = 1
    while span < a.shape[1]:
        b = torch.cat([b[:, :span], b[:, span:] + a[:, span:] * b[:, :-span]], dim=1)
        a = torch.cat([a[:, :span], a[:, span:] * a[:, :-span]], dim=1)
        span *= 2
    return b


def odd_even(a: Tensor, b: Tensor, reverse: bool) -> Tensor:
    if reverse:
        return odd_even(a.flip(1), b.flip(1), False).flip(1)
    T = a.shape[1]
    if T == 1:
        return b
    pairs = T // 2
    a0, b0, a1, b1 = a[:, 0 : 2 * pairs : 2], b[:, 0 : 2 * pairs : 2], a[:, 1::2], b[:, 1::2]
    odd = odd_even(a0 * a1, a1 * b0 + b1, False)
    even = torch.cat([b[:, :1], a[:, 2::2] * odd[:, : (T - 1) // 2] + b[:, 2::2]], dim=1)
    paired = torch.stack([even[:, :pairs], odd], dim=2).flatten(1, 2)
    return torch.cat([paired, even[:, pairs:]], dim=1)


def associative(a: Tensor, b: Tensor, reverse: bool) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    mode = "pointwise" if a.is_cuda else "generic"
    return associative_scan(combine, (a, b), dim=1, reverse=reverse, combine_mode=mode)[1]


CANDIDATES: dict[str, Scan] = {
    "chunked8": partial(chunked, C=8),
    "chunked16": partial(chunked, C=16),
    "chunked32": partial(chunked, C=32),
    "doubling": doubling,
    "odd_even": odd_even,
    "associative": associative,
}
# What "compiled" stands for at every size. On CPUs the chunked ones lead by far and their order is close, so at the headline
# size the rivals are timed too and the report takes the fastest; on a GPU PyTorch's own stands in.
FASTEST = {"cpu": "chunked16", "cuda": "associative"}
RIVALS = {"cpu": ("chunked32",), "cuda": ()}


def shifted(h: Tensor, reverse: bool) -> Tensor:
    """What each step started from: h a step earlier, zero at the start."""
    zero = torch.zeros_like(h[:, :1])
    return torch.cat([h[:, 1:], zero] if reverse else [zero, h[:, :-1]], dim=1)


def _scan_forward(scan: Scan, a: Tensor, b: Tensor) -> Tensor:
    return scan(a.float(), b.float(), False).to(a.dtype)


def _scan_backward(scan: Scan, grad: Tensor, a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    a32, grad32 = a.float(), grad.float()
    handed_on = scan(a32, a32 * grad32, True)  # a_t g_t, which needs no decay of the step after
    g = grad32 + shifted(handed_on, True)
    return (g * shifted(h.float(), False)).to(a.dtype), g.to(a.dtype)


def _gated_forward(scan: Scan, f: Tensor, i: Tensor, d: Tensor) -> Tensor:
    return scan(f.float().sigmoid(), i.float().sigmoid() * d.float().tanh(), False).to(f.dtype)


def _gated_backward(scan: Scan, grad: Tensor, f: Tensor, i: Tensor, d: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    forget, write, delta = f.float().sigmoid(), i.float().sigmoid(), d.float().tanh()
    grad32 = grad.float()
    g = grad32 + shifted(scan(forget, forget * grad32, True), True)
    grads = (
        g * shifted(c.float(), False) * forget * (1 - forget),
        g * delta * write * (1 - write),
        g * write * (1 - delta * delta),
    )
    return tuple(grad.to(f.dtype) for grad in grads)


PASSES = {"scan": (_scan_forward, _scan_backward), "gated_scan": (_gated_forward, _gated_backward)}


class Recurrence(torch.autograd.Function):
    """A compiled forward and a compiled backward, with only inputs and output saved between them."""

    @staticmethod
    def forward(ctx: Any, forward: Callable[..., Tensor], backward: Callable[..., Any], *inputs: Tensor) -> Tensor:
        output = forward(*inputs)
        ctx.backward_pass = backward
        ctx.save_for_backward(*inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.backward_pass(grad, *ctx.saved_tensors)


@cache  # forward and backward are benchmarks of their own, and share one compilation
def compiled(operation: str, candidate: str) -> Callable[..., tuple[Tensor, ...]]:
    """The operation ("scan" or "gated_scan") by one of the candidates, forward and backward compiled for static shapes."""
    forward, backward = (
        torch.compile(partial(f, CANDIDATES[candidate]), fullgraph=True, dynamic=False) for f in PASSES[operation]
    )
    return lambda *inputs: (Recurrence.apply(forward, backward, *inputs),)
