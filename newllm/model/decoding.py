"""One token at a time, without the host: a model's step as a program of fused linear layers on buffers that stay in place.

    decoder = make_decoder(model, rows)      None for a model that has no program
    decoder.load(state)                      the state of as many texts
    decoder.tokens.copy_(...); decoder.run()
    decoder.logits                           (B, V), and the state has moved on

It computes what `model(tokens[:, None], state)` does, in another order of additions. See newllm_kernels.decode_linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor, nn

from newllm.model.classic import Classic
from newllm.model.common import AS_IT_IS, LanguageModel, Mixing, State
from newllm.model.decoding_recall import RecallStep, fitting
from newllm.model.mixer import ContextCell
from newllm.model.newllm import Block, NewLLM
from newllm.model.transformer import Transformer
from newllm_kernels import LayerNorm
from newllm_kernels.decode_linear import MOST_ROWS, TooManyRows
from newllm_kernels.decode_linear.program import Activation, DecodeLayer, DecodeProgram
from newllm_kernels.numerics import acc_dtype


class Decoder(Protocol):
    """tokens (B,) int64 and logits (B, V) that stay in place, and a state between them."""

    tokens: Tensor
    logits: Tensor
    mixing: Mixing

    def load(self, state: State) -> None: ...

    def run(self) -> None: ...


def make_decoder(model: LanguageModel, rows: int) -> Decoder | None:
    """The decoder of a model for `rows` texts; it reads the model's weights where they lie when it is made.

    None for a mixture of softmaxes, for a Transformer where there is no Triton, for more than 16 texts, and for as many as do not fit into the
    shared memory of the GPU: 16 of a model as wide as `1b`.
    """
    if getattr(model, "mixture", None) is not None or rows > MOST_ROWS:
        return None
    try:
        if isinstance(model, (NewLLM, Classic)):
            return ProgramDecoder(model, rows)
        if isinstance(model, Transformer) and find_spec("triton"):
            from newllm.model.decoding_transformer import CacheDecoder  # not at the top: it needs Triton

            return CacheDecoder(model, rows)
    except TooManyRows:
        return None
    return None


class ProgramDecoder:
    """Static buffers (tokens (B,) int64, logits (B, V), contexts (B, D) per cell and hop) and the program between them.

    With recall the program begins at what is recalled, which is looked up before it and mixed into the logits after it.
    """

    mixing = AS_IT_IS

    def __init__(self, model: NewLLM | Classic, rows: int) -> None:
        weight = model.head.weight
        acc = acc_dtype(weight.dtype)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.logits = torch.zeros(rows, weight.shape[0], dtype=acc, device=weight.device)
        initial = model.initial_state(rows, weight.device)
        tables = {key: value.clone() for key, value in initial.items() if key.startswith("recall.")}
        self.contexts = {  # of (B, K, D) each
            key: [value[:, hop].clone() for hop in range(value.shape[1])]
            for key, value in initial.items()
            if key not in tables
        }
        self.recall = RecallStep(model, rows, tables, acc) if tables else None
        build = _newllm_layers if isinstance(model, NewLLM) else _classic_layers
        with torch.no_grad():
            self.program = fitting(lambda: DecodeProgram(list(build(model, self)), rows), self.recall, model)

    def load(self, state: State) -> None:
        """Go on from a state of the model."""
        for key, contexts in self.contexts.items():
            for hop, context in enumerate(contexts):
                context.copy_(state[key][:, hop])
        if self.recall is not None:
            self.recall.load(state)

    def state(self) -> State:
        """A copy of the state, as the model has it."""
        contexts = {key: torch.stack(contexts, dim=1) for key, contexts in self.contexts.items()}
        tables = {} if self.recall is None else self.recall.tables
        return contexts | {key: table.clone() for key, table in tables.items()}

    def run(self) -> None:
        """tokens -> logits, one token on."""
        if self.recall is not None:
            self.recall.before(self.tokens)
        self.program.run()
        if self.recall is not None:
            self.recall.after(self.tokens, self.logits, self.mixing)


def _norm_of(norm: LayerNorm) -> dict[str, object]:
    return {"norm": (norm.weight, norm.bias), "eps": norm.eps}


def _thirds(weight: Tensor, bias: Tensor | None) -> dict[str, tuple[Tensor | None, ...]]:
    """The three gates of one matrix (3D, K) as three."""
    return {"weights": weight.chunk(3), "biases": (None,) * 3 if bias is None else bias.chunk(3)}


def _whole(linear: nn.Linear) -> dict[str, tuple[Tensor | None, ...]]:
    return {"weights": (linear.weight,), "biases": (linear.bias,)}


class _Cell:
    """The layers of one ContextCell. `source` is what of x its first layer reads: fields of a DecodeLayer."""

    def __init__(self, cell: ContextCell, activation: str, contexts: list[Tensor], source: dict[str, object]) -> None:
        self.cell, self.activation, self.contexts, self.source = cell, activation, contexts, source
        self.D = cell.start.numel()
        self.read_out: dict[str, object] = {}  # how the layer above reads the last hop's context
        self.from_x = Activation(cell.from_x.out_features, exact=True)

    def layers(self, output_gate: Tensor | None = None, gate: Activation | None = None) -> Iterator[DecodeLayer]:
        """Everything up to the new contexts. `gate` takes silu of the output gate's product."""
        cell, beside = self.cell, output_gate is not None
        if cell.from_context is None and cell.to_gates is None and beside:
            made = _thirds(
                cell.from_x.weight, cell.from_x.bias
            )  # gates and output gate of one input: one layer of four matrices
            matrices = {"weights": (*made["weights"], output_gate), "biases": (*made["biases"], None)}
            yield from self._update(0, {**self.source, **matrices, "y": gate}, last=True)
            return
        yield DecodeLayer(**self.source, **_whole(cell.from_x), y=self.from_x)
        if beside:
            yield DecodeLayer(**self.source, weights=(output_gate,), y=gate, activation="silu")
        # From the last hop down: each reads the context of the hop before it as it was before this token.
        for hop in reversed(range(len(self.contexts))):
            if cell.from_context is not None and (hop > 0 or cell.coupling == "full"):
                of = self.reading(self.contexts[0 if cell.coupling == "full" else hop - 1])
                weight = cell.from_context.weight
            else:
                of = {"x": self.from_x}  # of which nothing is read: z is from_x alone
                weight = cell.from_x.weight[:, :0]
            last = hop == len(self.contexts) - 1
            if cell.to_gates is None:
                made = {**of, **_thirds(weight, None), "addend": self.from_x}
            else:
                h = yield from self.hidden(of, weight)
                made = {"x": h, **_thirds(cell.to_gates.weight, cell.to_gates.bias)}
            yield from self._update(hop, made, last)

    def reading(self, context: Tensor) -> dict[str, object]:
        """Fields of a layer that reads a context kept from the token before."""
        if self.cell.norm_kind != "output":
            return {"x": context}
        return {"x": context, **_norm_of(self.cell.norm), "clamp": self.cell.clamp}

    def hidden(self, of: dict[str, object], weight: Tensor) -> Iterator[DecodeLayer]:
        """The FNN from its first pre-activation on; returns where h is."""
        h = Activation(weight.shape[0])
        yield DecodeLayer(**of, weights=(weight,), addend=self.from_x, y=h, activation=self.activation)
        for layer in self.cell.hidden_layers:
            x, h = h, Activation(layer.out_features)
            yield DecodeLayer(x, **_whole(layer), y=h, activation=self.activation)
        return h

    def _update(self, hop: int, made: dict[str, object], last: bool) -> Iterator[DecodeLayer]:
        cell, state = self.cell, self.contexts[hop]
        # A layer whose every block reads the whole old context cannot put the new one in its place.
        reads_it = made["x"] is state
        context = Activation(self.D, exact=reads_it or cell.norm_kind == "state")  # what becomes the state is float32
        several = len(self.contexts) > 1  # then this context is another hop's input
        if cell.norm_kind == "state":
            # What is normalised before it becomes the state: by the layer that reads it, or by one for that purpose.
            yield DecodeLayer(**made, state=state, context=context, epilogue="context", after_all=several)
            normalised = {"x": context, **_norm_of(cell.norm), "clamp": cell.clamp, "x_out": state}
            if last:
                self.read_out = normalised
            else:
                yield DecodeLayer(**normalised, weights=(cell.start.new_empty(0, self.D),), after_all=True)
            return
        yield DecodeLayer(
            **made,
            state=state,
            state_out=None if reads_it else state,
            context=context,
            epilogue="context",
            after_all=several,
        )
        if reads_it:
            yield DecodeLayer(context, weights=(cell.start.new_empty(0, self.D),), x_out=state)
        if last:
            self.read_out = {"x": context}
            if cell.norm_kind == "output":
                self.read_out |= {**_norm_of(cell.norm), "clamp": cell.clamp}


