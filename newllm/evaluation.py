"""How well a model predicts a text: perplexity with carried context, and the baseline that knows only word counts."""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from newllm.data import evaluation_segments
from newllm.errors import UserError
from newllm.generation import evaluating
from newllm.model import LanguageModel
from newllm.tokenizer import Tokenizer

SEGMENT = 512  # tokens per forward pass; the context is carried over, so the result does not depend on it
GPU_SEGMENTS = 8  # as many at once where a GPU would wait for the host
ROUNDS = 200  # of expectation maximisation
POOLED = 100  # tokens that the shares of all groups together count as in each of them


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood in nats per predicted token, and how many were predicted."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond that it is no number any more


def evaluate(
    model: LanguageModel, tokens: np.ndarray, *, limit: int | None = None, progress: str | None = None
) -> Score:
    """Score `tokens` (n,) as one stream from the start of a text, every token but the first predicted once.

    Every token is predicted from all before it that the model can hold: the context is carried from segment to segment,
    and a Transformer slides its window. `limit` scores only the first so many tokens. Raises UserError where there are
    fewer than two tokens or one is not in the model's vocabulary.
    """
    losses = token_losses(model, tokens, limit=limit, progress=progress)
    return Score(float(losses.astype(np.float64).mean()), losses.size)


def token_losses(
    model: LanguageModel, tokens: np.ndarray, *, limit: int | None = None, progress: str | None = None
) -> np.ndarray:
    """Negative log-likelihood of every token but the first, as `evaluate` predicts them: (n - 1,) float32."""
    tokens = tokens[: None if limit is None else limit + 1]
    check_tokens(model, tokens)
    device = next(model.parameters()).device
    segment = SEGMENT * (GPU_SEGMENTS if device.type == "cuda" else 1)
    state, losses = None, []
    with torch.inference_mode(), evaluating(model.modules()), progress_bar(tokens.size - 1, progress) as bar:
        for inputs, targets in evaluation_segments(tokens, segment):
            x, state = model.features(inputs.to(device), state)  # (1, T, F)
            losses.append(model.nll(x, targets.to(device))[0].float())
            bar.update(inputs.shape[1])
        return torch.cat(losses).cpu().numpy()


def calibrate(
    model: LanguageModel, tokens: np.ndarray, *, limit: int | None = None, progress: str | None = None
) -> Score:
    """Set the shares of a model with `recall` (newllm/model/recall.py) so that `tokens` are likeliest, and score them as `evaluate` does.

    The likelihood is concave in the shares; expectation maximisation climbs it: each round, a share becomes the mean over its tokens of what
    it is of their probability. First for all tokens as one group, then for each group, beside its own tokens POOLED of that mean: a group of few
    tokens knows little of its own. (On the built-in text, whose validation has 10,061 tokens, shares set on one half predict the other 0.5%
    better so; anything from 50 to 200 is as good.)
    """
    tokens = tokens[: None if limit is None else limit + 1]
    check_tokens(model, tokens)
    device = next(model.parameters()).device
    segment = SEGMENT * (GPU_SEGMENTS if device.type == "cuda" else 1)
    state, seen, groups = None, [], []
    with torch.inference_mode(), evaluating(model.modules()), progress_bar(tokens.size - 1, progress) as bar:
        for inputs, targets in evaluation_segments(tokens, segment):
            features, state = model.features(inputs.to(device), state)
            targets = targets.to(device)
            softmax = (-model.nll(features.x, targets).double()).exp()
            # Of a token that nothing expects: as little as float64 can hold.
            softmax.clamp_(min=torch.finfo(torch.float64).tiny)
            seen.append(features.parts(softmax, targets)[0])  # (T, C): of the softmax, words recalled, and recent words
            groups.append(features.groups[0])
            bar.update(inputs.shape[1])
    likely, group = torch.cat(seen), torch.cat(groups)
    shares, mixed = model.recall.shares, likely[:, 0].clone()
    shares.zero_()
    start = torch.full_like(likely[0], 0.1 / (likely.shape[1] - 1))
    start[0] = 0.9
    pooled = _likeliest_shares(likely, start, 0)
    for index in range(shares.shape[0]):
        own = likely[group == index]
        if own.shape[0] == 0:
            continue
        share = _likeliest_shares(own, pooled, POOLED)
        nowhere = (own == own[:, :1]).all(0)  # words that no token of this group recalls: the softmax, by another name
        share[0] = share[nowhere].sum()
        share[1:][nowhere[1:]] = 0
        share[0].clamp_(min=1e-6)  # a word that is neither recalled nor recent can always come
        share /= share.sum()
        shares[index] = share[1:]
        mixed[group == index] = own @ share
    return Score(-mixed.log().mean().item(), mixed.numel())


