"""What words share by how they are written: the embedding of a rare word learns from all words that look like it.

While a model trains, its embedding is a sum,

    E = E_word + S G,      S[w, g] = 1 / sqrt(number of features of w) where the spelling of w has feature g, else 0

E_word (V, E) has a row of its own for every token, G (K, E) one for every feature of spelling; both are decayed like any other matrix,
so that a word of which the text says little is left with what its letters say. E is what computes, is evaluated and kept: the
trained model is one like any other, with V rows and nothing to look up.

Features are the runs of one to five characters of a token in lower case between marks of its beginning and end, the whole of
it, and its shape (capitals, small letters, digits and other signs, each run of a kind once). The K that most tokens have are kept.

After: Bojanowski, Grave, Joulin and Mikolov, "Enriching word vectors with subword information" (2017), whose features are hashed
and serve the input alone; here, where the output matrix is the embedding, it shares them too.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from newllm.tokenizer import Tokenizer

LONGEST = 5  # characters of a feature


def features_of(token: str) -> set[str]:
    """All features of a token's spelling, none of the empty one."""
    if not token:
        return set()
    word = f"<{token.lower()}>"
    runs = {word[i : i + n] for n in range(1, LONGEST + 1) for i in range(len(word) - n + 1)} - {"<", ">"}
    return runs | {word, "shape " + _shape(token)}


def _shape(token: str) -> str:
    """Aa for "Paris", Aa-0 for "Boeing-747"."""
    kinds = ["A" if c.isupper() else "a" if c.islower() else "0" if c.isdigit() else c for c in token]
    return "".join(kind for n, kind in enumerate(kinds) if n == 0 or kinds[n - 1] != kind)


def spelling_matrix(tokenizer: Tokenizer, count: int) -> Tensor:
    """S (V, K), float32, dense: K = count, or as many features as two tokens share where these are fewer."""
    tokens = [features_of(tokenizer.spelling(index)) for index in range(tokenizer.vocab_size)]
    found = Counter(feature for features in tokens for feature in features)
    shared = sorted((feature for feature, n in found.items() if n > 1), key=lambda feature: (-found[feature], feature))
    column = {feature: index for index, feature in enumerate(shared[:count])}
    S = torch.zeros(len(tokens), len(column))
    for row, features in enumerate(tokens):
        kept = [column[feature] for feature in features if feature in column]
        if kept:
            S[row, kept] = len(kept) ** -0.5
    return S


class Spelling:
    """G of a model in training, which begins as zero, and the embedding that it is a part of."""

    def __init__(self, matrix: Tensor, embedding: Tensor) -> None:
        """matrix: S (V, K). embedding: (V, E), which computes and gets the gradients."""
        self.matrix = matrix.to(embedding)  # dense: one product each way, sums in a fixed order
        self.weight = nn.Parameter(torch.zeros(matrix.shape[1], embedding.shape[1], device=embedding.device))  # float32
        self.embedding = embedding

    @torch.no_grad()
    def write(self, word: Tensor, shared: Tensor) -> None:
        """embedding = E_word + S G, of word (V, E) and shared (K, E)."""
        self.embedding.copy_(word + self.matrix @ shared.to(self.matrix.dtype))

    def gradient(self) -> Tensor:
        """Of G (K, E), from the embedding's."""
        return self.matrix.t() @ self.embedding.grad
