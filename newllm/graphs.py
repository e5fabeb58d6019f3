"""CUDA graphs of a training step: what the host would launch kernel by kernel it launches as one.

A step of a few hundred kernels takes the host some 40 ms and the GPU 10. Captured in a graph it takes the host one launch;
what changes from step to step (position in the text, learning rate) is read from tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

EAGER_RUNS = 2  # before a capture: kernels are compiled and tuned, libraries take their workspaces


class Graphs:
    """`run(key, function)`: calls `function` the first times, then captures it, then replays it. Without `enabled`, or on a
    CPU, it calls it every time.

    A function with one key must do the same every time to the same tensors. All of it runs on one stream of its own
    (`with graphs.stream():`): backward kernels go to the stream of their forward, and the default one cannot be captured.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled and device.type == "cuda"
        self._runs: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        if self.enabled:
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time

    @contextmanager
    def stream(self) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        if not self.enabled or self._runs[key] < EAGER_RUNS:
            self._runs[key] += 1
            function()
            return
        if key not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                function()
            self._graphs[key] = graph
        self._graphs[key].replay()
