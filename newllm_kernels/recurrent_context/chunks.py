"""The full cell in chunks of time that run side by side (multiple shooting), forward and in the adjoint.

T steps are cut into K chunks of C steps. All chunks run at once, as rows of one batch, from guessed starts s_k; then the seams
are mended and what moved runs again, until no start moves by more than the tolerance. Mending hands each chunk's end e_k on
to the next and carries the change of starts through,

    s'_{k+1} = e_k + P_k * (s'_k - s_k),    P_k = product over the chunk of the diagonal of dc_t/dc_{t-1}, clipped at 1,

a scan over the few chunks. Chunk p is exact after p passes whatever the weights; past a bound on passes whatever still moves
runs in order of time. The adjoint is the same problem from the other end, its starts the gradients of the chunks' last
contexts. The T mod K last steps run by themselves.

Shapes as in reference.py; starts, ends and P are (B, K, D), in the order in which time is walked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm_kernels.context_scan import seams
from newllm_kernels.scan import scan

# Of a start's relative change, where nothing else is asked for. 32 bits: a fraction of what outputs may be off by, for changes of
# several passes may add up; 64: what rounding leaves of 64 chunks. 16 bits: on a GPU operands are rounded, so that starts
# ever so close end some 1e-3 (bfloat16) apart, and less could only be reached by as many passes as chunks (docs/numerics.md).
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4, torch.float64: 1e-13}

Run = Callable[[Tensor | None, Tensor], tuple[Tensor, Tensor]]


class Plan(NamedTuple):
    """How a call goes through time."""

    chunks: int  # K; 1: in order of time
    tolerance: float
    passes: int  # the most

    def applies(self, T: int) -> bool:
        return self.chunks > 1 and 2 * self.chunks <= T


def solve(
    run: Run, start: Tensor, guess: Tensor, plan: Plan
) -> tuple[Tensor, tuple[int, float], tuple[int, Tensor] | None]:
    """(ends of all chunks, (passes, mismatch), what is left to do in order of time: (first chunk, its starts (B, D)) or None).

    run(which, starts) computes chunks: `which` are indices into (B, K), flattened, or None for all; it returns their ends and
    P. `start` (B, D) is that of the first chunk, `guess` (B, D) what the others begin with.
    """
    K = plan.chunks
    starts = torch.cat((start[:, None], guess[:, None].expand(-1, K - 1, -1)), dim=1)
    ends, through = (x.unflatten(0, starts.shape[:2]) for x in run(None, starts.flatten(0, 1)))
    for passes in range(1, plan.passes + 1):
        # move_{k+1} = e_k - s_{k+1} + P_k move_k, and the first does not move
        carried = through[:, :-1].clamp(-1, 1)
        move, _ = scan(carried, ends[:, :-1] - starts[:, 1:])
        # Not starts + move, which would round where nothing moves: a chunk after one that rests starts exactly where it ended.
        wanted = ends[:, :-1] + carried * torch.cat((torch.zeros_like(move[:, :1]), move[:, :-1]), dim=1)
        change, size = (wanted - starts[:, 1:]).norm(dim=-1), wanted.norm(dim=-1)
        moved = ~(change <= plan.tolerance * size)  # by NaN too
        which = moved.nonzero()
        mismatch = (change / size.clamp_min(torch.finfo(size.dtype).tiny)).masked_fill(moved, 0.0)
        if len(which) == 0 or passes == plan.passes:
            break
        b, k = which[:, 0], which[:, 1] + 1
        starts[b, k] = wanted[b, k - 1]
        ends[b, k], through[b, k] = run(b * K + k, starts[b, k])
    worst = max(mismatch.flatten().tolist(), default=0.0)
    if len(which) == 0:
        return ends, (passes, worst), None
    first = int(which[:, 1].min())
    return ends, (passes, worst + plan.tolerance), (first + 1, wanted[:, first])


def forward(
    kernel: Callable[..., Any], z: Tensor, c0: Tensor, weights: tuple[Any, ...], save: bool, width: int, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """(c, c_last, pre). kernel(z, c0, *weights, save, decay); `width` is S, that of a row of pre."""
    (B, T, _), D, K = z.shape, c0.shape[1], plan.chunks
    C = T // K
    body = K * C
    c, pre = z.new_empty(B, T, D), z.new_empty((B, T, width) if save else (0,))
    rows = z[:, :body].unflatten(1, (K, C)).flatten(0, 1)
    c_chunks = c[:, :body].unflatten(1, (K, C))
    pre_chunks = pre[:, :body].unflatten(1, (K, C)) if save else None

    def run(which: Tensor | None, starts: Tensor) -> tuple[Tensor, Tensor]:
        count = len(starts)
        more, starts = _padded(which, starts, B * K)
        got, end, got_pre, decay = kernel(rows if more is None else rows[more], starts, *weights, save, True)
        _put(c_chunks, which, got[:count])
        if save:
            _put(pre_chunks, which, got_pre[:count])
        return end[:count], decay[:count]

    ends, (passes, mismatch), rest = solve(run, c0, c0, plan)
    begin, end = (body, ends[:, -1]) if rest is None else (rest[0] * C, rest[1])
    if begin < T:
        c[:, begin:], end, got_pre, _ = kernel(z[:, begin:], end.contiguous(), *weights, save, False)
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
    C = T // K
    body = K * C
    grad_pre, hidden = pre.new_empty(pre.shape), pre.new_empty(B, T, hidden_width)
    grad = c0.new_zeros(B, D) if grad_c_last is None else grad_c_last.to(c0.dtype)
    norm_of_tail = c0.new_zeros(B, 2, D)
    if body < T:
        outside = None if grad_c is None else grad_c[:, body:]
        grad_pre[:, body:], hidden[:, body:], grad, norm_of_tail, _ = kernel(
            outside, grad, pre[:, body:], c[:, body:], c[:, body - 1].to(c0.dtype), *weights, False
        )

    def chunked(x: Tensor) -> Tensor:
        return x[:, :body].unflatten(1, (K, C)).flip(1).flatten(0, 1)  # the last chunk of a row comes first

    inputs = [None if x is None else chunked(x) for x in (grad_c, pre, c)]
    before = torch.cat((c0[:, None], c[:, C - 1 : body - 1 : C].to(c0.dtype)), dim=1).flip(1).flatten(0, 1)
    grad_norm = c0.new_zeros(B, K, 2, D)
    pre_chunks, hidden_chunks = (x[:, :body].unflatten(1, (K, C)) for x in (grad_pre, hidden))

    def run(which: Tensor | None, starts: Tensor) -> tuple[Tensor, Tensor]:
        count = len(starts)
        more, starts = _padded(which, starts, B * K)
        outside, pre_, c_ = (x if x is None or more is None else x[more] for x in inputs)
        start = before if more is None else before[more]
        got, got_hidden, end, got_norm, decay = kernel(outside, starts, pre_, c_, start, *weights, True)
        _put(pre_chunks, which, got[:count], backwards=True)
        _put(hidden_chunks, which, got_hidden[:count], backwards=True)
        _put(grad_norm, which, got_norm[:count])
        return end[:count], decay[:count]

    ends, (passes, mismatch), rest = solve(run, grad, torch.zeros_like(grad), plan)
    end = ends[:, -1]
    if rest is not None:  # chunks `first` and on, which are the earliest of time, in one piece
        first, begin = rest
        stop = (K - first) * C
        outside = None if grad_c is None else grad_c[:, :stop]
        grad_pre[:, :stop], hidden[:, :stop], end, of_rest, _ = kernel(
            outside, begin.contiguous(), pre[:, :stop], c[:, :stop], c0, *weights, False
        )
        grad_norm = torch.cat((grad_norm[:, :first], of_rest[:, None]), dim=1)
    seams.report_known("backward", C, K, passes, mismatch, rest is not None)
    return grad_pre, hidden, end.contiguous(), grad_norm.sum(dim=1) + norm_of_tail


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


def _put(target: Tensor, which: Tensor | None, rows: Tensor, backwards: bool = False) -> None:
    """rows (n, ...) into target (B, K, ...) where `which` says; `backwards` turns the order of the K chunks."""
    B, K = target.shape[:2]
    if which is None:
        rows = rows.unflatten(0, (B, K))
        target.copy_(rows.flip(1) if backwards else rows)
    else:
        k = which % K
        target[which // K, K - 1 - k if backwards else k] = rows
