"""The whole cell, step by step in plain PyTorch: the definition of `recurrent_context`.

    a_1 = z_t + W_c r_{t-1}      h_1 = act(a_1)      a_k = W_k h_{k-1} + b_k      h_k = act(a_k)      k = 2 .. L
    f, i, d = W_g h_L + b_g      (with no hidden layer: f, i, d = a_1)
    u_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(d)

    norm   state    c_t = clamp(LayerNorm(u_t))     r_t = c_t
           output   c_t = u_t                       r_t = clamp(LayerNorm(c_t))
           none     c_t = u_t                       r_t = c_t

z (B, T, Z)   c (B, T, D)   c0 (B, D)   context_weight W_c (Z, D)   hidden_weight W_2 .. W_L (L - 1, H, H)
gate_weight W_g (3D, H)   weight, bias (D,)   pre (B, T, S): [a_1 | ... | a_L | f | i | d], S = L H + 3D
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from newllm_kernels.context_scan.reference import _edge, mark_cut
from newllm_kernels.context_update.reference import row_gradients
from newllm_kernels.layer_norm.reference import affine, grad_normalise, normalise
from newllm_kernels.numerics import acc_dtype, in_acc

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")  # in the order of ActivationKind in csrc/args.h
NORMS = (None, "state", "output")  # in the order of NormKind
_ACTIVATION = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def activate(a: Tensor, activation: int) -> Tensor:
    return _ACTIVATION[ACTIVATIONS[activation]](a)


def activate_backward(grad: Tensor, a: Tensor, activation: int) -> Tensor:
    """Gradient of a from that of the activation of a."""
    name = ACTIVATIONS[activation]
    if name == "relu":
        return grad.masked_fill(a <= 0, 0)  # a NaN too
    if name == "gelu":
        return grad * (0.5 * torch.erfc(-a * 0.5**0.5) + a * torch.exp(-0.5 * a * a) * (2 * torch.pi) ** -0.5)
    if name == "silu":
        s = torch.sigmoid(a)
        return grad * (s + a * s * (1 - s))
    return grad * (1 - torch.tanh(a).square())


def read(c: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, clamp: float, norm: int) -> Tensor:
    """What the hidden layer reads of contexts c (..., D)."""
    if NORMS[norm] != "output":
        return c
    return affine(normalise(c, eps)[0], weight, bias).clamp(-clamp, clamp)


def read_backward(
    grad: Tensor, c: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, clamp: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Where norm is "output": the gradient of c from that of what was read of it, and of every row those of weight and bias."""
    xhat, _, rstd = normalise(c, eps)
    y = affine(xhat, weight, bias)
    grad = grad.masked_fill((y > clamp) | (y < -clamp), 0)
    return grad_normalise(grad if weight is None else grad * weight, xhat, rstd), grad * xhat, grad


def _layers(hidden_weight: Tensor | None, gate_weight: Tensor | None) -> int:
    return (0 if gate_weight is None else 1) + (0 if hidden_weight is None else hidden_weight.shape[0])


def _decay(f: Tensor, u: Tensor, weight: Tensor | None, eps: float, norm: int) -> Tensor:
    """The diagonal of dc_t/dc_{t-1} along the direct path: what the gates and LayerNorm let through, clamp aside."""
    if NORMS[norm] != "state":
        return torch.sigmoid(f)
    xhat, _, rstd = normalise(u, eps)
    through = rstd * (1 - (1 + xhat * xhat) / u.shape[-1])
    return torch.sigmoid(f) * (through if weight is None else through * weight)


