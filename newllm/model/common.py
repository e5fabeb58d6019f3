"""What the architectures share: the interface of a language model, the feed-forward network, helpers for states.

A *state* is everything a model remembers of the text so far: a flat dict of tensors, batch first in every one of them,
so that it can be detached, indexed by row, or saved as safetensors. `None` stands for the start of a text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from newllm.config import ModelConfig
from newllm.cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from newllm.model.recall import Pointed

State = dict[str, Tensor]

NONE = -1  # in place of a token: there is none

ACTIVATION = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class Mixing(NamedTuple):
    """How recall goes into logits that are drawn from: the temperature that they will be divided by, and how much of its share it has."""

    temperature: float = 1.0
    recall_share: float = 1.0


AS_IT_IS = Mixing()


class LanguageModel(nn.Module):
    """Base of every architecture: `model(tokens, state) -> (logits, new_state)`.

    tokens (B, T) int64; logits (B, T, V); logits[:, t] predict tokens[:, t + 1]. Feeding a text in pieces, each with
    the state the last one returned, gives the logits of the whole text ("golden property", docs/model.md).

    An architecture defines `features`, what the output matrix `head` reads. Training and evaluation ask for the `nll`
    of features, which never holds all logits at once. Features are a tensor or, where the softmax is not all there is, `Pointed`.
    """

    carries_context = True  # whether what it remembers of a text goes on from segment to segment in training
    head: nn.Linear  # (F -> V), no bias

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_dim if config.architecture == "classic" else config.embed_dim  # F
        self.mixture = Mixture(width, config.softmaxes) if config.softmaxes > 1 else None
        self.output_dropout = Dropout(config.output_dropout, config.locked_dropout)

    def features(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor | Pointed, State]:
        """tokens (B, T) int64 -> features (B, T, F), state after the last token."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, state: State | None = None, mixing: Mixing = AS_IT_IS) -> tuple[Tensor, State]:
        """tokens (B, T) int64 -> logits (B, T, V), state after the last token. `mixing`: of `logits`."""
        x, state = self.features(tokens, state)
        return self.logits(x, mixing), state

    def logits(self, x: Tensor | Pointed, mixing: Mixing = AS_IT_IS) -> Tensor:
        """features (B, T, F) -> logits (B, T, V); of a mixture, logarithms of its probabilities. Only features that point at words have a
        use for `mixing`."""
        if not isinstance(x, Tensor):
            return x.mixed_logits(self.logits(x.x), mixing)
        if self.mixture is None:
            return self.head(self.output_dropout(x))
        shares, latent = self.mixture(x)  # (B, T, K), (B, T, K, F)
        each = self.head(self._drop_latent(latent)).to(shares.dtype).log_softmax(-1)  # (B, T, K, V)
        return (shares[..., None] + each).logsumexp(-2)

    def nll(self, x: Tensor | Pointed, targets: Tensor, advice: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """features (B, T, F), targets (B, T) int64 -> negative log-likelihood of each target (B, T), float32.

        advice: further words (B, T, K) int64, each once at its place, and what they share of the target (B, T, K); not of a mixture.
        """
        if not isinstance(x, Tensor):
            if advice is not None:
                raise ValueError("advice: features that point at a word take none")
            return x.mixed(self.nll(x.x, targets), targets)
        B, T, F_ = x.shape
        if self.mixture is None:
            x = self.output_dropout(x)
            further = () if advice is None else tuple(part.flatten(0, 1) for part in advice)
            return linear_cross_entropy(x.reshape(-1, F_), self.head.weight, targets.reshape(-1), *further).view(B, T)
        if advice is not None:
            raise ValueError("advice: a mixture of softmaxes takes none")
        shares, latent = self.mixture(x)
        repeated = targets[..., None].expand(shares.shape)  # (B, T, K)
        latent = self._drop_latent(latent).reshape(-1, F_)
        each = linear_cross_entropy(latent, self.head.weight, repeated.reshape(-1)).view(shares.shape)
        return -(shares - each).logsumexp(-1)

    def _drop_latent(self, latent: Tensor) -> Tensor:
        """Dropout of (B, T, K, F), one mask for all T where it is locked."""
        return self.output_dropout(latent.flatten(2)).view(latent.shape)

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> State:
        """The state that `None` stands for, for `batch_size` texts."""
        raise NotImplementedError

    def carried(self, state: State) -> State:
        """What of a state the next segment of training starts from; where it is nothing, it starts afresh."""
        return state

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


class Dropout(nn.Module):
    """Dropout of (B, T, E). Locked ("variational"): what is dropped is dropped at every step of a text.

    Source: Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks" (2016).
    """

    def __init__(self, p: float, locked: bool) -> None:
        super().__init__()
        self.p, self.locked = p, locked

    def forward(self, x: Tensor) -> Tensor:
        if not self.locked or not self.training or self.p == 0:
            return F.dropout(x, self.p, self.training)
        return x * F.dropout(torch.ones_like(x[:, :1]), self.p)


def input_dropout(config: ModelConfig) -> Dropout:
    """The dropout of embedded tokens."""
    return Dropout(config.dropout if config.input_dropout is None else config.input_dropout, config.locked_dropout)


class Embedding(nn.Embedding):
    """Embeds tokens (B, T) -> (B, T, E). In training every word is left out with probability p, wherever it stands."""

    def __init__(self, vocab_size: int, embed_dim: int, p: float) -> None:
        super().__init__(vocab_size, embed_dim)
        self.p = p

    def forward(self, tokens: Tensor) -> Tensor:
        x = super().forward(tokens)
        if self.training and self.p > 0:
            x = x * F.dropout(self.weight.new_ones(self.num_embeddings), self.p)[tokens][..., None]
        return x


class Mixture(nn.Module):
    """What K softmaxes over one output matrix read, and their shares: p(token) = sum_k pi_k softmax(W h_k).

    x (..., F) -> log pi (..., K), float32 (float64 for float64), and h (..., K, F), h_k = tanh(W_k x).

    Source: Yang, Dai, Salakhutdinov and Cohen, "Breaking the softmax bottleneck" (2018).
    """

    def __init__(self, width: int, softmaxes: int) -> None:
        super().__init__()
        self.softmaxes = softmaxes
        self.shares = nn.Linear(width, softmaxes, bias=False)
        self.latent = nn.Linear(width, softmaxes * width)
        init_linear(self.shares)
        init_linear(self.latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        latent = torch.tanh(self.latent(x)).unflatten(-1, (self.softmaxes, -1))
        return self.shares(x).to(wide).log_softmax(-1), latent


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
