"""Triton kernels of the recurrences `scan` and `gated_scan`, forward and backward.

    stream      one program walks a whole sequence tile by tile, its state in registers: few bytes, no waiting, but only
                N * D / BD programs
    chunks      time is cut into chunks that run in parallel, in three launches (triton_chunks.py)
    look-back   the same in one launch (triton_look_back.py)

All are made of the tiles of triton_tiles.py, which also explains the names.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from newllm_kernels.scan.triton_chunks import backward_pairs, chunk_starts, forward_pairs, piece
from newllm_kernels.scan.triton_look_back import GROUP, backward_look_back, forward_look_back
from newllm_kernels.scan.triton_plan import MOST_CHUNKS, Plan, chosen, chunks_of
from newllm_kernels.scan.triton_tiles import (
    backward_tile,
    carry_through,
    forward_tile,
    norm_gradient,
    rows_left,
    scan_groups,
    scan_groups_exclusive,
    state_of,
    states_before,
    store,
    store_columns,
    store_gradients,
    tile_rows,
    tile_times,
)
from newllm_kernels.triton_support import cdiv, kernel, power_of_two


@kernel(do_not_specialize=("T", "chunks", "chunk_steps"))
def _forward_stream(
    p_a, p_b, p_c, p_h0, p_h, p_last, p_cu, T, D, s_ab, s_at, s_bb, s_bt, s_cb, s_ct, d_blocks, chunks, chunk_steps,
    GATED: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr, HAS_H0: tl.constexpr,
    HAS_CU: tl.constexpr, CHUNKED: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    i_p = (tl.program_id(0) // d_blocks).to(tl.int64)
    o_d = (tl.program_id(0) % d_blocks) * BD + tl.arange(0, BD)
    m_d = o_d < D
    i_n, i_c, first, steps, L, begin, i_b = piece(p_cu, i_p, T, chunks, chunk_steps, HAS_CU, CHUNKED)
    state = state_of(p_h0, i_p, D, o_d, m_d, HAS_H0, BD)
    p_a, p_b, p_c, p_h = p_a + i_b * s_ab, p_b + i_b * s_bb, p_c + i_b * s_cb, p_h + i_b * T * D
    rows = tile_rows(R, G)
    o_t = tile_times(rows, REVERSE, WIDE)
    for start in tl.range(0, steps, R * G, num_stages=STAGES):
        t = begin + (L - 1 - first - start if REVERSE else first + start)
        m_t = rows < rows_left(start, steps)
        b_a, b_b = forward_tile(p_a, p_b, p_c, s_at, s_bt, s_ct, t, o_t, m_t, o_d, m_d, GATED, EXACT, EVEN, R, G, BD)
        b_a, b_h, g_a, g_h = scan_groups(b_a, b_b, R)
        before, state = carry_through(g_a, g_h, state, G)
        store(p_h, D, t, o_t, m_t, o_d, m_d, b_h + b_a * before, EVEN, R, G, BD)
    if i_c == chunks - 1:
        store_columns(p_last + i_n * D, o_d, m_d, state, BD)


@kernel(do_not_specialize=("T", "chunks", "chunk_steps"))
def _backward_stream(
    p_gh, p_glast, p_a, p_b, p_c, p_h, p_h0, p_ga, p_gb, p_gc, p_gh0, p_cu, p_gy, p_mean, p_rstd, p_mean_g, p_mean_gx,
    p_weight, p_bias, T, D, s_ghb, s_ght, s_ab, s_at, s_bb, s_bt, s_cb, s_ct, s_hb, s_ht, s_gt, d_blocks, chunks,
    chunk_steps, clamp, NORMED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_CLAMP: tl.constexpr, GATED: tl.constexpr, REVERSE: tl.constexpr,
    EXACT: tl.constexpr, EVEN: tl.constexpr, HAS_GH: tl.constexpr, HAS_GLAST: tl.constexpr, HAS_H0: tl.constexpr,
    HAS_CU: tl.constexpr, CHUNKED: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """p_glast holds the gradient of the state after the sequence, or after each chunk, counted from the end. NORMED: to
    grad_h comes what LayerNorm of h hands back, from grad_y and two sums a row (gated_scan_layer_norm/triton.py)."""
    i_p = (tl.program_id(0) // d_blocks).to(tl.int64)
    o_d = (tl.program_id(0) % d_blocks) * BD + tl.arange(0, BD)
    m_d = o_d < D
    i_n, i_c, first, steps, L, begin, i_b = piece(p_cu, i_p, T, chunks, chunk_steps, HAS_CU, CHUNKED)
    state = state_of(p_glast, i_p, D, o_d, m_d, HAS_GLAST, BD)
    start_state = state_of(p_h0, i_n, D, o_d, m_d, HAS_H0, BD)
    p_gh, p_h = p_gh + i_b * s_ghb, p_h + i_b * s_hb
    p_a, p_b, p_c = p_a + i_b * s_ab, p_b + i_b * s_bb, p_c + i_b * s_cb
    p_ga, p_gb, p_gc = p_ga + i_b * T * s_gt, p_gb + i_b * T * s_gt, p_gc + i_b * T * s_gt
    weight, bias = tl.full([1, 1, BD], 1.0, tl.float32), tl.zeros([1, 1, BD], tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, None, :]
    if HAS_BIAS:
        bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, None, :]
    rows = tile_rows(R, G)
    o_t = tile_times(rows, not REVERSE, WIDE)
    for start in tl.range(0, steps, R * G, num_stages=STAGES):
        t = begin + (first + start if REVERSE else L - 1 - first - start)
        t_before = t + 1 if REVERSE else t - 1
        m_t = rows < rows_left(start, steps)
        b_a, b_slope, b_g = backward_tile(
            p_gh, p_a, s_ght, s_at, t, o_t, m_t, o_d, m_d, GATED, HAS_GH, EXACT, EVEN, R, G, BD
        )
        if NORMED:
            b_g += norm_gradient(
                p_gy + i_b * T * D, p_h, p_mean + i_b * T, p_rstd + i_b * T, p_mean_g + i_b * T, p_mean_gx + i_b * T,
                D, s_ht, t, o_t, m_t, o_d, m_d, weight, bias, clamp, HAS_CLAMP, EVEN, R, G, BD,
            )  # fmt: skip
        x_a, x_v, g_a, g_v = scan_groups_exclusive(b_a, b_a * b_g, R)
        before, state = carry_through(g_a, g_v, state, G)
        b_g += x_v + x_a * before
        b_h = states_before(
            p_h, s_ht, t_before, o_t, rows, rows_left(first + start, L), o_d, m_d, start_state, HAS_H0, R, G, BD
        )
        store_gradients(
            p_b,
            p_c,
            p_ga,
            p_gb,
            p_gc,
            s_bt,
            s_ct,
            s_gt,
            t,
            o_t,
            m_t,
            o_d,
            m_d,
            b_slope,
            b_h,
            b_g,
            GATED,
            EXACT,
            EVEN,
            R,
            G,
            BD,
        )
    if i_c == chunks - 1:
        store_columns(p_gh0 + i_n * D, o_d, m_d, state, BD)


# ---- host side ---------------------------------------------------------------------------------------------------------


class NormGradient(NamedTuple):
    """What the backward of LayerNorm on the states needs: grad_y (B, T, D) contiguous; of every row the mean and 1/std of
    the states, and of g = grad_y * weight mean(g) and mean(g xhat); weight and bias (D,); the clamp of y."""

    grad_y: Tensor
    mean: Tensor
    rstd: Tensor
    mean_g: Tensor
    mean_gx: Tensor
    weight: Tensor | None
    bias: Tensor | None
    clamp: float


def _workspace(x: Tensor, N: int, D: int, chunks: int) -> tuple[Tensor, Tensor]:
    """Of a look-back: the ticket counter, and the words of all groups of chunks; nothing (-1) in all of them."""
    words = 2 * N * cdiv(chunks, GROUP.value) * GROUP.value * D
    ticket = torch.full((4 + words,), -1, dtype=torch.int32, device=x.device)
    return ticket, ticket[4:]  # aligned to 16 bytes


def columns(f: Tensor, i: Tensor | None, d: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The gates as three tensors with contiguous rows; views where they are packed."""
    if i is None or d is None:
        f = f if f.stride(-1) == 1 else f.contiguous()
        D = f.shape[2] // 3
        return f[..., :D], f[..., D : 2 * D], f[..., 2 * D :]
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (f, i, d))


