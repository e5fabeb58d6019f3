"""The full cell in fused steps: per step the matrix products through torch, and one Triton kernel after each of them.

Any sizes, numbers of hidden layers and places of the norm, float32 too. It is also the fast way where a step has rows enough to
keep a GPU busy by itself. Everything is launched without asking the device, so it can be captured into a CUDA graph, and
eager calls replay one (replay.py): a step alone is shorter than what the host needs for its launches.

Shapes as in reference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from newllm_kernels.context_scan.triton import _edges
from newllm_kernels.layer_norm.triton_tiles import row_tile
from newllm_kernels.numerics import acc_dtype
from newllm_kernels.recurrent_context import reference, replay
from newllm_kernels.recurrent_context.triton_kernels import (
    hidden_backward,
    hidden_forward,
    update_backward,
    update_forward,
)
from newllm_kernels.triton_support import cdiv, contiguous, power_of_two


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a b in out's dtype, that of accumulation: what is summed is not rounded before it is used."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _operand(matrix: Tensor | None) -> Tensor | None:
    """What products of the forward read: float16 for bfloat16, as the persistent kernel does it (csrc/cuda/recurrent_context.cuh)."""
    return matrix.to(torch.float16) if matrix is not None and matrix.dtype == torch.bfloat16 else matrix


class _Steps:
    """Matrices, scratch and state of one direction, in buffers that stay where they are, so that a graph can replay steps."""

    def __init__(
        self, like: Tensor, rows: int, D: int, weights: tuple[Tensor | None, ...], kinds: tuple[Any, ...]
    ) -> None:
        self.rows, self.D, self.dtype = rows, D, like.dtype
        self.eps, self.clamp, self.activation, self.norm, self.with_decay = kinds
        self.exact = like.dtype == torch.float32
        self.marks, self.edge, self.below = _edges(like.dtype, self.clamp)
        self.marks = self.marks and reference.NORMS[self.norm] == "state"
        self.weights = contiguous(*weights)
        self.tile = row_tile(D, 512, 8)
        self.acc = {"dtype": acc_dtype(like.dtype), "device": like.device}
        self.own = {"dtype": like.dtype, "device": like.device}
        self.decay = torch.ones((rows, D) if self.with_decay else (0,), **self.acc)

    def _constants(self, weight: Tensor | None, bias: Tensor | None) -> dict[str, Any]:
        return {
            "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "DECAY": self.with_decay, "NORM": self.norm,
            "MARK": self.marks, "EXACT": self.exact, "BR": self.tile.BR, "BD": self.tile.BD, "num_warps": self.tile.warps,
        }  # fmt: skip

    def _update_grid(self) -> tuple[int]:
        return (cdiv(self.rows, self.tile.BR),)

    def _hidden(self, width: int) -> tuple[tuple[int, int], dict[str, Any]]:
        """Grid and constants of the kernels of hidden units: 8 of them a thread."""
        block = min(1024, power_of_two(width))
        constants = {"ACT": self.activation, "EXACT": self.exact, "BZ": block, "num_warps": max(1, block // 256)}
        return (self.rows, cdiv(width, block)), constants


class _Forward(_Steps):
    """`state` (B, D) moves on with every step; `read` is what the next one reads of it."""

    def __init__(
        self, z: Tensor, D: int, weights: tuple[Tensor | None, ...], kinds: tuple[Any, ...], save: bool
    ) -> None:
        W_c, W_k, b_k, W_g, *rest = weights
        W_c, W_k, W_g = (_operand(W) for W in (W_c, W_k, W_g))
        super().__init__(z, z.shape[0], D, (W_c, W_k, b_k, W_g, *rest), kinds)
        W_c, W_k, _, W_g, *_ = self.weights
        self.own = {"dtype": W_c.dtype, "device": z.device}
        self.save, self.Z = save, W_c.shape[0]
        self.further = 0 if W_k is None else W_k.shape[0]
        self.state = torch.empty((self.rows, D), **self.acc)
        self.read = torch.empty((self.rows, D), **self.own)
        self.gates = torch.empty((self.rows, 3 * D), **self.acc)
        has_hidden = W_g is not None
        self.product = torch.empty((self.rows, self.Z), **self.acc) if has_hidden else self.gates
        self.h = torch.empty((self.rows, self.Z), **self.own) if has_hidden else self.read

    def begin(self, c0: Tensor) -> None:
        _, _, _, _, _, weight, bias = self.weights
        self.state.copy_(c0)
        self.read.copy_(reference.read(self.state, weight, bias, self.eps, self.clamp, self.norm))
        self.decay.fill_(1.0)

    def run(self, z: Tensor, c: Tensor, pre: Tensor) -> None:
        """Steps z (B, T, Z) -> contexts into c (B, T, D), pre-activations into pre (B, T, S) where `save`."""
        W_c, W_k, b_k, W_g, b_g, weight, bias = self.weights
        grid, hidden = self._hidden(self.Z)
        constants = self._constants(weight, bias) | {
            "HAS_Z": W_g is None,
            "HAS_ADD": b_g is not None,
            "SAVE": self.save,
        }
        for t in range(z.shape[1]):
            z_t, pre_t, at = z[:, t], pre[:, t] if self.save else pre, 0
            _product(self.read, W_c.mT, self.product)
            for layer in range(0 if W_g is None else 1 + self.further):
                first = layer == 0
                add = None if first or b_k is None else b_k[layer - 1]
                if not first:
                    _product(self.h, W_k[layer - 1].mT, self.product)
                hidden_forward[grid](
                    z_t if first else None, self.product, add, self.h, pre_t[:, at:] if self.save else None, self.Z,
                    z_t.stride(0), pre_t.stride(0), HAS_Z=first, HAS_BIAS=add is not None, SAVE=self.save, **hidden,
                )  # fmt: skip
                at += self.Z
            if W_g is not None:
                _product(self.h, W_g.mT, self.gates)
            update_forward[self._update_grid()](
                self.gates, z_t if W_g is None else None, b_g, self.state, weight, bias, c[:, t], self.read,
                pre_t[:, at:] if self.save else None, self.decay, self.rows, self.D, z_t.stride(0), c.stride(0),
                pre_t.stride(0), self.eps, self.clamp, self.below, **constants,
            )  # fmt: skip


class _Backward(_Steps):
    """`carry` (B, D) and `product`, what came through the first layer, are the gradient of the context before."""

    def __init__(self, pre: Tensor, D: int, weights: tuple[Tensor | None, ...], kinds: tuple[Any, ...]) -> None:
        super().__init__(pre, pre.shape[0], D, weights, kinds)
        _, W_k, W_g, *_ = self.weights
        self.H = 0 if W_g is None else W_g.shape[1]
        self.further = 0 if W_k is None else W_k.shape[0]
        self.carry, self.product = (torch.empty((self.rows, D), **self.acc) for _ in range(2))
        self.grad_norm = torch.empty((self.rows, 2, D), **self.acc)
        self.grad_h = torch.empty((self.rows, self.H), **self.acc)
        # Gradients as products read them: always laid out alike, or graphs and single steps might differ in bits.
        self.of_gates, self.of_hidden = (torch.empty((self.rows, width), **self.own) for width in (3 * D, self.H))

    def begin(self, grad_c_last: Tensor | None) -> None:
        if grad_c_last is None:
            self.carry.zero_()
        else:
            self.carry.copy_(grad_c_last)
        self.product.zero_()
        self.grad_norm.zero_()
        self.decay.fill_(1.0)

    def run(
        self, grad_c: Tensor | None, pre: Tensor, c: Tensor, first: Tensor, grad_pre: Tensor, hidden: Tensor
    ) -> None:
        """Steps from the last to the first; `first` (B, D) is the context before them. Fills grad_pre (B, T, S) and hidden
        (B, T, L H)."""
        W_c, W_k, W_g, weight, bias = self.weights
        H, layers = self.H, 0 if W_g is None else 1 + self.further
        grid, constants = self._hidden(max(1, H))
        of_update = self._constants(weight, bias) | {"HAS_GRAD": grad_c is not None}
        for t in reversed(range(c.shape[1])):
            before, pre_t, grad_t, hidden_t = c[:, t - 1] if t > 0 else first, pre[:, t], grad_pre[:, t], hidden[:, t]
            from_outside = None if grad_c is None else grad_c[:, t]
            update_backward[self._update_grid()](
                pre_t[:, layers * H :], before, c[:, t], from_outside, self.product, self.carry, weight, bias,
                grad_t[:, layers * H :], self.of_gates, self.grad_norm, self.decay, self.rows, self.D, pre.stride(0), before.stride(0), c.stride(0),
                0 if grad_c is None else grad_c.stride(0), grad_pre.stride(0), self.eps, self.clamp, self.edge,
                **of_update,
            )  # fmt: skip
            grad = self.of_gates
            for layer in reversed(range(layers)):
                _product(grad, W_g if layer == layers - 1 else W_k[layer], self.grad_h)
                own = slice(layer * H, (layer + 1) * H)
                grad = self.of_hidden
                hidden_backward[grid](
                    self.grad_h, pre_t[:, own], grad_t[:, own], grad, hidden_t[:, own], H, pre.stride(0), grad_pre.stride(0),
                    hidden.stride(0), **constants,
                )  # fmt: skip
            _product(grad, W_c, self.product)

    def grad_c0(self, c0: Tensor) -> Tensor:
        """What is left at the beginning of time; where the first layer read normalised contexts, through their LayerNorm."""
        *_, weight, bias = self.weights
        if reference.NORMS[self.norm] != "output":
            return self.carry + self.product
        through, of_weight, of_bias = reference.read_backward(self.product, c0, weight, bias, self.eps, self.clamp)
        self.grad_norm += torch.stack((of_weight, of_bias), dim=1)
        return self.carry + through


def _signature(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else (x.shape, x.dtype) for x in tensors)


def _segment(x: Tensor) -> Tensor:
    """A buffer for replay.STEPS steps of x (B, T, N), zero."""
    return x.new_zeros(x.shape[0], replay.STEPS, x.shape[2])


def _copies(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(x if x is None else x.detach().clone(memory_format=torch.contiguous_format) for x in tensors)


def _load(static: tuple[Tensor | None, ...], tensors: tuple[Tensor | None, ...]) -> None:
    for target, source in zip(static, tensors, strict=True):
        if target is not None:
            target.copy_(source)


def recurrent_context(
    z: Tensor, c0: Tensor, context_weight: Tensor, hidden_weight: Tensor | None, hidden_bias: Tensor | None,
    gate_weight: Tensor | None, gate_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    clamp: float, activation: int, norm: int, save: bool, decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """newllm::recurrent_context, see reference.py."""
    (B, T, _), D = z.shape, c0.shape[1]
    weights = (context_weight, hidden_weight, hidden_bias, gate_weight, gate_bias, weight, bias)
    kinds = (eps, clamp, activation, norm, decay)
    width = (
        0 if gate_weight is None else z.shape[2] * (1 if hidden_weight is None else 1 + len(hidden_weight))
    ) + 3 * D
    c, pre = z.new_empty((B, T, D)), z.new_empty((B, T, width) if save else (0, 0, 0))
    if B == 0 or T == 0:
        return c, c0.clone(), pre if save else pre.flatten(), torch.ones_like(c0) if decay else c0.new_empty(0)
    z = z if z.stride(2) == 1 else z.contiguous()

    def plain() -> tuple[Tensor, Tensor]:
        steps = _Forward(z, D, weights, kinds, save)
        steps.begin(c0)
        steps.run(z, c, pre)
        return steps.state, steps.decay

    def replayed(found: replay.Replay) -> tuple[Tensor, Tensor]:
        steps, z_part, c_part, pre_part = found.static
        _load(steps.weights, weights)
        steps.begin(c0)
        for t in range(0, T - replay.STEPS + 1, replay.STEPS):
            part = slice(t, t + replay.STEPS)
            z_part.copy_(z[:, part])
            found.graph.replay()
            c[:, part].copy_(c_part)
            if save:
                pre[:, part].copy_(pre_part)
        rest = slice(T - T % replay.STEPS, T)
        steps.run(z[:, rest], c[:, rest], pre[:, rest])
        return steps.state.clone(), steps.decay.clone()

    def make() -> tuple[Any, Callable[[], None]]:
        parts = _segment(z), _segment(c), _segment(pre) if save else pre
        steps = _Forward(z, D, _copies(weights), kinds, save)
        steps.begin(c0)
        return (steps, *parts), lambda: steps.run(*parts)

    if replay.applies(z, B, T, D, z.shape[2]):
        key = ("forward", B, _signature(*weights), z.dtype, kinds, save)
        with replay.borrow(key, z.device, make) as found:
            state, product = plain() if found is None else replayed(found)
    else:
        state, product = plain()
    return c, state, pre if save else pre.flatten(), product


def recurrent_context_backward(
    grad_c: Tensor | None, grad_c_last: Tensor | None, pre: Tensor, c: Tensor, c0: Tensor, context_weight: Tensor,
    hidden_weight: Tensor | None, gate_weight: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    clamp: float, activation: int, norm: int, decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """newllm::recurrent_context_backward, see reference.py."""
    (B, T, D), weights = c.shape, (context_weight, hidden_weight, gate_weight, weight, bias)
    kinds = (eps, clamp, activation, norm, decay)
    width = pre.shape[2] - 3 * D
    grad_pre, hidden = pre.new_empty((B, T, pre.shape[2])), pre.new_empty((B, T, width))
    pre, c, grad_c = (x if x is None or x.stride(2) == 1 else x.contiguous() for x in (pre, c, grad_c))
    if B == 0 or T == 0:
        carry = torch.zeros_like(c0) if grad_c_last is None else grad_c_last.to(c0.dtype)
        grad_norm = c0.new_zeros((B, 2, D))
        return grad_pre, hidden, carry.clone(), grad_norm, torch.ones_like(c0) if decay else c0.new_empty(0)

    def plain() -> tuple[Tensor, Tensor, Tensor]:
        steps = _Backward(pre, D, weights, kinds)
        steps.begin(grad_c_last)
        steps.run(grad_c, pre, c, c0, grad_pre, hidden)
        return steps.grad_c0(c0), steps.grad_norm, steps.decay

    def replayed(found: replay.Replay) -> tuple[Tensor, Tensor, Tensor]:
        steps, grad_part, pre_part, c_part, first, grad_pre_part, hidden_part = found.static
        _load(steps.weights, weights)
        steps.begin(grad_c_last)
        rest = slice(T - T % replay.STEPS, T)
        if T % replay.STEPS:
            outside = None if grad_c is None else grad_c[:, rest]
            steps.run(outside, pre[:, rest], c[:, rest], c[:, rest.start - 1], grad_pre[:, rest], hidden[:, rest])
        for t in range(rest.start - replay.STEPS, -1, -replay.STEPS):
            part = slice(t, t + replay.STEPS)
            if grad_c is not None:
                grad_part.copy_(grad_c[:, part])
            pre_part.copy_(pre[:, part])
            c_part.copy_(c[:, part])
            first.copy_(c[:, t - 1] if t > 0 else c0)
            found.graph.replay()
            grad_pre[:, part].copy_(grad_pre_part)
            hidden[:, part].copy_(hidden_part)
        return steps.grad_c0(c0).clone(), steps.grad_norm.clone(), steps.decay.clone()

    def make() -> tuple[Any, Callable[[], None]]:
        steps = _Backward(pre, D, _copies(weights), kinds)
        steps.begin(grad_c_last)
        grad_part = None if grad_c is None else _segment(grad_c)
        parts = (grad_part, _segment(pre), _segment(c), torch.zeros_like(c0), _segment(grad_pre), _segment(hidden))
        return (steps, *parts), lambda: steps.run(*parts)

    if replay.applies(pre, B, T, D, 0 if gate_weight is None else gate_weight.shape[1]):
        outside = None if grad_c is None else grad_c.dtype
        key = ("backward", B, _signature(*weights), pre.dtype, c0.dtype, outside, kinds)
        with replay.borrow(key, pre.device, make) as found:
            return grad_pre, hidden, *(plain() if found is None else replayed(found))
    return grad_pre, hidden, *plain()
