"""Speed of the full cell, microseconds a step: recurrent_context in order and in chunks of time, against a Python loop on a CPU
and torch.nn.LSTM on a GPU.

    python benchmarks/recurrent.py [--results FILE]

Weights are those of a fresh ContextRNN; medians of single calls, on a GPU by events. Backward is torch.autograd.grad of a sum, on a
retained graph, with gradients of all weights and inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import newllm_kernels as nk


def median_us(run: Callable[[], Any], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        else:
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def measure(name: str, call: Callable[[], Tensor], inputs: list[Tensor], T: int, device: str, repeats: int = 7) -> dict:
    """Forward as training runs it, and backward, a step each."""
    output = call()
    total = output.float().sum()
    torch.autograd.grad(total, inputs, retain_graph=True)
    forward = median_us(call, device, repeats) / T
    backward = median_us(lambda: torch.autograd.grad(total, inputs, retain_graph=True), device, repeats) / T
    row = {"name": name, "forward_us": round(forward, 3), "backward_us": round(backward, 3)}
    print(f"{name:<60} {forward:8.2f} {backward:8.2f}", flush=True)
    return row


def python_loop(rnn: nk.ContextRNN, x: Tensor) -> Tensor:
    """The formula as one would write it: x (B, T, E) -> contexts (B, T, D)."""
    layer, outputs = rnn.layers[0], []
    W = torch.cat((layer.from_input.weight, layer.context_weight), dim=1)
    c = layer.start.expand(x.shape[0], -1)
    for x_t in x.unbind(1):
        h = F.silu(F.linear(torch.cat((x_t, c), dim=-1), W, layer.from_input.bias))
        f, i, d = layer.gates(h).chunk(3, dim=-1)
        u = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(d)
        c = F.layer_norm(u, u.shape[-1:], layer.norm.weight, layer.norm.bias).clamp(-10, 10)
        outputs.append(c)
    return torch.stack(outputs, dim=1)


def ours(rnn: nk.ContextRNN, x: Tensor, chunks: int = 1, **options: Any) -> Callable[[], Tensor]:
    layer = rnn.layers[0]

    def call() -> Tensor:
        z = layer.from_input(x)
        return nk.recurrent_context(
            z, layer.context_weight, layer.start.expand(len(x), -1), gate_weight=layer.gates.weight,
            gate_bias=layer.gates.bias, weight=layer.norm.weight, bias=layer.norm.bias, chunks=chunks, **options,
        )[0]  # fmt: skip

    return call


def run_shape(B: int, T: int, D: int, device: str, dtype: torch.dtype, chunks: tuple[int, ...]) -> list[dict]:
    rnn = nk.ContextRNN(D, 2 * D, D, batch_first=True, device=device, dtype=dtype)
    x = torch.randn(B, T, D, device=device, dtype=dtype, requires_grad=True)
    inputs = [x, *rnn.parameters()]
    shape = f"{B}x{T}x{D} {str(dtype).removeprefix('torch.')}"
    rows = [measure(f"recurrent_context {shape}", ours(rnn, x), inputs, T, device)]
    for K in chunks:
        with nk.record_seams() as seams:
            call = ours(rnn, x, K, tolerance=1e-3)
            torch.autograd.grad(call().float().sum(), inputs)
        passes = "/".join(f"{s.passes}{'+' if s.in_order else ''}" for s in seams)
        rows.append(measure(f"recurrent_context {shape} {K} chunks, passes {passes}", call, inputs, T, device))
    if device == "cpu":
        rows.append(measure(f"Python loop {shape}", lambda: python_loop(rnn, x), inputs, T, device, 5))
    else:
        for lstm_dtype in (torch.float16, torch.bfloat16):
            lstm = nn.LSTM(D, D, batch_first=True, device=device, dtype=lstm_dtype)
            y = x.detach().to(lstm_dtype).requires_grad_()
            name = f"torch.nn.LSTM {B}x{T}x{D} {str(lstm_dtype).removeprefix('torch.')}"
            rows.append(measure(name, lambda lstm=lstm, y=y: lstm(y)[0], [y, *lstm.parameters()], T, device))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{'microseconds a step':<60} {'forward':>8} {'backward':>8}")
    rows = []
    if torch.cuda.is_available():
        for B, T, D, chunks in (
            (16, 1024, 256, (4, 7)),
            (16, 1024, 768, ()),
            (1, 4096, 256, (32, 64)),
            (1, 1024, 768, (8, 16)),
        ):
            rows += run_shape(B, T, D, "cuda", torch.bfloat16, chunks)
    else:
        rows += run_shape(8, 256, 256, "cpu", torch.float32, ())
        rows += run_shape(8, 256, 256, "cpu", torch.bfloat16, ())
        rows += run_shape(1, 1024, 256, "cpu", torch.float32, (8, 16))
    if args.results:
        args.results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
