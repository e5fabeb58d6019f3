"""What the architectures share: the interface of a language model, the feed-forward network, helpers for states.

A *state* is everything a model remembers of the text so far: a flat dict of tensors, batch first in every one of them,
so that it can be detached, indexed by row, or saved as safetensors. `None` stands for the start of a text.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from newllm.config import ModelConfig

State = dict[str, Tensor]

ACTIVATION = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class LanguageModel(nn.Module):
    """Base of every architecture: `model(tokens, state) -> (logits, new_state)`.

    tokens (B, T) int64; logits (B, T, V); logits[:, t] predict tokens[:, t + 1]. Feeding a text in pieces, each with
    the state the last one returned, gives the logits of the whole text ("golden property", docs/model.md).
    """

    carries_context = True  # whether training may hand the state of one segment to the next

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> State:
        """The state that `None` stands for, for `batch_size` texts."""
        raise NotImplementedError

    def num_parameters(self) -> int:
        """Trainable numbers, those of tied matrices counted once."""
        return sum(p.numel() for p in self.parameters())

    def check_inputs(self, tokens: Tensor, state: State | None, keys: Iterable[str]) -> None:
        """Raise ValueError naming what is wrong with the arguments of forward."""
        if tokens.dim() != 2 or tokens.shape[1] == 0 or tokens.dtype != torch.int64:
            raise ValueError(f"tokens: got {tuple(tokens.shape)} of {tokens.dtype}, wanted (B, T >= 1) of torch.int64")
        if state is None:
            return
        keys = sorted(keys)
        if sorted(state) != keys:
            raise ValueError(f"state: got the keys {sorted(state)}, wanted {keys}")
        for key, value in state.items():
            if value.shape[0] != tokens.shape[0]:
                raise ValueError(f"state[{key!r}]: holds {value.shape[0]} rows, tokens {tokens.shape[0]}")


class SwiGLU(nn.Module):
    """Feed-forward network W_o (silu(W_a x) * W_b x) of inner width F: (..., E) -> (..., E)."""

    def __init__(self, embed_dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_and_value = nn.Linear(embed_dim, 2 * ffn_dim, bias=False)  # W_a and W_b in one product
        self.out = nn.Linear(ffn_dim, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)  # (..., F) each
        return self.out(F.silu(gate) * value)


def init_linear(linear: nn.Linear, fan_in: int | None = None) -> None:
    """Normal weights that keep the variance of the input, zero bias.

    `fan_in` is the width of the whole input where `linear` reads only a part of it.
    """
    nn.init.normal_(linear.weight, std=(fan_in or linear.in_features) ** -0.5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def detach_state(state: State) -> State:
    """The same state cut off from the graph that computed it: the seam of truncated backpropagation."""
    return {key: value.detach() for key, value in state.items()}


def state_bytes(state: State) -> int:
    """Bytes that the state occupies: the memory of generation, beside the weights."""
    return sum(value.numel() * value.element_size() for value in state.values())


def stack_states(states: list[State]) -> State:
    """One state of several rows out of several states, in their order.

    Key-value caches of different length are padded at the front; the positions in the state tell the model which
    entries are real.
    """
    stacked = {}
    for key in states[0]:
        values = [state[key] for state in states]
        if values[0].dim() == 4:  # a cache (B, heads, S, width): S is what may differ
            longest = max(value.shape[2] for value in values)
            values = [F.pad(value, (0, 0, longest - value.shape[2], 0)) for value in values]
        stacked[key] = torch.cat(values)
    return stacked
