"""Triton kernels of the recurrences `scan` and `gated_scan`, forward and backward.

    stream      one program walks a whole sequence tile by tile, its state in registers: few bytes, no waiting, but only
                N * D / BD programs (this file)
    look-back   time is cut into chunks that run in parallel (triton_look_back.py)

Both are made of the tiles of triton_tiles.py, which also explains the names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm_kernels.scan.triton_look_back import backward_look_back, forward_look_back
from newllm_kernels.scan.triton_tiles import (
    backward_tile,
    forward_tile,
    last_of,
    scan_tile,
    sequence,
    steps,
    store,
    store_gradients,
    store_start_gradient,
    times,
)
from newllm_kernels.triton_support import device_of, multiprocessors


@triton.jit(do_not_specialize=["T"])
def _forward_stream(
    p_a, p_b, p_c, p_h0, p_h, p_last, p_cu, T, D, s_ab, s_at, s_bb, s_bt, s_cb, s_ct, d_blocks,
    GATED: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr, HAS_H0: tl.constexpr,
    HAS_CU: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_n = (tl.program_id(0) // d_blocks).to(tl.int64)
    o_d = (tl.program_id(0) % d_blocks) * BD + tl.arange(0, BD)
    m_d = o_d < D
    begin, L, i_b = sequence(p_cu, i_n, T, HAS_CU)
    state = tl.zeros([BD], tl.float32)
    if HAS_H0:
        state = tl.load(p_h0 + i_n * D + o_d, mask=m_d, other=0.0)
    p_a, p_b, p_c, p_h = p_a + i_b * s_ab, p_b + i_b * s_bb, p_c + i_b * s_cb, p_h + i_b * T * D
    for start in tl.range(0, L, R * G, num_stages=STAGES):
        o_s = steps(start, R, G)
        o_t = times(begin, o_s, L, REVERSE)
        b_a, b_b = forward_tile(p_a, p_b, p_c, s_at, s_bt, s_ct, o_t, o_s < L, o_d, m_d, GATED, EXACT, EVEN)
        b_a, b_h, g_a, g_h, x_a, x_h = scan_tile(b_a, b_b, R, G)
        b_h += b_a * (x_h + x_a * state[None, :])[None, :, :]
        store(p_h, D, o_t, o_s < L, o_d, m_d, b_h, EVEN)
        state = last_of(g_h + g_a * state[None, :], G)
    tl.store(p_last + i_n * D + o_d, state, mask=m_d)


@triton.jit(do_not_specialize=["T"])
def _backward_stream(
    p_gh, p_glast, p_a, p_b, p_c, p_h, p_h0, p_ga, p_gb, p_gc, p_gh0, p_cu, T, D, s_ghb, s_ght, s_ab, s_at, s_bb, s_bt,
    s_cb, s_ct, s_hb, s_ht, s_gt, d_blocks, GATED: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr,
    HAS_GH: tl.constexpr,
    HAS_GLAST: tl.constexpr, HAS_H0: tl.constexpr, HAS_CU: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    i_n = (tl.program_id(0) // d_blocks).to(tl.int64)
    o_d = (tl.program_id(0) % d_blocks) * BD + tl.arange(0, BD)
    m_d = o_d < D
    begin, L, i_b = sequence(p_cu, i_n, T, HAS_CU)
    state, start_state = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    if HAS_GLAST:
        state = tl.load(p_glast + i_n * D + o_d, mask=m_d, other=0.0)
    if HAS_H0:
        start_state = tl.load(p_h0 + i_n * D + o_d, mask=m_d, other=0.0)
    p_gh, p_h = p_gh + i_b * s_ghb, p_h + i_b * s_hb
    p_a, p_b, p_c = p_a + i_b * s_ab, p_b + i_b * s_bb, p_c + i_b * s_cb
    p_ga, p_gb, p_gc = p_ga + i_b * T * s_gt, p_gb + i_b * T * s_gt, p_gc + i_b * T * s_gt
    for start in tl.range(0, L, R * G, num_stages=STAGES):
        o_s = L - 1 - steps(start, R, G)
        b_a, b_g = backward_tile(p_gh, p_a, s_ght, s_at, begin, o_s, L, o_d, m_d, GATED, REVERSE, HAS_GH, EXACT, EVEN)
        b_a, b_g, g_a, g_g, x_a, x_g = scan_tile(b_a, b_g, R, G)
        b_g += b_a * (x_g + x_a * state[None, :])[None, :, :]
        store_gradients(
            p_a, p_b, p_c, p_h, p_ga, p_gb, p_gc, s_at, s_bt, s_ct, s_ht, s_gt, begin, o_s, L, o_d, m_d, start_state,
            b_g, GATED, REVERSE, EXACT, EVEN,
        )  # fmt: skip
        state = last_of(g_g + g_a * state[None, :], G)
    store_start_gradient(p_gh0 + i_n * D, p_a, s_at, begin, L, o_d, m_d, state, GATED, REVERSE)


# ---- host side ---------------------------------------------------------------------------------------------------------


def _tiles(dtype: torch.dtype, gated: bool, backward: bool, look_back: bool) -> tuple[int, int, int, int, int]:
    """(R, G, BD, warps, stages), each the fastest of some twenty on an H100 (docs/performance.md).

    G groups are what the threads hold at a time when each loads 16 bytes: 32 * warps * (16 / itemsize) / BD.
    """
    if look_back:
        return (8, 16, 32, 4, 1) if dtype == torch.float32 else (8, 32, 32, 4, 1)
    if dtype == torch.float32:
        return 4, 8, 32, 2, 3 if backward or gated else 4
    if gated:
        return (2, 32, 64, 8, 3) if backward else (2, 32, 32, 4, 3)
    return 4, 32, 64, 8, 3


def _plan(
    x: Tensor, N: int, T: int, D: int, packed_sequences: bool, gated: bool, backward: bool
) -> tuple[bool, int, int, int, int, int, int]:
    """Whether to look back, the tile, and the number of programs side by side. Looks back where whole sequences would
    leave most multiprocessors idle."""
    R, G, BD, warps, stages = _tiles(x.dtype, gated, backward, look_back=False)
    BD = min(BD, max(16, triton.next_power_of_2(D)))
    programs = N * triton.cdiv(D, BD)
    # A third of the multiprocessors streaming moves as much as all of them looking back.
    if packed_sequences or T <= 2 * R * G or 3 * programs >= multiprocessors(x.device):
        return False, R, G, BD, warps, stages, programs
    R, G, BD, warps, stages = _tiles(x.dtype, gated, backward, look_back=True)
    BD = min(BD, max(16, triton.next_power_of_2(D)))
    return True, R, G, BD, warps, stages, N * triton.cdiv(D, BD)


def _workspace(x: Tensor, N: int, D: int, chunks: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ticket counter and flags (zeroed), pairs, states."""
    flags = torch.zeros(1 + groups * chunks, dtype=torch.int32, device=x.device)
    return flags, x.new_empty((N, chunks, 2, D), dtype=torch.float32), x.new_empty((N, chunks, D), dtype=torch.float32)


