"""Muon: steps whose directions are orthogonal, for the matrices between embedding and output; AdamW for all else.

Of a matrix W (A, B) with gradient G, its running mean M and mu = 0.95, after Nesterov's look ahead:

    M <- mu M + (1 - mu) G        U = (1 - mu) G + mu M        W <- (1 - lr w) W - 0.2 lr sqrt(max(A, B)) orth(U)

orth(U) has U's singular vectors and singular values near one: five steps of a Newton-Schulz iteration in bfloat16. The factor
gives an entry of the update AdamW's usual size, so that learning rates and weight decay are of one scale for both.

Sources: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the factor from Liu et al., "Muon is
scalable for LLM training" (2025). Why not torch.optim.Muon: it reads the learning rate on the host, which a CUDA graph cannot
hold, and goes through matrices one by one; here all of one shape go through the iteration together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.AdamW):
    """AdamW whose parameter groups with `muon=True` (matrices all) take Muon's steps instead. Arguments as AdamW's."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__([{"muon": False} | group for group in groups], **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault(p.shape, []).append(p)
        for shape, parameters in by_shape.items():
            gradients = [p.grad for p in parameters]
            means = [self._mean(p) for p in parameters]
            torch._foreach_lerp_(means, gradients, 1 - MOMENTUM)
            ahead = torch.stack(torch._foreach_lerp(gradients, means, MOMENTUM))
            update = orthogonalised(ahead).to(ahead.dtype) * (group["lr"] * (0.2 * math.sqrt(max(shape))))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(parameters, list(update))

    def _mean(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
            state["step"] = torch.zeros((), device=p.device)  # AdamW asks every state that it loads for one
        return state["momentum"]


def orthogonalised(x: Tensor) -> Tensor:
    """Matrices x (N, A, B) -> bfloat16 ones with the same singular vectors and singular values from about 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    y = x.mT if tall else x
    y = (y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).bfloat16()  # no singular value above one
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y
