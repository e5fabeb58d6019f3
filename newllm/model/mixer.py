"""The context cell and the context mixer: the recurrence of New-LLM, under its three couplings.

    h_t = FNN([x_t ; r_{t-1}])                               r: what is read of the context
    f_t, i_t, d_t = W_g h_t + b_g
    u_t = sigmoid(f_t) * c_{t-1} + sigmoid(i_t) * tanh(d_t)

    norm="state"    c_t = clamp(LayerNorm(u_t))     r_t = c_t
    norm="output"   c_t = u_t                       r_t = clamp(LayerNorm(c_t))
    norm=None       c_t = u_t                       r_t = c_t

    coupling="none"   the FNN sees x_t only: one scan over time
    coupling="hops"   hop k sees the context of hop k - 1, c^(0) = 0; same weights at every hop: K scans over time
    coupling="full"   the FNN sees its own last context: T steps, one after the other, in one kernel

Hops approach the full cell from outside in time: after K hops the first K - 1 contexts are those of coupling="full".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from newllm.config import ModelConfig
from newllm.model.common import ACTIVATION, init_linear
from newllm_kernels import (
    LayerNorm,
    context_scan_packed,
    context_update_packed,
    gated_scan_layer_norm_packed,
    gated_scan_packed,
    recurrent_context,
)
from newllm_kernels.recurrent_context.solver import Solver


class ContextCell(nn.Module):
    """Contexts of a whole sequence, and the state to go on from. See the formulas at the top of this file.

    The first linear layer of the FNN is split by its input, W [x ; r] = W_x x + W_r r, so that the x part is one matrix
    product for all T. Its output, the pre-activation `z`, is H wide, or 3D where fnn_layers=0: then z are the gates.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, H, D = config.embed_dim, config.hidden_dim, config.context_dim
        self.coupling, self.hops, self.norm_kind, self.clamp = config.coupling, config.hops, config.norm, config.clamp
        self.activation_name, self.activation = config.activation, ACTIVATION[config.activation]
        self.recurrent_dropout = config.recurrent_dropout
        self.solver = Solver("auto")  # of coupling="full" on a GPU

        first_width = H if config.fnn_layers else 3 * D
        self.from_x = nn.Linear(E, first_width)
        self.from_context = nn.Linear(D, first_width, bias=False) if config.reads_context else None
        self.hidden_layers = nn.ModuleList(nn.Linear(H, H) for _ in range(config.fnn_layers - 1))
        self.to_gates = nn.Linear(H, 3 * D) if config.fnn_layers else None
        self.norm = LayerNorm(D) if config.norm else None
        # A zero start would make LayerNorm's 1/std explode on the first step, hence a learned one of unit variance.
        self.start = nn.Parameter(torch.randn(D))
        self._init_weights(config)

    def _init_weights(self, config: ModelConfig) -> None:
        reads = () if self.from_context is None else (self.from_context,)
        fan_in = self.from_x.in_features + sum(linear.in_features for linear in reads)
        for linear in (self.from_x, *reads):
            init_linear(linear, fan_in)
        for linear in reads:
            # A context that nothing has been taught to write is noise in the gates, and the more lasting, the longer it lasts.
            linear.weight.data.mul_(config.context_init)
        for linear in self.hidden_layers:
            init_linear(linear)
        gates = self.from_x
        if self.to_gates is not None:
            init_linear(self.to_gates)
            gates = self.to_gates
        with torch.no_grad():  # memories of many lengths from the first step of training on
            D = self.start.numel()
            gates.bias[:D] = torch.linspace(0.0, config.forget_init, D)
            gates.bias[D : 2 * D] = -config.input_init * gates.bias[:D]

    def initial_state(self, batch_size: int, device: torch.device | None = None) -> Tensor:
        """The learned start, once per hop: (B, K, D), float32 (float64 for a float64 model)."""
        dtype = torch.float64 if self.start.dtype == torch.float64 else torch.float32
        return self.start.to(device=device, dtype=dtype).repeat(batch_size, self.hops, 1)

    def hidden(self, z: Tensor) -> Tensor:
        """Rest of the FNN: pre-activation z (..., H) of the first layer -> h (..., H)."""
        h = self.activation(z)
        for layer in self.hidden_layers:
            h = self.activation(layer(h))
        return h

    def gates(self, z: Tensor) -> Tensor:
        """z -> packed pre-activations [f | i | d] (..., 3D)."""
        return z if self.to_gates is None else self.to_gates(self.hidden(z))

    def read(self, c: Tensor) -> Tensor:
        """Contexts c (..., D) -> what is read of them, r (..., D)."""
        return self.norm(c).clamp(-self.clamp, self.clamp) if self.norm_kind == "output" else c

    def reading_weight(self) -> Tensor | None:
        """W_r (Z, D), None where no context is read. In training single weights of it are dropped, drawn by this call:
        what it returns serves all steps and hops of a segment (DropConnect, as in AWD-LSTM; Merity et al., 2018)."""
        if self.from_context is None:
            return None
        return F.dropout(self.from_context.weight, self.recurrent_dropout, self.training)

    def with_context(self, from_x: Tensor, c: Tensor, reading: Tensor) -> Tensor:
        """z = W_x x + W_r r, of from_x = W_x x (..., Z), the contexts c (..., D) before it and W_r = `reading` (Z, D)."""
        return from_x + F.linear(self.read(c).to(from_x.dtype), reading)

    def forward(self, from_x: Tensor, state: Tensor, reading: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """from_x = self.from_x(x) (B, T, Z), state (B, K, D) -> (contexts (B, T, D), new state (B, K, D)).

        `reading`: what `reading_weight` gave, where its caller uses it too.
        """
        reading = self.reading_weight() if reading is None else reading
        if self.coupling == "full":
            contexts, last = self._in_time(from_x, state[:, 0], reading)
            return contexts, last[:, None]

        z, ends = self._up_to_the_last_hop(from_x, state, reading)
        contexts, end = self._scan(self.gates(z), state[:, -1])  # (B, T, D), (B, D)
        return contexts, torch.stack((*ends, end), dim=1)

    def read_out(self, from_x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As forward, but what is read of the contexts in their place: with norm="output" one operation with the scan."""
        if self.coupling == "full" or self.norm_kind != "output":
            contexts, state = self(from_x, state)
            return self.read(contexts), state
        z, ends = self._up_to_the_last_hop(from_x, state, self.reading_weight())
        norm = self.norm
        r, _, end = gated_scan_layer_norm_packed(
            self.gates(z), state[:, -1], norm.weight, norm.bias, norm.eps, self.clamp
        )
        return r, torch.stack((*ends, end), dim=1)

    def _up_to_the_last_hop(self, from_x: Tensor, state: Tensor, reading: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Pre-activations z (B, T, Z) that the last hop sees, and the states (B, D) that the hops before it end in."""
        z, ends = from_x, []  # the first hop reads c^(0) = 0
        for k in range(self.hops - 1):
            contexts, end = self._scan(self.gates(z), state[:, k])
            ends.append(end)
            z = self.with_context(from_x, shift(contexts, state[:, k]), reading)
        return z, ends

    def _in_time(self, from_x: Tensor, c: Tensor, reading: Tensor) -> tuple[Tensor, Tensor]:
        """Of coupling="full", from_x (B, T, Z): step by step, or in whichever way through time is faster on this GPU."""
        if from_x.shape[1] == 1:  # cheaper than a kernel that gets its weights ready for many steps
            return self._one_step(from_x, c, reading)
        if not from_x.is_cuda:  # a resumed run walks through the same losses, whatever was seen before
            return self.full(from_x, c, reading)
        H = 0 if self.to_gates is None else self.to_gates.in_features
        layers = (self.to_gates is not None) + len(self.hidden_layers)
        with self.solver.way(from_x, c.shape[1], H, layers, self.norm_kind) as way:
            return self.full(from_x, c, reading, **way)

    def _one_step(self, from_x: Tensor, c: Tensor, reading: Tensor) -> tuple[Tensor, Tensor]:
        """Of coupling="full", from_x (B, 1, Z): generation."""
        c = self._update(self.gates(self.with_context(from_x[:, 0], c, reading)), c)
        return c[:, None].to(from_x.dtype), c

    def full(self, from_x: Tensor, c: Tensor, reading: Tensor, **way: Any) -> tuple[Tensor, Tensor]:
        """Of coupling="full", from_x (B, T, Z), c (B, D), reading (Z, D): one kernel over all T, from the weights that
        single steps use. `way` are recurrent_context's chunks, tolerance and passes."""
        norm, gates, further = self.norm, self.to_gates, self.hidden_layers
        return recurrent_context(
            from_x, reading, c,
            torch.stack([layer.weight for layer in further]) if further else None,
            torch.stack([layer.bias for layer in further]) if further else None,
            None if gates is None else gates.weight, None if gates is None else gates.bias,
            None if norm is None else norm.weight, None if norm is None else norm.bias,
            1e-5 if norm is None else norm.eps, self.clamp, activation=self.activation_name, norm=self.norm_kind, **way,
        )  # fmt: skip

    def _scan(self, gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """All steps: gates (B, T, 3D), c (B, D) -> contexts (B, T, D) of the gates' dtype, last (B, D) of c's."""
        if self.norm_kind == "state":
            return context_scan_packed(gates, c, self.norm.weight, self.norm.bias, self.norm.eps, self.clamp)
        return gated_scan_packed(gates, c)

    def _update(self, gates: Tensor, c: Tensor) -> Tensor:
        """One step: gates (B, 3D), c (B, D) -> new c (B, D)."""
        if self.norm_kind == "state":
            return context_update_packed(gates, c, self.norm.weight, self.norm.bias, self.norm.eps, self.clamp)
        return gated_scan_packed(gates[:, None], c)[1]


def shift(contexts: Tensor, start: Tensor) -> Tensor:
    """The context before each step: contexts (B, T, D), start (B, D) -> (B, T, D), at t the context of t - 1."""
    return torch.cat((start[:, None].to(contexts.dtype), contexts[:, :-1]), dim=1)


class ContextMixer(nn.Module):
    """Mixes along time: y_t = W_o (r_t * silu(W_s x_t)), r_t what the cell's context reads as after step t."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cell = ContextCell(config)
        self.output_gate = nn.Linear(config.embed_dim, config.context_dim, bias=False)
        self.out = nn.Linear(config.context_dim, config.embed_dim, bias=False)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, E), state (B, K, D) -> (y (B, T, E), new state (B, K, D))."""
        r, state = self.cell.read_out(self.cell.from_x(x), state)  # (B, T, D)
        return self.out(r.to(x.dtype) * F.silu(self.output_gate(x))), state  # full contexts are float32
