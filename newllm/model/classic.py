"""The classic New-LLM: one context vector, one cell, logits straight from the hidden layer.

    h_t = FNN([x_t ; c_{t-1}])        c_t = cell(h_t, c_{t-1})        logits_t = W_o h_t

With coupling="hops" the hidden layer behind the logits reads the contexts of the last hop, as one hop more would.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from newllm.config import ModelConfig
from newllm.model.common import Dropout, Embedding, LanguageModel, State, init_linear, input_dropout
from newllm.model.mixer import ContextCell, shift


class Classic(LanguageModel):
    """State: `context` (B, K, D) float32, K = 1 but for coupling="hops"."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        # Unit variance, as the context has.
        self.embedding = Embedding(config.vocab_size, config.embed_dim, config.embed_dropout)
        self.input_dropout = input_dropout(config)
        self.dropout = Dropout(config.dropout, config.locked_dropout)
        self.cell = ContextCell(config)
        self.head = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
        init_linear(self.head)

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> State:
        return {"context": self.cell.initial_state(batch_size, device)}

    def features(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens (B, T) int64 -> hidden layer h (B, T, H), state after the last token."""
        self.check_inputs(tokens, state, ["context"])
        start = self.cell.initial_state(tokens.shape[0]) if state is None else state["context"]  # (B, K, D)
        from_x = self.cell.from_x(self.input_dropout(self.embedding(tokens)))  # (B, T, H)
        reading = self.cell.reading_weight()
        contexts, end = self.cell(from_x, start, reading)  # (B, T, D), (B, K, D)
        # The cell needs h step by step; the logits need it once more, but for all T in one product.
        h = self.cell.hidden(self.cell.with_context(from_x, shift(contexts, start[:, -1]), reading))  # (B, T, H)
        return self.dropout(h), {"context": end}
