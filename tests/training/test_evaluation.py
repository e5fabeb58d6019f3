"""What a model is scored by: one pass over the text, places in documents, word counts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from newllm.errors import UserError
from newllm.evaluation import by_position, document_starts, evaluate, unigram_score
from newllm.model import build_model

from .test_trainer import FULL, MODEL, TRANSFORMER, text


@pytest.mark.parametrize("model", [MODEL, FULL, TRANSFORMER], ids=["none", "full", "transformer"])
def test_evaluation_is_the_mean_over_one_pass(model, monkeypatch):
    """In segments or at once: the carried state (or sliding window) makes it the same number."""
    torch.manual_seed(0)
    model, tokens = build_model(model), text(60)
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits, _ = model.eval()(ids[:, :-1])
    want = F.cross_entropy(logits[0], ids[0, 1:]).item()
    model.train()
    for segment in (512, 7, 1):
        monkeypatch.setattr("newllm.evaluation.SEGMENT", segment)
        score = evaluate(model, tokens)
        assert score.tokens == 59
        assert score.loss == pytest.approx(want, rel=1e-5)  # float32
    assert model.training
    assert evaluate(model, tokens, limit=20).tokens == 20


def test_evaluation_refuses_what_it_cannot_score():
    model = build_model(MODEL)
    with pytest.raises(UserError, match="fewer than two tokens"):
        evaluate(model, np.zeros(1, np.uint16))
    with pytest.raises(UserError, match="token 17, the model's vocabulary only 17"):
        evaluate(model, np.array([1, 17], np.uint16))


def test_losses_by_position_in_documents():
    losses = np.arange(1.0, 12.0, dtype=np.float32)  # of tokens 1 to 11
    rows = by_position(losses, np.array([0, 6]))  # 0..5 are one document, 6..11 the other
    assert [(row["first"], row["last"], row["tokens"]) for row in rows] == [(0, 0, 1), (1, 1, 2), (2, 3, 4), (4, 7, 4)]
    assert [row["loss"] for row in rows] == [6.0, (1 + 7) / 2, (2 + 3 + 8 + 9) / 4, (4 + 5 + 10 + 11) / 4]
    assert rows[0]["perplexity"] == pytest.approx(math.exp(6))


def test_document_starts_are_after_the_ends_but_for_words():
    tokens = np.array([5, 0, 4, 4, 0], np.uint16)
    bpe, word = SimpleNamespace(kind="bpe", eos_id=0), SimpleNamespace(kind="word", eos_id=0)
    assert document_starts(tokens, bpe).tolist() == [0, 2]
    assert document_starts(tokens, word).tolist() == [0]


def test_unigram_by_hand():
    score = unigram_score(np.array([3, 0, 1]), np.array([0, 0, 1, 2], np.uint16))
    # p = 4/7, 1/7, 2/7; predicted are the last three tokens.
    assert score.loss == pytest.approx(-math.log(4 / 7 * 1 / 7 * 2 / 7) / 3)
    assert score.tokens == 3
    assert score.perplexity == pytest.approx(math.exp(score.loss))