def _block_layers(
    block: Block, activation: str, contexts: list[Tensor], x: Tensor | Activation, tokens: Tensor | None
) -> Iterator[DecodeLayer]:
    """One block; returns the Activation that takes the place of x."""
    mixer, ffn = block.mixer, block.ffn
    gate, D, E = Activation(mixer.out.in_features), mixer.out.in_features, mixer.out.out_features
    cell = _Cell(mixer.cell, activation, contexts, {"x": x, "tokens": tokens, **_norm_of(block.mixer_norm)})
    yield from cell.layers(mixer.output_gate.weight, gate)
    mixed, inner, thought = Activation(E), Activation(ffn.out.in_features), Activation(E)
    assert gate.width == D
    yield DecodeLayer(
        **cell.read_out, factor=gate, weights=(mixer.out.weight,), residual=x, residual_tokens=tokens, y=mixed
    )
    yield DecodeLayer(
        mixed, **_norm_of(block.ffn_norm), weights=ffn.gate_and_value.weight.chunk(2), y=inner, epilogue="gated"
    )
    yield DecodeLayer(inner, weights=(ffn.out.weight,), residual=mixed, y=thought)
    return thought


def _newllm_layers(model: NewLLM, decoder: ProgramDecoder) -> Iterator[DecodeLayer]:
    x, tokens = model.embedding.weight, decoder.tokens
    if decoder.recall is not None:
        x, tokens = (yield from decoder.recall.layers()), None
    for block, contexts in zip(model.blocks, decoder.contexts.values(), strict=True):
        x = yield from _block_layers(block, model.config.activation, contexts, x, tokens)
        tokens = None
    yield DecodeLayer(x, **_norm_of(model.final_norm), weights=(model.head.weight,), y=decoder.logits)


def _classic_layers(model: Classic, decoder: ProgramDecoder) -> Iterator[DecodeLayer]:
    contexts = decoder.contexts["context"]
    cell = _Cell(model.cell, model.config.activation, contexts, {"x": model.embedding.weight, "tokens": decoder.tokens})
    yield DecodeLayer(**cell.source, **_whole(model.cell.from_x), y=cell.from_x)
    h = yield from cell.hidden(cell.reading(contexts[-1]), model.cell.from_context.weight)
    yield DecodeLayer(h, weights=(model.head.weight,), y=decoder.logits)
    yield from cell.layers()
    if cell.cell.norm_kind == "state":
        empty = cell.cell.start.new_empty(0, cell.D)
        yield DecodeLayer(**cell.read_out, weights=(empty,))
