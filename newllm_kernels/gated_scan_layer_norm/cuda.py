"""`gated_scan_layer_norm` in one launch of CUDA C++ (csrc/cuda/scan_norm*.cuh), where that is possible and pays.

The blocks of all columns of a sequence, a team, run at the same time and exchange the statistics of a row, so that every tensor
is read once and written once. A GPU holds few teams: few sequences leave it idle where a scan on its own would cut them along
time, so under `auto` such calls, and packed sequences, go to Triton; small ones, whose time is the host's (162 us with Triton's
launches, where a call of `gated_scan` takes 26 and one of `layer_norm` 21), to the kernels of these two. By name
(`use_backend("cuda")`) all are served here that can be. What never can are calls with a gradient of c beside y's, rows that do not begin at 16 bytes and empty tensors: these take the
kernels of `gated_scan` and `layer_norm`, one after the other.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from newllm_kernels import backends, gates, native
from newllm_kernels.gated_scan_layer_norm import composed

WIDEST = 2048  # columns, 32 blocks of 64
WINDOW = 64  # steps that a block takes at a time
BUSY = 0.9  # share of the multiprocessors' time with work in it, from where on one launch takes less time than two


def supports(call: backends.Call) -> native.Verdict:
    """Whether calls of this kind can be served at all."""
    verdict = backends.supports_cuda_recurrence("gated_scan")(call)
    if not verdict.ok:
        return verdict
    if call.width > WIDEST:
        return native.Verdict(False, f"holds a row in 32 blocks of 64 columns: D up to {WIDEST}, got {call.width}")
    if call.width * call.dtype.itemsize % 16 != 0:
        return native.Verdict(False, f"wants rows of whole 16 bytes, got D = {call.width} of {call.dtype}")
    is_float = call.dtype == torch.float32
    for backward in (False, True):
        if native.cuda_gated_scan_layer_norm_teams(_index(call.device), is_float, backward, call.width) == 0:
            name = torch.cuda.get_device_name(call.device)
            return native.Verdict(
                False,
                f"needs compute capability 9.0 and all blocks of a row at the same time, which {name} does not give",
            )
    return native.Verdict(
        True, f"{verdict.reason}, one launch; where few sequences would leave the GPU idle, as triton, or if small, two"
    )


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.lru_cache(4096)
def busy(device: int, is_float: bool, backward: bool, B: int, T: int, D: int) -> float:
    """The share of all multiprocessors' time with work in it: a team takes sequence after sequence, window after window."""
    teams = native.cuda_gated_scan_layer_norm_teams(device, is_float, backward, D)
    rounds = -(-B // max(1, teams))
    blocks = B * -(-D // 64) / (rounds * torch.cuda.get_device_properties(device).multi_processor_count)
    return blocks * T / (-(-T // WINDOW) * WINDOW)


def _begin_at_16_bytes(*tensors: Tensor | None) -> bool:
    """Whether every row does; one whose last dimension is strided is copied before it is read."""
    for x in tensors:
        if x is None or (x.stride(-1) != 1 and x.shape[-1] > 1):
            continue
        if x.data_ptr() % 16 or any(stride * x.element_size() % 16 for stride in x.stride()[:-1]):
            return False
    return True


def in_one_launch(
    f: Tensor, D: int, cu_seqlens: Tensor | None, rows: tuple[Tensor | None, ...], backward: bool
) -> bool:
    """Whether the call is served so."""
    if f.numel() == 0 or not _begin_at_16_bytes(f, *rows):
        return False
    if backends.current_backend() == "cuda":
        return True
    if cu_seqlens is not None:  # their lengths are on the device, and no measurement says what uneven ones cost
        return False
    return busy(f.get_device(), f.dtype == torch.float32, backward, f.shape[0], f.shape[1], D) >= BUSY


def implementation(triton: backends.Implementation) -> backends.Implementation:
    """The backend `cuda`; under `auto`, `triton` takes the large calls that one launch is slower for."""

    def others(f: Tensor, D: int) -> backends.Implementation | None:
        if backends.current_backend() != "auto" or f.numel() <= backends.SMALL:
            return None
        return triton if triton.supports(backends.Call(f.device, f.dtype, D)).ok else None

    def forward(f, i, d, c0, cu_seqlens, weight, bias, eps, clamp):
        D = gates.gate_width(f, i)
        args = (f, i, d, c0, cu_seqlens, weight, bias, eps, clamp)
        if in_one_launch(f, D, cu_seqlens, (i, d), backward=False):
            return torch.ops.newllm_native.gated_scan_layer_norm(*args)
        other = others(f, D)
        return (other.forward if other else composed.gated_scan_layer_norm)(*args)

    def backward(grad_y, grad_c, grad_c_last, f, i, d, c, c0, cu_seqlens, weight, bias, mean, rstd, clamp):
        D = c.shape[2]
        args = (grad_y, grad_c, grad_c_last, f, i, d, c, c0, cu_seqlens, weight, bias, mean, rstd, clamp)
        of_y_alone = grad_y is not None and grad_c is None
        if of_y_alone and in_one_launch(f, D, cu_seqlens, (i, d, c, grad_y), backward=True):
            return torch.ops.newllm_native.gated_scan_layer_norm_backward(*args)
        other = others(f, D)
        return (other.backward if other else composed.gated_scan_layer_norm_backward)(*args)

    return backends.Implementation("cuda", forward, backward, supports)
