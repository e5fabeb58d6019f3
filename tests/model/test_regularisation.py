"""Dropouts and the mixture of softmaxes: what is dropped is what their names say, and evaluation drops nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from configs import SMALL, VOCAB, make_model, make_tokens
from torch.nn import functional as F

from newllm.config import ModelConfig, transformer_like
from newllm.model import build_model
from newllm.model.common import Dropout, Embedding, Mixture

NONE = ModelConfig(**SMALL, fnn_layers=0)
ARCHITECTURES = {
    "none": NONE,
    "hops": dataclasses.replace(NONE, coupling="hops", hops=2),
    "full": dataclasses.replace(NONE, coupling="full"),
    "classic": dataclasses.replace(NONE, architecture="classic", coupling="hops", hops=1, fnn_layers=1),
    "transformer": dataclasses.replace(NONE, architecture="transformer", embed_dim=12, num_heads=2),
}


def test_locked_dropout_is_one_mask_for_all_steps():
    torch.manual_seed(0)
    x = torch.ones(3, 50, 8)
    y = Dropout(0.5, locked=True)(x)
    assert torch.equal(y, y[:, :1].expand(y.shape))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(y[0], y[1])
    loose = Dropout(0.5, locked=False)(x)
    assert not torch.equal(loose, loose[:, :1].expand(y.shape))
    assert torch.equal(Dropout(0.5, locked=True).eval()(x), x)


def test_embedding_dropout_leaves_out_whole_words():
    torch.manual_seed(0)
    embedding = Embedding(VOCAB, 4, 0.5)
    tokens = make_tokens(4, 40)
    ratio = (embedding(tokens) / F.embedding(tokens, embedding.weight)).detach()
    assert torch.allclose(ratio, ratio[..., :1].expand(ratio.shape))
    kinds = [ratio[..., 0][tokens == word].unique() for word in range(VOCAB)]
    assert all(len(kind) == 1 for kind in kinds)  # a word is dropped everywhere or nowhere
    assert {round(kind.item(), 3) for kind in kinds} == {0.0, 2.0}
    assert torch.equal(embedding.eval()(tokens), F.embedding(tokens, embedding.weight))


@pytest.mark.parametrize("name", ["hops", "full", "classic"])
def test_recurrent_dropout_drops_weights_that_read_the_context(name):
    config = dataclasses.replace(ARCHITECTURES[name], recurrent_dropout=0.5)
    model = make_model(config).train()
    cell = model.cell if name == "classic" else model.blocks[0].mixer.cell
    weight = cell.reading_weight()
    assert set((weight / cell.from_context.weight).unique().tolist()) == {0.0, 2.0}
    tokens = make_tokens(2, 6)
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    assert torch.equal(model.eval()(tokens)[0], make_model(ARCHITECTURES[name])(tokens)[0])


@pytest.mark.parametrize("name", ["hops", "full", "classic"])
def test_context_init_scales_what_reads_the_context_and_nothing_else(name):
    torch.manual_seed(3)
    plain = dict(build_model(ARCHITECTURES[name]).named_parameters())
    torch.manual_seed(3)
    scaled = dict(build_model(dataclasses.replace(ARCHITECTURES[name], context_init=0.25)).named_parameters())
    reading = [key for key in plain if key.endswith("from_context.weight")]
    assert reading
    for key, weight in plain.items():
        assert torch.equal(scaled[key], weight * (0.25 if key in reading else 1.0))


@pytest.mark.parametrize("name", ["none", "hops", "full", "classic"])
def test_gate_biases_begin_as_the_config_says_and_nothing_else_changes(name):
    torch.manual_seed(3)
    plain = dict(build_model(ARCHITECTURES[name]).named_parameters())
    torch.manual_seed(3)
    config = dataclasses.replace(ARCHITECTURES[name], forget_init=3.0, input_init=0.5)
    begun = dict(build_model(config).named_parameters())
    D = config.context_dim
    biases = [key for key, value in plain.items() if value.shape == (3 * D,)]
    assert len(biases) == (1 if name == "classic" else config.num_layers)
    for key, value in plain.items():
        if key not in biases:
            assert torch.equal(begun[key], value)
            continue
        f, i, d = begun[key].split(D)
        assert torch.equal(f, torch.linspace(0, 3, D))
        assert torch.equal(i, -f / 2)
        assert torch.equal(value, torch.cat((torch.linspace(0, 4, D), torch.zeros(2 * D))))
        assert not d.any()


def test_classic_draws_the_weights_of_a_segment_once(monkeypatch):
    model = make_model(dataclasses.replace(ARCHITECTURES["classic"], recurrent_dropout=0.5)).train()
    drawn = []
    real = model.cell.reading_weight
    monkeypatch.setattr(model.cell, "reading_weight", lambda: (drawn.append(1), real())[1])
    model(make_tokens(2, 6))
    assert drawn == [1]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("field", ["input_dropout", "output_dropout", "embed_dropout", "dropout"])
def test_every_dropout_reaches_every_architecture_in_training_only(name, field):
    model = make_model(dataclasses.replace(ARCHITECTURES[name], **{field: 0.5}))
    tokens, targets = make_tokens(2, 6), make_tokens(2, 6, seed=2)

    def losses():
        return model.nll(model.features(tokens)[0], targets)

    with torch.no_grad():
        assert torch.equal(losses(), losses())
        model.train()
        assert not torch.equal(losses(), losses())


def test_input_dropout_is_that_of_the_rest_unless_given():
    assert build_model(dataclasses.replace(NONE, dropout=0.3)).dropout.p == 0.3
    assert build_model(dataclasses.replace(NONE, dropout=0.3, input_dropout=0.0)).dropout.p == 0.0


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("softmaxes", [1, 3])
def test_nll_is_the_cross_entropy_of_the_logits(name, softmaxes):
    model = make_model(dataclasses.replace(ARCHITECTURES[name], softmaxes=softmaxes))
    tokens, targets = make_tokens(3, 7), make_tokens(3, 7, seed=2)
    x, _ = model.features(tokens)
    got = model.nll(x, targets)
    want = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten(), reduction="none").view(3, 7)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    parameters = list(model.parameters())
    pairs = zip(*(torch.autograd.grad(loss.sum(), parameters, retain_graph=True) for loss in (got, want)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_mixture_is_the_weighted_sum_of_softmaxes():
    torch.manual_seed(0)
    model = make_model(dataclasses.replace(NONE, softmaxes=3))
    assert isinstance(model.mixture, Mixture)
    x = torch.randn(2, 5, NONE.embed_dim, dtype=torch.float64)
    pi = model.mixture.shares(x).softmax(-1)
    latent = model.mixture.latent(x).tanh().view(2, 5, 3, -1)
    want = sum(pi[..., k, None] * model.head(latent[..., k, :]).softmax(-1) for k in range(3))
    torch.testing.assert_close(model.logits(x).exp(), want)
    assert torch.allclose(want.sum(-1), torch.ones(2, 5, dtype=torch.float64))


def test_the_transformer_to_compare_with_has_the_same_regularisation():
    config = dataclasses.replace(
        NONE, embed_dim=16, context_dim=20, ffn_dim=40, coupling="full", dropout=0.1, output_dropout=0.2, embed_dropout=0.3,
        recurrent_dropout=0.4, locked_dropout=True, softmaxes=2,
    )  # fmt: skip
    like = transformer_like(config)
    for field in ("dropout", "output_dropout", "embed_dropout", "locked_dropout", "softmaxes"):
        assert getattr(like, field) == getattr(config, field)
    assert like.recurrent_dropout == 0
