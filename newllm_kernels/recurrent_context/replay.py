"""CUDA graphs of a few steps, for eager calls of recurrent_context's fused steps: the host launches one graph instead of some
hundred kernels.

A graph works on buffers of its own, weights included: what a call gives is copied in, what it wants is copied out, so nobody
ever holds what a later replay overwrites. There are at most MOST of them, the least recently used goes first. A kind of call gets
one when it is seen for the second time; until then, and inside somebody's own capture, steps are launched one by one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

STEPS = 16  # of a graph: enough that its launch does not show, few enough that its buffers stay small
MOST = 8
SEEN = 256  # kinds of calls remembered
MOST_ROWS = 512  # where a step takes longer than its launches

# One lock and one chain of events for all: graphs share the workspace of the matrix products captured into them.
_lock = threading.Lock()
_seen: OrderedDict[Hashable, None] = OrderedDict()
_graphs: OrderedDict[Hashable, Replay] = OrderedDict()
_streams: dict[int, torch.cuda.Stream] = {}
_last_use: dict[int, torch.cuda.Event] = {}


class Replay:
    """`run`, recorded on one device; `static` is whatever holds the buffers it works on."""

    def __init__(self, device: torch.device, static: Any, run: Callable[[], None]) -> None:
        self.static = static
        stream = _streams.setdefault(device.index, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            run()  # compiles, and lets cuBLAS make what it would otherwise make inside of the graph
            stream.synchronize()
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            finally:
                self.graph.capture_end()


def applies(like: Tensor, rows: int, steps: int, *widths: int) -> bool:
    """Whether a call is one that a graph would be faster for, and give the same bits for.

    Triton compiles a kernel anew where strides or addresses are multiples of 16, and its sums in another order with it. Of the
    buffers of a graph, which hold STEPS steps, strides always are; of a call's tensors where all widths are.
    """
    if not like.is_cuda or rows > MOST_ROWS or steps < STEPS or any(width % 16 for width in widths):
        return False
    return not torch.cuda.is_current_stream_capturing()


@contextmanager
def borrow(
    key: Hashable, device: torch.device, make: Callable[[], tuple[Any, Callable[[], None]]]
) -> Iterator[Replay | None]:
    """The graph of this kind of call, for the block alone, or None; make() gives what Replay takes."""
    with _lock:
        key = (device.index, key)
        found = _graphs.get(key)
        if found is None and key not in _seen:
            _seen[key] = None
            if len(_seen) > SEEN:
                _seen.popitem(last=False)
            yield None
            return
        stream = torch.cuda.current_stream(device)
        if device.index in _last_use:
            stream.wait_event(_last_use[device.index])
        if found is None:
            if len(_graphs) >= MOST:
                torch.cuda.synchronize(device)  # its buffers may still be in use
                _graphs.popitem(last=False)
            with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
                found = _graphs[key] = Replay(device, *make())
        _graphs.move_to_end(key)
        try:
            yield found
        finally:
            _last_use[device.index] = stream.record_event()


def clear() -> None:
    """Free all graphs and their buffers."""
    with _lock:
        if _graphs:
            torch.cuda.synchronize()
        _graphs.clear()
        _seen.clear()
