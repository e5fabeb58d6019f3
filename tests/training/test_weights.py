"""Averages, optimizers and the copy that computes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from newllm.config import ModelConfig
from newllm.model import build_model
from newllm.training_config import TrainingConfig
from newllm.weights import Weights, in_dtype, make_optimizer

MODEL = ModelConfig(vocab_size=11, embed_dim=8, context_dim=8, num_layers=1, ffn_dim=8, fnn_layers=0)
CONFIG = TrainingConfig(steps=10, lr=0.1, warmup=0, weight_decay=0.0, clip=1e9)


def stepped(steps=8, dtype=torch.float32, **changes):
    """Weights after some steps of random gradients, and every parameter's history as (steps, numel)."""
    torch.manual_seed(0)
    weights = Weights(build_model(MODEL), dataclasses.replace(CONFIG, **changes), dtype)
    history = []
    for step in range(steps):
        for p in weights.computing.parameters():
            p.grad = torch.randn_like(p)
        weights.collect_gradients(first=True)
        weights.set_rates(0.1, step)
        weights.update(weights.averages(step))
        history.append(torch.cat([p.detach().flatten() for p in weights.parameters]))
    return weights, torch.stack(history)


def averaged(weights):
    return torch.cat([p.flatten() for p in weights.average.parameters()])


def test_a_decay_of_one_is_the_plain_mean_from_its_start():
    weights, history = stepped(average=1.0, average_start=3)
    torch.testing.assert_close(averaged(weights), history[3:].mean(0))


def test_a_decay_forgets_and_begins_as_the_plain_mean():
    weights, history = stepped(average=0.6)
    want = history[0]
    for n, w in enumerate(history[1:], start=1):
        want = want + (w - want) * max(0.4, 1 / (n + 1))
    torch.testing.assert_close(averaged(weights), want)


def test_an_average_of_every_third_step_forgets_as_fast():
    weights, history = stepped(average=0.6, average_start=1, average_every=3)
    want = history[1]
    for n, w in enumerate((history[4], history[7]), start=1):
        want = want + (w - want) * max(1 - 0.6**3, 1 / (n + 1))
    torch.testing.assert_close(averaged(weights), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_evaluated_is_the_average_once_there_is_one(dtype):
    weights, history = stepped(average=1.0, average_start=5, dtype=dtype)

    def flat(model):
        return torch.cat([p.flatten().float() for p in model.parameters()])

    assert torch.equal(flat(weights.evaluated(5)), flat(weights.computing))
    tolerance = {"rtol": 0, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(flat(weights.evaluated(8)), history[5:].mean(0), **tolerance)
    weights.refresh_copy()
    torch.testing.assert_close(flat(weights.computing), history[-1], **tolerance)


def test_sgd_takes_plain_steps():
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, optimizer="sgd", beta1=0.0, weight_decay=0.5)
    weights = Weights(build_model(MODEL), config, torch.float32)
    before = [p.detach().clone() for p in weights.parameters]
    gradients = [torch.randn_like(p) for p in weights.parameters]
    for p, g in zip(weights.parameters, gradients, strict=True):
        p.grad = g.clone()
    weights.set_rates(0.2, 0)
    weights.update(False)
    for p, old, g in zip(weights.parameters, before, gradients, strict=True):
        decay = 0.5 * old if p.dim() >= 2 else 0
        torch.testing.assert_close(p.detach(), old - 0.2 * (g + decay))


def test_optimizers_take_their_settings():
    model = build_model(MODEL)
    adamw = make_optimizer(model, dataclasses.replace(CONFIG, beta1=0.7, beta2=0.8))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.7, 0.8)
    sgd = make_optimizer(model, dataclasses.replace(CONFIG, optimizer="sgd", beta1=0.7))
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["momentum"] == 0.7


def test_a_copy_keeps_norms_starts_and_ties():
    model = build_model(MODEL)
    assert in_dtype(model, torch.float32) is model
    low = in_dtype(model, torch.bfloat16)
    assert low.head.weight is low.embedding.weight
    wide = {name for name, p in low.named_parameters() if p.dtype == torch.float32}
    assert wide == {name for name, _ in low.named_parameters() if "norm" in name or name.endswith("start")}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
