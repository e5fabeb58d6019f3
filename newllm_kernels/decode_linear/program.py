"""Programs: the linear layers of one token, one under the other, on buffers that stay where they are.

    program = DecodeProgram([DecodeLayer(...), ...])
    program.run()          every token: reads and writes the same tensors, so that it fits into a CUDA graph

On a GPU the whole program is one launch, whose weights come as one stream (csrc/cuda/decode.cuh); elsewhere the layers
run one after the other in plain PyTorch. What layers hand to each other are `Activation`s, which only the program sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from newllm_kernels import backends
from newllm_kernels.decode_linear import (
    BARRIER,
    MOST_ROWS,
    NORMALIZE,
    PAIRS,
    RESIDUAL_IS_TABLE,
    X_IS_TABLE,
    check_layer,
    check_shared_memory,
    interleaved_norm,
    reference,
)
from newllm_kernels.numerics import acc_dtype


class Activation:
    """A (B, width) tensor that lives inside a program: written by one layer, read by later ones.

    On a GPU it is rounded to the dtype of the weights where that is of 16 bits, as between layers of PyTorch, unless it is
    `exact`: then it is float32. A residual that is an Activation is float32 in any case.
    """

    def __init__(self, width: int, exact: bool = False) -> None:
        self.width, self.exact = width, exact


@dataclass(frozen=True, eq=False)
class DecodeLayer:
    """One layer, as `decode_linear` computes it, between tensors that exist already or Activations of the program.

    `tokens` (B,) int64: x is a table (V, K) in the dtype of the weights, of which row tokens[b] counts; `residual_tokens`
    says the same of residual. `kept` (B, N) takes y once more. `x_out` (B, K) keeps clamp(LayerNorm(x)); `context` and `state_out` both take the context, as an
    Activation and as a tensor, which may be `state` itself. Tensors that are written are float32 (float64 beside float64). A
    (N, 0) weight makes z of bias and addend alone, a (0, K) one only x_out.

    `after_all`: the layer begins when all before it have ended, on all of the GPU. Needed where it overwrites an Activation or
    a tensor whose readers it does not itself depend on, directly or through other layers.
    """

    x: Tensor | Activation
    weights: tuple[Tensor, ...]
    y: Tensor | Activation | None = None
    biases: tuple[Tensor | None, ...] | None = None
    tokens: Tensor | None = None
    residual_tokens: Tensor | None = None
    kept: Tensor | None = None
    norm: tuple[Tensor | None, Tensor | None] | None = None
    eps: float = 1e-5
    clamp: float = float("inf")
    factor: Activation | None = None
    addend: Activation | None = None
    residual: Tensor | Activation | None = None
    state: Tensor | None = None
    state_out: Tensor | None = None
    context: Activation | None = None
    x_out: Tensor | None = None
    epilogue: str = "linear"
    activation: str = "none"
    after_all: bool = False

    @property
    def all_biases(self) -> tuple[Tensor | None, ...]:
        return self.biases or (None,) * len(self.weights)


class DecodeProgram:
    """Layers for `rows` texts at one token each. Parameters of LayerNorm are copied, weights are read where they lie.

    Raises TypeError or ValueError naming what is wrong with a layer, BackendError where the GPU cannot hold it.
    """

    def __init__(self, layers: Sequence[DecodeLayer], rows: int) -> None:
        if not 0 <= rows <= MOST_ROWS:
            raise ValueError(f"rows: got {rows}, wanted 0 to {MOST_ROWS}")
        self.layers, self.rows = tuple(layers), rows
        for layer in self.layers:
            check_layer(list(layer.weights), list(layer.all_biases), layer.epilogue, layer.activation)
        if not self.layers:
            raise ValueError("layers: got none, wanted at least one")
        self.like = self.layers[0].weights[0]
        self._activations: dict[Activation, Tensor] = {}
        implementation = backends.select("decode_linear", self.like, self.like.shape[1])
        self._packed = implementation.backend == "cuda"
        if self._packed:
            self._norms: list[Tensor | None] = []  # the kernel has only their addresses
            self._pack()

    def run(self) -> None:
        """Compute one token: all layers, in order."""
        if self._packed:
            torch.ops.newllm_native.decode_run(
                self._program, self._counters, self.like, self.rows, self._widest, self._widest_norm
            )
            return
        for layer in self.layers:
            self._run_reference(layer)

    # ---- plain PyTorch ----

    def _value(self, x: Tensor | Activation | None) -> Tensor | None:
        return self._activations[x] if isinstance(x, Activation) else x

    def _keep(self, where: Tensor | Activation | None, value: Tensor) -> None:
        if isinstance(where, Activation):
            self._activations[where] = value
        elif where is not None:
            where.copy_(value)

    def _run_reference(self, layer: DecodeLayer) -> None:
        acc = acc_dtype(self.like.dtype)
        tokens_of_x = layer.tokens
        x, residual = self._value(layer.x)[:, : layer.weights[0].shape[1]], self._value(layer.residual)
        if layer.residual_tokens is not None:
            residual = residual[layer.residual_tokens]
        normalize = layer.norm is not None
        norm_weight, norm_bias = layer.norm if normalize else (None, None)
        if layer.x_out is not None:
            rows = x if tokens_of_x is None else x[tokens_of_x]
            layer.x_out.copy_(reference.prepared(rows, norm_weight, norm_bias, normalize, layer.eps, layer.clamp, acc))
        if layer.weights[0].shape[0] == 0:
            return
        y, context = reference.decode_linear(
            x, list(layer.weights), list(layer.all_biases), tokens_of_x, norm_weight, norm_bias, normalize, layer.eps,
            layer.clamp, self._value(layer.factor), self._value(layer.addend), residual, layer.state, layer.epilogue,
            layer.activation,
        )  # fmt: skip
        self._keep(layer.context, context)
        self._keep(layer.state_out, context)
        self._keep(layer.y, y)
        self._keep(layer.kept, y)

    # ---- CUDA ----

    def _pack(self) -> None:
        """Descriptions of the layers on the device."""
        self._widest = max(layer.weights[0].shape[1] for layer in self.layers)
        self._widest_norm = max(
            (layer.weights[0].shape[1] for layer in self.layers if layer.norm is not None), default=0
        )
        check_shared_memory(len(self.layers), self.rows, self._widest, self._widest_norm, self.like)
        residuals = {layer.residual for layer in self.layers if isinstance(layer.residual, Activation)}
        self._kept = {
            x: torch.zeros(self.rows, x.width, dtype=torch.float32, device=self.like.device) for x in residuals
        }
        self._kept |= {layer.y: layer.kept for layer in self.layers if layer.kept is not None}
        writers: dict[Activation, int] = {}
        self._program = torch.stack([self._describe(layer, n, writers) for n, layer in enumerate(self.layers)])
        self._counters = torch.zeros(2 + len(self.layers), dtype=torch.int64, device=self.like.device)

    def _is_pairs(self, x: Tensor | Activation | None) -> bool:
        return isinstance(x, Activation) and not x.exact and self.like.element_size() == 2

    def _words(self, x: Tensor | Activation | None) -> Tensor | None:
        if not isinstance(x, Activation):
            return x
        if x not in self._activations:
            words = (x.width + 3) // 4 * (2 if self._is_pairs(x) else 4)
            self._activations[x] = torch.zeros(self.rows, words, dtype=torch.int64, device=self.like.device)
        return self._activations[x]

    def _describe(self, layer: DecodeLayer, number: int, writers: dict[Activation, int]) -> Tensor:
        inputs = (layer.x, layer.factor, layer.addend, layer.residual)
        if layer.tokens is not None and layer.residual_tokens is not None:
            raise ValueError(f"layer {number}: got both tokens and residual_tokens, wanted one")
        for name, x in zip(("x", "factor", "addend", "residual"), inputs, strict=True):
            if isinstance(x, Activation) and x not in writers:
                raise ValueError(f"layer {number}: {name} is an Activation that no layer before it writes")
        if layer.addend is not None and self._is_pairs(layer.addend):
            raise ValueError(f"layer {number}: addend is an Activation that is not exact")
        sources = [writers.get(x, 0) if isinstance(x, Activation) else 0 for x in inputs]
        tokens = layer.tokens if layer.residual_tokens is None else layer.residual_tokens
        flags = (
            NORMALIZE * (layer.norm is not None)
            | X_IS_TABLE * (layer.tokens is not None)
            | RESIDUAL_IS_TABLE * (layer.residual_tokens is not None)
            | BARRIER * layer.after_all
        )
        for bit, x in enumerate((layer.x, layer.factor, layer.y, layer.context)):
            flags |= PAIRS << bit if self._is_pairs(x) else 0
        K = layer.weights[0].shape[1]
        norm = None if layer.norm is None else interleaved_norm(*layer.norm, K, self.like)
        self._norms.append(norm)
        x, factor, addend = map(self._words, inputs[:3])
        residual = self._kept.get(layer.residual, layer.residual)
        described = torch.ops.newllm_native.decode_layer(
            x, tokens, factor, addend, residual, self._words(layer.y), self._words(layer.context), self._kept.get(layer.y), norm,
            layer.x_out, list(layer.weights), list(layer.all_biases), layer.state, layer.state_out, layer.eps, layer.clamp,
            flags, sources, reference.EPILOGUES.index(layer.epilogue), list(reference.ACTIVATIONS).index(layer.activation),
        )  # fmt: skip
        for written in (layer.y, layer.context):
            if isinstance(written, Activation):
                writers[written] = number
        return described