def _starts(pairs: Tensor, state: Tensor | None, programs: int, d_blocks: int, p: Plan) -> Tensor:
    """The state before every chunk, (N, chunks, D)."""
    N, chunks, _, D = pairs.shape
    starts = torch.empty((N, chunks, D), dtype=torch.float32, device=pairs.device)
    chunk_starts[(programs,)](
        pairs,
        state,
        starts,
        D,
        d_blocks,
        chunks,
        HAS_STATE=state is not None,
        BC=power_of_two(min(MOST_CHUNKS, max(16, p.chunks))),
        BD=p.BD,
        num_warps=4,
    )
    return starts


def run_forward(
    a: Tensor, b: Tensor, c: Tensor, h0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None, operation: str
) -> tuple[Tensor, Tensor]:
    """(h, h_last) of h_t = a_t h_{t-1} + b_t; gated_scan: a, b, c are f, i, d."""
    B, T, D = a.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h = torch.empty((B, T, D), dtype=a.dtype, device=a.device)
    h_last = torch.empty((N, D), dtype=torch.float32, device=a.device)
    if N == 0:
        return h, h_last
    h0 = None if h0 is None else h0.contiguous()
    run = functools.partial(_launch_forward, a, b, c, h0, h, h_last, reverse, cu_seqlens, operation)
    run(chosen(a, N, T, D, cu_seqlens is not None, operation, "forward", run))
    return h, h_last


