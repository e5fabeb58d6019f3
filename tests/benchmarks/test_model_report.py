"""The results section of docs/model.md: what is kept of a run, and tables and plots made of it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # they are files beside each other, not a package

import model_report
import report
import torch
import train_speed

from newllm.config import PRESETS

PAGE = f"# Model\n\n{model_report.BEGIN}\nold\n{model_report.END}\n\nafter\n"


@pytest.fixture
def one_thread():
    """Threads that wait for each other where other programs want the cores take a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_run(folder, perplexity, records=500, **model):
    """A run folder as a training on books would leave it, its curve one of `records` lines."""
    folder.mkdir(parents=True)
    model = PRESETS["tiny"].to_dict() | model
    training = {"lr": 1e-3, "eval_tokens": 1000, "seed": 0}
    data = {"corpus": "/somewhere/books", "text_field": "text"}
    config = {"model": model, "training": training, "data": data, "command": f"newllm train --run {folder.name}"}
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for step in range(1, records + 1):
        lines.append(
            {"step": step, "loss": 9 - step / records, "tokens": 512 * step, "elapsed_s": step / 10, "mfu": 0.25}
        )
        if step % 100 == 0:
            lines.append({"step": step, "valid_loss": 8 - step / records, "valid_perplexity": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    split = {"tokens": 999, "loss": math.log(perplexity), "perplexity": perplexity, "bits_per_byte": 1.25}
    summary = {
        "steps": records, "best_step": records, "valid": split, "test": split, "parameters": 40_000_000, "seconds": 90.0,
        "tokens_per_s": 1e6, "peak_memory_bytes": 2**30, "device": "A GPU", "torch": "2.13", "date": "2026-11-25T10:00:00",
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_runs_are_collected_and_written(tmp_path, capsys):
    ours = make_run(tmp_path / "ours", 40.0, context_dim=512)
    theirs = make_run(tmp_path / "theirs", 50.0, architecture="transformer", max_seq_len=128)
    place = [{"first": 1, "last": 1, "tokens": 200, "loss": 4.0, "perplexity": math.exp(4)}]
    dynamic = {"tokens": 999, "loss": 3.5, "perplexity": math.exp(3.5), "lr": 1e-4, "decay": 1e-3, "segment": 32}
    (ours / "eval.json").write_text(json.dumps({"run": "x", "splits": {"test": {"dynamic": dynamic, "by_position": place}}}))  # fmt: skip
    one = {"mean": 0.5, "error": None, "texts": 1}
    judged = {
        "runs": {"ours": {"path": "/somewhere/of/mine/ours"}}, "split": "test", "sampling": {"samples": 1}, "perplexity": {"human": {"ours": one}}, "figures": {"human": dict.fromkeys(
            ("distinct_1", "distinct_2", "distinct_3", "repeated", "longest_repeat", "names", "names_again", "names_span",
             "names_longest", "faults", "words"), one)}, "samples": [{"prompt": "Once", "human": "upon a time"}],
    }  # fmt: skip
    (ours / "judge.json").write_text(json.dumps(judged))
    results = tmp_path / "results" / "model"
    assert model_report.main(["collect", str(ours), str(theirs), "--results", str(results)]) == 0
    kept = json.loads((results / "ours.json").read_text())
    assert len(kept["train"]) <= model_report.CURVE
    assert kept["train"][-1] == [500, 256000, 50.0, 8.0]
    assert [row[0] for row in kept["valid"]] == [100, 200, 300, 400, 500]
    assert kept["best_valid"] == {"step": 500, "loss": 7.0, "tokens": 1000}
    assert kept["splits"]["test"]["loss"] == pytest.approx(math.log(40))  # eval.json adds, and takes nothing away
    assert len((results / "ours.json").read_text().splitlines()) < 400
    assert "/" not in kept["config"]["data"]["corpus"]  # no folder of this machine
    assert "/" not in json.loads((results / "ours-judge.json").read_text())["judge"]["runs"]["ours"]["path"]

    contexts = {
        **report.environment(), "preset": "40m", "precision": "bfloat16", "contexts": [
            {"model": name, "length": length, "tokens_per_s": 10.0, "peak_bytes": 2**30, "graph": True}
            for name in ("newllm", "transformer") for length in (1024, 2048)]}  # fmt: skip
    contexts["contexts"][-1] = {
        "model": "transformer",
        "length": 2048,
        "graph": False,
        "failure": "OutOfMemoryError: x",
    }
    (tmp_path / "results" / "speed.json").write_text(json.dumps(contexts))
    found = [("as-it-is", 71.26), ("lr-low", 70.5), ("noise-high", None), ("lr-low+clip-low", 69.75)]
    tried = [{"recipe": "ours", "trial": name, "settings": {}, "valid_perplexity": value} for name, value in found]
    searched = {**report.environment(), "command": ["trials.py ours"], "steps": 30, "trials": tried}
    (tmp_path / "results" / "searched.json").write_text(json.dumps(searched))
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for _ in range(2):  # a second time changes nothing
        assert model_report.main(["write", "--results", str(results), "--page", str(page)]) == 0
        text = page.read_text()
    assert (text.count(model_report.BEGIN), text.count(model_report.END)) == (1, 1)
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    row = next(line for line in text.splitlines() if line.startswith("| ours "))
    for shown in ("40.0M", "40.00", "33.12", "1.2500", "0.800", "0.3M", "1.5", "25.0%", "context_dim 512"):
        assert shown in row
    for shown in (
        "newllm train --run theirs",
        "out of memory",
        "upon a time",
        "A GPU, torch 2.13",
        "### searched",
        "trials.py ours",
    ):
        assert shown in text
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in text.splitlines()) if len(cells) > 3}
    assert [rows[name][2].strip() for name in ("as-it-is", "lr-low", "noise-high")] == ["71.26", "70.50", "diverged"]
    assert "lr-low, clip-low" in text
    assert "**69.75**" in text
    pictures = {path.name for path in results.glob("*.png")}
    assert pictures == {"books-curves.png", "books-position.png", "contexts.png"}
    assert all(f"results/model/{name}" in text for name in pictures)


def test_what_a_folder_does_not_say_is_asked_for(tmp_path, capsys):
    run = make_run(tmp_path / "stopped", 40.0)
    (run / "summary.json").unlink()  # by --max-minutes
    arguments = ["collect", str(run), "--results", str(tmp_path / "model")]
    assert model_report.main(arguments) == 2
    assert "give --device --torch" in capsys.readouterr().err
    assert (
        model_report.main([*arguments, "--device", "A GPU", "--torch", "2", "--note", "half a GPU", "--name", "x"]) == 0
    )
    kept = json.loads((tmp_path / "model" / "x.json").read_text())
    assert (kept["steps"], kept["tokens"], kept["tokens_per_s"], kept["splits"]) == (500, 256000, 256000 / 50, {})
    table = model_report.table([kept])
    assert f"{math.exp(7):,.2f}*" in table
    assert "(half a GPU)" in table


def test_pages_and_files_that_do_not_fit_are_refused_in_one_line(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    (tmp_path / "model").mkdir()
    arguments = ["write", "--results", str(tmp_path / "model"), "--page", str(page)]
    assert model_report.main(arguments) == 2
    page.write_text(PAGE)
    (tmp_path / "model" / "other.json").write_text("{}")
    assert model_report.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert page.read_text() == PAGE


def test_training_at_lengths_of_context(tmp_path, capsys, one_thread):
    path = tmp_path / "contexts.json"
    options = ["--preset", "tiny", "--vocab-size", "300", "--device", "cpu", "--steps", "2", "--contexts", "16", "64"]
    assert train_speed.main([*options, "--results", str(path)]) == 0
    content = json.loads(path.read_text())
    assert [(run["model"], run["length"]) for run in content["contexts"]] == [
        (name, length) for length in (16, 64) for name in ("newllm", "transformer")
    ]
    assert all(run["tokens_per_s"] > 0 and run["steps"] == 2 for run in content["contexts"])
    assert "| 64 " in capsys.readouterr().out
    assert report.main([str(path)]) == 0
    assert train_speed.main([*options[:-2], "0"]) == 2


def test_generation_at_lengths_is_of_the_devices_that_trained_at_lengths(tmp_path):
    for name, content in (
        ("trained", {"device": "new", "contexts": []}),
        ("new", {"device": "new", "generation": []}),
        ("old", {"device": "old", "generation": []}),
        ("other", {"device": "new", "ours": []}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert [content["device"] for content in model_report.contexts(tmp_path)] == ["new", "new"]
    (tmp_path / "trained.json").unlink()
    assert model_report.contexts(tmp_path) == []


def test_a_table_says_which_transformer_has_recall(tmp_path):
    runs = [
        make_run(tmp_path / "ours", 40.0, recall=64),
        make_run(tmp_path / "theirs", 50.0, architecture="transformer", recall=0),
        make_run(tmp_path / "with", 45.0, architecture="transformer", recall=128),
    ]
    results = tmp_path / "model"
    assert model_report.main(["collect", *map(str, runs), "--results", str(results)]) == 0
    (kept,) = model_report.load(results)[0].values()
    rows = {line.split("|")[1].strip(): line for line in model_report.table(kept).splitlines()}
    assert "recall 0" in rows["theirs"]
    assert "recall 128" in rows["with"]
    assert "0.889" in rows["ours"]  # of the best Transformer's
