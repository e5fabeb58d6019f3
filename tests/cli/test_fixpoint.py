"""newllm fixpoint and newllm train --init, from end to end."""

from __future__ import annotations

import json

import pytest
import torch
from cli_tools import TINY

from newllm import checkpoint, fixpoint

CELL = [
    "--embed-dim",
    16,
    "--context-dim",
    16,
    "--hidden-dim",
    16,
    "--vocab-size",
    280,
    "--threads",
    1,
    "--device",
    "cpu",
]
SHORT = ["--steps", 12, "--batch-size", 16, "--repeats", 4]
TRAINING = TINY[TINY.index("--batch-size") :]


@pytest.fixture
def fixed(newllm, text):
    assert newllm("fixpoint", "--data", text, *CELL, *SHORT, "--run", "fixed").code == 0


def test_the_command(newllm, text, runs_root):
    code, out, err = newllm("fixpoint", "--data", text, *CELL, *SHORT, "--phrase", 3, "--run", "fixed")
    assert (code, err) == (0, "")
    for words in ("phrases of 3 tokens", "come to rest", "effective rank", "cosine of two", "newllm train --init"):
        assert words in out
    folder = runs_root / "fixed"
    assert (folder / "fixpoint.png").read_bytes().startswith(b"\x89PNG")
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == [10, 12]
    report = json.loads((folder / "fixpoint.json").read_text())
    assert report["steps"] == 12
    assert newllm("eval", "fixed").code == 0  # a run like others: diagnose and generate take it too


def test_json_is_what_the_folder_holds(newllm, text, runs_root):
    options = ["--preset", "tiny", "--coupling", "full", "--norm", "state", "--layers", 2, "--ffn-dim", 16]
    printed = json.loads(newllm("fixpoint", "--data", text, *options, *CELL, *SHORT, "--run", "two", "--json").out)
    assert printed == json.loads((runs_root / "two" / "fixpoint.json").read_text())
    for when in ("before", "after"):
        assert [one["layer"] for one in printed[when]] == ["blocks.0.mixer.cell", "blocks.1.mixer.cell"]
        assert all(sum(one["variances"]) == pytest.approx(1.0) for one in printed[when])


def test_training_starts_from_its_weights_and_resumes(newllm, text, runs_root, fixed):
    options = ["--data", text, *TRAINING, "--init", "fixed"]
    assert newllm("train", *options, "--stop-after", 1, "--lr", 1e-30, "--weight-decay", 0, "--run", "still").code == 0
    begun = checkpoint.load(runs_root / "still" / "last.safetensors")[0]
    for name, tensor in checkpoint.load(runs_root / "fixed" / "best.safetensors")[0].items():
        torch.testing.assert_close(begun[name], tensor, rtol=0, atol=1e-20)
    assert newllm("train", *options, "--run", "whole").code == 0
    assert newllm("train", *options, "--run", "halves", "--stop-after", 7).code == 0
    assert newllm("train", "--resume", "halves", "--steps", 20).code == 0
    runs = [runs_root / name for name in ("whole", "halves")]
    whole, halves = (checkpoint.load(run / "last.safetensors")[0] for run in runs)
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())
    assert all(json.loads((run / "config.json").read_text())["init"] == str(runs_root / "fixed") for run in runs)


def test_it_resumes_to_the_last_bit(newllm, text, runs_root, monkeypatch):
    monkeypatch.setattr(fixpoint, "SAVED_EVERY", 5)
    options = ["--data", text, *CELL, *SHORT, "--dropout", 0.1]
    assert newllm("fixpoint", *options, "--run", "whole").code == 0
    stopped = newllm("fixpoint", *options, "--run", "parts", "--stop-after", 7)
    assert stopped.code == 0
    assert "stopped at step 7 of 12" in stopped.out
    assert newllm("eval", "parts").code == 0
    with monkeypatch.context() as patch:  # as a kill does at any moment: all since the last checkpoint is lost
        patch.setattr(fixpoint.FixpointTrainer, "_gradient_step", killed_after(4))
        with pytest.raises(Killed):
            newllm("fixpoint", "--resume", "parts", "--threads", 1, "--device", "cpu")
    assert checkpoint.load(runs_root / "parts" / "last.safetensors")[1]["fixpoint_step"] == 10
    assert newllm("fixpoint", "--resume", "parts", "--threads", 1, "--device", "cpu").code == 0
    whole, parts = (runs_root / name for name in ("whole", "parts"))
    for name in ("best.safetensors", "last.safetensors"):
        expected, got = (checkpoint.load(run / name)[0] for run in (whole, parts))
        assert all(torch.equal(tensor, got[key]) for key, tensor in expected.items())
    assert (whole / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
    expected, got = (json.loads((run / "fixpoint.json").read_text()) for run in (whole, parts))
    assert [expected[key] for key in ("steps", "before", "after")] == [got[key] for key in ("steps", "before", "after")]


class Killed(BaseException):
    """What nothing catches."""


def killed_after(steps):
    train_step, count = fixpoint.FixpointTrainer._gradient_step, iter(range(steps))

    def step(self):
        if next(count, None) is None:
            raise Killed
        train_step(self)

    return step


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "--resume", "fixed"], "go on with newllm fixpoint --resume, or start from it with --init"),
        (["fixpoint", "--resume", "fixed", "--lr", 1], "does not take --lr"),
        (["fixpoint", "--resume", "fixed", "--steps", 3], "has already trained 12 steps"),
        (["fixpoint", "--resume", "nowhere"], "no run 'nowhere'"),
        (["fixpoint", "--resume", "fixed", "--stop-after", 0], "--stop-after: got 0"),
    ],
)
def test_a_resume_that_cannot_be_is_one_line(newllm, fixed, command, words):
    code, out, err = newllm(*command)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "classic", "--embed-dim", 24], "this model's ("),
        (["--preset", "tiny", "--embed-dim", 16], "not there"),
        (["--tokenizer", "word"], "another tokenizer"),
        (["--init", "nowhere"], "no run 'nowhere'"),
        (["--resume", "fixed"], "--init"),
    ],
    ids=["shape", "architecture", "tokenizer", "missing", "resume"],
)
def test_init_that_does_not_fit_is_one_line(newllm, text, runs_root, fixed, options, words):
    data = [] if "--resume" in options else ["--data", text]
    code, _, err = newllm("train", "--init", "fixed", *data, *options)
    assert code == 2
    assert err.count("\n") == 1
    assert words in err
    assert [path.name for path in runs_root.iterdir()] == ["fixed"]  # no folder is left behind


@pytest.mark.parametrize(
    "options",
    [["--preset", "tiny"], ["--coupling", "hops", "--hops", 2], ["--steps", 0], ["--phrase", 10**6], ["--run", "a/b"]],
)
def test_fixpoint_refuses_in_one_line(newllm, text, runs_root, options):
    code, _, err = newllm("fixpoint", "--data", text, *CELL, *options)
    assert code == 2
    assert err.count("\n") == 1
    assert not runs_root.exists()
