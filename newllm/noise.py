"""Data noising: words of the training text replaced by others, as Kneser-Ney smoothing would weigh them.

A token x is replaced with probability noise * N(x .) / n(x): N(x .) how many different tokens follow it, n(x) how often it
occurs, so that words whose followers say little are trusted less. What takes its place is drawn in proportion to N(. y), how
many different tokens y follows. Where an input is replaced its target is, too: the pair is noise.

Source: Xie, Wang, Li, Levy, Nie, Jurafsky and Ng, "Data noising as smoothing in neural network language models" (2017),
bigram Kneser-Ney noising.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Noise:
    """Draws noise for pairs of inputs and targets; a CUDA graph can hold it."""

    def __init__(self, tokens: np.ndarray, vocab_size: int, noise: float, device: torch.device) -> None:
        """tokens (n,): the training text. noise: from 0 to 1, the probability for a word that never has the same follower twice."""
        pairs = np.unique(tokens[:-1].astype(np.int64) * vocab_size + tokens[1:])  # each once
        after = np.bincount(pairs // vocab_size, minlength=vocab_size)  # N(x .)
        before = np.bincount(pairs % vocab_size, minlength=vocab_size)  # N(. y)
        counts = np.bincount(tokens, minlength=vocab_size)
        probability = noise * after / np.maximum(counts, 1)
        self.probability = torch.from_numpy(probability).to(device, torch.float32)
        self.cumulative = torch.from_numpy(np.cumsum(before) / before.sum()).to(device, torch.float32)

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """inputs, targets (B, T) int64 -> the same, with pairs replaced."""
        chosen = torch.rand(inputs.shape, device=inputs.device) < self.probability[inputs]
        return torch.where(chosen, self._draw(inputs), inputs), torch.where(chosen, self._draw(targets), targets)

    def _draw(self, like: Tensor) -> Tensor:
        drawn = torch.searchsorted(self.cumulative, torch.rand(like.shape, device=like.device))
        return drawn.clamp_(max=self.cumulative.numel() - 1)
