"""How well a model predicts a text: perplexity with carried context, and the baseline that knows only word counts."""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from newllm.data import evaluation_segments
from newllm.errors import UserError
from newllm.generation import evaluating
from newllm.model import LanguageModel

SEGMENT = 512  # tokens per forward pass; the context is carried over, so the result does not depend on it


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood in nats per predicted token, and how many were predicted."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # beyond that it is no number any more


def evaluate(
    model: LanguageModel,
    tokens: np.ndarray,
    *,
    limit: int | None = None,
    autocast: torch.dtype | None = None,
    progress: str | None = None,
) -> Score:
    """Score `tokens` (n,) as one stream from the start of a text, every token but the first predicted once.

    Every token is predicted from all before it that the model can hold: the context is carried from segment to segment,
    and a Transformer slides its window. `limit` scores only the first so many tokens. Raises UserError where there are
    fewer than two tokens or one is not in the model's vocabulary.
    """
    tokens = tokens[: None if limit is None else limit + 1]
    if tokens.size < 2:
        raise UserError("a text of fewer than two tokens cannot be evaluated: there is nothing to predict")
    if int(tokens.max()) >= model.config.vocab_size:
        raise UserError(
            f"the text has token {int(tokens.max())}, the model's vocabulary only {model.config.vocab_size}"
        )
    device = next(model.parameters()).device
    state, total = None, 0.0
    bar = tqdm(
        total=tokens.size - 1,
        desc=progress,
        unit="token",
        unit_scale=True,
        leave=False,
        disable=None if progress else True,
    )
    with torch.inference_mode(), evaluating(model.modules()), bar:
        for inputs, targets in evaluation_segments(tokens, SEGMENT):
            with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                logits, state = model(inputs.to(device), state)  # (1, T, V)
            total += F.cross_entropy(logits[0].float(), targets[0].to(device), reduction="sum").item()
            bar.update(inputs.shape[1])
    return Score(total / (tokens.size - 1), tokens.size - 1)


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
