"""`newllm judge` from end to end: what each run writes is what it is said to have written, and scores are right."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import TINY

from newllm.evaluation import token_losses
from newllm.judge import Sampling, choose_prompts, score, write
from newllm.prepare import run_data
from newllm.run import find_run

SHORT = ["--samples", 3, "--prompt-tokens", 5, "--tokens", 12, "--threads", 1, "--no-grammar"]


def test_two_runs_side_by_side_beside_human_text(newllm, text, trained, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert newllm("train", "--data", text, *TINY, "--seed", 1, "--run", "second").code == 0
    code, out, err = newllm("judge", "first", "second", *SHORT, "--show", 1)
    assert (code, err) == (0, "")
    assert out.count("===") == 1
    for words in ("first", "second", "human", "perplexity to second", "distinct pairs", "judge.md"):
        assert words in out
    result = json.loads((trained / "judge.json").read_text())
    assert result["sampling"]["samples"] == 3
    assert list(result["figures"]) == ["human", "first", "second"]
    assert all(result["figures"][who]["words"]["texts"] == 3 for who in result["figures"])
    assert any(sample["first"] != sample["second"] for sample in result["samples"])
    assert all(row["human"].strip() for row in result["samples"])
    assert (trained / "judge.md").read_text().count("**human**") == 3
    before = (trained / "judge.md").read_text()
    assert newllm("judge", "first", "second", *SHORT, "--out", "elsewhere").code == 0
    assert Path("elsewhere/judge.md").read_text() == before  # the same seeds, the same texts
    assert newllm("judge", "first", "second", *SHORT, "--seed", 5).code == 0
    assert (trained / "judge.md").read_text() != before


def test_a_score_is_the_loss_after_the_prompt(trained):
    model, tokenizer = find_run("first").load(torch.device("cpu"))
    tokens = run_data(find_run("first"), model.config).tokens["valid"]
    how = Sampling(samples=20, prompt_tokens=4, tokens=9, seed=3)
    prompts, human = choose_prompts(tokens, tokenizer, how)
    got = score(model, prompts, human, tokenizer.eos_id)
    for n in (0, 17):  # of two batches
        whole = np.concatenate(([tokenizer.eos_id], prompts[n], human[n]))
        assert got[n] == pytest.approx(float(token_losses(model, whole)[4:].mean()), rel=1e-4)
    texts = write(model, prompts, tokenizer.eos_id, how, None)
    assert texts.shape == (20, 9)
    alone = write(model, prompts[18:19], tokenizer.eos_id, Sampling(samples=1, tokens=9, seed=3 + 18), None)
    np.testing.assert_array_equal(alone[0], texts[18])
    own = score(model, prompts, texts, tokenizer.eos_id)
    assert math.isfinite(sum(own))


def test_wrong_use_is_one_line(newllm, text, trained, runs_root):
    assert newllm("train", "--data", text, *TINY, "--vocab-size", 270, "--run", "small").code == 0
    shutil.copytree(trained, runs_root / "odd")
    tokens = (trained / "tokenizer.json").read_text()
    assert '"byte_fallback":false' in tokens
    (runs_root / "odd" / "tokenizer.json").write_text(tokens.replace('"byte_fallback":false', '"byte_fallback":true'))
    for options, said in (
        (["first", "first"], "named twice"), (["first", "--samples", 0], "--samples: got 0"),
        (["first", "--tokens", 10**6], "too few for --samples"), (["first", "--split", "test"], "no such split"),
        (["nothing"], "no run 'nothing'"), (["first", "--temperature", -1], "temperature: got -1"),
        (["first", "odd"], "another tokenizer"), (["first", "small"], "small: has another tokenizer"),
    ):  # fmt: skip
        code, _, err = newllm("judge", *options, "--no-grammar")
        assert (code, err.count("\n")) == (2, 1)
        assert said in err
