"""New-LLM: a residual stack of context mixers and feed-forward networks.

    x = embedding(tokens)                        (B, T, E), with `recall` and what followed such places before
    L times:  x = x + mixer(LayerNorm(x))        memory: along time, through contexts of fixed size
              x = x + ffn(LayerNorm(x))          thought: along features
    logits = head(LayerNorm(x))                  (B, T, V), the head tied to the embedding

All it remembers of a text is K context vectors a layer and the tables of `recall`, however long the text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from newllm.config import ModelConfig
from newllm.model.common import Dropout, Embedding, LanguageModel, State, SwiGLU, init_linear, input_dropout
from newllm.model.mixer import ContextMixer
from newllm.model.recall import TABLES, Pointed, Recall, initial_tables
from newllm_kernels import LayerNorm


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm = LayerNorm(config.embed_dim)
        self.mixer = ContextMixer(config)
        self.ffn_norm = LayerNorm(config.embed_dim)
        self.ffn = SwiGLU(config.embed_dim, config.ffn_dim)
        self.dropout = Dropout(config.dropout, config.locked_dropout)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, E), state (B, K, D) -> the same, one layer on and T steps on."""
        y, state = self.mixer(self.mixer_norm(x), state)
        x = x + self.dropout(y)
        x = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return x, state


class NewLLM(LanguageModel):
    """State: per layer `layers.<n>.context` (B, K, D) float32, K = 1 but for coupling="hops"; with recall `recall.entries` (B, 3, S, 4) int32 (int64 for more than 2^17 words),
    `recall.tokens` (B, 3) int64 and `recall.recent` (B, V) float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config.vocab_size, config.embed_dim, config.embed_dropout)
        self.recall = Recall(config) if config.recall else None
        self.dropout = input_dropout(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = LayerNorm(config.embed_dim)
        self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight
        else:
            nn.init.normal_(self.head.weight, std=0.02)
        for block in self.blocks:
            init_linear(block.mixer.output_gate)
            init_linear(block.ffn.gate_and_value)
            for out in (block.mixer.out, block.ffn.out):  # every block begins as the identity: measured best
                nn.init.zeros_(out.weight)

    def _keys(self) -> list[str]:
        """Of the contexts."""
        return [f"layers.{n}.context" for n in range(len(self.blocks))]

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> State:
        cells = (block.mixer.cell for block in self.blocks)
        state = {key: cell.initial_state(batch_size, device) for key, cell in zip(self._keys(), cells, strict=True)}
        if self.recall is not None:
            first = next(iter(state.values()))  # a context: where and how exact they are
            state |= initial_tables(batch_size, self.config, first.device, first.dtype)
        return state

    def features(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor | Pointed, State]:
        """tokens (B, T) int64 -> features (B, T, E), state after the last token. With recall, where it is not trained, they point at words."""
        self.check_inputs(tokens, state, [*self._keys(), *([] if self.recall is None else TABLES)])
        if state is None:
            state = self.initial_state(tokens.shape[0])
        if self.recall is None:
            x, new_state = self.embedding(tokens), {}  # (B, T, E)
        else:
            x, pointed, new_state = self.recall(tokens, self.embedding, state)
        x = self.dropout(x)
        for key, block in zip(self._keys(), self.blocks, strict=True):
            x, new_state[key] = block(x, state[key])
        x = self.final_norm(x)
        if self.recall is None or self.training:
            return x, new_state
        return pointed._replace(x=x), new_state
