"""Recall around a program of one token: looked up before it, mixed into the logits after it.

    recalled (B, 3 E), base (B, E)   what the program begins with: x = base + W recalled

On a GPU two kernels (newllm/model/recall_triton.py); elsewhere, and in float64, the operations that the model itself uses.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from newllm.model.common import Mixing, State
from newllm.model.newllm import NewLLM
from newllm.model.recall import ORDERS, WORDS, Pointed


class RecallStep:
    """The tables of `rows` texts, and what they say of a token, in buffers that stay in place."""

    def __init__(self, model: NewLLM, rows: int, tables: State, dtype: torch.dtype) -> None:
        self.recall, self.embedding, self.tables = model.recall, model.embedding, tables
        device, E = model.embedding.weight.device, model.config.embed_dim
        self.recalled = torch.zeros(rows, ORDERS * E, dtype=dtype, device=device)
        self.base = torch.zeros(rows, E, dtype=dtype, device=device)
        self.fused = device.type == "cuda" and dtype == torch.float32 and find_spec("triton") is not None
        self.words = torch.zeros(rows, WORDS, dtype=torch.int64, device=device)
        self.groups = torch.zeros(rows, dtype=torch.int64, device=device)
        self.total = torch.zeros(rows, dtype=dtype, device=device)  # of recent words
        self.pointed: Pointed | None = None
        self.next: State = {}

    def load(self, state: State) -> None:
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
        self.recalled.copy_(recalled[:, 0])

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
