"""Dynamic evaluation: a model that goes on learning from the text it has just been scored on.

Each segment is scored first and learnt from afterwards, so no token's score has seen the token. After segment s, with its
gradient g and the trained weights w*:

    w <- w - lr g min(1, R / |g|) / (r + rms(r)) + min(1, decay r / mean(r)) (w* - w)

r is the root mean square of the gradient over segments of the training text: weights that see large gradients move less per
gradient, and come back faster. mean(r) and rms(r) are over a weight's tensor. R is the root mean square of |g|, the length of
the gradient of all weights together. Nothing is dropped out.

Where the model has recall (newllm/model/recall.py), the shares of recalled and of recent words go on learning too, by expectation
maximisation as it comes: of every group of tokens, counts of what they owe to the softmax, to each word recalled and to recent words, which
begin as the calibrated shares of PRIOR tokens. Weights that learn what has been read leave less to recall than those that were calibrated.

Source: Krause, Kahembwe, Murray and Renals, "Dynamic evaluation of neural sequence models" (2018), equations 8 to 10, with two
changes. rms(r) stands in place of a constant epsilon, so that the scale of the loss does not matter. And gradients are cut to
the length they had in training: of 33,278 words 500 segments hold a few thousand, r of the others is next to nothing, and
without a bound the first of them moves its row by several times its size, the next gradients are larger for it, and perplexity
is 1e300 in the end (seen on WikiText-2 with mean(r) and no bound).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from newllm.errors import UserError
from newllm.evaluation import check_tokens, progress_bar
from newllm.graphs import Graphs
from newllm.model import LanguageModel, State
from newllm.model.recall import Pointed
from newllm.weights import copy_all, in_dtype

STATISTICS = 500  # segments of training text that gradients are measured on
PRIOR = 200.0  # tokens of each group that the calibrated shares count as; not searched


def dynamic_losses(
    model: LanguageModel, tokens: np.ndarray, train: np.ndarray, *, lr: float, decay: float, segment: int,
    dtype: torch.dtype = torch.float32, progress: str | None = None,
) -> np.ndarray:  # fmt: skip
    """Negative log-likelihood of every token but the first under dynamic evaluation: (n - 1,) float32.

    Args:
        model: float32; it is left as it was.
        tokens: (n,), the text, one stream from its start.
        train: the training text, whose first segments say how large gradients are.
        lr, decay: of the formula, above 0 and from 0 on.
        segment: tokens per update.
        dtype: computed in, with weights kept in float32.

    Raises UserError for a text that cannot be scored or a setting that makes no sense.
    """
    if not lr > 0 or not decay >= 0 or segment < 1:
        raise UserError(
            f"dynamic evaluation with lr {lr}, decay {decay} and segments of {segment}: wanted above 0, at least 0 and at least 1"
        )
    check_tokens(model, tokens)
    check_tokens(model, train)
    reader = _Reader(model, dtype)
    reader.measure(train[: STATISTICS * segment + 1], segment)
    return reader.score(tokens, segment, lr, decay, progress)


class _Reader:
    """Walks one stream of text; every segment leaves its losses in `losses` and its gradients in `gradients`."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        self.trained = [p.detach() for p in model.parameters()]
        self.computing = in_dtype(model, dtype)
        if self.computing is model:
            self.computing = copy.deepcopy(model)
        self.computing.eval()
        self.parameters = list(self.computing.parameters())
        self.weights = [p.clone() for p in self.trained]
        self.gradients = [torch.zeros_like(p) for p in self.trained]
        self.rms = [torch.zeros_like(p) for p in self.trained]  # r
        self.device = self.trained[0].device
        self.offset = torch.zeros((), dtype=torch.int64, device=self.device)
        recall = getattr(self.computing, "recall", None)
        self.shares = None if recall is None else recall.shares  # of recalled and of recent words, per group
        self.owed = None  # per group: tokens that the softmax, words recalled and recent words account for

    def _open(self, tokens: np.ndarray) -> None:
        self.tokens = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
        self.losses = torch.zeros(tokens.size - 1, device=self.device)
        self.state: State | None = None
        self.graphs = Graphs(self.device, enabled=True)  # of this text's tensors

    def measure(self, tokens: np.ndarray, segment: int) -> None:
        self._open(tokens)
        count = 0
        with self.graphs.stream():
            for start in range(0, tokens.size - 1, segment):
                self._read(start, min(segment, tokens.size - 1 - start), self._add_squares)
                count += 1
        torch._foreach_div_(self.rms, count)
        self.usual_length = torch.stack([square.sum() for square in self.rms]).sum().sqrt()  # R
        torch._foreach_sqrt_(self.rms)

    def score(self, tokens: np.ndarray, segment: int, lr: float, decay: float, progress: str | None) -> np.ndarray:
        self._open(tokens)
        if self.shares is not None:
            shares = self.shares.double()
            self.owed = PRIOR * torch.cat((1 - shares.sum(1, keepdim=True), shares), dim=1)
        rates = [_rates(r, lr, decay) for r in self.rms]
        steps, returns = [step for step, _ in rates], [back for _, back in rates]
        with self.graphs.stream(), progress_bar(tokens.size - 1, progress) as bar:
            for start in range(0, tokens.size - 1, segment):
                length = min(segment, tokens.size - 1 - start)
                self._read(start, length, lambda: self._learn(steps, returns))
                bar.update(length)
        return self.losses.cpu().numpy()

    def _read(self, start: int, length: int, then: Callable[[], None]) -> None:
        self.offset.fill_(start)
        shapes = None if self.state is None else tuple(value.shape for value in self.state.values())  # a cache may grow
        self.graphs.run((length, shapes), lambda: (self._segment(length), then()))

    def _segment(self, length: int) -> None:
        place = self.offset + torch.arange(length, device=self.device)
        inputs, targets = self.tokens[place][None], self.tokens[place + 1][None]  # (1, T) each
        x, state = self.computing.features(inputs, self.state)
        if isinstance(x, Pointed):
            softmax = self.computing.nll(x.x, targets)
            nll = x.mixed(softmax, targets)[0]
            if self.owed is not None:
                self._learn_shares(x, softmax, targets)
        else:
            nll = self.computing.nll(x, targets)[0]
        gradients = torch.autograd.grad(nll.mean(), self.parameters, allow_unused=True)
        for kept, gradient in zip(self.gradients, gradients, strict=True):
            kept.zero_() if gradient is None else kept.copy_(gradient)  # a start context in the middle of a text
        self.losses.index_copy_(0, place, nll.detach().float())
        self._carry({name: value.detach() for name, value in state.items()})

    def _carry(self, state: State) -> None:
        same = self.state is not None and all(self.state[name].shape == value.shape for name, value in state.items())
        if not same:
            self.state = {name: torch.empty_like(value) for name, value in state.items()}
        for name, value in state.items():
            self.state[name].copy_(value)

    @torch.no_grad()
    def _learn_shares(self, x: Pointed, softmax: Tensor, targets: Tensor) -> None:
        """After a segment: what its tokens owe to whom, by the shares they were scored with; x has those already."""
        share = x.shares.double()
        share = torch.cat((1 - share.sum(-1, keepdim=True), share), dim=-1)
        parts = (share * x.parts((-softmax.double()).exp(), targets))[0]
        parts /= parts.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        self.owed.index_add_(0, x.groups[0], parts)
        self.shares.copy_(self.owed[:, 1:] / self.owed.sum(1, keepdim=True))

    @torch.no_grad()
    def _add_squares(self) -> None:
        torch._foreach_addcmul_(self.rms, self.gradients, self.gradients)

    @torch.no_grad()
    def _learn(self, steps: list[Tensor], returns: list[Tensor]) -> None:
        back = torch._foreach_sub(self.trained, self.weights)
        length = torch.stack(torch._foreach_norm(self.gradients)).norm()
        torch._foreach_mul_(self.gradients, torch.where(length > self.usual_length, self.usual_length / length, 1.0))
        torch._foreach_addcmul_(self.weights, self.gradients, steps, value=-1)
        torch._foreach_addcmul_(self.weights, back, returns)
        copy_all(self.parameters, self.weights)


def _rates(rms: Tensor, lr: float, decay: float) -> tuple[Tensor, Tensor]:
    """Of one tensor of weights: step per gradient, and rate of return. One that had no gradient in training stays."""
    mean, spread = rms.mean(), rms.square().mean().sqrt()
    moved = mean > 0
    mean, spread = (torch.where(moved, x, torch.ones_like(x)) for x in (mean, spread))
    return lr * moved / (rms + spread), (decay * rms / mean).clamp(max=1)