def _likeliest_shares(likely: torch.Tensor, prior: torch.Tensor, weight: float) -> torch.Tensor:
    """Shares (C,) of what says that tokens have the probabilities likely (T, C), by expectation maximisation from `prior` (C,), which counts as
    `weight` further tokens."""
    share = prior
    for _ in range(ROUNDS):
        owed = (likely * (share / (likely @ share)[:, None])).sum(0) + weight * prior
        share = owed / owed.sum()
    return share


def bits_per_byte(loss: float, tokens: np.ndarray, tokenizer: Tokenizer) -> float:
    """Of a mean loss in nats per token over all tokens (n,) but the first: what compares across vocabularies."""
    return loss * (tokens.size - 1) / math.log(2) / float(tokenizer.byte_counts[tokens[1:]].sum())


def check_tokens(model: LanguageModel, tokens: np.ndarray) -> None:
    """Raise UserError where tokens (n,) cannot be scored."""
    if tokens.size < 2:
        raise UserError("a text of fewer than two tokens cannot be evaluated: there is nothing to predict")
    if int(tokens.max()) >= model.config.vocab_size:
        raise UserError(
            f"the text has token {int(tokens.max())}, the model's vocabulary only {model.config.vocab_size}"
        )


def progress_bar(tokens: int, label: str | None) -> tqdm:
    """Over tokens; silent without a label or a terminal."""
    return tqdm(
        total=tokens, desc=label, unit="token", unit_scale=True, leave=False, disable=None if label else True
    )  # fmt: skip


def by_position(losses: np.ndarray, starts: np.ndarray) -> list[dict[str, Any]]:
    """Losses (n - 1,) of `token_losses`, gathered by how far into its document a token stands.

    starts: indices of the tokens that begin a document, the first 0. One row per power of two: tokens `first` to `last`
    of their documents (counted from 0), how many there are, their mean loss and its perplexity.
    """
    index = np.arange(1, losses.size + 1)  # of the token that is predicted
    position = index - starts[np.searchsorted(starts, index, side="right") - 1]
    bucket = np.where(position > 0, np.log2(np.maximum(position, 1)).astype(int) + 1, 0)
    rows = []
    for number in np.unique(bucket):
        chosen = losses[bucket == number].astype(np.float64)
        first, last = (0, 0) if number == 0 else (2 ** (number - 1), 2**number - 1)
        mean = float(chosen.mean())
        rows.append(
            {
                "first": int(first),
                "last": int(last),
                "tokens": chosen.size,
                "loss": mean,
                "perplexity": perplexity(mean),
            }
        )
    return rows


def document_starts(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Indices of the tokens that begin a document. In word-level text `<eos>` ends a line, and the whole is one document."""
    if tokenizer.kind == "word":
        return np.zeros(1, np.int64)
    ends = np.flatnonzero(tokens[:-1] == tokenizer.eos_id)
    return np.concatenate((np.zeros(1, np.int64), ends + 1))


def unigram_score(counts: np.ndarray, tokens: np.ndarray) -> Score:
    """The score of p(token) = (count + 1) / (sum of counts + V), on the same tokens that `evaluate` predicts.

    counts: occurrences of every token in the training text (V,).
    """
    smoothed = counts.astype(np.float64) + 1
    nats = -np.log(smoothed / smoothed.sum())
    return Score(float(nats[tokens[1:]].mean()), tokens.size - 1)


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest: of tensors on a GPU, of the whole process (resident) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
