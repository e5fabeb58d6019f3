"""Dynamic evaluation: scored before it is learnt from, by the formula, and a text that repeats itself gets easier."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from newllm import dynamic
from newllm.config import ModelConfig
from newllm.dynamic import dynamic_losses
from newllm.errors import UserError
from newllm.evaluation import token_losses
from newllm.model import build_model
from newllm.model.recall import NONE, recent_shares

MODEL = ModelConfig(vocab_size=17, embed_dim=12, context_dim=12, num_layers=1, ffn_dim=16, fnn_layers=0, dropout=0.3)
MODELS = {
    "none": MODEL,
    "full": dataclasses.replace(MODEL, coupling="full", norm="state"),
    "transformer": dataclasses.replace(MODEL, architecture="transformer", num_heads=2, max_seq_len=8),
}
SETTINGS = {"lr": 1e-2, "decay": 1e-3, "segment": 5}


@pytest.fixture(params=MODELS)
def model(request):
    return noisy(MODELS[request.param])


def noisy(config):
    """What begins as zero has no gradient to measure."""
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def text(n, seed):
    return np.random.default_rng(seed).integers(17, size=n, dtype=np.uint16)


def test_with_hardly_any_step_it_is_the_static_evaluation(model):
    tokens = text(64, 1)
    got = dynamic_losses(model, tokens, text(100, 0), lr=1e-12, decay=0.0, segment=5)
    assert got.shape == (63,)
    np.testing.assert_allclose(got, token_losses(model, tokens), rtol=1e-5)


def test_a_segment_is_scored_before_it_is_learnt_from(model):
    tokens = text(64, 1)
    got = dynamic_losses(model, tokens, text(100, 0), **SETTINGS)
    static = token_losses(model, tokens)
    np.testing.assert_allclose(got[:5], static[:5], rtol=1e-5)
    assert np.abs(got[5:] - static[5:]).min() > 0
    changed = tokens.copy()
    changed[40] = (changed[40] + 1) % 17
    np.testing.assert_array_equal(dynamic_losses(model, changed, text(100, 0), **SETTINGS)[:39], got[:39])


def test_a_text_that_repeats_itself_gets_easier(model):
    tokens = np.tile(text(20, 1), 15)
    static, got = token_losses(model, tokens), dynamic_losses(model, tokens, text(200, 0), **SETTINGS)
    assert got[200:].mean() < static[200:].mean() - 0.5
    assert model.training  # and the model is as it was
    np.testing.assert_array_equal(token_losses(model, tokens), static)


def test_two_updates_by_hand(monkeypatch):
    monkeypatch.setattr(dynamic, "STATISTICS", 2)
    model = noisy(dataclasses.replace(MODEL, dropout=0.0)).eval()
    train, tokens, lr, decay, T = text(50, 0), text(14, 1), 0.05, 0.4, 4

    def gradients(of, ids, state):
        ids = torch.from_numpy(ids.astype(np.int64))[None]
        x, state = of.features(ids[:, :-1], state)
        nll = of.nll(x, ids[:, 1:])[0]
        found = torch.autograd.grad(nll.mean(), list(of.parameters()), allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, of.parameters(), strict=True)]
        return found, {name: value.detach() for name, value in state.items()}, nll.detach()

    first, state, _ = gradients(model, train[:5], None)
    second, _, _ = gradients(model, train[4:9], state)
    squares = [(a.square() + b.square()) / 2 for a, b in zip(first, second, strict=True)]
    rms, usual = [square.sqrt() for square in squares], sum(square.sum() for square in squares).sqrt()
    learner = build_model(model.config).eval()
    learner.load_state_dict(model.state_dict())
    want, cut, state = [], [], None
    for start in (0, 4, 8, 12):
        found, state, nll = gradients(learner, tokens[start : start + T + 1], state)
        want.append(nll)
        cut.append(min(1.0, (usual / torch.cat([g.flatten() for g in found]).norm()).item()))
        with torch.no_grad():
            for p, trained, g, r in zip(learner.parameters(), model.parameters(), found, rms, strict=True):
                p += -lr * cut[-1] * g / (r + r.square().mean().sqrt()) + (decay * r / r.mean()).clamp(max=1) * (
                    trained - p
                )
    got = dynamic_losses(model, tokens, train, lr=lr, decay=decay, segment=T)
    np.testing.assert_allclose(got, torch.cat(want).numpy(), rtol=1e-4)
    assert min(cut) < 1 == max(cut)  # both happened


def test_shares_of_recall_learn_what_is_owed_to_whom():
    """Weights that stand still: what changes from segment to segment are the shares, here by hand."""
    model = noisy(dataclasses.replace(MODEL, recall=100)).eval()
    with torch.no_grad():
        model.recall.shares.uniform_(0.01, 0.07)
    tokens, T = text(120, 1) % 5, 16  # places that come again
    got = dynamic_losses(model, tokens, text(100, 0), lr=1e-30, decay=0.0, segment=T)
    shares = model.recall.shares.double()
    owed = dynamic.PRIOR * torch.cat((1 - shares.sum(1, keepdim=True), shares), dim=1)
    state, want, groups = None, [], set()
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    for start in range(0, 119, T):
        inputs, targets = ids[:, start : start + T], ids[:, start + 1 : start + T + 1]
        inputs = inputs[:, : targets.shape[1]]
        with torch.no_grad():
            x, state = model.features(inputs, state)
            softmax = (-model.nll(x.x, targets)).exp().double()
            recent = recent_shares(x.tokens, x.recent, targets).double()
        now = owed / owed.sum(1, keepdim=True)
        for t in range(targets.shape[1]):
            group = int(x.groups[0, t])
            groups.add(group)
            model_says, next_word = softmax[0, t].item(), targets[0, t].item()
            words = [model_says if word == NONE else float(word == next_word) for word in x.words[0, t].tolist()]
            parts = now[group] * torch.tensor([model_says, *words, recent[0, t].item()], dtype=torch.float64)
            want.append(-parts.sum().log().item())
            owed[group] += parts / parts.sum()
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert len(groups) >= 5
    assert torch.equal(model.recall.shares.double(), shares)  # the model is as it was


def test_words_that_the_sample_of_the_training_text_lacks_do_no_harm():
    model = noisy(dataclasses.replace(MODEL, vocab_size=2000))
    common, rare = np.random.default_rng(0), np.random.default_rng(1)
    train = common.integers(20, size=200, dtype=np.uint16)
    tokens = rare.permutation(np.arange(2000, dtype=np.uint16))  # every word once: nothing to learn
    static, got = token_losses(model, tokens), dynamic_losses(model, tokens, train, lr=1e-2, decay=1e-3, segment=32)
    assert got.mean() < static.mean() + 0.5


@pytest.mark.parametrize("changes", [{"lr": 0.0}, {"decay": -1.0}, {"segment": 0}, {"lr": float("nan")}])
def test_settings_that_make_no_sense(changes):
    with pytest.raises(UserError, match="dynamic evaluation with"):
        dynamic_losses(build_model(MODEL), text(9, 0), text(9, 0), **{**SETTINGS, **changes})


@pytest.mark.gpu
def test_on_a_gpu_graphs_give_what_the_cpu_gives(model):
    tokens = text(200, 1)
    want = dynamic_losses(model, tokens, text(100, 0), **SETTINGS)
    got = dynamic_losses(model.cuda(), tokens, text(100, 0), **SETTINGS)
    np.testing.assert_allclose(got, want, rtol=5e-3, atol=5e-3)  # float32 (TF32 off) through forty updates
