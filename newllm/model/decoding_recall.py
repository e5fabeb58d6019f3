"""Recall around a program of one token: looked up before it, mixed into the logits after it.

    recalled (B, 3, E), base (B, E)   what the program begins with: x = base + W recalled

On a GPU two kernels (newllm/model/recall_triton.py); elsewhere, and in float64, the operations that the model itself uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from newllm.model.common import Mixing, State
from newllm.model.newllm import NewLLM
from newllm.model.recall import ORDERS, WORDS, Pointed
from newllm.model.transformer import Transformer
from newllm_kernels.decode_linear import TooManyRows
from newllm_kernels.decode_linear.program import Activation, DecodeLayer

Made = TypeVar("Made")


def fitting(build: Callable[[], Made], step: RecallStep | None, model: NewLLM | Transformer) -> Made:
    """What `build` makes; once more, with the product with recalled words split, where that is what is too wide for it."""
    try:
        return build()
    except TooManyRows:
        # Only where that product is the widest layer does splitting it help.
        if step is None or max(model.recall.out.weight.shape) <= model.config.ffn_dim:
            raise
        step.split_by_order()
        return build()


class RecallStep:
    """The tables of `rows` texts, and what they say of a token, in buffers that stay in place. dtype: of the buffers, what the model sums in."""

    split = False

    def __init__(self, model: NewLLM | Transformer, rows: int, tables: State, dtype: torch.dtype) -> None:
        self.recall, self.embedding, self.tables = model.recall, model.embedding, tables
        device, E = model.embedding.weight.device, model.config.embed_dim
        self.recalled = torch.zeros(rows, ORDERS, E, dtype=dtype, device=device)
        self.base = torch.zeros(rows, E, dtype=dtype, device=device)
        self.fused = device.type == "cuda" and dtype == torch.float32 and find_spec("triton") is not None
        self.words = torch.zeros(rows, WORDS, dtype=torch.int64, device=device)
        self.groups = torch.zeros(rows, dtype=torch.int64, device=device)
        self.total = torch.zeros(rows, dtype=dtype, device=device)  # of recent words
        self.pointed: Pointed | None = None
        self.next: State = {}

    def layers(self) -> Iterator[DecodeLayer]:
        """x = base + W recalled; returns the Activation that takes x, y of the last layer."""
        weight, x = self.recall.out.weight, self.base
        E = weight.shape[0]
        pieces = [(self.recalled.flatten(1), weight)]
        if self.split:  # (B, 3, E) of which an order is one piece of memory
            pieces = [(self.recalled[:, n], weight[:, n * E : (n + 1) * E]) for n in range(ORDERS)]
        for recalled, part in pieces:
            x, before = Activation(E), x
            yield DecodeLayer(recalled, weights=(part,), residual=before, y=x)
        return x

    def split_by_order(self) -> None:
        """Three layers of width E instead of one of 3 E: where that is too wide for the program."""
        self.split, self.recalled = True, torch.zeros_like(self.recalled.transpose(0, 1).contiguous()).transpose(0, 1)

    def load(self, state: State) -> None:
        """Go on from a state of the model."""
        for key, table in self.tables.items():
            table.copy_(state[key])
        self.total.copy_(self.tables["recall.recent"].sum(1))

    def before(self, tokens: Tensor) -> None:
        """tokens (B,) -> recalled and base."""
        if self.fused:
            from newllm.model.recall_triton import look_up  # not at the top: it needs Triton

            look_up(
                tokens, self.tables["recall.entries"], self.tables["recall.tokens"], self.embedding.weight,
                self.recall.flags.weight, self.recalled, self.base, self.words, self.groups,
            )  # fmt: skip
            return
        base, recalled, self.pointed, self.next = self.recall.parts(tokens[:, None], self.embedding, self.tables)
        self.base.copy_(base[:, 0])
        self.recalled.copy_(recalled[:, 0].view(self.recalled.shape))

    def after(self, tokens: Tensor, logits: Tensor, mixing: Mixing) -> None:
        """logits (B, V) of the softmax become those of all of it, as `Pointed.mixed_logits` says."""
        if self.fused:
            from newllm.model.recall_triton import mix

            recent = self.tables["recall.recent"]
            mix(logits, tokens, self.words, self.groups, self.recall.shares, recent, self.total, mixing)
            return
        logits.copy_(self.pointed.mixed_logits(logits[:, None], mixing)[:, 0])
        for key, table in self.tables.items():
            table.copy_(self.next[key])
