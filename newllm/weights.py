"""The weights of a training run: float32 masters, the copy that computes, the optimizer, a running average.

In bfloat16 a model computes with a copy of its matrices in that dtype, made once a step, instead of casting each of them
wherever it is used (autocast): fewer launches, and a residual stream of half the bytes. Gradients are collected in
float32; AdamW and the average see float32 only. Norms and start contexts stay float32 in the copy too.

Everything here but `__init__` can be captured in a CUDA graph: what changes from step to step, the learning rate and the
rate of averaging, lies in tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from newllm.model import LanguageModel
from newllm.muon import Muon
from newllm.spelling import Spelling
from newllm.training_config import TrainingConfig


def in_dtype(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """The model itself for float32; else a copy whose linear layers and embeddings are of `dtype`, ties kept."""
    if dtype == torch.float32:
        return model
    low = copy.deepcopy(model)
    for module in low.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.to(dtype)
    return low


def make_optimizer(model: nn.Module, config: TrainingConfig, further: Sequence[Tensor] = ()) -> torch.optim.Optimizer:
    """AdamW, Muon or SGD over a model's weights and `further` ones that decays matrices and leaves vectors (biases, norms, start
    contexts) alone.

    On a GPU it is one fused kernel over all weights (of Muon: over all but its matrices), its learning rate a tensor, so that
    a CUDA graph can hold it.
    """
    parameters = [p for p in (*model.parameters(), *further) if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    inner = _inner_matrices(model) if config.optimizer == "muon" else []
    taken = {id(p) for p in inner}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in matrices if id(p) not in taken], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    cuda = parameters[0].is_cuda
    lr = torch.tensor(config.lr, device=parameters[0].device) if cuda else config.lr
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.beta1, fused=cuda)
    options: dict[str, Any] = {"lr": lr, "betas": (config.beta1, config.beta2), "fused": cuda, "capturable": cuda}
    if config.optimizer == "muon":
        return Muon([*groups, {"params": inner, "weight_decay": config.weight_decay, "muon": True}], **options)
    return torch.optim.AdamW(groups, **options)


def _inner_matrices(model: nn.Module) -> list[Tensor]:
    """Weights of linear layers whose two sides are features: neither tokens nor the shares of a mixture."""
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outer |= {id(model.head.weight)} | ({id(model.mixture.shares.weight)} if model.mixture is not None else set())
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [linear.weight for linear in linears if linear.weight.requires_grad and id(linear.weight) not in outer]


@torch.no_grad()
def copy_all(to: list[Tensor], of: list[Tensor]) -> None:
    """Copy every tensor of `of` into its counterpart, in one launch per pair of dtypes: mixed lists go one by one."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for target, source in zip(to, of, strict=True):
        groups.setdefault((target.dtype, source.dtype), []).append((target, source))
    for pairs in groups.values():
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


