"""Training settings: values that make no sense are named, and the schedule has the values of its formula."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from newllm.config import ModelConfig
from newllm.errors import UserError
from newllm.model import build_model
from newllm.training_config import TRAINING_PRESETS, TrainingConfig, choose_device, compute_dtype, learning_rate
from newllm.weights import make_optimizer

CONFIG = TrainingConfig(steps=110, warmup=10, lr=2.0, min_lr=0.25)


@pytest.mark.parametrize(
    ("step", "want"),
    [
        (0, 0.2),
        (4, 1.0),
        (9, 2.0),  # the warm-up's last step has reached the top
        (10, 2.0),
        (43, 0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 3))),  # a third of the 99 steps of decay
        (109, 0.5),  # the last step trains at min_lr * lr
        (500, 0.5),
    ],
)
def test_schedule_values(step, want):
    assert learning_rate(CONFIG, step) == pytest.approx(want, rel=1e-12)


def test_other_schedules():
    linear = dataclasses.replace(CONFIG, schedule="linear")
    assert [learning_rate(linear, step) for step in (9, 10, 43, 109)] == pytest.approx([2.0, 2.0, 1.5, 0.5])
    constant = dataclasses.replace(CONFIG, schedule="constant")
    assert [learning_rate(constant, step) for step in (0, 10, 109)] == [0.2, 2.0, 2.0]


@pytest.mark.parametrize(("warmup", "steps"), [(0, 20), (5, 20), (19, 20), (20, 20), (50, 20), (0, 1)])
def test_schedule_rises_then_falls_and_stays_in_bounds(warmup, steps):
    config = dataclasses.replace(CONFIG, warmup=warmup, steps=steps)
    rates = [learning_rate(config, step) for step in range(steps)]
    assert all(0 < rate <= config.lr for rate in rates)
    top = min(warmup, steps)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize("architecture", ["newllm", "classic", "transformer"])
def test_matrices_decay_and_vectors_do_not(architecture):
    model = build_model(
        ModelConfig(architecture=architecture, vocab_size=11, embed_dim=8, coupling="full", num_heads=2)
    )
    decayed, kept = make_optimizer(model, TrainingConfig(weight_decay=0.3, beta2=0.9)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == (0.9, 0.9)
    names = {id(p): name for name, p in model.named_parameters()}
    ends = {names[id(p)].rsplit(".", 1)[-1] for p in kept["params"]}
    assert ends <= {"bias", "weight", "start"}
    assert all("norm" in names[id(p)] for p in kept["params"] if names[id(p)].endswith("weight"))
    assert all(p.dim() == 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("steps", 1.5), ("steps", True), ("batch_size", 0), ("segment", -1), ("grad_accum", 0),
        ("warmup", -1), ("seed", -1), ("seed", 2**63), ("threads", -2), ("eval_every", 0), ("checkpoint_every", 0),
        ("lr", 0), ("lr", math.nan), ("lr", math.inf), ("lr", "big"), ("clip", 0), ("weight_decay", -0.1),
        ("min_lr", 1.1), ("beta2", 1), ("precision", "float16"), ("device", 3), ("compile", "yes"),
        ("cuda_graph", 1), ("random_segments", None), ("schedule", "step"), ("optimizer", "adam"), ("average", 1.1), ("restart", 1.5),
        ("average_start", -1), ("average_every", 0), ("activation_penalty", -1), ("change_penalty", math.inf), ("beta1", 1.0), ("lr", True),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(field, value):
    with pytest.raises(UserError, match=field.replace("_", "-")):
        TrainingConfig(**{field: value})


def test_settings_survive_their_dict_and_unknown_ones_are_named():
    for config in TRAINING_PRESETS.values():
        assert TrainingConfig.from_dict(dataclasses.asdict(config)) == config
    with pytest.raises(UserError, match="unknown training setting momentum"):
        TrainingConfig.from_dict({"momentum": 0.9})


def test_tokens_per_step():
    assert TrainingConfig(batch_size=3, segment=5, grad_accum=7).tokens_per_step == 105


def test_devices_and_precisions():
    cpu = choose_device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name, said in [("gpu", "no such device"), ("meta", "not supported"), ("cuda:99", "CUDA devices")]:
        with pytest.raises(UserError, match=f"--device {name}.*{said}"):
            choose_device(name)
    assert compute_dtype("auto", cpu) is torch.float32
    assert compute_dtype("float32", cpu) is torch.float32
    assert compute_dtype("bfloat16", cpu) is torch.bfloat16
