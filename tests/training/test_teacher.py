"""Distillation: what teachers expect is what they compute, and a model that learns it alone comes to agree with them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from newllm import teacher
from newllm.config import ModelConfig
from newllm.errors import UserError
from newllm.model import build_model
from newllm.run import Run
from newllm.training import Trainer
from newllm.training_config import TrainingConfig

V = 20
MODEL = ModelConfig(vocab_size=V, embed_dim=12, context_dim=12, num_layers=2, ffn_dim=16, fnn_layers=0)
TRANSFORMER = dataclasses.replace(MODEL, architecture="transformer", num_heads=2, max_seq_len=8)
RECALL = dataclasses.replace(MODEL, recall=60)
CONFIG = TrainingConfig(
    steps=12, batch_size=4, segment=8, lr=1e-2, warmup=3, eval_every=4, eval_tokens=64, checkpoint_every=5, log_every=2,
    teacher_share=0.5, teacher_words=6, device="cpu", threads=1,
)  # fmt: skip


def text(n, seed):
    return np.random.default_rng(seed).integers(V, size=n).astype(np.uint16)


def a_teacher(seed=0, config=MODEL):
    """Of expectations far from flat."""
    torch.manual_seed(seed)
    model = build_model(config).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(2)
        if config.recall:
            model.recall.out.weight.normal_()
            model.recall.shares.fill_(0.07)
    return model


def trainer(folder, teachers, **changes):
    run = Run(folder)
    run.path.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(CONFIG, **changes)
    return Trainer(run, MODEL, config, text(400, 0), text(100, 1), None, teachers)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("config", [MODEL, TRANSFORMER, RECALL], ids=["newllm", "transformer", "recall"])
def test_advice_is_the_mean_of_what_teachers_compute(config, temperature, monkeypatch):
    monkeypatch.setattr(teacher, "SEGMENT", 33)  # in pieces, contexts carried
    teachers, tokens = [a_teacher(0, config), a_teacher(1, config)], text(100, 2)
    advice = teacher.read(teachers, tokens, 6, torch.float32, temperature)
    stream = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        features = [model.features(stream)[0] for model in teachers]
        logits = [
            model.logits(getattr(x, "x", x))[0] for model, x in zip(teachers, features, strict=True)
        ]  # the softmax alone
        p = sum((one / temperature).softmax(-1) for one in logits) / 2
    assert advice.words.shape == advice.probabilities.shape == (100, 6)
    assert torch.allclose(advice.probabilities.float(), p.topk(6).values, atol=1e-3)
    assert torch.allclose(p.gather(1, advice.words.long()), p.topk(6).values, atol=1e-6)
    assert all(len(set(row)) == 6 for row in advice.words.tolist())


def test_words_are_of_the_places_that_are_read(tmp_path):
    """Row t of the advice is what follows token t, wherever an epoch begins."""
    one = trainer(tmp_path, [a_teacher()])
    for offset in (0, 395):
        at = one.streams.positions(torch.tensor(offset), 8)
        inputs, _ = one.streams.window(offset, 8)
        assert torch.equal(one.streams.tokens[at].long(), inputs)
        words, shares = one.advice.at(at, 0.5)
        assert torch.equal(words, one.advice.words[at].long())
        assert torch.allclose(shares, one.advice.probabilities[at].float() / 2)


def test_a_model_that_learns_from_a_teacher_alone_comes_to_agree_with_it(tmp_path):
    """On text without any rule, so that all it can learn is the teacher's."""
    model = a_teacher()

    def distance(of):
        stream = torch.from_numpy(text(400, 0).astype(np.int64))[None]
        with torch.no_grad():
            p, q = model(stream)[0].softmax(-1), of.model.eval()(stream)[0].log_softmax(-1)
        return (p * (p.log() - q)).sum(-1).mean().item()

    taught = trainer(tmp_path / "taught", [model], teacher_share=1.0, teacher_words=V, steps=150)
    alone = trainer(tmp_path / "alone", [], teacher_share=0.0, steps=150)
    before = distance(taught)
    taught.train()
    alone.train()
    assert distance(taught) < 0.5 * min(before, distance(alone))


def test_all_words_and_no_share_of_the_text_is_cross_entropy_with_the_teacher(tmp_path):
    model = a_teacher()
    one = trainer(tmp_path, [model], teacher_share=1.0, teacher_words=V)
    inputs, targets = one.streams.window(0, 8)
    x, _ = one.forward(inputs, None)
    nll = one.model.nll(x, targets, one.advice.at(one.streams.positions(torch.tensor(0), 8), 1.0))
    first = one.streams.tokens.long()[None]
    with torch.no_grad():
        p = model(first)[0][0].softmax(-1)[one.streams.positions(torch.tensor(0), 8)]
    want = -(p * one.model.logits(x).log_softmax(-1)).sum(-1)
    assert torch.allclose(nll, want, rtol=2e-3)  # probabilities are kept in float16


def test_the_trainer_asks_as_its_config_says(tmp_path):
    one = trainer(tmp_path, [a_teacher()], teacher_temperature=2.0, teacher_words=3)
    want = teacher.read([a_teacher()], text(400, 0), 3, torch.float32, 2.0)
    assert one.advice.words.equal(want.words)
    assert one.advice.probabilities.equal(want.probabilities)


def test_noise_is_not_for_the_teacher(tmp_path):
    assert trainer(tmp_path, [a_teacher()], noise=1.0).advice.words.equal(
        teacher.read([a_teacher()], text(400, 0), 6, torch.float32).words
    )


def test_a_resumed_run_goes_on_with_the_same_losses(tmp_path):
    whole, parts = (trainer(tmp_path / name, [a_teacher()]) for name in ("whole", "parts"))
    whole.train()
    parts.train(stop_after=5)
    again = trainer(tmp_path / "parts", [a_teacher()])
    again.load()
    again.train()
    for one, other in zip(whole.weights.parameters, again.weights.parameters, strict=True):
        assert torch.equal(one, other)


def test_what_does_not_fit(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="teachers: got 0"):
        trainer(tmp_path, [])
    with pytest.raises(ValueError, match="teachers: got 1"):
        trainer(tmp_path, [a_teacher()], teacher_share=0.0)
    mixture = build_model(dataclasses.replace(MODEL, softmaxes=2))
    with pytest.raises(ValueError, match="advice: a mixture of softmaxes takes none"):
        mixture.nll(torch.zeros(1, 2, 12), torch.zeros(1, 2, dtype=torch.int64), (torch.zeros(0), torch.zeros(0)))
    monkeypatch.setattr(teacher, "MOST_BYTES", 6000)
    with pytest.raises(UserError, match=r"--teacher-words 6: 6 words at each of 400 tokens .* wanted at most 2$"):
        teacher.read([a_teacher()], text(400, 0), 6, torch.float32)


@pytest.mark.gpu
def test_a_graph_trains_what_eager_steps_train(tmp_path):
    graph, eager = (
        trainer(tmp_path / name, [a_teacher().cuda()], device="cuda", precision="float32", cuda_graph=name == "graph")
        for name in ("graph", "eager")
    )
    graph.train()
    eager.train()
    for one, other in zip(graph.weights.parameters, eager.weights.parameters, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
