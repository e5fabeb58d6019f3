"""newllm calibrate, and what recall is in a run: set at evaluations, kept in checkpoints, resumed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from cli_tools import TINY

from newllm import checkpoint
from newllm.run import Run


def perplexity(newllm, run) -> float:
    done = newllm("eval", run, "--split", "valid", "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)["splits"]["valid"]["perplexity"]


def test_a_run_without_recall_gets_it_and_predicts_better(newllm, text, runs_root):
    assert newllm("train", "--data", text, *TINY, "--recall", 0, "--run", "plain").code == 0
    before = perplexity(newllm, "plain")
    done = newllm("calibrate", "plain", "--recall", 500, "--run", "with")
    assert done.code == 0, done.err
    assert perplexity(newllm, "with") < 0.9 * before  # a text of sentences that return
    assert f"{perplexity(newllm, 'with'):,.2f}" in done.out
    made, plain = Run(runs_root / "with"), Run(runs_root / "plain")
    assert made.model_config().recall == 500
    for name, tensor in plain.weights().items():
        assert torch.equal(made.weights()[name], tensor), name
    assert not made.weights()["recall.out.weight"].any()
    assert newllm("generate", "The", "--run", "with", "--max-tokens", 5, "--seed", 0).code == 0


def test_a_run_with_recall_is_calibrated_already(newllm, trained, runs_root):
    """Once more gives the same shares, from the weights that were kept."""
    assert Run(trained).model_config().recall == 4096
    shares = Run(trained).weights()["recall.shares"]
    assert shares.max() > 0.01
    done = newllm("calibrate", trained, "--threads", 1)
    assert done.code == 0, done.err
    again = Run(runs_root / "first-recall")
    torch.testing.assert_close(again.weights()["recall.shares"], shares, rtol=1e-4, atol=1e-5)
    assert perplexity(newllm, again.path) == pytest.approx(perplexity(newllm, trained), rel=1e-6)
    assert newllm("generate", "The", "--max-tokens", 3, "--seed", 0).code == 0  # the latest is the new one


def test_the_best_checkpoint_scores_what_training_said(newllm, trained):
    best = min(record["valid_perplexity"] for record in Run(trained).metrics() if "valid_perplexity" in record)
    assert perplexity(newllm, trained) == pytest.approx(best, rel=1e-5)
    last = checkpoint.load(Run(trained).last_file)[0]
    assert last["model.recall.shares"].max() > 0


def test_training_goes_on_from_a_calibrated_run(newllm, text, trained):
    assert newllm("calibrate", trained, "--run", "again").code == 0
    done = newllm("train", "--data", text, *TINY[10:], "--init", "again", "--run", "further")
    assert done.code == 0, done.err
    done = newllm("train", "--resume", "again")
    assert done.code == 2
    assert "not the state of a training that could go on" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recall", "0"], "--recall 0: wanted at least 1"),
        (["--run", "first"], "exists and is not an empty folder"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_bad_arguments(newllm, trained, arguments, message):
    done = newllm("calibrate", "first", *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_classic_cell_takes_none(newllm, text):
    classic = ["--architecture", "classic", "--coupling", "full", "--fnn-layers", 1]
    assert newllm("train", "--data", text, *TINY, *classic, "--run", "c").code == 0
    done = newllm("calibrate", "c")
    assert done.code == 2
    assert "architecture classic, which takes no recall" in done.err


def test_a_transformer_gets_it_or_is_trained_with_it(newllm, text, runs_root):
    transformer = ["--data", text, *TINY, "--architecture", "transformer"]
    assert newllm("train", *transformer, "--run", "plain").code == 0
    assert newllm("calibrate", "plain", "--run", "given").code == 0
    assert newllm("train", *transformer, "--recall", 100, "--run", "with").code == 0
    assert Run(runs_root / "plain").model_config().recall == 0
    assert Run(runs_root / "given").model_config().recall == 16384
    assert Run(runs_root / "with").weights()["recall.out.weight"].any()  # recalled words are inputs that it learns from
    for run in ("given", "with"):
        assert Run(runs_root / run).weights()["recall.shares"].max() > 0
        assert newllm("generate", "the", "--run", run, "--max-tokens", 5).code == 0


@pytest.mark.parametrize("old", [torch.zeros(7, 2), None], ids=["of-two", "none"])
def test_a_run_with_shares_of_an_older_version_says_what_to_do(newllm, trained, runs_root, tmp_path, old):
    folder = tmp_path / "old"
    shutil.copytree(trained, folder)
    tensors, info = checkpoint.load(folder / "best.safetensors")
    del tensors["model.recall.shares"]
    checkpoint.save(folder / "best.safetensors", tensors | ({} if old is None else {"model.recall.shares": old}), info)
    code, _, error = newllm("eval", folder)
    assert (code, error.count("\n")) == (2, 1)
    assert "newllm calibrate" in error
    assert newllm("calibrate", folder, "--run", "anew").code == 0
    shares = Run(trained).weights()["recall.shares"]
    torch.testing.assert_close(Run(runs_root / "anew").weights()["recall.shares"], shares, rtol=1e-4, atol=1e-5)
