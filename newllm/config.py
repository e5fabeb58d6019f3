"""What a model is made of: one frozen dataclass, five presets, and the Transformer to compare any of them with.

A config is plain data: it validates itself when it is made, goes to JSON and comes back unchanged, and knows
nothing about weights. Dimension letters, here and in `newllm.model`:

    B batch    T time    E embed_dim    H hidden_dim    D context_dim    F ffn_dim    V vocab_size    K hops
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

ARCHITECTURES = ("newllm", "classic", "transformer")
COUPLINGS = ("none", "hops", "full")
NORMS = ("state", "output", None)
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")

_POSITIVE_INTS = (
    "vocab_size", "embed_dim", "hidden_dim", "context_dim", "num_layers", "ffn_dim", "hops", "num_heads", "max_seq_len",
    "softmaxes",
)  # fmt: skip


MAX_RECALL = 2**24  # entries: a quarter of a gigabyte a text and table


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's shape. Raises ValueError naming the field when a value makes no sense.

    Which fields an architecture reads:

    - `newllm`: all but `num_heads`, `max_seq_len`; `hidden_dim` and `activation` only where `fnn_layers > 0`.
    - `classic`: one cell, so not `num_layers`, `ffn_dim`, `recall`, `recall_dropout`, `num_heads`, `max_seq_len`, `tie_embeddings`.
    - `transformer`: `vocab_size`, `embed_dim`, `num_layers`, `ffn_dim`, `recall`, all dropouts but `recurrent_dropout`, `softmaxes`,
      `tie_embeddings`, `num_heads`, `max_seq_len`.
    """

    architecture: str = "newllm"  # "newllm" residual stack | "classic" single cell | "transformer" baseline
    vocab_size: int = 4096  # V
    embed_dim: int = 256  # E: width of the residual stream
    hidden_dim: int = 512  # H: width of the FNN that computes the gates
    context_dim: int = 256  # D: width of one context vector
    num_layers: int = 2
    ffn_dim: int = 512  # F: inner width of the SwiGLU feed-forward network
    fnn_layers: int = 1  # linear+activation layers before the gates; 0: gates straight from [x ; c]
    activation: str = "silu"  # of the FNN
    coupling: str = "none"  # what the gates see of the context: "none" | "hops" | "full"
    hops: int = 1  # K, read where coupling is "hops"
    norm: str | None = "output"  # LayerNorm "state": in the loop | "output": on what is read | None
    clamp: float = 10.0  # bound on the normalised context
    dropout: float = 0.0  # of what a layer adds to the residual stream
    input_dropout: float | None = None  # of the embedded tokens; None: as `dropout`
    output_dropout: float = 0.0  # of what the output matrix reads
    embed_dropout: float = 0.0  # of whole words, wherever they stand in the segment
    context_init: float = 1.0  # first weights that read the context, as a multiple of those that read the input
    forget_init: float = 4.0  # forget biases are spread evenly from 0 to it at first
    input_init: float = 0.0  # input biases are -input_init times those at first: 1 makes what is kept and written 1
    recurrent_dropout: float = 0.0  # of single weights between the last context and the gates (DropConnect)
    locked_dropout: bool = False  # one mask for all steps of a text ("variational"), for `dropout`, input and output
    recall: int = (
        0  # S: entries of each table of what followed the last 1, 2 and 3 tokens (newllm/model/recall.py); 0: none
    )
    recall_dropout: float = 0.0  # of single recalled words among the inputs
    softmaxes: int = 1  # of the mixture that gives the next token; 1: one softmax
    tie_embeddings: bool = True
    num_heads: int = 4
    max_seq_len: int = 512  # window of the Transformer's attention, in tokens

    def __post_init__(self) -> None:
        for name in _POSITIVE_INTS:
            self._require_int(name, minimum=1)
        self._require_int("fnn_layers", minimum=0)
        self._require_int("recall", minimum=0)
        self._require_choice("architecture", ARCHITECTURES)
        self._require_choice("activation", ACTIVATIONS)
        self._require_choice("coupling", COUPLINGS)
        self._require_choice("norm", NORMS)
        self._require(_is_number(self.clamp) and self.clamp > 0, "clamp", "a finite number above 0")
        self._require(
            _is_number(self.context_init) and self.context_init >= 0, "context_init", "a number of at least 0"
        )
        for name in ("forget_init", "input_init"):
            self._require(_is_number(getattr(self, name)), name, "a finite number")
        for name in (
            "dropout",
            "input_dropout",
            "output_dropout",
            "embed_dropout",
            "recurrent_dropout",
            "recall_dropout",
        ):
            value = getattr(self, name)
            fits = (_is_number(value) and 0 <= value < 1) or (name == "input_dropout" and value is None)
            self._require(fits, name, "a number in [0, 1)")
        for name in ("locked_dropout", "tie_embeddings"):
            self._require(isinstance(getattr(self, name), bool), name, "True or False")
        self._require(self.recall <= MAX_RECALL, "recall", f"at most {MAX_RECALL:,} entries of a table")
        self._require(self.recall == 0 or self.architecture != "classic", "recall", '0 with architecture="classic"')
        self._require(self.recall > 0 or self.recall_dropout == 0, "recall_dropout", "0: there is no recall")
        if self.architecture == "transformer":
            even_heads = self.embed_dim % (2 * self.num_heads) == 0  # RoPE turns pairs of features
            self._require(even_heads, "num_heads", f"heads of an even width that divide embed_dim={self.embed_dim}")
        else:
            self._require(
                self.hops == 1 or self.coupling == "hops", "hops", f'1 unless coupling="hops" (it is "{self.coupling}")'
            )
            reads = self.reads_context or self.recurrent_dropout == 0
            self._require(reads, "recurrent_dropout", "0: no weight of this coupling reads the context")
            reads = self.reads_context or self.context_init == 1
            self._require(reads, "context_init", "1: no weight of this coupling reads the context")
        if self.architecture == "classic":
            self._require(
                self.coupling != "none",
                "coupling",
                '"full" or "hops": the classic cell reads its context only through the coupling',
            )
            self._require(self.fnn_layers >= 1, "fnn_layers", "1 or more: the classic cell's logits are W_o h_t")

    @property
    def unread(self) -> set[str]:
        """Fields that change nothing about this model: what the options of the command line are told by."""
        if self.architecture == "transformer":
            return {
                "hidden_dim", "context_dim", "fnn_layers", "activation", "coupling", "hops", "norm", "clamp", "context_init", "forget_init",
                "input_init", "recurrent_dropout",
            }  # fmt: skip
        attention = {"num_heads", "max_seq_len"}
        if self.architecture == "classic":
            return attention | {"num_layers", "ffn_dim", "recall", "recall_dropout", "tie_embeddings"}
        return (
            attention
            | (set() if self.fnn_layers else {"hidden_dim", "activation"})
            | (set() if self.norm else {"clamp"})
        )

    @property
    def reads_context(self) -> bool:
        """Whether the gates have weights for the context: a mixer of one hop has no context to read, and none for it.
        The classic cell reads its last hop too."""
        return self.coupling == "full" or self.hops > 1 or self.architecture == "classic"

    def _require(self, ok: bool, name: str, wanted: str) -> None:
        if not ok:
            raise ValueError(f"ModelConfig.{name} is {getattr(self, name)!r}, wanted {wanted}")

    def _require_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
        self._require(ok, name, f"an integer of at least {minimum}")

    def _require_choice(self, name: str, choices: tuple[str | None, ...]) -> None:
        value = getattr(self, name)
        ok = (value is None or isinstance(value, str)) and value in choices
        self._require(ok, name, "one of " + ", ".join(repr(choice) for choice in choices))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict that json.dumps takes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`. Fields left out take their defaults; unknown or ill-typed ones raise ValueError."""
        if not isinstance(values, dict):
            raise ValueError(f"ModelConfig.from_dict wants a dict of fields, got {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"ModelConfig has no field {', '.join(unknown)}; it has {', '.join(known)}")
        return cls(**values)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


PRESETS: dict[str, ModelConfig] = {
    # The cell of docs/model.md as it stands: one context, LayerNorm in the loop, logits from the hidden layer.
    "classic": ModelConfig(
        architecture="classic", vocab_size=4096, embed_dim=256, hidden_dim=512, context_dim=256, num_layers=1,
        fnn_layers=1, activation="relu", coupling="full", norm="state",
    ),
    # Small enough to learn from half a megabyte of text on two CPU cores while one waits. Forget and input biases: perplexity 39.3 where
    # it was 42.8 with 4 and 0; recall: 21.5.
    "tiny": ModelConfig(
        vocab_size=2048, embed_dim=192, hidden_dim=192, context_dim=256, num_layers=2, ffn_dim=512, fnn_layers=0,
        dropout=0.1, forget_init=2.0, input_init=1.0, recall=4096, max_seq_len=256,
    ),
    "40m": ModelConfig(
        vocab_size=16384, embed_dim=512, hidden_dim=512, context_dim=768, num_layers=8, ffn_dim=1280, fnn_layers=0,
        input_init=1.0, recall=16384, num_heads=8, max_seq_len=1024,
    ),
    "100m": ModelConfig(
        vocab_size=32768, embed_dim=768, hidden_dim=768, context_dim=768, num_layers=12, ffn_dim=1344, fnn_layers=0,
        input_init=1.0, recall=16384, num_heads=12, max_seq_len=1024,
    ),
    "1b": ModelConfig(
        vocab_size=32768, embed_dim=2048, hidden_dim=2048, context_dim=2048, num_layers=24, ffn_dim=2992, fnn_layers=0,
        input_init=1.0, recall=16384, num_heads=32, max_seq_len=2048,
    ),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """The preset of that name. Raises ValueError listing the names there are."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def transformer_like(config: ModelConfig, *, recall: bool = False) -> ModelConfig:
    """A Transformer with the vocabulary, width, dropout and total parameter count (within 2%) of `config`; with `recall`, its tables too.

    The number of layers is the one at which the feed-forward width that meets the count comes nearest to the customary
    8/3 of embed_dim; heads are 64 wide where that divides embed_dim, else the widest even divisor below.
    Raises ValueError where no such Transformer exists (a target smaller than one layer of attention).
    """
    if config.architecture == "transformer":
        return config
    embed_dim = config.embed_dim + config.embed_dim % 2
    head_dim = next(width for width in range(64, 0, -2) if embed_dim % width == 0)
    template = dataclasses.replace(
        config, architecture="transformer", embed_dim=embed_dim, num_heads=embed_dim // head_dim,
        tie_embeddings=True, coupling="none", hops=1, recurrent_dropout=0.0, context_init=1.0, forget_init=4.0,
        input_init=0.0,
    )  # fmt: skip
    if not recall:
        template = dataclasses.replace(template, recall=0, recall_dropout=0.0)
    target = count_parameters(config)
    ideal = 8 / 3 * embed_dim
    fits = sorted(_transformers_of(template, target), key=lambda fit: abs(math.log(fit.ffn_dim / ideal)))
    if not fits or abs(count_parameters(fits[0]) / target - 1) > 0.02:
        raise ValueError(f"config: has {target} parameters, and no Transformer of embed_dim={embed_dim} has as many")
    return fits[0]


def _transformers_of(template: ModelConfig, target: int) -> list[ModelConfig]:
    """For every number of layers that leaves room for a feed-forward network, the one nearest to `target`."""
    one, two = (count_parameters(dataclasses.replace(template, num_layers=n, ffn_dim=1)) for n in (1, 2))
    layer, per_unit = two - one, 3 * template.embed_dim  # a layer of ffn_dim=1; SwiGLU has three E x F matrices
    step = 8 if template.embed_dim >= 256 else 1  # rounder widths where a step of 8 stays well under the 2%
    candidates = []
    for num_layers in range(1, (target - one) // layer + 2):
        room = target - one - (num_layers - 1) * layer
        ffn_dim = step * round((1 + room / (per_unit * num_layers)) / step)
        candidates.append(dataclasses.replace(template, num_layers=num_layers, ffn_dim=max(1, ffn_dim)))
    return candidates


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of the model of this config, tied ones once; nothing is allocated."""
    import torch

    from newllm.model import build_model  # not at the top: newllm.model imports this file

    with torch.device("meta"):
        return build_model(config).num_parameters()
