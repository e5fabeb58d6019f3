"""`ContextRNN`: stacked full cells with the manners of torch.nn.LSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from newllm_kernels.context_update import context_update_packed
from newllm_kernels.gated_scan import gated_scan_packed
from newllm_kernels.modules import LayerNorm
from newllm_kernels.numerics import acc_dtype
from newllm_kernels.recurrent_context import recurrent_context
from newllm_kernels.recurrent_context.reference import ACTIVATIONS, NORMS
from newllm_kernels.recurrent_context.solver import Solver

_ACTIVATE = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class ContextLayer(nn.Module):
    """One full cell over a sequence: (B, T, E), state (B, D) -> contexts (B, T, D), state (B, D). See ContextRNN."""

    def __init__(
        self, input_size: int, hidden_dim: int, context_dim: int, fnn_layers: int, activation: str, norm: str | None,
        clamp: float | None, eps: float, bias: bool, solver: Solver, device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        made = {"device": device, "dtype": dtype}
        H, D = hidden_dim, context_dim
        first = H if fnn_layers else 3 * D
        self.activation, self.norm_kind, self.clamp, self.solver = activation, norm, clamp, solver
        self.from_input = nn.Linear(input_size, first, bias=bias, **made)
        self.context_weight = nn.Parameter(torch.empty(first, D, **made))
        further = fnn_layers - 1
        self.hidden_weight = nn.Parameter(torch.empty(further, H, H, **made)) if further > 0 else None
        self.hidden_bias = nn.Parameter(torch.empty(further, H, **made)) if further > 0 and bias else None
        self.gates = nn.Linear(H, 3 * D, bias=bias, **made) if fnn_layers else None
        self.norm = LayerNorm(D, eps=eps, **made) if norm else None
        self.start = nn.Parameter(torch.empty(D, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Pre-activations of unit variance for inputs of unit variance; memories from two to some fifty steps; a start of unit
        variance, which LayerNorm can divide by."""
        D = self.start.numel()
        fan_in = self.from_input.in_features + D
        for weight in (self.from_input.weight, self.context_weight):
            nn.init.normal_(weight, std=fan_in**-0.5)
        if self.hidden_weight is not None:
            nn.init.normal_(self.hidden_weight, std=self.hidden_weight.shape[-1] ** -0.5)
        if self.gates is not None:
            nn.init.normal_(self.gates.weight, std=self.gates.in_features**-0.5)
        for bias in (self.from_input.bias, self.hidden_bias, None if self.gates is None else self.gates.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        forget = (self.from_input if self.gates is None else self.gates).bias
        if forget is not None:
            with torch.no_grad():
                forget[:D] = torch.linspace(0.0, 4.0, D)
        nn.init.normal_(self.start)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        z = self.from_input(x)  # one product for all T
        if x.shape[1] == 1:  # cheaper than a kernel that gets its weights ready for many steps
            state = self._step(z[:, 0], state)
            return state[:, None].to(z.dtype), state
        gates, norm = self.gates, self.norm
        H = 0 if gates is None else gates.in_features
        layers = (gates is not None) + (0 if self.hidden_weight is None else len(self.hidden_weight))
        with self.solver.way(z, state.shape[1], H, layers, self.norm_kind) as way:
            return recurrent_context(
                z, self.context_weight, state, self.hidden_weight, self.hidden_bias,
                None if gates is None else gates.weight, None if gates is None else gates.bias,
                None if norm is None else norm.weight, None if norm is None else norm.bias,
                1e-5 if norm is None else norm.eps, self.clamp, activation=self.activation, norm=self.norm_kind, **way,
            )  # fmt: skip

    def _step(self, z: Tensor, state: Tensor) -> Tensor:
        """One step: z (B, Z), state (B, D) -> state (B, D)."""
        norm, activate = self.norm, _ACTIVATE[self.activation]
        read = state
        if self.norm_kind == "output":
            read = norm(state)
            read = read if self.clamp is None else read.clamp(-self.clamp, self.clamp)
        a = z + F.linear(read.to(z.dtype), self.context_weight.to(z.dtype))
        if self.hidden_weight is not None:
            for k, weight in enumerate(self.hidden_weight):
                a = F.linear(activate(a), weight, None if self.hidden_bias is None else self.hidden_bias[k])
        gates = a if self.gates is None else self.gates(activate(a))
        if self.norm_kind == "state":
            return context_update_packed(gates, state, norm.weight, norm.bias, norm.eps, self.clamp)
        return gated_scan_packed(gates[:, None], state)[1]


class ContextRNN(nn.Module):
    """New-LLM's full cell as a recurrent network: hidden layers and gates see their own last context.

        h_t           = FNN([x_t ; r_{t-1}])                               fnn_layers linear + activation layers
        f_t, i_t, d_t = W_g h_t + b_g
        u_t           = sigmoid(f_t) * c_{t-1} + sigmoid(i_t) * tanh(d_t)

        norm="state"    c_t = clamp(LayerNorm(u_t))     r_t = c_t          LayerNorm in the loop
        norm="output"   c_t = u_t                       r_t = clamp(LayerNorm(c_t))
        norm=None       c_t = u_t                       r_t = c_t

    Arguments, call and results as of `torch.nn.LSTM`, but that the state is one tensor, and that without one given the
    network starts from contexts it has learned.

    Args:
        input_size: E, width of x.
        hidden_dim: H, width of the hidden layers.
        context_dim: D, width of the contexts, which are the output.
        num_layers: cells on top of each other, each reading the contexts of the one below.
        fnn_layers: hidden layers of a cell; 0 computes the gates straight from [x ; r].
        activation: "relu", "gelu", "silu" or "tanh".
        norm, clamp, eps: where LayerNorm stands, the bound on what it gives (None for none), and what is added to the
            variance.
        bias: whether the linear layers have biases. Those of the forget gates start spread over 0 to 4.
        batch_first: whether x and output are (N, T, ...) instead of (T, N, ...).
        dropout: on the contexts that a layer hands to the next, in training.
        solver: "sequential", all steps in order of time; "chunked", `chunks` pieces of time side by side in passes until they
            meet; "auto", whichever is predicted to be faster from how long the cell was seen to remember (few, long sequences on
            a GPU; inside a CUDA graph's capture and torch.compile always in order).
        chunks, warm_up: for "chunked"; chunks=None: as many, warmed up for as long, as are predicted to be fastest.
        tolerance, passes: when chunks have met, and how many passes there are at most; see `recurrent_context`.

    Shapes:
        x (T, N, E), (N, T, E) where batch_first, (T, E) without a batch, or a PackedSequence
        state (num_layers, N, D), (num_layers, D) without a batch, or None
        -> output, as x with D in place of E, and the state after the last step of every sequence

    The output has the dtype of the input's projection, the state is float32 (float64 for a float64 network).

    Raises:
        ValueError, TypeError: naming the argument, what it got and what was wanted.

    Formula: docs/model.md, coupling "full".

    >>> import torch, newllm_kernels as nk
    >>> rnn = nk.ContextRNN(input_size=5, hidden_dim=16, context_dim=8, num_layers=2, batch_first=True)
    >>> x = torch.randn(3, 7, 5)
    >>> output, state = rnn(x)
    >>> output.shape, state.shape
    (torch.Size([3, 7, 8]), torch.Size([2, 3, 8]))
    >>> first, state = rnn(x[:, :4])
    >>> then, state = rnn(x[:, 4:], state)
    >>> torch.allclose(torch.cat((first, then), dim=1), output, atol=1e-5)
    True
    """

    def __init__(
        self,
        input_size: int,
        hidden_dim: int,
        context_dim: int,
        num_layers: int = 1,
        *,
        fnn_layers: int = 1,
        activation: str = "silu",
        norm: str | None = "state",
        clamp: float | None = 10.0,
        eps: float = 1e-5,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        solver: str = "auto",
        chunks: int | None = None,
        tolerance: float | None = None,
        passes: int = 8,
        warm_up: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "input_size": input_size,
            "hidden_dim": hidden_dim,
            "context_dim": context_dim,
            "num_layers": num_layers,
        }
        for name, value in (*sizes.items(), ("fnn_layers", fnn_layers)):
            least = 0 if name == "fnn_layers" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: got {value!r}, wanted an integer of at least {least}")
        for name, value, choices in (("activation", activation, ACTIVATIONS), ("norm", norm, NORMS)):
            if value not in choices:
                raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, choices))}")
        if clamp is not None and not clamp > 0:
            raise ValueError(f"clamp: got {clamp!r}, wanted a number above 0 or None")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout!r}, wanted a number in [0, 1)")
        self.input_size, self.hidden_dim, self.context_dim, self.num_layers = sizes.values()
        self.batch_first, self.dropout, self.solver = batch_first, dropout, solver
        self.layers = nn.ModuleList(
            ContextLayer(
                context_dim if n else input_size, hidden_dim, context_dim, fnn_layers, activation, norm, clamp, eps,
                bias, Solver(solver, chunks, tolerance, passes, warm_up), device, dtype,
            )
            for n in range(num_layers)
        )  # fmt: skip

    def reset_parameters(self) -> None:
        for layer in self.layers:
            layer.reset_parameters()

    def initial_state(self, batch_size: int) -> Tensor:
        """The state that None stands for: (num_layers, N, D), float32 (float64 for a float64 network)."""
        starts = torch.stack([layer.start for layer in self.layers])
        return starts.to(acc_dtype(starts.dtype))[:, None].expand(-1, batch_size, -1)

    def forward(
        self, x: Tensor | PackedSequence, state: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """See the class."""
        if isinstance(x, PackedSequence):
            return self._packed(x, state)
        if not isinstance(x, Tensor) or x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            batched = "(N, T, " if self.batch_first else "(T, N, "
            raise ValueError(
                f"x: got {got}, wanted {batched}{self.input_size}), (T, {self.input_size}) or a PackedSequence"
            )
        alone = x.dim() == 2
        if alone:
            x, state = x[None], state if state is None else self._checked(state, ())[:, None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        state = self.initial_state(x.shape[0]) if state is None else self._checked(state, (x.shape[0],))
        output, state = self._run(x, state)
        if alone:
            return output[0], state[:, 0]
        return output if self.batch_first else output.transpose(0, 1), state

    def _checked(self, state: Tensor, batch: tuple[int, ...]) -> Tensor:
        wanted = (self.num_layers, *batch, self.context_dim)
        if not isinstance(state, Tensor) or state.shape != wanted:
            got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(f"state: got {got}, wanted {wanted}")
        return state

    def _run(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, E), state (layers, B, D) -> output (B, T, D), state (layers, B, D)."""
        ends = []
        for n, layer in enumerate(self.layers):
            if n and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            x, end = layer(x, state[n])
            ends.append(end)
        return x, torch.stack(ends)

    def _packed(self, x: PackedSequence, state: Tensor | None) -> tuple[PackedSequence, Tensor]:
        """Steps that as many sequences take lie in one block; one after the other, each with the states of those still there."""
        data, sizes, order, back = x
        if data.dim() != 2 or data.shape[1] != self.input_size:
            raise ValueError(f"x: got packed data {tuple(data.shape)}, wanted (steps, {self.input_size})")
        sizes = sizes.tolist()
        if state is None:
            state = self.initial_state(sizes[0])
        else:
            state = self._checked(state, (sizes[0],))
            state = state if order is None else state[:, order]
        outputs, ended, begin, row = [], [], 0, 0
        while begin < len(sizes):
            count, end = sizes[begin], begin
            while end < len(sizes) and sizes[end] == count:
                end += 1
            if count < state.shape[1]:  # the shortest come last
                ended.insert(0, state[:, count:])
                state = state[:, :count]
            block = data[row : row + count * (end - begin)].unflatten(0, (end - begin, count))
            output, state = self._run(block.transpose(0, 1), state)
            outputs.append(output.transpose(0, 1).flatten(0, 1))
            begin, row = end, row + count * (end - begin)
        state = torch.cat((state, *ended), dim=1)
        packed = PackedSequence(torch.cat(outputs), x.batch_sizes, order, back)
        return packed, state if back is None else state[:, back]

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_dim}, {self.context_dim}, num_layers={self.num_layers}, "
            f"batch_first={self.batch_first}, dropout={self.dropout}, solver={self.solver!r}"
        )
