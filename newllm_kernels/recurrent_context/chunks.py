"""The full cell in chunks of time that run side by side (multiple shooting), forward and in the adjoint.

T steps are a head of W steps and K chunks of C. The first pass finds a start for every chunk: the W steps before it, read from c0,
all K windows as rows of one batch; the first window is the head itself. Then all chunks run at once; the seams are looked at, and
what does not fit runs again with its start mended, until no seam is open by more than the tolerance. Mending hands each chunk's
end e_k on to the next and carries the change of starts s_k through,

    s'_{k+1} = e_k + P_k * (s'_k - s_k),    P_k = product over the chunk of the diagonal of dc_t/dc_{t-1}, clipped at 1,

a scan over the few chunks. Chunk p is exact after p passes whatever the weights; past a bound on passes whatever still moves
runs in order of time. A cell that has forgotten its start after W steps takes one pass. The adjoint is the same problem from the
other end, its starts the gradients of the chunks' last contexts.

Shapes as in reference.py; starts, ends and P are (B, K, D), in the order in which time is walked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm_kernels.context_scan import seams
from newllm_kernels.scan import scan

# Of a start's relative change, where nothing else is asked for: (forward, adjoint). 32 bits: a fraction of what outputs may be off by,
# for changes of several passes may add up; 64: what rounding leaves of 64 chunks. 16 bits: on a GPU operands are rounded, so that starts
# ever so close end apart, and less could only be reached by as many passes as chunks (docs/numerics.md).
TOLERANCES = {
    torch.float32: (1e-6, 1e-6), torch.bfloat16: (1e-3, 8e-3), torch.float16: (1e-3, 1e-3), torch.float64: (1e-13, 1e-13),
}  # fmt: skip
OF_DTYPE = -1.0  # a tolerance that stands for these

# How the last adjoints by a plan went, for who decides about the next call and is not there when they run: (T, D, plan) ->
# (passes, whether the rest went in order of time).
adjoints: OrderedDict[tuple[int, int, Plan], tuple[int, bool]] = OrderedDict()
MOST_ADJOINTS = 64

Run = Callable[[Tensor | None, Tensor], tuple[Tensor, Tensor]]


class Plan(NamedTuple):
    """How a call goes through time."""

    chunks: int  # K; 1: in order of time
    tolerance: float
    passes: int  # the most
    warm_up: int = 0  # steps that a chunk's first start is read from

    def of(self, dtype: torch.dtype, adjoint: bool) -> Plan:
        return self._replace(tolerance=TOLERANCES[dtype][adjoint]) if self.tolerance == OF_DTYPE else self

    def applies(self, T: int) -> bool:
        return self.chunks > 1 and 2 * self.chunks + self.warm_up <= T

    def steps(self, T: int) -> tuple[int, int]:
        """(W, C). What does not divide into chunks is warmed up with."""
        C = (T - self.warm_up) // self.chunks
        return T - self.chunks * C, C


def solve(run: Run, starts: Tensor, plan: Plan) -> tuple[Tensor, tuple[int, float], tuple[int, Tensor] | None]:
    """(ends of all chunks, (passes, mismatch), what is left to do in order of time: (first chunk, its starts (B, D)) or None).

    run(which, starts) computes chunks: `which` are indices into (B, K), flattened, or None for all; it returns their ends and
    P. `starts` (B, K, D): the first is right, the others are guessed.
    """
    ends, through = (x.unflatten(0, starts.shape[:2]) for x in run(None, starts.flatten(0, 1)))
    for passes in range(1, plan.passes + 1):
        gap = torch.stack((ends[:, :-1] - starts[:, 1:], ends[:, :-1])).norm(dim=-1).cpu()  # asks the GPU once
        if (gap[0] <= plan.tolerance * gap[1]).all():
            return ends, (passes, _worst(gap[0], gap[1])), None
        # move_{k+1} = e_k - s_{k+1} + P_k move_k, and the first does not move
        carried = through[:, :-1].clamp(-1, 1)
        move, _ = scan(carried, ends[:, :-1] - starts[:, 1:])
        # Not starts + move, which would round where nothing moves: a chunk after one that rests starts exactly where it ended.
        wanted = ends[:, :-1] + carried * torch.cat((torch.zeros_like(move[:, :1]), move[:, :-1]), dim=1)
        change, size = (wanted - starts[:, 1:]).norm(dim=-1), wanted.norm(dim=-1)
        moved = ~(change <= plan.tolerance * size)  # by NaN too
        which = moved.nonzero()
        if len(which) == 0 or passes == plan.passes:
            break
        b, k = which[:, 0], which[:, 1] + 1
        starts[b, k] = wanted[b, k - 1]
        ends[b, k], through[b, k] = run(b * starts.shape[1] + k, starts[b, k])
    worst = _worst(change.masked_fill(moved, 0.0), size)
    if len(which) == 0:
        return ends, (passes, worst), None
    first = int(which[:, 1].min())
    return ends, (passes, worst + plan.tolerance), (first + 1, wanted[:, first])


def _worst(change: Tensor, size: Tensor) -> float:
    return (change / size.clamp_min(torch.finfo(size.dtype).tiny)).max().item()


def _windows(x: Tensor, first: int, length: int, step: int, count: int) -> Tensor:
    """x (B, T, N) -> (B * count, length, N): pieces that begin at first, first + step, ... and may overlap. Of one row no copy."""
    whole = x[:, first : first + step * (count - 1) + length]
    return whole.unfold(1, length, step).movedim(-1, 2).flatten(0, 1)


def forward(
    kernel: Callable[..., Any], z: Tensor, c0: Tensor, weights: tuple[Any, ...], save: bool, width: int, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """(c, c_last, pre). kernel(z, c0, *weights, save, decay); `width` is S, that of a row of pre."""
    (B, T, _), D, K = z.shape, c0.shape[1], plan.chunks
    W, C = plan.steps(T)
    plan = plan.of(z.dtype, adjoint=False)
    c, pre = z.new_empty(B, T, D), z.new_empty((B, T, width) if save else (0,))
    starts = c0[:, None].expand(-1, K, -1)
    if W:
        windows, from_c0 = _windows(z, 0, W, C, K), starts.flatten(0, 1)
        got, ends, got_pre, _ = kernel(windows, from_c0, *weights, save, False)
        c[:, :W], starts = got[::K], ends.unflatten(0, (B, K)).contiguous()
        if save:
            pre[:, :W] = got_pre[::K]
    rows = _windows(z, W, C, C, K)
    c_chunks = c[:, W:].unflatten(1, (K, C))
    pre_chunks = pre[:, W:].unflatten(1, (K, C)) if save else None

    def run(which: Tensor | None, starts: Tensor) -> tuple[Tensor, Tensor]:
        count = len(starts)
        more, starts = _padded(which, starts, B * K)
        got, end, got_pre, decay = kernel(rows if more is None else rows[more], starts, *weights, save, True)
        _put(c_chunks, which, got[:count])
        if save:
            _put(pre_chunks, which, got_pre[:count])
        return end[:count], decay[:count]

    ends, (passes, mismatch), rest = solve(run, starts.contiguous(), plan)
    end = ends[:, -1]
    if rest is not None:
        begin = W + rest[0] * C
        c[:, begin:], end, got_pre, _ = kernel(z[:, begin:], rest[1].contiguous(), *weights, save, False)
        if save:
            pre[:, begin:] = got_pre
    seams.report_known("forward", C, K, passes, mismatch, rest is not None)
    return c, end.contiguous(), pre


def backward(
    kernel: Callable[..., Any],
    grad_c: Tensor | None,
    grad_c_last: Tensor | None,
    pre: Tensor,
    c: Tensor,
    c0: Tensor,
    weights: tuple[Any, ...],
    hidden_width: int,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_pre, hidden, grad_c0, grad_norm (B, 2, D)). kernel(grad_c, grad_c_last, pre, c, c0, *weights, decay)."""
    (B, T, D), K = c.shape, plan.chunks
    W, C = plan.steps(T)
    plan = plan.of(c.dtype, adjoint=True)
    body = K * C
    grad_pre, hidden = pre.new_empty(pre.shape), pre.new_empty(B, T, hidden_width)
    grad = c0.new_zeros(B, D) if grad_c_last is None else grad_c_last.to(c0.dtype)
    grad_norm, norm_of_head = c0.new_zeros(B, K, 2, D), c0.new_zeros(B, 2, D)
    before = torch.cat((c0[:, None], c[:, C - 1 : T - 1 : C].to(c0.dtype)), dim=1)  # contexts before step k C

    def window(x: Tensor | None, first: int, length: int) -> Tensor | None:
        return None if x is None else _windows(x, first, length, C, K)

    def turned(x: Tensor) -> Tensor:
        """Between the order of the walk and that of time, in which rows of kernels lie, so that what is large need not move."""
        return x.unflatten(0, (B, K)).flip(1).flatten(0, 1)

    starts = torch.cat((grad[:, None], torch.zeros_like(grad)[:, None].expand(-1, K - 1, -1)), dim=1)
    if W:
        outside, pre_, c_ = (window(x, C, W) for x in (grad_c, pre, c))
        at = before[:, 1 : K + 1].flatten(0, 1)
        got, got_hidden, ends, got_norm, _ = kernel(
            outside, starts.flip(1).flatten(0, 1), pre_, c_, at, *weights, False
        )
        last = slice(K - 1, None, K)
        grad_pre[:, body:], hidden[:, body:], norm_of_head = got[last], got_hidden[last], got_norm[last]
        starts = ends.unflatten(0, (B, K)).flip(1)
    inputs = [window(x, 0, C) for x in (grad_c, pre, c)]
    first_contexts = before[:, :K].flatten(0, 1)
    pre_chunks, hidden_chunks = (x[:, :body].unflatten(1, (K, C)) for x in (grad_pre, hidden))

    def run(which: Tensor | None, starts: Tensor) -> tuple[Tensor, Tensor]:
        count = len(starts)
        starts, which = (turned(starts), None) if which is None else (starts, which + K - 1 - 2 * (which % K))
        more, starts = _padded(which, starts, B * K)
        outside, pre_, c_ = (x if x is None or more is None else x[more] for x in inputs)
        start = first_contexts if more is None else first_contexts[more]
        got, got_hidden, end, got_norm, decay = kernel(outside, starts, pre_, c_, start, *weights, True)
        _put(pre_chunks, which, got[:count])
        _put(hidden_chunks, which, got_hidden[:count])
        _put(grad_norm, which, got_norm[:count])
        return (turned(end), turned(decay)) if which is None else (end[:count], decay[:count])

    ends, (passes, mismatch), rest = solve(run, starts, plan)
    end = ends[:, -1]
    if rest is not None:  # chunks `first` and on, which are the earliest of time, in one piece
        first, begin = rest
        stop = (K - first) * C
        outside = None if grad_c is None else grad_c[:, :stop]
        grad_pre[:, :stop], hidden[:, :stop], end, of_rest, _ = kernel(
            outside, begin.contiguous(), pre[:, :stop], c[:, :stop], c0, *weights, False
        )
        grad_norm = torch.cat((of_rest[:, None], grad_norm[:, K - first :]), dim=1)
    seams.report_known("backward", C, K, passes, mismatch, rest is not None)
    adjoints[T, D, plan._replace(tolerance=0.0)] = passes, rest is not None
    if len(adjoints) > MOST_ADJOINTS:
        adjoints.popitem(last=False)
    return grad_pre, hidden, end.contiguous(), grad_norm.sum(dim=1) + norm_of_head


def _padded(which: Tensor | None, starts: Tensor, whole: int) -> tuple[Tensor | None, Tensor]:
    """On a GPU: chunks to compute again and their starts (n, D), some of them several times, so that there are `whole` or a half, a
    quarter ... of it. Rows beside others cost little there, and a new number of them a CUDA graph of its own (replay.py)."""
    count = len(starts)
    size = whole
    while size % 2 == 0 and size // 2 >= count:
        size //= 2
    if which is None or not starts.is_cuda or size == count:
        return which, starts
    again = torch.arange(size, device=starts.device) % count
    return which[again], starts[again]


def _put(target: Tensor, which: Tensor | None, rows: Tensor) -> None:
    """rows (n, ...) into target (B, K, ...) where `which` says."""
    B, K = target.shape[:2]
    if which is None:
        target.copy_(rows.unflatten(0, (B, K)))
    else:
        target[which // K, which % K] = rows