class Weights:
    """`masters` are trained, `computing` computes forward and backward (the same module in float32), `average` is what is
    evaluated where the config wants one (else None). `spelling`: S of newllm/spelling.py; then the masters' embedding is
    E_word, and the one that computes the sum."""

    def __init__(
        self, masters: LanguageModel, config: TrainingConfig, dtype: torch.dtype, spelling: Tensor | None = None
    ) -> None:
        self.masters, self.config = masters, config
        self.computing = in_dtype(masters, dtype)
        if spelling is not None and self.computing is masters:
            self.computing = copy.deepcopy(masters)
        self.spelling = None if spelling is None else Spelling(spelling, self.computing.embedding.weight)
        shared = [] if self.spelling is None else [self.spelling.weight]
        self.optimizer = make_optimizer(masters, config, shared)
        self.parameters = [*masters.parameters(), *shared]  # G last
        self.copies = [] if self.computing is masters else list(self.computing.parameters())
        if self.parameters[0].is_cuda:  # for graphs: memory that stays
            for master in self.parameters:
                master.grad = torch.zeros_like(master)
        self.average = copy.deepcopy(masters).requires_grad_(False) if config.average else None
        self.averaged = (
            [] if self.average is None else [*self.average.parameters(), *(p.detach().clone() for p in shared)]
        )
        device = self.parameters[0].device
        self.rate = torch.zeros((), device=device)  # of the step to be averaged
        self.grad_norm = torch.zeros((), device=device)  # of the last step, before clipping

    def averages(self, step: int) -> bool:
        """Whether the weights that `step` leaves are taken into the average."""
        after = step - self.config.average_start
        return self.average is not None and after >= 0 and after % self.config.average_every == 0

    def set_rates(self, lr: float, step: int) -> None:
        """Learning rate, and rate of averaging, of `step`: the plain mean until its rate falls to that of the decay."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self.averages(step):
            every = self.config.average_every
            held = (step - self.config.average_start) // every  # weights that the average holds already
            self.rate.fill_(max(1 - self.config.average**every, 1 / (held + 1)))

    def collect_gradients(self, first: bool) -> None:
        """Take over the gradients of the copy; `first`: of the step, so that there is nothing to add them to."""
        if not self.copies:
            return  # autograd has added them up where they belong
        for master in self.parameters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        for low in self.copies:
            if low.grad is None:  # a start context in the middle of a text
                low.grad = torch.zeros_like(low)
        masters, lows = [p.grad for p in self.parameters], [p.grad for p in self.copies]
        if self.spelling is not None:
            lows.append(self.spelling.gradient())
        if first:
            copy_all(masters, lows)
        else:
            torch._foreach_add_(masters, [low.to(master.dtype) for master, low in zip(masters, lows, strict=True)])
        for low in self.copies:
            low.grad = None

    @torch.no_grad()
    def update(self, averaged: bool) -> None:
        """Clip, step, average if this step is to be averaged, and give the copy the new weights."""
        self.grad_norm.copy_(nn.utils.clip_grad_norm_(self.parameters, self.config.clip))
        self.optimizer.step()
        if averaged:
            ahead = torch._foreach_sub(self.parameters, self.averaged)
            torch._foreach_mul_(ahead, self.rate)
            torch._foreach_add_(self.averaged, ahead)
        if self.copies:
            self._copy(self.parameters)
        else:
            # A graph adds to the memory it was captured with, so on a GPU that has to stay.
            self.optimizer.zero_grad(set_to_none=not self.parameters[0].is_cuda)

    def _copy(self, weights: list[Tensor]) -> None:
        """Give the copy these weights, which are in the order of `parameters`."""
        copy_all(self.copies, weights[: len(self.copies)])
        if self.spelling is not None:
            word = next(w for w, low in zip(weights, self.copies, strict=False) if low is self.spelling.embedding)
            self.spelling.write(word, weights[-1])

    def refresh_copy(self) -> None:
        """After the masters were written from outside."""
        if self.copies:
            self._copy(self.parameters)

    def evaluated(self, steps: int) -> LanguageModel:
        """The model that stands for this run after `steps` steps, computing as it does: the average once there is one.
        Call `refresh_copy` when done with it."""
        if self.average is None or steps <= self.config.average_start:
            return self.computing
        if not self.copies:
            return self.average
        self._copy(self.averaged)
        return self.computing

    @torch.no_grad()
    def set_shares(self, shares: Tensor) -> None:
        """Of recall: all copies of the model have the same."""
        for model in (self.masters, self.computing, self.average):
            if model is not None:
                model.recall.shares.copy_(shares)

    def spelling_tensors(self) -> dict[str, Tensor]:
        """G and its average, for a checkpoint; nothing where there is none."""
        if self.spelling is None:
            return {}
        return {"weight": self.spelling.weight.detach()} | ({"average": self.averaged[-1]} if self.averaged else {})

    @torch.no_grad()
    def load_spelling(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `spelling_tensors`; `refresh_copy` afterwards."""
        for name, own in self.spelling_tensors().items():
            own.copy_(tensors[name])
