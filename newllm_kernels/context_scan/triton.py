"""Triton kernels of the cell over a sequence, LayerNorm and clamp in the loop: a program walks the steps of one row, its state in
registers, while the gates of later steps are on their way.

A step needs two sums over the row, one after the other, and takes as long as they do, some half a microsecond; B rows fill B
programs. Where that leaves the GPU idle, time is cut into chunks that run side by side, in passes (multiple shooting,
docs/kernels.md):

    first   every chunk but the last from a guess, for its last state; chunk 0, whose start is known, for good
    again   every chunk from the state that the pass before left before it. A chunk whose start moved by no more than the
            tolerance rests; after the second pass, from which all starts come from a whole chunk before, most do.
    rest    whatever still moves, in order of time, one program a row

The cell forgets its start, so the second pass is usually the last that works; the others look and leave. Nothing waits for
the host: the same launches serve every input and fit into a CUDA graph. Chunk k is exact after pass k + 1 whatever the
weights, and `rest` runs until no seam is left above the tolerance. What comes back through time is linear and decays alike: the
backward goes the same way, counted from the end.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm_kernels.context_scan.passes import MOST_CHUNKS, PASSES, TOLERANCE, chunks
from newllm_kernels.context_scan.seams import report
from newllm_kernels.context_scan.triton_steps import affine, backward_steps, forward_steps
from newllm_kernels.layer_norm.triton import reduce_partials
from newllm_kernels.scan.triton import columns
from newllm_kernels.triton_support import contiguous, kernel, multiprocessors, power_of_two

WHOLE, FIRST, AGAIN, REST = (tl.constexpr(mode) for mode in range(4))


@triton.jit
def _change(new, old):
    """By which part of itself a state has moved, squared; NaN where there is one, which is above every tolerance."""
    moved, size = tl.sum((new - old) * (new - old), axis=0), tl.sum(new * new, axis=0)
    return tl.where(moved == 0.0, 0.0, moved / size)


@triton.jit
def _above(change, tolerance):
    return (change > tolerance) | (change != change)


@triton.jit
def _start(p_ends, i_pass, i_b, i_c, B, chunks, D, o_d, m_d):
    """The state before chunk i_c > 0 as the pass before left it; that after chunk 0 is final since the first."""
    slot = tl.where(i_c == 1, 0, i_pass - 1)
    p_end = p_ends + (((slot * B + i_b) * chunks) + i_c - 1) * D + o_d
    return tl.load(p_end, mask=m_d, other=0.0)


@triton.jit
def _moved_too_far(p_change, i_pass, i_b, i_c, B, chunks, tolerance):
    """Whether the start of chunk i_c moved in the pass before; in pass 1 it came from a guess."""
    change = tl.load(p_change + ((i_pass - 1) * B + i_b) * chunks + i_c, mask=(i_pass > 1) & (i_c > 1), other=0.0)
    return (i_pass == 1) | _above(change, tolerance)


@triton.jit
def _hand_on(p_ends, p_change, i_pass, i_b, i_c, B, chunks, D, o_d, m_d, state):
    """Keeps the state after chunk i_c, and for the next chunk by how much it differs from that of the pass before."""
    i_end = (i_pass * B + i_b) * chunks + i_c
    if i_c < chunks - 1:
        if i_pass > 0:
            old = tl.load(p_ends + (i_end - B * chunks) * D + o_d, mask=m_d, other=0.0)
            tl.store(p_change + i_end + 1, _change(tl.where(m_d, state, 0.0), old))
        tl.store(p_ends + i_end * D + o_d, state, mask=m_d)


@triton.jit
def _keep(p_ends, p_change, i_pass, i_b, i_c, B, chunks, D, o_d, m_d):
    """A chunk that rests leaves what the pass before left."""
    i_end = (i_pass * B + i_b) * chunks + i_c
    if i_c < chunks - 1:
        old = tl.load(p_ends + (i_end - B * chunks) * D + o_d, mask=m_d, other=0.0)
        tl.store(p_change + i_end + 1, 0.0)
        tl.store(p_ends + i_end * D + o_d, old, mask=m_d)


@triton.jit
def _any_moved(p_change, i_b, B, chunks, tolerance, PASSES: tl.constexpr, BC: tl.constexpr):
    """Whether the last pass has moved the start of any chunk of the row."""
    o_c = tl.arange(0, BC)
    change = tl.load(p_change + ((PASSES - 1) * B + i_b) * chunks + o_c, mask=(o_c > 1) & (o_c < chunks), other=0.0)
    return tl.max(_above(change, tolerance).to(tl.int32), axis=0) == 1


@kernel(do_not_specialize=("T", "chunks", "chunk_steps", "i_pass", "B"))
def _forward(
    p_f, p_i, p_d, p_c0, p_weight, p_bias, p_c, p_last, p_ends, p_change, B, T, D, s_fb, s_ft, s_ib, s_it, s_db, s_dt,
    s_c0, chunks, chunk_steps, i_pass, eps, clamp, below, tolerance, MODE: tl.constexpr, PASSES: tl.constexpr,
    BC: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, MARK: tl.constexpr, EXACT: tl.constexpr,
    BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_f, p_i, p_d, p_c = p_f + i_b * s_fb + o_d, p_i + i_b * s_ib + o_d, p_d + i_b * s_db + o_d, p_c + i_b * T * D + o_d
    weight, bias = affine(p_weight, p_bias, o_d, m_d, HAS_WEIGHT, HAS_BIAS, BD)
    if MODE == WHOLE:
        state = tl.load(p_c0 + i_b * s_c0 + o_d, mask=m_d, other=0.0)
        state = forward_steps(
            p_f, p_i, p_d, p_c, i_b * 0, T.to(tl.int64), D, s_ft, s_it, s_dt, m_d, m_d, state, weight, bias, eps,
            clamp, below, MARK, EXACT, STAGES,
        )  # fmt: skip
        tl.store(p_last + i_b * D + o_d, state, mask=m_d)
    elif MODE == FIRST:
        i_c = tl.program_id(1).to(tl.int64)
        begin = i_c * chunk_steps
        state = tl.load(p_c0 + i_b * s_c0 + o_d, mask=m_d, other=0.0)
        state = forward_steps(
            p_f, p_i, p_d, p_c, begin, begin + chunk_steps, D, s_ft, s_it, s_dt, m_d, m_d & (o_d * 0 + i_c == 0),
            state, weight, bias, eps, clamp, below, MARK, EXACT, STAGES,
        )  # fmt: skip
        _hand_on(p_ends, p_change, i_pass, i_b, i_c, B, chunks, D, o_d, m_d, state)
    elif MODE == AGAIN:
        i_c = tl.program_id(1).to(tl.int64) + 1
        if _moved_too_far(p_change, i_pass, i_b, i_c, B, chunks, tolerance):
            begin = i_c * chunk_steps
            state = forward_steps(
                p_f, p_i, p_d, p_c, begin, tl.minimum(begin + chunk_steps, T), D, s_ft, s_it, s_dt, m_d, m_d,
                _start(p_ends, i_pass, i_b, i_c, B, chunks, D, o_d, m_d), weight, bias, eps, clamp, below, MARK,
                EXACT, STAGES,
            )  # fmt: skip
            _hand_on(p_ends, p_change, i_pass, i_b, i_c, B, chunks, D, o_d, m_d, state)
            if i_c == chunks - 1:
                tl.store(p_last + i_b * D + o_d, state, mask=m_d)
        else:
            _keep(p_ends, p_change, i_pass, i_b, i_c, B, chunks, D, o_d, m_d)
    elif _any_moved(p_change, i_b, B, chunks, tolerance, PASSES, BC):
        state = tl.zeros([BD], tl.float32)
        running = i_pass < 0  # the chunk before was computed again, so `state` is new
        for chunk in range(2, chunks):
            i_c = i_b * 0 + chunk
            if running | _moved_too_far(p_change, PASSES, i_b, i_c, B, chunks, tolerance):
                if not running:
                    state = _start(p_ends, PASSES, i_b, i_c, B, chunks, D, o_d, m_d)
                begin = i_c * chunk_steps
                state = forward_steps(
                    p_f, p_i, p_d, p_c, begin, tl.minimum(begin + chunk_steps, T), D, s_ft, s_it, s_dt, m_d, m_d,
                    state, weight, bias, eps, clamp, below, MARK, EXACT, STAGES,
                )  # fmt: skip
                running = i_pass >= 0
                if i_c < chunks - 1:
                    old = tl.load(p_ends + (((PASSES - 1) * B + i_b) * chunks + i_c) * D + o_d, mask=m_d, other=0.0)
                    running = _above(_change(tl.where(m_d, state, 0.0), old), tolerance)
                else:
                    tl.store(p_last + i_b * D + o_d, state, mask=m_d)


@triton.jit
def _store_shares(p_gweight, p_gbias, i_row, D, o_d, m_d, gweight, gbias):
    tl.store(p_gweight + i_row * D + o_d, gweight, mask=m_d)
    tl.store(p_gbias + i_row * D + o_d, gbias, mask=m_d)


@kernel(do_not_specialize=("T", "chunks", "chunk_steps", "i_pass", "B"))
def _backward(
    p_gc, p_glast, p_f, p_i, p_d, p_c, p_c0, p_weight, p_bias, p_gf, p_gi, p_gd, p_gc0, p_gweight, p_gbias, p_ends,
    p_change, B, T, D, s_gcb, s_gct, s_fb, s_ft, s_ib, s_it, s_db, s_dt, s_cb, s_ct, s_c0, s_out, chunks, chunk_steps,
    i_pass, eps, clamp, edge, tolerance, MODE: tl.constexpr, PASSES: tl.constexpr, BC: tl.constexpr,
    HAS_GC: tl.constexpr, HAS_GLAST: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    MARK: tl.constexpr, EXACT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Chunks are counted from the end of time. Each leaves its share of the gradients of weight and bias in a row of its own."""
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_f, p_i, p_d, p_c = p_f + i_b * s_fb + o_d, p_i + i_b * s_ib + o_d, p_d + i_b * s_db + o_d, p_c + i_b * s_cb + o_d
    p_gc += i_b * s_gcb + o_d
    row = i_b * T * s_out + o_d
    p_gf, p_gi, p_gd = p_gf + row, p_gi + row, p_gd + row
    weight, bias = affine(p_weight, p_bias, o_d, m_d, HAS_WEIGHT, HAS_BIAS, BD)
    start = tl.load(p_c0 + i_b * s_c0 + o_d, mask=m_d, other=0.0).to(tl.float32)
    carry = tl.zeros([BD], tl.float32)
    if MODE == WHOLE:
        if HAS_GLAST:
            carry = tl.load(p_glast + i_b * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        carry, gweight, gbias = backward_steps(
            p_gc, p_f, p_i, p_d, p_c, p_gf, p_gi, p_gd, start, i_b * 0, T.to(tl.int64), D, s_gct, s_ft, s_it, s_dt,
            s_ct, s_out, m_d, m_d, carry, weight, bias, eps, clamp, edge, HAS_GC, MARK, EXACT, BD, STAGES,
        )  # fmt: skip
        tl.store(p_gc0 + i_b * D + o_d, carry, mask=m_d)
        _store_shares(p_gweight, p_gbias, i_b, D, o_d, m_d, gweight, gbias)
    elif MODE == FIRST:
        i_c = tl.program_id(1).to(tl.int64)
        end = T - i_c * chunk_steps
        if HAS_GLAST:
            carry = tl.load(p_glast + i_b * D + o_d, mask=m_d & (o_d * 0 + i_c == 0), other=0.0).to(tl.float32)
        m_store = m_d & (o_d * 0 + i_c == 0)
        carry, gweight, gbias = backward_steps(
            p_gc, p_f, p_i, p_d, p_c, p_gf, p_gi, p_gd, start, end - chunk_steps, end, D, s_gct, s_ft, s_it, s_dt,
            s_ct, s_out, m_d, m_store, carry, weight, bias, eps, clamp, edge, HAS_GC, MARK, EXACT, BD, STAGES,
        )  # fmt: skip
        _store_shares(p_gweight, p_gbias, i_b * chunks + i_c, D, o_d, m_store, gweight, gbias)
        _hand_on(p_ends, p_change, i_pass, i_b, i_c, B, chunks, D, o_d, m_d, carry)
    elif MODE == AGAIN:
        i_c = tl.program_id(1).to(tl.int64) + 1
        if _moved_too_far(p_change, i_pass, i_b, i_c, B, chunks, tolerance):
            end = T - i_c * chunk_steps
            carry = _start(p_ends, i_pass, i_b, i_c, B, chunks, D, o_d, m_d)
            carry, gweight, gbias = backward_steps(
                p_gc, p_f, p_i, p_d, p_c, p_gf, p_gi, p_gd, start, tl.maximum(end - chunk_steps, 0), end, D, s_gct,
                s_ft, s_it, s_dt, s_ct, s_out, m_d, m_d, carry, weight, bias, eps, clamp, edge, HAS_GC, MARK, EXACT,
                BD, STAGES,
            )  # fmt: skip
            _store_shares(p_gweight, p_gbias, i_b * chunks + i_c, D, o_d, m_d, gweight, gbias)
            _hand_on(p_ends, p_change, i_pass, i_b, i_c, B, chunks, D, o_d, m_d, carry)
            if i_c == chunks - 1:
                tl.store(p_gc0 + i_b * D + o_d, carry, mask=m_d)
        else:
            _keep(p_ends, p_change, i_pass, i_b, i_c, B, chunks, D, o_d, m_d)
    elif _any_moved(p_change, i_b, B, chunks, tolerance, PASSES, BC):
        running = i_pass < 0
        for chunk in range(2, chunks):
            i_c = i_b * 0 + chunk
            if running | _moved_too_far(p_change, PASSES, i_b, i_c, B, chunks, tolerance):
                if not running:
                    carry = _start(p_ends, PASSES, i_b, i_c, B, chunks, D, o_d, m_d)
                end = T - i_c * chunk_steps
                carry, gweight, gbias = backward_steps(
                    p_gc, p_f, p_i, p_d, p_c, p_gf, p_gi, p_gd, start, tl.maximum(end - chunk_steps, 0), end, D,
                    s_gct, s_ft, s_it, s_dt, s_ct, s_out, m_d, m_d, carry, weight, bias, eps, clamp, edge, HAS_GC,
                    MARK, EXACT, BD, STAGES,
                )  # fmt: skip
                _store_shares(p_gweight, p_gbias, i_b * chunks + i_c, D, o_d, m_d, gweight, gbias)
                running = i_pass >= 0
                if i_c < chunks - 1:
                    old = tl.load(p_ends + (((PASSES - 1) * B + i_b) * chunks + i_c) * D + o_d, mask=m_d, other=0.0)
                    running = _above(_change(tl.where(m_d, carry, 0.0), old), tolerance)
                else:
                    tl.store(p_gc0 + i_b * D + o_d, carry, mask=m_d)


# ---- host side ---------------------------------------------------------------------------------------------------------


@functools.cache
def _edges(dtype: torch.dtype, clamp: float) -> tuple[bool, float, float]:
    """Whether contexts carry a mark of the clamp, the clamp as the dtype holds it, and the next smaller value."""
    if dtype == torch.float32 or clamp == math.inf:
        return False, clamp, clamp
    edge = torch.tensor(clamp, dtype=dtype)
    return True, edge.item(), (edge.view(torch.int16) - 1).view(dtype).item()


class Plan(NamedTuple):
    """How a sequence is cut."""

    chunks: int  # 1: not at all
    steps: int  # of a chunk
    warps: int
    stages: int


def plan(device: torch.device, dtype: torch.dtype, B: int, T: int, D: int, direction: str) -> Plan:
    """Chunks by `passes.chunks`; warps and rows ahead by the width."""
    BD = max(16, power_of_two(D))
    warps = min(16, max(1, BD // 256))
    # Rows on their way: as many as fit beside each other into half a multiprocessor's shared memory.
    stages = max(1, min(4, 98304 // (BD * dtype.itemsize * (3 if direction == "forward" else 6))))
    return Plan(*chunks(B, T, multiprocessors(device)), warps, stages)


def _constants(
    D: int, dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None, p: Plan, mark: bool
) -> dict[str, int | bool]:
    return {
        "PASSES": PASSES, "BC": MOST_CHUNKS, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None,
        "MARK": mark, "EXACT": dtype == torch.float32, "BD": max(16, power_of_two(D)), "STAGES": p.stages,
        "num_warps": p.warps,
    }  # fmt: skip


def _seams(p: Plan, B: int, D: int, like: Tensor, direction: str) -> tuple[Tensor | None, Tensor | None]:
    """States after every chunk and what they moved by, of every pass; reported to whoever records."""
    ends = change = None
    if p.chunks > 1:
        ends = torch.empty((PASSES, B, p.chunks, D), dtype=torch.float32, device=like.device)
        change = torch.empty((PASSES, B, p.chunks), dtype=torch.float32, device=like.device)
    report(direction, p.steps, p.chunks, change, TOLERANCE[like.dtype])
    return ends, change


def _modes(p: Plan, B: int) -> list[tuple[tuple[int, ...], int, int]]:
    """(grid, mode, number of the pass) of all launches."""
    if p.chunks == 1:
        return [((B,), 0, 0)]
    passes = [((B, p.chunks - 1), 1 if number == 0 else 2, number) for number in range(PASSES)]
    return [*passes, ((B,), 3, PASSES)]


def _gate_strides(f: Tensor, i: Tensor, d: Tensor) -> tuple[int, ...]:
    return (*f.stride()[:2], *i.stride()[:2], *d.stride()[:2])


def context_scan(
    f: Tensor,
    i: Tensor | None,
    d: Tensor | None,
    c0: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    clamp: float,
) -> tuple[Tensor, Tensor]:
    """newllm::context_scan"""
    f, i, d = columns(f, i, d)
    weight, bias = contiguous(weight, bias)
    B, T, D = f.shape
    c = torch.empty((B, T, D), dtype=f.dtype, device=f.device)
    last = torch.empty((B, D), dtype=torch.float32, device=f.device)
    p = plan(f.device, f.dtype, B, T, D, "forward")
    ends, change = _seams(p, B, D, f, "forward")
    if B == 0:
        return c, last
    c0 = c0 if c0.stride(1) == 1 else c0.contiguous()
    mark, _, below = _edges(f.dtype, clamp)
    constants = _constants(D, f.dtype, weight, bias, p, mark)
    for grid, mode, number in _modes(p, B):
        _forward[grid](
            f, i, d, c0, weight, bias, c, last, ends, change, B, T, D, *_gate_strides(f, i, d), c0.stride(0), p.chunks,
            p.steps, number, eps, clamp, below, TOLERANCE[f.dtype], MODE=mode, **constants,
        )  # fmt: skip
    return c, last


def context_scan_backward(
    grad_c: Tensor | None,
    grad_c_last: Tensor | None,
    f: Tensor,
    i: Tensor | None,
    d: Tensor | None,
    c: Tensor,
    c0: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    clamp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """newllm::context_scan_backward"""
    packed = i is None or d is None
    first = torch.empty(f.shape, dtype=f.dtype, device=f.device)
    second, third = (first.new_empty(0 if packed else f.shape) for _ in range(2))
    gf, gi, gd = columns(first, None, None) if packed else (first, second, third)
    f, i, d = columns(f, i, d)
    weight, bias = contiguous(weight, bias)
    B, T, D = c.shape
    grad_c0 = torch.empty((B, D), dtype=torch.float32, device=c.device)
    p = plan(f.device, f.dtype, B, T, D, "backward")
    ends, change = _seams(p, B, D, f, "backward")
    if B == 0:
        return first, second, third, grad_c0, *(torch.zeros(D, device=c.device) for _ in range(2))
    c, c0 = (x if x.stride(-1) == 1 else x.contiguous() for x in (c, c0))
    if grad_c is not None and grad_c.stride(2) != 1:
        grad_c = grad_c.contiguous()
    grad_c_last = None if grad_c_last is None else grad_c_last.contiguous()
    mark, edge, _ = _edges(f.dtype, clamp)
    gweight, gbias = torch.empty((2, B * p.chunks, D), dtype=torch.float32, device=c.device)
    gc_strides = (0, 0) if grad_c is None else grad_c.stride()[:2]
    strides = (*gc_strides, *_gate_strides(f, i, d), *c.stride()[:2], c0.stride(0), gf.stride(1))
    constants = _constants(D, f.dtype, weight, bias, p, mark)
    for grid, mode, number in _modes(p, B):
        _backward[grid](
            grad_c if grad_c is not None else c, grad_c_last, f, i, d, c, c0, weight, bias, gf, gi, gd, grad_c0,
            gweight, gbias, ends, change, B, T, D, *strides, p.chunks, p.steps, number, eps, clamp, edge,
            TOLERANCE[f.dtype], MODE=mode, HAS_GC=grad_c is not None, HAS_GLAST=grad_c_last is not None, **constants,
        )  # fmt: skip
    return first, second, third, grad_c0, *reduce_partials(B * p.chunks, gweight, gbias)
