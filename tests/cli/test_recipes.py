"""Recipes: files of options, those that come with newllm and others."""

from __future__ import annotations

import dataclasses

import pytest
from cli_tools import TINY

from newllm.cli.parser import build_parser
from newllm.cli.settings import model_settings, training_settings
from newllm.config import count_parameters, transformer_like
from newllm.errors import UserError
from newllm.recipe import apply_recipe, read_recipe, recipe_names
from newllm.run import find_run

RECIPE = """
[model]
preset = "classic"
norm = "none"
tie_embeddings = false
[training]
lr = 0.25
random_segments = true
steps = 7
[data]
tokenizer = "word"
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE)
    return path


def parsed(*argv):
    args = build_parser().parse_args([str(arg) for arg in argv])
    apply_recipe(args)
    return args


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_comes_with_newllm_is_a_model_of_its_size(name):
    args = parsed("train", "--config", name)
    model, training = model_settings(args), training_settings(args)
    assert training.steps > 0
    model = dataclasses.replace(model, vocab_size=33278 if name.startswith("wikitext-2") else model.vocab_size)
    low, high = (24e6, 36.5e6) if name.startswith("wikitext-2") else (40e6, 41e6)
    assert low <= count_parameters(model) <= high
    assert abs(count_parameters(transformer_like(model)) / count_parameters(model) - 1) <= 0.02


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_takes_a_step(newllm, tmp_path, name):
    """Of a small model, with all that the recipe says of training."""
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("the cat sat on the mat and the dog on the log\n" * 300)
    options = [
        "--data", tmp_path, "--steps", 2, "--batch-size", 2, "--segment", 8, "--no-compile", "--layers", 1, "--embed-dim", 24,
        "--context-dim", 16, "--ffn-dim", 16, "--hidden-dim", 16, "--vocab-size", 300, "--device", "cpu", "--eval-tokens", 50,
        "--spelling", 20 if name.startswith("wikitext") else 0,
    ]  # fmt: skip
    if name.endswith("-taught"):
        code, _, err = newllm("train", "--config", name, "--run", "nobody", *options)
        assert (code, "wanted --teacher RUN beside it" in err) == (2, True)
        assert newllm("train", "--config", name.removesuffix("-taught"), "--run", "first", *options).code == 0
        options += ["--teacher", "first"]
    code, out, err = newllm("train", "--config", name, "--run", "r", *options)
    assert code == 0, err
    assert "test perplexity" in out


def test_the_command_line_comes_before_the_recipe_and_the_recipe_before_the_preset(recipe):
    args = parsed("train", "--config", recipe, "--lr", 0.5, "--tie-embeddings")
    model, training = model_settings(args), training_settings(args)
    assert (model.architecture, model.norm, model.tie_embeddings) == ("classic", None, True)
    assert (training.lr, training.steps, training.random_segments, training.segment) == (0.5, 7, True, 64)
    assert args.tokenizer == "word"


def test_a_model_without_recall_takes_none_of_the_recipes(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[model]\nrecall = 100\nrecall_dropout = 0.2")
    for typed, expected in (
        ((), (100, 0.2)),
        (("--recall", 0), (0, 0.0)),
        (("--architecture", "newllm"), (100, 0.2)),
        (("--architecture", "transformer"), (0, 0.0)),
        (("--architecture", "transformer", "--recall", 50), (50, 0.0)),
        (("--recall", 50), (50, 0.2)),
    ):
        model = model_settings(parsed("train", "--config", path, *typed))
        assert (model.recall, model.recall_dropout) == expected, typed


@pytest.mark.parametrize("without", [("--recall", 0), ("--architecture", "transformer")])
@pytest.mark.parametrize("given", [(), ("--config", "wikitext-2")])
def test_dropout_of_a_recall_that_is_not_there_is_refused(newllm, text, without, given):
    code, _, err = newllm("train", *given, "--data", text, *without, "--recall-dropout", 0.1)
    assert code == 2
    assert err.count("\n") == 1
    assert "recall_dropout is 0.1" in err


def test_a_run_of_a_recipe(newllm, text, recipe):
    options = [option for option in TINY if option not in ("--steps", "20", "--lr", "0.01")]
    assert newllm("train", "--config", recipe, "--data", text, *options, "--hidden-dim", 16, "--lr", 0.01).code == 0
    config = find_run("latest").config()
    assert config["training"]["steps"] == 7
    assert config["model"]["architecture"] == "classic"
    assert find_run("latest").path.name.startswith("mine-")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[model]\nwidth = 3", r"\[model\] has no setting 'width'"),
        ("[optimizer]\nlr = 3", "'optimizer' is none of the sections data, model, training"),
        ("lr = 3", "'lr' is none of the sections"),
        ("[model]\nlr = 3", r"\[model\] has no setting 'lr'"),
        ("[model", "not valid TOML"),
        ("[data]\ndata = 3", "data is 3, wanted a text"),
        ("[data]\nvocab_size = '3'", "vocab_size is '3', wanted an integer"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_named(tmp_path, content, said):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        read_recipe(str(path))
    assert "bad.toml" in str(caught.value)


def test_values_of_the_wrong_kind_are_one_line(newllm, text, tmp_path):
    for content, said in (
        ("[training]\nlr = 'big'", "--lr: got 'big'"),
        ("[model]\nembed_dim = 1.5", "embed_dim is 1.5"),
    ):
        (tmp_path / "bad.toml").write_text(content)
        code, _, err = newllm("train", "--config", "bad.toml", "--data", text)
        assert code == 2
        assert err.count("\n") == 1
        assert said in err


def test_a_recipe_that_is_not_there_and_one_beside_resume(newllm):
    code, _, err = newllm("train", "--config", "none")
    assert code == 2
    assert "nor one of the recipes" in err
    assert "wikitext-2" in err
    code, _, err = newllm("train", "--config", "wikitext-2", "--resume", "latest")
    assert code == 2
    assert "it does not take --config" in err
