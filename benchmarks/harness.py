"""Timing: what is timed, on cold caches, against the copy bandwidth of the same run, and where the figures go.

Forward is the call without gradients recorded. Backward is torch.autograd.grad on a graph built once and retained, for
every provider alike: kernels plus autograd's own overhead, nothing of the forward.

Caches are cold. On the CPU the calls rotate among sets of inputs that together exceed the last-level cache several times;
on a GPU a buffer larger than L2 is zeroed between repeats, outside the time. Memory comes back from the allocator already
mapped: PyTorch's caching allocator does that on a GPU, `keep_heap` makes malloc do it here. Otherwise every result above
32 MiB would be paid for in page faults, by every provider alike, and kernels would not be what is measured.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import pytest
import torch
from operations import (
    COLUMNS,
    PEERS_PARAMETER_TOLERANCES,
    PEERS_TOLERANCES,
    SEGMENT,
    TOLERANCES,
    Case,
    cases,
    checked,
    make_inputs,
    output_gradients,
    relative_error,
    truth,
)
from peers import NEWLLM, PROVIDERS, Outputs, Provider, first_line

import newllm_kernels as nk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MiB = 2**20
# Sets of inputs together: four times the 32 MiB last-level cache of this project's CPU, ten times the L2 of an H100.
COLD = {"cpu": 128 * MiB, "cuda": 512 * MiB}
MOST_SETS = 32  # tiny cases measure latency, and thousands of graphs would measure the allocator
# Per measurement: time spent, least and most repeats. A GPU varies by 1%, and its time is dearer.
SECONDS, FEWEST, MOST = {"cpu": 0.4, "cuda": 0.15}, 5, 200
SLOW = 0.02  # seconds: a call that takes longer is a loop of thousands of kernels, and enters a CUDA graph once


def keep_heap() -> None:
    """Let glibc's malloc serve from the heap alone and never give memory back; elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ---- copy bandwidth -------------------------------------------------------------------------------------------------


def copy_bandwidth() -> float:
    """Bytes read plus written per second, in GB/s: median of many copies of 256 MiB (1 GiB on a GPU), all threads."""
    size = 1024 * MiB if DEVICE == "cuda" else 256 * MiB
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = (
        _events(lambda: target.copy_(source), 30) if DEVICE == "cuda" else _seconds(lambda: target.copy_(source), 15)
    )
    return 2 * size / statistics.median(times) / 1e9


