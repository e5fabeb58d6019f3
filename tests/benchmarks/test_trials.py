"""As many trials for one recipe as for another: which are run, and what becomes of them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import program_tables  # noqa: E402
import trials  # noqa: E402

RECIPES = ["wikitext-2", "wikitext-2-hops", "wikitext-2-full", "wikitext-2-transformer"]


def test_every_recipe_has_the_same_number_of_trials():
    counts = {name: len(trials.changes(trials.settings_of(name))) for name in RECIPES}
    assert set(counts.values()) == {12}
    assert 1 + 12 + len(trials.TOGETHER) == 19


def test_changes_that_were_best_go_together_but_for_those_of_one_setting():
    singles = {"a": {"lr": 1.0}, "b": {"lr": 2.0}, "c": {"noise": 3.0}, "d": {"clip": 4.0}, "e": {"beta1": 5.0}}
    singles |= {"f": {"warmup": 6.0}, "g": {"steps": 7.0}, "h": {"average": 8.0}}
    found = {"a": 11.0, "b": 10.0, "c": 12.0, "d": 13.0, "e": 9.0, "f": 14.0, "g": 15.0, "h": 16.0}
    made = trials.together(found, singles)
    assert list(made)[:2] == ["e+b", "e+b+c"]
    assert len(made) == len(trials.TOGETHER)
    assert made["e+b+c"] == {"beta1": 5.0, "lr": 2.0, "noise": 3.0}
    assert not any("a" in name.split("+") for name in made)


@pytest.mark.parametrize("gpus", [[None], ["0", "1", "2"]], ids=["one", "three"])
def test_a_search_trains_every_trial_once_and_finds_the_best(gpus):
    recipes = {name: trials.settings_of(name) for name in RECIPES[:2]}
    ran, noted, lock = [], [], threading.Lock()

    def train(recipe, name, settings, gpu):
        with lock:
            ran.append((recipe, name))
        assert gpu in gpus
        gains = {"lr-low": 3.0, "noise-high": 2.0, "dropout-low": 1.0}  # the others do harm
        return 50.0 - sum(gains.get(change, -1.0) for change in name.split("+") if change != "as-it-is")

    search = trials.Search(recipes, train, noted.append)
    search.run(gpus)
    assert len(ran) == len(set(ran)) == len(noted) == 38
    for recipe in recipes:
        assert search.best(recipe) == ("lr-low+noise-high+dropout-low", 44.0)
        name = search.best(recipe)[0]
        was = recipes[recipe]
        rates = ("dropout", "input_dropout", "output_dropout")
        assert search.settings[recipe][name] == {
            "lr": was["lr"] / 1.5, "noise": 2 * was["noise"], **{rate: pytest.approx(was[rate] - 0.1) for rate in rates}
        }  # fmt: skip


def test_a_trial_that_fails_ends_the_search():
    def train(recipe, name, settings, gpu):
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        trials.Search({RECIPES[0]: trials.settings_of(RECIPES[0])}, train, print).run([None, None])


def test_trials_train_and_are_taken_up_again(tmp_path, capsys, monkeypatch):
    """Two real ones, of a recipe of a small model; the second time nothing is trained."""
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        '[data]\ntokenizer = "word"\n[model]\narchitecture = "newllm"\nembed_dim = 8\ncontext_dim = 8\nnum_layers = 1\nffn_dim = 8\n'
        "fnn_layers = 0\n[training]\nbatch_size = 2\nsegment = 8\neval_tokens = 50\ncompile = false\n"
    )
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 200)
    monkeypatch.setattr(trials, "changes", lambda recipe: {"lr-high": {"lr": 0.01}})
    monkeypatch.setattr(trials, "TOGETHER", range(0))
    arguments = [str(recipe), "--data", str(text), "--steps", "2", "--runs", str(tmp_path / "runs")]
    results = tmp_path / "trials.json"
    assert trials.main([*arguments, "--results", str(results)]) == 0
    assert "best of 2" in capsys.readouterr().out
    content = json.loads(results.read_text())
    assert [trial["trial"] for trial in content["trials"]] == ["as-it-is", "lr-high"]
    printed = program_tables.trials_table(content)
    assert all(f"{trial['valid_perplexity']:.2f}" in printed for trial in content["trials"])
    assert printed.count("**") == 2  # the best
    assert "several changes" not in printed
    diverged = [trial | {"valid_perplexity": None} for trial in content["trials"]]
    assert program_tables.trials_table(content | {"trials": diverged}).count("diverged") == 2
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("trained once more"))
    assert trials.main([*arguments, "--results", str(results)]) == 0
    assert json.loads(results.read_text())["trials"] == content["trials"]
    capsys.readouterr()
    arguments[arguments.index("2")] = "3"  # other trials, which are not there
    assert trials.main(arguments) == 2
    assert "was trained with steps 2, not 3" in capsys.readouterr().err


def test_trials_refuse_in_one_line(capsys):
    assert trials.main(["nothing", "--data", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_changes_are_relative_to_the_preset_that_a_recipe_names():
    settings = trials.settings_of("books")
    assert (settings["batch_size"], settings["embed_dim"], settings["lr"]) == (16, 512, 1.5e-3)
    made = trials.changes(settings)
    assert len(made) == 12
    assert all(
        settings[key] != value for change in ("noise-high", "dropout-high") for key, value in made[change].items()
    )


def test_a_trial_that_diverges_is_the_worst_and_ends_nothing():
    noted = []

    def train(recipe, name, settings, gpu):
        return float("inf") if "lr-high" in name else 50.0 + len(name)

    search = trials.Search({RECIPES[0]: trials.settings_of(RECIPES[0])}, train, noted.append)
    search.run([None, None])
    assert len(noted) == 19
    assert {trial["trial"]: trial["valid_perplexity"] for trial in noted}["lr-high"] is None
    assert "lr-high" not in search.best(RECIPES[0])[0]


def test_a_failure_while_figures_are_kept_ends_the_search():
    def note(trial):
        raise OSError("No space left on device")

    search = trials.Search({RECIPES[0]: trials.settings_of(RECIPES[0])}, lambda *_: 50.0, note)
    with pytest.raises(OSError, match="No space"):
        search.run([None, None])
