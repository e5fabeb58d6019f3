"""CUDA graphs of the training step: they train what steps launched kernel by kernel train, and go on after a resume."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from newllm.config import ModelConfig
from newllm.graphs import EAGER_RUNS, Graphs
from newllm.run import Run
from newllm.training import Trainer
from newllm.training_config import TrainingConfig

MODEL = ModelConfig(
    vocab_size=101, embed_dim=64, context_dim=48, num_layers=2, ffn_dim=80, fnn_layers=0, dropout=0.1, locked_dropout=True,
    embed_dropout=0.1, softmaxes=2,
)  # fmt: skip
MODELS = {
    "none": MODEL,
    "hops": dataclasses.replace(MODEL, coupling="hops", hops=2, recurrent_dropout=0.2),
    "recall": dataclasses.replace(MODEL, recall=60, recall_dropout=0.2),
    "transformer": dataclasses.replace(MODEL, architecture="transformer", num_heads=2, max_seq_len=18),
    "transformer-recall": dataclasses.replace(
        MODEL, architecture="transformer", num_heads=2, max_seq_len=18, recall=60, recall_dropout=0.2
    ),
}
CONFIG = TrainingConfig(
    steps=30, batch_size=4, segment=16, random_segments=True, grad_accum=2, lr=3e-3, warmup=3, average=0.9, average_start=10,
    activation_penalty=0.1, change_penalty=0.1, eval_every=30, eval_tokens=64, checkpoint_every=30, log_every=10,
)  # fmt: skip


def trained(folder, model, stops=(30,), **changes):
    """The metrics and the weights at the end of a training in as many sessions as there are stops."""
    folder.mkdir(exist_ok=True)
    tokens = np.random.default_rng(0).integers(101, size=1500, dtype=np.uint16)
    for stop in stops:
        config = dataclasses.replace(CONFIG, **changes)
        spelling = torch.eye(101, config.spelling) if config.spelling else None
        trainer = Trainer(Run(folder), model, config, tokens, tokens[:200], spelling)
        if trainer.run.last_file.exists():
            trainer.load()
        trainer.train(stop - trainer.step)
    return [r["loss"] for r in trainer.run.metrics() if "loss" in r], list(trainer.weights.average.parameters())


def assert_same(got, want):
    assert got[0] == pytest.approx(
        want[0], rel=2e-3
    )  # bfloat16 through thirty steps; launched otherwise, rounded alike
    for one, other in zip(got[1], want[1], strict=True):
        assert (one - other).norm() <= 0.02 * other.norm() + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "precision", "more"),
    [
        ("none", "bfloat16", {}),
        ("none", "float32", {}),
        ("none", "bfloat16", {"spelling": 40, "noise": 0.2}),
        ("none", "float32", {"spelling": 40, "noise": 0.2}),
        ("hops", "bfloat16", {}),
        ("transformer", "bfloat16", {}),
        ("transformer-recall", "bfloat16", {}),
    ],
)
def test_graphs_train_what_eager_steps_train(tmp_path, name, precision, more):
    settings = {"device": "cuda", "precision": precision} | more
    eager = trained(tmp_path / "eager", MODELS[name], cuda_graph=False, **settings)
    assert eager[0][-1] < eager[0][0]
    stops = (17, 30) if name == "none" else (30,)
    assert_same(trained(tmp_path / "graph", MODELS[name], stops, **settings), eager)


@pytest.mark.gpu
def test_a_function_is_captured_once_and_replayed():
    graphs = Graphs(torch.device("cuda"), enabled=True)
    x, calls = torch.zeros((), device="cuda"), []

    def function():
        calls.append(1)
        x.add_(1)

    with graphs.stream():
        for _ in range(10):
            graphs.run("key", function)
    torch.cuda.synchronize()
    assert x.item() == 10
    assert len(calls) == EAGER_RUNS + 1


def test_without_a_gpu_every_run_is_a_call():
    graphs, calls = Graphs(torch.device("cpu"), enabled=True), []
    with graphs.stream():
        for n in range(5):
            graphs.run("key", lambda n=n: calls.append(n))
    assert calls == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", MODELS)
def test_all_options_together_train_and_resume_to_the_last_bit(tmp_path, name):
    """Here on a CPU: random segments, averages, penalties, dropouts, a mixture."""
    settings = {"device": "cpu", "steps": 24, "average_start": 9, "threads": 1}
    straight = trained(tmp_path / "straight", MODELS[name], (24,), **settings)
    resumed = trained(tmp_path / "resumed", MODELS[name], (5, 13, 24), **settings)
    assert resumed[0] == straight[0]
    assert all(torch.equal(one, other) for one, other in zip(resumed[1], straight[1], strict=True))