def recurrent_context(
    z: Tensor,
    c0: Tensor,
    context_weight: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    clamp: float,
    activation: int,
    norm: int,
    save: bool,
    decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c, c_last, pre, decay), the last two empty unless wanted. Differentiable by PyTorch's own autograd."""
    dtype, (B, T, _), D = z.dtype, z.shape, context_weight.shape[1]
    W_c, W_k, b_k, W_g, b_g, weight, bias = (
        in_acc(x, dtype) for x in (context_weight, hidden_weight, hidden_bias, gate_weight, gate_bias, weight, bias)
    )
    state, product = c0, torch.ones_like(c0)
    steps, pres = [], []
    for z_t in z.to(acc_dtype(dtype)).unbind(1):
        a = z_t + F.linear(read(state, weight, bias, eps, clamp, norm), W_c)
        kept = [a]
        for layer in range(_layers(W_k, W_g)):
            h = activate(a, activation)
            last = W_k is None or layer == W_k.shape[0]
            a = F.linear(h, W_g, b_g) if last else F.linear(h, W_k[layer], None if b_k is None else b_k[layer])
            kept.append(a)
        f, i, d = a.chunk(3, dim=-1)
        u = torch.sigmoid(f) * state + torch.sigmoid(i) * torch.tanh(d)
        state = affine(normalise(u, eps)[0], weight, bias).clamp(-clamp, clamp) if NORMS[norm] == "state" else u
        steps.append(state)
        if save:
            pres.append(torch.cat(kept, dim=-1).to(dtype))
        if decay:
            product = product * _decay(f, u, weight, eps, norm)
    S = _layers(W_k, W_g) * (0 if W_g is None else W_g.shape[1]) + 3 * D
    c = torch.stack(steps, dim=1) if steps else z.new_empty((B, 0, D), dtype=c0.dtype)
    c = mark_cut(c, dtype, clamp) if NORMS[norm] == "state" else c.to(dtype)
    pre = (torch.stack(pres, dim=1) if pres else z.new_empty((B, T, S))) if save else z.new_empty(0)
    return c, state.clone(), pre, product if decay else c0.new_empty(0)


def recurrent_context_backward(
    grad_c: Tensor | None,
    grad_c_last: Tensor | None,
    pre: Tensor,
    c: Tensor,
    c0: Tensor,
    context_weight: Tensor,
    hidden_weight: Tensor | None,
    gate_weight: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    clamp: float,
    activation: int,
    norm: int,
    decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backpropagation through time: (grad_pre (B, T, S), hidden (B, T, L H), grad_c0 (B, D), grad_norm (B, 2, D), decay).

    grad_norm are the gradients of weight and bias, of every row of the batch its own. hidden is what the hidden layers gave; gradients of inputs and matrices are products of these, `products.gradients`.
    """
    acc, (B, T, D) = acc_dtype(pre.dtype), c.shape
    W_c, W_k, W_g, weight, bias = (
        in_acc(x, pre.dtype) for x in (context_weight, hidden_weight, gate_weight, weight, bias)
    )
    L = _layers(W_k, W_g)
    H = 0 if W_g is None else W_g.shape[1]
    grad_pre, hidden = pre.new_empty(pre.shape), pre.new_empty((B, T, L * H))
    grad_norm = c0.new_zeros(B, 2, D)
    carry = c0.new_zeros(B, D) if grad_c_last is None else grad_c_last.to(acc)
    product = torch.ones_like(c0)
    edges = _edge(c.dtype, clamp)
    for t in reversed(range(T)):
        *a, gates = pre[:, t].to(acc).split([H] * L + [3 * D], dim=-1)
        f, i, d = gates.chunk(3, dim=-1)
        before = (c[:, t - 1] if t > 0 else c0).to(acc)
        g = carry if grad_c is None else carry + grad_c[:, t].to(acc)
        if NORMS[norm] == "state":
            cut = None if edges is None else c[:, t].abs() >= edges[0].to(c.device)
            df, di, dd, carry, *of_norm = row_gradients(g, f, i, d, before, weight, bias, eps, clamp, cut)
            grad_norm = grad_norm + torch.stack(of_norm, dim=1)
        else:
            forget, write, delta = torch.sigmoid(f), torch.sigmoid(i), torch.tanh(d)
            df, di = g * before * forget * (1 - forget), g * delta * write * (1 - write)
            dd, carry = g * write * (1 - delta * delta), g * forget
        grads = [torch.cat((df, di, dd), dim=-1)]
        for layer in reversed(range(L)):
            back = W_g if layer == L - 1 else W_k[layer]
            grads.insert(0, activate_backward(grads[0] @ back, a[layer], activation))
            hidden[:, t, layer * H : (layer + 1) * H] = activate(a[layer], activation)
        grad_pre[:, t] = torch.cat(grads, dim=-1)
        dr = grads[0] @ W_c
        if NORMS[norm] == "output":
            dr, *of_norm = read_backward(dr, before, weight, bias, eps, clamp)
            grad_norm = grad_norm + torch.stack(of_norm, dim=1)
        carry = carry + dr
        if decay:
            u = torch.sigmoid(f) * before + torch.sigmoid(i) * torch.tanh(d)
            product = product * _decay(f, u, weight, eps, norm)
    return grad_pre, hidden, carry.clone(), grad_norm, product if decay else c0.new_empty(0)