def _launch_forward(a, b, c, h0, h, h_last, reverse, cu_seqlens, operation, p: Plan) -> None:
    (_, T, D), N = a.shape, h_last.shape[0]
    chunks, chunk_steps, even = chunks_of(p, T, D)
    strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(1), c.stride(0), c.stride(1))
    d_blocks = cdiv(D, p.BD)
    programs = N * d_blocks
    fixed = {
        "GATED": operation == "gated_scan", "REVERSE": reverse, "EXACT": a.dtype == torch.float32,
        "EVEN": even and cu_seqlens is None, "WIDE": _wide(p, D, strides), "R": p.R, "G": p.G, "BD": p.BD,
        "num_warps": p.warps,
    }  # fmt: skip
    has_h0 = h0 is not None
    if p.way == "look-back":
        ticket, words = _workspace(a, N, D, chunks)
        forward_look_back[(programs * chunks,)](
            a, b, c, h0, h, h_last, ticket, words, T, D, *strides, d_blocks, chunks, programs,
            HAS_H0=has_h0, **fixed,
        )  # fmt: skip
        return
    if p.way == "chunks":
        pairs = torch.empty((N, chunks, 2, D), dtype=torch.float32, device=a.device)
        forward_pairs[(programs * chunks,)](
            a, b, c, pairs, T, D, *strides, d_blocks, chunks, chunk_steps, STAGES=p.stages, **fixed
        )
        h0, has_h0 = _starts(pairs, h0, programs, d_blocks, p), True
    _forward_stream[(programs * chunks,)](
        a, b, c, h0, h, h_last, cu_seqlens, T, D, *strides, d_blocks, chunks, chunk_steps, HAS_H0=has_h0,
        HAS_CU=cu_seqlens is not None, CHUNKED=p.way == "chunks", STAGES=p.stages, **fixed,
    )  # fmt: skip


def run_backward(
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    h: Tensor,
    h0: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    operation: str,
    norm: NormGradient | None = None,
) -> Tensor:
    """Fills `grads` (of a, b, and gated of c; rows of one stride) and returns grad_h0 (N, D). `norm`: only where the plan is
    a stream."""
    B, T, D = h.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grad_h0 = torch.empty((N, D), dtype=torch.float32, device=h.device)
    if N == 0:
        return grad_h0
    if grad_h is not None and grad_h.stride(2) != 1:
        grad_h = grad_h.contiguous()
    h = h if h.stride(2) == 1 else h.contiguous()
    h0, grad_last = (None if x is None else x.contiguous() for x in (h0, grad_last))
    run = functools.partial(
        _launch_backward, grad_h, grad_last, a, b, c, h, h0, reverse, cu_seqlens, grads, grad_h0, operation, norm
    )
    kind = operation if norm is None else "gated_scan_layer_norm"
    run(chosen(a, N, T, D, cu_seqlens is not None, kind, "backward", run))
    return grad_h0


