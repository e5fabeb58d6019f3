"""Generation on a GPU without the host: the step of a decoder and the draw of its tokens, captured in one CUDA graph.

Tokens, states and random numbers stay on the device. A launch of the graph is BLOCK steps; the tokens of a block are copied to the
host while the next one runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from newllm.generation import (
    BROKEN,
    Sampling,
    clocks,
    distribution,
    draw,
    eager_steps,
    evaluating,
    held,
    prefill,
    sane,
)
from newllm.model import LanguageModel
from newllm.model.decoding import Decoder, make_decoder

BLOCK = 16  # tokens between two looks at them: a text may be computed that many tokens past its end
WARM_UPS = 2  # runs before the capture, in which libraries get their memory


def _next_token_fused(*arguments: Tensor | float | None) -> None:
    from newllm.model.next_token import next_token  # not at the top: it needs Triton

    next_token(*arguments)


def _next_token(
    logits: Tensor, rates: Tensor | None, times: Tensor | None, temperature: float, tokens: Tensor, written: Tensor,
    number: Tensor, broken: Tensor, eos_id: int | None,
) -> None:  # fmt: skip
    """What newllm.model.next_token computes, where there is no Triton."""
    if times is None:
        drawn = logits.float().argmax(dim=-1)
    else:
        drawn = ((distribution(logits, temperature) if rates is None else rates) / times).argmax(dim=-1)
    if eos_id is not None:
        drawn = torch.where(tokens == eos_id, eos_id, drawn)
    broken |= ~sane(logits).all(dim=-1)
    tokens.copy_(drawn)
    written.scatter_(0, number[None], drawn[None])
    number.add_(1).remainder_(written.shape[0])


class StepGraph:
    """Steps of tokens -> logits -> tokens, a block of them as a CUDA graph. Every row draws from its own generator."""

    def __init__(self, decoder: Decoder, options: Sampling, generators: list[torch.Generator]) -> None:
        self.decoder, self.options, self.generators = decoder, options, generators
        rows, device = decoder.tokens.shape[0], decoder.tokens.device
        self.written = torch.zeros(BLOCK, rows, dtype=torch.int64, device=device)
        self.number = torch.zeros(rows, dtype=torch.int64, device=device)  # of the step in its block, for each row
        self.broken = torch.zeros(rows, dtype=torch.int32, device=device)  # 1: logits have been NaN or infinite

    def _step(self) -> None:
        decoder, options = self.decoder, self.options
        decoder.run()
        logits, rates, times, temperature = decoder.logits, None, None, held(options.temperature)
        if options.temperature > 0:
            times = clocks(logits, self.generators)
            if options.top_k is not None or options.top_p is not None:
                rates = distribution(logits, options.temperature, options.top_k, options.top_p)
        next_token = _next_token if find_spec("triton") is None else _next_token_fused
        next_token(
            logits, rates, times, temperature, decoder.tokens, self.written, self.number, self.broken, options.eos_id
        )

    def capture(self) -> None:
        """Leaves the decoder's tokens and state, and the generators, anywhere: load them afterwards."""
        stream = torch.cuda.Stream(self.decoder.tokens.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):
            for _ in range(BLOCK):
                self._step()

    def start(self, tokens: Tensor) -> None:
        """The tokens (B,) to go on from, and a new block."""
        self.decoder.tokens.copy_(tokens)
        self.number.zero_()
        self.broken.zero_()

    def run_block(self) -> None:
        self.graph.replay()


def graph_steps(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    options: Sampling,
    generators: list[torch.Generator],
) -> Iterator[list[int]]:
    """As eager_steps. A model without a decoder goes there."""
    modules = list(model.modules())
    with torch.inference_mode(), evaluating(modules):
        decoder = make_decoder(model, len(prompts))
    if decoder is None:
        yield from eager_steps(model, prompts, max_new_tokens, options, generators)
        return
    decoder.mixing = options.mixing
    with torch.inference_mode(), evaluating(modules):
        step = StepGraph(decoder, options, generators)
        before = [generator.get_state() for generator in generators]
        step.capture()
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
        logits, state = prefill(model, prompts, options.mixing)
        if not sane(logits).all():
            raise ValueError(BROKEN)
        first = draw(logits, options.temperature, options.top_k, options.top_p, generators)
        decoder.load(state)
        del state
        step.start(first)
        blocks = _blocks(step, max_new_tokens - 1)
        tokens = first.tolist()
    given = 0
    while True:
        yield tokens
        given += 1
        if given == max_new_tokens or all(token == options.eos_id for token in tokens):
            return
        if (given - 1) % BLOCK == 0:
            with torch.inference_mode():
                block = next(blocks)
        tokens = block[(given - 1) % BLOCK]


def _blocks(step: StepGraph, wanted: int) -> Iterator[list[list[int]]]:
    """The tokens of block after block, each asked for only after the next has been launched."""
    pending = None
    for begin in range(0, wanted + BLOCK, BLOCK):
        following = None
        if begin < wanted:
            step.run_block()
            copies = [x.to("cpu", non_blocking=True) for x in (step.written.clone(), step.broken.clone())]
            event = torch.cuda.Event()
            event.record()
            following = (*copies, event)
        if pending is not None:
            written, broken, event = pending
            event.synchronize()
            if broken.any():
                raise ValueError(BROKEN)
            yield written.tolist()
        pending = following