def _seconds(function: Callable[[], Any], repeats: int, warm_up: int = 2) -> list[float]:
    times = []
    for _ in range(warm_up + repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return times[warm_up:]


def _events(function: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds by CUDA events, L2 cold. The zeroing also keeps the GPU busy while the host enqueues the call."""
    flush = torch.empty(256 * MiB, dtype=torch.uint8, device="cuda")  # H100: 50 MiB of L2, B200: 126
    pairs = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        function()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs[2:]]


def _graph_seconds(calls: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Seconds a call by replay of one CUDA graph of all calls: without the host's overhead, and with that of starting a
    graph (some 8 us) shared out. Each call has inputs of its own, or larger ones than L2, so it finds L2 cold."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in calls:
            call()
    return [seconds / len(calls) for seconds in _events(graph.replay, repeats)]


# ---- rows -----------------------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """Rows of this session and the best copy bandwidth seen in it: the ceiling is what the machine can do undisturbed."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)

    def measure_copy(self) -> None:
        self.copies.append(copy_bandwidth())

    @property
    def copy_gbps(self) -> float:
        return max(self.copies, default=math.nan)

    def percent(self, gbps: float | None) -> float | None:
        return None if gbps is None else 100 * gbps / self.copy_gbps

    def finished(self) -> list[dict[str, Any]]:
        return [{**row, "percent_of_copy": self.percent(row["gbps"])} for row in self.rows]

    def add(self, benchmark: Any, times: list[float], row: dict[str, Any]) -> None:
        """One row of figures (microseconds); pytest-benchmark gets the same as extra_info."""
        low, median, high = quartiles(times)
        row |= {"median_us": median * 1e6, "min_us": min(times) * 1e6, "iqr_us": (high - low) * 1e6}
        row |= {"repeats": len(times), "gbps": row["bytes"] / median / 1e9 if row.get("bytes") else None}
        self.rows.append(row)
        benchmark.extra_info.update(row, percent_of_copy=self.percent(row["gbps"]))


def quartiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) < 2:
        return times[0], times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, statistics.median(times), high


# ---- one measurement ------------------------------------------------------------------------------------------------


def grid(operation: str, providers: list[Provider] | None = None, only: list[Case] | None = None) -> Any:
    """Parametrisation by case, provider and direction, in the order that computes every float64 truth once."""
    return pytest.mark.parametrize(
        ("case", "provider", "direction"),
        [
            pytest.param(case, provider, direction, id=f"{case}-{provider.name}-{direction}")
            for case in only or cases(operation, DEVICE)
            for provider in providers or PROVIDERS[operation]
            for direction in ("forward", "backward")
        ],
    )


def measure(benchmark: Any, recorder: Recorder, case: Case, provider: Provider, direction: str) -> None:
    """Check a provider against float64, then time it. A wrong result fails the benchmark and leaves no figure; a peer that
    raises (it may not know this PyTorch, or run out of memory) is skipped, and the results say so."""
    reason = provider.unavailable(case)
    if reason is not None:
        pytest.skip(f"{provider.name}: {reason}")
    what = f"{case.operation} {case} {provider.name} {direction}"
    try:
        with nk.use_backend(provider.backend if provider.backend != "auto" else nk.current_backend()):
            row = checked_row(recorder, case, provider, direction, what)
            times = timed(benchmark, case, provider, direction, row)
    except Exception as error:
        if provider.name == NEWLLM:
            raise
        recorder.refused.append(f"{what}: {type(error).__name__}: {first_line(error)}")
        pytest.skip(recorder.refused[-1])
    if times:  # none under --benchmark-disable
        recorder.add(benchmark, times, row)


def checked_row(recorder: Recorder, case: Case, provider: Provider, direction: str, what: str) -> dict[str, Any]:
    """The row of a provider whose results are right, without times."""
    error, parameter_error = errors_of(provider.build(case), provider, case, direction)
    tolerance = large = loose = TOLERANCES[case.dtype]
    if provider.name != NEWLLM:
        large, loose = PEERS_TOLERANCES[case.dtype], PEERS_PARAMETER_TOLERANCES[case.dtype]
    if not (error <= large and parameter_error <= loose):
        found = f"relative error {error:.1e}, allowed {large:.0e}; of parameters {parameter_error:.1e}, {loose:.0e}"
        recorder.refused.append(f"{what}: {found}")
        pytest.fail(f"no figure for a wrong result: {what}: {found}", pytrace=False)
    row = {
        "op": case.operation, "provider": provider.name, "direction": direction, "shape": list(case.shape),
        "dtype": case.precision, "device": case.device, "bytes": case.bytes(direction), "error": error,
        "parameter_error": parameter_error, "tolerance": tolerance,
    }  # fmt: skip
    if case.series is not None:
        row |= {"series": case.series, "checked": f"every {SEGMENT} steps of some {COLUMNS} columns, against float32"}
    return row


def timed(benchmark: Any, case: Case, provider: Provider, direction: str, row: dict[str, Any]) -> list[float]:
    function = provider.build(case)
    gc.collect()  # graphs of the case before
    if case.device != "cuda":
        return time_on_cpu(benchmark, prepared_calls(function, provider, case, direction))
    torch.cuda.empty_cache()  # the largest cases want the memory in one piece
    # A backward runs on the stream of its forward, and a graph is not captured on the default one.
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
        return time_on_gpu(benchmark, prepared_calls(function, provider, case, direction), row)


def errors_of(function: Callable[..., Outputs], provider: Provider, case: Case, direction: str) -> tuple[float, float]:
    """Relative errors against float64: the worst of the large tensors, and the worst of weight's and bias's gradients."""
    inputs = make_inputs(case)
    with torch.set_grad_enabled(direction == "backward"):
        outputs = tuple(y.to(case.dtype) for y in provider.restore(*function(*provider.prepare(*inputs))))
    got = outputs if direction == "forward" else torch.autograd.grad(outputs, inputs, output_gradients(outputs))
    pairs = list(zip(checked(case, got), truth(case)[direction], strict=True))
    large, vectors = ([pair for pair in pairs if (pair[1].dim() == 1) is flat] for flat in (False, True))
    return relative_error(large, SEGMENT if case.series else None), relative_error(vectors)


def prepared_calls(
    function: Callable[..., Outputs], provider: Provider, case: Case, direction: str
) -> list[Callable[[], Any]]:
    """As many calls, each on inputs (or a graph) of its own, as it takes to leave the caches cold."""
    sets = min(MOST_SETS, math.ceil(COLD[case.device] / case.bytes(direction)))
    calls = []
    for seed in range(sets):
        with torch.no_grad():
            inputs = provider.prepare(*make_inputs(case, seed))
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        if direction == "forward":
            calls.append(_forward(function, inputs))
        else:
            outputs = function(*inputs)
            calls.append(_backward(outputs, inputs, output_gradients(outputs)))
    return calls


def _forward(function: Callable[..., Outputs], inputs: Outputs) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            function(*inputs)

    return call


def _backward(outputs: Outputs, inputs: Outputs, grads: Outputs) -> Callable[[], Any]:
    def call() -> None:
        torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    return call


def _repeats(one_call: float) -> int:
    return max(FEWEST, min(MOST, int(SECONDS[DEVICE] / max(one_call, 1e-9))))


def time_on_cpu(benchmark: Any, calls: list[Callable[[], Any]]) -> list[float]:
    rotation: Iterator[Callable[[], Any]] = cycle(calls)
    next(rotation)()
    once = min(_seconds(lambda: next(rotation)(), 1, warm_up=0))
    benchmark.pedantic(
        lambda call: call(),
        setup=lambda: ((next(rotation),), {}),
        rounds=_repeats(once),
        warmup_rounds=0 if once > 0.1 else 2,
    )
    return list(benchmark.stats.stats.data) if benchmark.stats else []


def time_on_gpu(benchmark: Any, calls: list[Callable[[], Any]], row: dict[str, Any]) -> list[float]:
    """Event times; the row gets the median of graph replays and the peak memory that the call allocates besides."""
    call = calls[0]
    for _ in range(3):  # autotuning, compilation
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    once = min(_events(call, 2))
    # Less the flush buffer, which _events allocates while it runs.
    row["peak_bytes"] = torch.cuda.max_memory_allocated() - before - 256 * MiB
    times: list[float] = []
    benchmark.pedantic(lambda: times.extend(_events(call, _repeats(once))), rounds=1)
    try:
        calls = calls[:1] if once > SLOW else calls + calls
        row["graph_us"] = statistics.median(_graph_seconds(calls, _repeats(once * len(calls)))) * 1e6
    except RuntimeError as error:  # a provider may synchronise or allocate in ways that a capture forbids
        row["graph_us"], row["graph_failure"] = None, first_line(error)
    return times
