"""What words share by how they are written: the embedding of a rare word learns from all words that look like it.

While a model trains, its embedding is a sum,

    E = E_word + S G,      S[w, g] = 1 / sqrt(number of features of w) where the spelling of w has feature g, else 0

E_word (V, E) has a row of its own for every token, G (K, E) one for every feature of spelling. Weight decay draws both to zero,
so what the text says little of is left with what its letters say. E is what computes, is evaluated and kept: the trained model is
one like any other, with V rows and nothing to look up.

Features are the runs of one to five letters of a token in lower case between marks of its beginning and end, the whole of it,
and its shape: capitals, small letters, digits and other signs, each run of a kind once. Kept are the K that most tokens have.

After: Bojanowski, Grave, Joulin and Mikolov, "Enriching word vectors with subword information" (2017), whose features are hashed;
here G also stands behind the output matrix where that is the embedding.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from newllm.tokenizer import EOS, UNKNOWN, Tokenizer

LONGEST = 5  # letters of a feature


def features_of(token: str) -> set[str]:
    """All features of a token's spelling. `<eos>` and `<unk>` are no words and have none."""
    if token in (EOS, UNKNOWN):
        return set()
    word = f"<{token.lower()}>"
    runs = {word[i : i + n] for n in range(1, LONGEST + 1) for i in range(len(word) - n + 1)} - {"<", ">"}
    return runs | {word, "shape " + _shape(token)}


def _shape(token: str) -> str:
    """Aa for "Paris", Aa-0 for "Boeing-747"."""
    kinds = ["A" if c.isupper() else "a" if c.islower() else "0" if c.isdigit() else c for c in token]
    return "".join(kind for n, kind in enumerate(kinds) if n == 0 or kinds[n - 1] != kind)


def spelling_matrix(tokenizer: Tokenizer, count: int) -> Tensor:
    """S (V, K), float32, K = count or, of a small vocabulary, as many features as two tokens share."""
    sets = [features_of(tokenizer.inner.id_to_token(index)) for index in range(tokenizer.vocab_size)]
    shared = Counter(feature for each in sets for feature in each)
    common = sorted((feature for feature, n in shared.items() if n > 1), key=lambda feature: (-shared[feature], feature))
    column = {feature: index for index, feature in enumerate(common[:count])}
    S = torch.zeros(len(sets), len(column))
    for row, each in enumerate(sets):
        kept = [column[feature] for feature in each if feature in column]
        if kept:
            S[row, kept] = len(kept) ** -0.5
    return S