def _launch_backward(
    grad_h, grad_last, a, b, c, h, h0, reverse, cu_seqlens, grads, grad_h0, operation, norm, p: Plan
) -> None:
    (_, T, D), N = h.shape, grad_h0.shape[0]
    chunks, chunk_steps, even = chunks_of(p, T, D)
    of_gh = (0, 0) if grad_h is None else (grad_h.stride(0), grad_h.stride(1))
    of_a = (a.stride(0), a.stride(1))
    strides = (
        *of_gh, *of_a, b.stride(0), b.stride(1), c.stride(0), c.stride(1), h.stride(0), h.stride(1), grads[0].stride(1)
    )  # fmt: skip
    d_blocks = cdiv(D, p.BD)
    programs = N * d_blocks
    fixed = {
        "GATED": operation == "gated_scan", "REVERSE": reverse, "EXACT": a.dtype == torch.float32,
        "EVEN": even and cu_seqlens is None, "HAS_GH": grad_h is not None, "WIDE": _wide(p, D, strides), "R": p.R,
        "G": p.G, "BD": p.BD, "num_warps": p.warps,
    }  # fmt: skip
    has_last, has_h0 = grad_last is not None, h0 is not None
    grad_h = h if grad_h is None else grad_h  # a pointer that is not read
    if p.way == "look-back":
        ticket, words = _workspace(a, N, D, chunks)
        backward_look_back[(programs * chunks,)](
            grad_h, grad_last, a, b, c, h, h0, *grads, grad_h0, ticket, words, T, D, *strides, d_blocks,
            chunks, programs, HAS_GLAST=has_last, HAS_H0=has_h0, **fixed,
        )  # fmt: skip
        return
    if p.way == "chunks":
        pairs = torch.empty((N, chunks, 2, D), dtype=torch.float32, device=a.device)
        backward_pairs[(programs * chunks,)](
            grad_h, a, pairs, T, D, *of_gh, *of_a, d_blocks, chunks, chunk_steps, STAGES=p.stages, **fixed
        )
        grad_last, has_last = _starts(pairs, grad_last, programs, d_blocks, p), True
    *of_norm, clamp = (None,) * 7 + (math.inf,) if norm is None else norm
    _backward_stream[(programs * chunks,)](
        grad_h, grad_last, a, b, c, h, h0, *grads, grad_h0, cu_seqlens, *of_norm, T, D, *strides, d_blocks, chunks,
        chunk_steps, clamp, NORMED=norm is not None, HAS_WEIGHT=of_norm[5] is not None,
        HAS_BIAS=of_norm[6] is not None, HAS_CLAMP=clamp != math.inf, HAS_GLAST=has_last, HAS_H0=has_h0, HAS_CU=cu_seqlens is not None,
        CHUNKED=p.way == "chunks", STAGES=p.stages, **fixed,
    )  # fmt: skip


def _wide(p: Plan, D: int, strides: tuple[int, ...]) -> bool:
    """Whether offsets within a tile need 64 bits."""
    return p.steps * max(D, *strides[1::2], strides[-1]) >= 2**31


def scan(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """newllm::scan"""
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
    return run_forward(a, b, b, h0, reverse, cu_seqlens, "scan")


def scan_backward(
    grad_h: Tensor | None,
    grad_h_last: Tensor | None,
    a: Tensor,
    h: Tensor,
    h0: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """newllm::scan_backward"""
    a = a if a.stride(-1) == 1 else a.contiguous()
    grad_a, grad_b = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for _ in range(2))
    grads = (grad_a, grad_b, grad_b)
    grad_h0 = run_backward(grad_h, grad_h_last, a, a, a, h, h0, reverse, cu_seqlens, grads, "scan")
    return grad_a, grad_b, grad_h0
