"""Embeddings that share features of spelling in training: what they are, their gradients, and what is left of them after."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from newllm.config import ModelConfig
from newllm.model import build_model
from newllm.run import Run
from newllm.spelling import features_of, spelling_matrix
from newllm.tokenizer import train_tokenizer
from newllm.training import Trainer
from newllm.training_config import TrainingConfig
from newllm.weights import Weights

WORDS = "The the then than Thane 1987 1988 Boeing-747 runs running runner <unk>"
MODEL = ModelConfig(vocab_size=20, embed_dim=8, context_dim=8, num_layers=1, ffn_dim=8, fnn_layers=0)
CONFIG = TrainingConfig(
    steps=12, batch_size=2, segment=6, lr=1e-2, warmup=2, eval_every=4, eval_tokens=90, checkpoint_every=12, log_every=4, average=0.7,
    device="cpu", threads=1, spelling=5,
)  # fmt: skip


def random_matrix(tokens=20, features=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(tokens, features, generator=draw) < 0.4) * 0.5


def trainer(folder, matrix, **changes):
    folder.mkdir(exist_ok=True)
    tokens = np.random.default_rng(0).integers(20, size=300, dtype=np.uint16)
    return Trainer(Run(folder), MODEL, dataclasses.replace(CONFIG, **changes), tokens, tokens[:90], matrix)


def test_features_are_runs_of_letters_the_word_and_its_shape():
    assert features_of("Abc") == {
        *("a", "b", "c", "<a", "ab", "bc", "c>", "<ab", "abc", "bc>", "<abc", "abc>", "<abc>", "shape Aa")
    }
    assert "shape Aa-0" in features_of("Boeing-747")
    assert features_of("") == set()


def test_the_matrix_has_what_most_words_share():
    tokenizer = train_tokenizer("word", [WORDS], None)
    every, few = spelling_matrix(tokenizer, 10**6), spelling_matrix(tokenizer, 7)
    assert every.shape[0] == few.shape[0] == tokenizer.vocab_size
    shared = [(every > 0).sum(0), (few > 0).sum(0)]
    assert shared[0].min() == 2  # no feature of a single word
    assert torch.equal(shared[1], shared[0].sort(descending=True).values[:7])
    length = every.norm(dim=1)
    row = {tokenizer.inner.id_to_token(n): n for n in range(tokenizer.vocab_size)}
    assert length[[row["<unk>"], row["<eos>"]]].tolist() == [0, 0]
    assert torch.allclose(length[[row[word] for word in ("The", "the", "1987")]], torch.ones(3))
    alike = every @ every.t()
    assert alike[row["The"], row["the"]] > alike[row["The"], row["than"]] > alike[row["The"], row["1987"]]
    assert torch.equal(every, spelling_matrix(tokenizer, 10**6))


def test_pieces_of_words_are_spelled_as_they_are_written():
    tokenizer = train_tokenizer("bpe", ["The the The the caf\u00e9 caf\u00e9 "] * 9, 300)
    spelled = {tokenizer.spelling(index) for index in range(tokenizer.vocab_size)}
    assert {" the", " The", "", "e", "\\xc3"} <= spelled  # a byte that is no character by itself
    row = {tokenizer.spelling(index): index for index in range(tokenizer.vocab_size)}
    alike = spelling_matrix(tokenizer, 10**6)
    alike = alike @ alike.t()
    assert alike[row[" The"], row[" the"]] > alike[row[" The"], row["e"]]
    assert "shape  Aa" in features_of(" The")
    assert "shape  a" in features_of(" the")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_both_parts_of_the_embedding(dtype):
    torch.manual_seed(0)
    weights = Weights(build_model(MODEL), CONFIG, dtype, random_matrix())
    spelling, masters = weights.spelling, weights.masters
    with torch.no_grad():
        spelling.weight.normal_(std=0.1)
    weights.refresh_copy()
    word, shared = masters.embedding.weight.detach(), spelling.weight.detach()
    whole = word + spelling.matrix.float() @ shared
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert (weights.computing.embedding.weight.float() - whole).norm() <= tolerance * whole.norm()

    tokens = torch.randint(20, (2, 9))
    weights.computing.nll(weights.computing.features(tokens[:, :-1])[0], tokens[:, 1:]).mean().backward()
    weights.collect_gradients(first=True)
    # The same by autograd, in float64, of a model whose embedding is the sum.
    wanted = build_model(MODEL).double()
    wanted.load_state_dict({name: value.double() for name, value in masters.state_dict().items()})
    parts = [part.double().requires_grad_() for part in (word, shared)]
    both = dict(wanted.named_parameters()) | {
        "embedding.weight": parts[0] + weights.spelling.matrix.double() @ parts[1]
    }
    both["head.weight"] = both["embedding.weight"]
    logits = torch.func.functional_call(wanted, both, (tokens[:, :-1],))[0]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    for got, want in zip(
        (masters.embedding.weight.grad, spelling.weight.grad), torch.autograd.grad(loss, parts), strict=True
    ):
        assert (got - want).norm() <= (1e-5 if dtype == torch.float32 else 5e-2) * want.norm()


def test_the_model_that_is_kept_is_the_sum(tmp_path):
    """What was evaluated is what best.safetensors holds, a model without any part of spelling."""
    from newllm import checkpoint
    from newllm.evaluation import evaluate

    one = trainer(tmp_path, random_matrix())
    one.train()
    assert one.weights.spelling.weight.norm() > 0
    model = build_model(MODEL)
    tensors, info = checkpoint.load(one.run.best_file)
    checkpoint.load_model(model, checkpoint.with_prefix("model", tensors), one.run.best_file)
    assert evaluate(model, one.valid).loss == pytest.approx(info["valid_loss"], rel=1e-6)
    average, shared = one.weights.average.embedding.weight, one.weights.averaged[-1]
    if info["step"] == one.step:
        assert torch.allclose(model.embedding.weight, average + one.weights.spelling.matrix @ shared, atol=1e-6)


def test_a_resumed_run_goes_on_with_the_same_losses(tmp_path):
    whole, parts = trainer(tmp_path / "whole", random_matrix()), trainer(tmp_path / "parts", random_matrix())
    whole.train()
    parts.train(stop_after=5)
    again = trainer(tmp_path / "parts", random_matrix())
    again.load()
    again.train()
    for one, other in (
        (whole.weights.parameters, again.weights.parameters),
        (whole.weights.averaged, again.weights.averaged),
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_trainer_gets_what_its_config_says(tmp_path):
    for matrix, count in ((None, 5), (random_matrix(), 0)):
        with pytest.raises(ValueError, match="spelling: got"):
            trainer(tmp_path, matrix, spelling=count)


def test_without_features_nothing_changes(tmp_path):
    """G begins as zero, and features that no token has leave it there."""
    plain, empty = trainer(tmp_path / "plain", None, spelling=0), trainer(tmp_path / "empty", torch.zeros(20, 3))
    plain.train()
    empty.train()
    wanted = dict(empty.model.named_parameters())
    for name, weight in plain.model.named_parameters():  # clipping sums one square more, in another order
        # A start context in the middle of a text has a gradient of zero here and none there, so AdamW moves it here alone.
        assert name.endswith("start") or torch.allclose(weight, wanted[name], rtol=0, atol=1e-6)
