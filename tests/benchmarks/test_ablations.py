"""Ablations: variants of one size, and runs that are trained once, resumed and collected."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # files beside each other, not a package

import ablations

from newllm.cli.settings import model_settings
from newllm.config import count_parameters
from newllm.recipe import read_recipe

SMALL = "--layers 1 --embed-dim 16 --context-dim 8 --ffn-dim 8 --batch-size 2 --segment 8 --eval-tokens 40 --device cpu --spelling 0"


@pytest.fixture(scope="module")
def base():
    recipe = model_settings(argparse.Namespace(**read_recipe("wikitext-2")))
    return dataclasses.replace(recipe, vocab_size=33278)


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_variants_are_of_one_size_and_differ(base, name):
    model = ablations.variant(base, ablations.VARIANTS[name])
    assert abs(count_parameters(model) / count_parameters(base) - 1) < 0.005
    assert (model == base) == (name == "base")
    for field, value in ablations.VARIANTS[name].items():
        assert getattr(model, field) == value


def test_a_variant_is_trained_and_collected(tmp_path, capfd):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("the cat sat on the mat and the dog on the log\n" * 60)
    out, results = tmp_path / "runs", tmp_path / "results"
    command = ["norm-none", "--data", str(tmp_path), "--steps", "3", "--options", SMALL]
    assert ablations.main([*command, "--out", str(out), "--results", str(results)]) == 0
    assert "finished" in capfd.readouterr().out
    found = json.loads((results / "ablation-norm-none.json").read_text())
    assert found["config"]["model"]["norm"] is None
    assert found["group"] == "ablations"
    assert found["splits"]["test"]["perplexity"] > 1


def test_what_is_finished_is_left_alone_and_what_was_stopped_goes_on(tmp_path):
    args = ablations.parse(["--out", str(tmp_path), "--steps", "7"])
    runs = ablations.Runs(args)
    fresh = runs.command("base", ["--layers", "3"])
    assert fresh[3:] == [
        "train",
        "--config",
        "wikitext-2",
        "--layers",
        "3",
        "--steps",
        "7",
        "--out",
        str(tmp_path / "base"),
    ]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "last.safetensors").touch()
    assert runs.command("base", ["--layers", "3"])[3:] == ["train", "--resume", str(tmp_path / "base")]
    (tmp_path / "base" / "summary.json").touch()
    assert runs.command("base", ["--layers", "3"]) is None


def test_what_there_is_not_is_said_in_one_line(capsys):
    assert ablations.main(["width-3"]) == 2
    assert "no variant width-3; there are base, width-256" in capsys.readouterr().err
    assert ablations.main(["base", "--beside", "0"]) == 2
    assert capsys.readouterr().err == "ablations: error: --beside: got 0, wanted a number above 0\n"
