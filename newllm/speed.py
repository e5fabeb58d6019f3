"""How much of the hardware a training run uses: matrix-product operations per token, and what the GPU could do."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from newllm.config import ModelConfig

# Dense bfloat16 operations per second by the makers' data sheets, by a part of the device's name.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def training_flops_per_token(config: ModelConfig, segment: int) -> float:
    """Operations of the matrix products (and attention, in full) of forward and backward, per token of a segment.

    Counted on a model without storage: twice the products' multiplications, and a backward of twice the forward, as is
    usual for model FLOPs utilisation. What is computed twice to save memory counts once.
    """
    from newllm.model import build_model

    steps = segment if config.architecture == "transformer" else min(segment, 8)  # the recurrence is linear in time
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build_model(config).eval()(torch.zeros(1, steps, dtype=torch.int64))
    return 3 * counter.get_total_flops() / steps


def device_name(device: torch.device) -> str:
    """What its maker calls the GPU, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_flops(device: torch.device) -> float | None:
    """Of a GPU in the table, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