def columns(f: Tensor, i: Tensor | None, d: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The gates as three tensors with contiguous rows; views where they are packed."""
    if i is None or d is None:
        f = f if f.stride(-1) == 1 else f.contiguous()
        D = f.shape[2] // 3
        return f[..., :D], f[..., D : 2 * D], f[..., 2 * D :]
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (f, i, d))


def run_forward(
    a: Tensor, b: Tensor, c: Tensor, h0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None, gated: bool
) -> tuple[Tensor, Tensor]:
    """(h, h_last) of h_t = a_t h_{t-1} + b_t; gated: a, b, c are f, i, d."""
    B, T, D = a.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h = torch.empty((B, T, D), dtype=a.dtype, device=a.device)
    h_last = torch.empty((N, D), dtype=torch.float32, device=a.device)
    if N == 0:
        return h, h_last
    h0 = None if h0 is None else h0.contiguous()
    look_back, R, G, BD, warps, stages, programs = _plan(a, N, T, D, cu_seqlens is not None, gated, False)
    strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(1), c.stride(0), c.stride(1))
    d_blocks = triton.cdiv(D, BD)
    exact, even = a.dtype == torch.float32, T % (R * G) == 0 and D % BD == 0 and cu_seqlens is None
    with device_of(a):
        if look_back:
            chunks = triton.cdiv(T, R * G)
            flags, pairs, states = _workspace(a, N, D, chunks, programs)
            forward_look_back[(programs * chunks,)](
                a, b, c, h0, h, h_last, flags, pairs, states, T, D, *strides, d_blocks, chunks, programs, GATED=gated,
                REVERSE=reverse, EXACT=exact, EVEN=even,
                HAS_H0=h0 is not None, R=R, G=G, BD=BD, FLAGS=32 * warps, num_warps=warps,
            )  # fmt: skip
        else:
            _forward_stream[(programs,)](
                a, b, c, h0, h, h_last, cu_seqlens, T, D, *strides, d_blocks, GATED=gated, REVERSE=reverse,
                EXACT=exact, EVEN=even,
                HAS_H0=h0 is not None, HAS_CU=cu_seqlens is not None, R=R, G=G, BD=BD, STAGES=stages, num_warps=warps,
            )  # fmt: skip
    return h, h_last


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
    gated: bool,
) -> Tensor:
    """Fills `grads` (of a, b, and gated of c; rows of one stride) and returns grad_h0 (N, D)."""
    B, T, D = h.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grad_h0 = torch.empty((N, D), dtype=torch.float32, device=h.device)
    if N == 0:
        return grad_h0
    if grad_h is not None and grad_h.stride(2) != 1:
        grad_h = grad_h.contiguous()
    h = h if h.stride(2) == 1 else h.contiguous()
    h0, grad_last = (None if x is None else x.contiguous() for x in (h0, grad_last))
    look_back, R, G, BD, warps, stages, programs = _plan(a, N, T, D, cu_seqlens is not None, gated, True)
    ghs = (0, 0) if grad_h is None else (grad_h.stride(0), grad_h.stride(1))
    strides = (
        *ghs, a.stride(0), a.stride(1), b.stride(0), b.stride(1), c.stride(0), c.stride(1), h.stride(0), h.stride(1),
        grads[0].stride(1),
    )  # fmt: skip
    d_blocks = triton.cdiv(D, BD)
    exact, even = a.dtype == torch.float32, T % (R * G) == 0 and D % BD == 0 and cu_seqlens is None
    tensors = (grad_h, grad_last, a, b, c, h, h0, *grads, grad_h0)
    has = {"HAS_GH": grad_h is not None, "HAS_GLAST": grad_last is not None, "HAS_H0": h0 is not None}
    with device_of(a):
        if look_back:
            chunks = triton.cdiv(T, R * G)
            flags, pairs, states = _workspace(a, N, D, chunks, programs)
            backward_look_back[(programs * chunks,)](
                *tensors, flags, pairs, states, T, D, *strides, d_blocks, chunks, programs, GATED=gated,
                REVERSE=reverse, EXACT=exact, EVEN=even, **has, R=R, G=G, BD=BD, FLAGS=32 * warps, num_warps=warps,
            )  # fmt: skip
        else:
            _backward_stream[(programs,)](
                *tensors, cu_seqlens, T, D, *strides, d_blocks, GATED=gated, REVERSE=reverse, EXACT=exact, EVEN=even, **has,
                HAS_CU=cu_seqlens is not None, R=R, G=G, BD=BD, STAGES=stages, num_warps=warps,
            )  # fmt: skip
    return grad_h0


def scan(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """newllm::scan"""
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
    return run_forward(a, b, b, h0, reverse, cu_seqlens, gated=False)


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
    grad_h0 = run_backward(grad_h, grad_h_last, a, a, a, h, h0, reverse, cu_seqlens, grads, gated=False)
    return grad_a, grad_b, grad_h0
