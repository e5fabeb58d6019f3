"""The baseline: a pre-norm Transformer decoder with RoPE, SwiGLU, fused attention and tied embeddings.

Attention looks back over a window of max_seq_len tokens, the present one included, in training and in generation
alike, so the key-value cache is bounded, and feeding tokens one at a time gives the logits of the parallel forward for
texts of any length. With `recall` it has the same tables as New-LLM, so that the two can be compared with and without.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from newllm.config import ModelConfig
from newllm.model.common import Dropout, Embedding, LanguageModel, State, SwiGLU, init_linear, input_dropout
from newllm.model.recall import TABLES, Pointed, Recall, initial_tables
from newllm_kernels import LayerNorm

ROPE_BASE = 10000.0


def rotary_angles(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (..., T, head_dim / 2) of every position's angles.

    The angles are taken in float64: a float32 angle of position 100,000 is only good to 1e-2.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions[..., None].double() * ROPE_BASE**-exponent
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the feature pairs (j, j + head_dim / 2) of x (B, heads, T, head_dim) by their positions' angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def window_mask(position: Tensor, cached: int, steps: int, window: int) -> Tensor:
    """Which keys each of `steps` queries sees: (B, 1, steps, cached + steps) bool.

    The keys are those of `cached` earlier tokens, then those of the queries' own; position (B,) is the number of tokens
    before the first query. Cache entries in front of a row's first token are padding.
    """
    device = position.device
    query = torch.arange(steps, device=device)[:, None]  # time relative to the first query
    key = torch.arange(-cached, steps, device=device)
    in_window = (key <= query) & (key > query - window)  # (steps, cached + steps)
    real = position[:, None] + key >= 0  # (B, cached + steps)
    return (in_window & real[:, None])[:, None]


class Attention(nn.Module):
    """Causal multi-head attention over a sliding window."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=False)
        self.out = nn.Linear(config.embed_dim, config.embed_dim, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, E) -> (y (B, T, E), keys, values (B, heads, S + T, head_dim)); without a mask, plainly causal."""
        B, T, E = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, E // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, head_dim) each
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k = torch.cat((cache[0].to(k.dtype), k), dim=2)
            v = torch.cat((cache[1].to(v.dtype), v), dim=2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        return self.out(y.transpose(1, 2).reshape(B, T, E)), k, v


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.embed_dim)
        self.attention = Attention(config)
        self.ffn_norm = LayerNorm(config.embed_dim)
        self.ffn = SwiGLU(config.embed_dim, config.ffn_dim)
        self.dropout = Dropout(config.dropout, config.locked_dropout)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, k, v = self.attention(self.attention_norm(x), rotation, mask, cache)
        x = x + self.dropout(y)
        x = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return x, k, v


class Transformer(LanguageModel):
    """State: `position` (B,) int64, tokens read so far, and per layer `layers.<n>.keys`, `layers.<n>.values`
    (B, heads, S, head_dim), S <= max_seq_len - 1, in the dtype attention computes in; with recall its tables, as NewLLM has them.

    A state of those tables alone is that of a text whose attention begins here: in training segments start so.
    """

    carries_context = False  # attention starts every segment of training afresh; the cache serves generation

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
            init_linear(block.attention.qkv)
            init_linear(block.ffn.gate_and_value)
            for out in (block.attention.out, block.ffn.out):  # every block begins as the identity: measured best
                nn.init.zeros_(out.weight)

    def _keys(self) -> list[str]:
        return ["position"] + [f"layers.{n}.{what}" for n in range(len(self.blocks)) for what in ("keys", "values")]

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> State:
        weight = self.embedding.weight
        device = weight.device if device is None else torch.device(device)
        head_dim = self.config.embed_dim // self.config.num_heads
        empty = torch.empty(batch_size, self.config.num_heads, 0, head_dim, device=device, dtype=weight.dtype)
        state = {key: empty.clone() for key in self._keys()}
        state["position"] = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return state | self._initial_tables(batch_size, device)

    def _initial_tables(self, batch_size: int, device: torch.device) -> State:
        if self.recall is None:
            return {}
        wide = torch.promote_types(self.embedding.weight.dtype, torch.float32)
        return initial_tables(batch_size, self.config, device, wide)

    def carried(self, state: State) -> State:
        return {} if self.recall is None else {key: state[key] for key in TABLES}

    def features(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor | Pointed, State]:
        """tokens (B, T) int64 -> features (B, T, E), state after the last token. With recall, where it is not trained, they point at words."""
        tables = () if self.recall is None else TABLES
        afresh = state is not None and bool(tables) and state.keys() == set(tables)  # attention begins here
        self.check_inputs(tokens, state, tables if afresh else [*self._keys(), *tables])
        B, T = tokens.shape
        window = self.config.max_seq_len
        if self.recall is None:
            x, new_state = self.embedding(tokens), {}  # (B, T, E)
        else:
            before = self._initial_tables(B, tokens.device) if state is None else {key: state[key] for key in TABLES}
            x, pointed, new_state = self.recall(tokens, self.embedding, before)
        x = self.dropout(x)

        if state is None or afresh:
            state = None
            position = torch.zeros(B, dtype=torch.int64, device=tokens.device)
            cached, fully_causal = 0, window >= T
        else:
            position, cached, fully_causal = state["position"], state["layers.0.keys"].shape[2], False
        mask = None if fully_causal else window_mask(position, cached, T, window)
        positions = position[:, None] + torch.arange(T, device=tokens.device)  # (B, T)
        # Angles of 16 bits would blur positions by a part in 256 of a turn.
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rotary_angles(positions, self.config.embed_dim // self.config.num_heads, wide)
        rotation = (cos[:, None], sin[:, None])  # (B, 1, T, head_dim / 2): the same for all heads

        new_state["position"] = position + T
        keep = max(cached + T - (window - 1), 0)  # the next token sees window - 1 tokens before it
        for n, block in enumerate(self.blocks):
            cache = None if state is None else (state[f"layers.{n}.keys"], state[f"layers.{n}.values"])
            x, k, v = block(x, rotation, mask, cache)
            new_state[f"layers.{n}.keys"] = k[:, :, keep:]
            new_state[f"layers.{n}.values"] = v[:, :, keep:]
        x = self.final_norm(x)
        if self.recall is None or self.training:
            return x, new_state
        return pointed._replace(x=x), new_state
