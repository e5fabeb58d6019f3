"""`newllm compare`: two runs alike in all that is held equal, one table, its files, and going on after an interruption."""

from __future__ import annotations

import json
import signal
import time

import pytest
from cli_tools import TINY, finish, start

from newllm import checkpoint, compare
from newllm.cli import main
from newllm.run import Run


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, text):
    """One finished comparison, and what it printed."""
    folder = tmp_path_factory.mktemp("compare") / "both"
    result = finish(start("compare", "--data", text, *TINY, "--out", folder))
    assert result.code == 0, result.err
    return folder, result


def test_one_table_with_a_line_per_model(comparison):
    _, result = comparison
    lines = result.out.splitlines()
    head = next(n for n, line in enumerate(lines) if line.split()[:2] == ["model", "parameters"])
    for title in ("perplexity", "tokens/s", "peak memory", "state at generation"):
        assert title in lines[head]
    assert [line.split()[0] for line in lines[head + 2 : head + 4]] == ["newllm", "transformer"]
    assert "unigram perplexity" in result.out
    assert result.err == ""


def test_its_files(comparison):
    folder, _ = comparison
    rows = json.loads((folder / "compare.json").read_text())["models"]
    assert [row["model"] for row in rows] == ["newllm", "transformer"]
    assert all(row["perplexity"] > 1 and row["tokens_per_s"] > 0 and row["peak_memory_bytes"] > 2**20 for row in rows)
    # One context of 16 in one layer, three tables of 4,096 entries of four words and a count for every word, 4 bytes each, three tokens of 8; a window of 16
    # tokens less the present one, keys and values of 16 a layer.
    assert rows[0]["state_bytes"] == 16 * 4 + 3 * 4096 * 4 * 4 + 3 * 8 + rows[0]["config"]["vocab_size"] * 4
    assert rows[1]["state_bytes"] == 8 + 15 * 16 * 2 * 4 * rows[1]["config"]["num_layers"]
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_held_equal(comparison):
    folder, _ = comparison
    ours, theirs = (Run(folder / name) for name in ("newllm", "transformer"))
    assert ours.config()["training"] == theirs.config()["training"]
    assert ours.config()["data"] == theirs.config()["data"]
    assert ours.tokenizer_file.read_bytes() == theirs.tokenizer_file.read_bytes()
    rows = json.loads((folder / "compare.json").read_text())["models"]
    assert rows[1]["parameters"] == pytest.approx(rows[0]["parameters"], rel=0.02)
    assert theirs.model_config().max_seq_len == 16  # the segment it was trained on
    tokens = [[record["tokens"] for record in run.metrics() if "tokens" in record] for run in (ours, theirs)]
    assert tokens[0] == tokens[1]


def test_a_finished_comparison_is_reported_again_without_training(newllm, comparison, monkeypatch):
    folder, result = comparison
    monkeypatch.setattr("subprocess.Popen", None)
    again = newllm("compare", "--resume", folder)
    assert again.code == 0

    def table(text):
        return [line for line in text.splitlines() if "MiB" in line]

    assert table(again.out) == table(result.out)
    assert len(table(again.out)) == 2


def test_an_interrupted_comparison_saves_and_goes_on(newllm, text, tmp_path):
    process = start("compare", "--data", text, *TINY, "--steps", 100_000, "--out", tmp_path / "c")
    metrics = tmp_path / "c" / "newllm" / "metrics.jsonl"
    while not metrics.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)  # to the parent alone: it hands it on
    code, out, err = finish(process)
    assert code == 130, err
    assert "newllm compare --resume" in out
    run = Run(tmp_path / "c" / "newllm")
    assert run.last_file.exists()
    for name in ("newllm", "transformer"):  # shortened, so that the test sees the end of it
        config = Run(tmp_path / "c" / name).config()
        config["training"]["steps"] = max(20, checkpoint.load(run.last_file)[1]["step"])
        Run(tmp_path / "c" / name).config_file.write_text(json.dumps(config))
    code, out, err = newllm("compare", "--resume", tmp_path / "c")
    assert code == 0, err
    assert (tmp_path / "c" / "compare.json").exists()


def test_equal_minutes_give_each_its_own_steps(newllm, text, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_train", lambda run, options: main(["train", "--resume", str(run.path), *options]))
    options = [option for option in TINY if option not in ("--steps", "20")]
    code, _, err = newllm("compare", "--data", text, *options, "--minutes", 0.002, "--out", tmp_path / "c")
    assert code == 0, err
    plan = json.loads((tmp_path / "c" / compare.EQUAL_TIME).read_text())
    for name, steps in plan["steps"].items():
        run = Run(tmp_path / "c" / name)
        logged = [record for record in run.metrics() if "tokens_per_s" in record]
        second = next(record for record in logged if record["step"] == 10)  # of --log-every 5
        assert steps == max(11, round(0.12 * second["tokens_per_s"] / 64))
        assert (run.config()["training"]["steps"], logged[-1]["step"]) == (steps, steps)
    assert plan["steps"].keys() == {"newllm", "transformer"}
    for wrong in (["--minutes", 0], ["--minutes", 1, "--steps", 3], ["--resume", tmp_path / "c", "--minutes", 1]):
        code, _, err = newllm("compare", *wrong)
        assert (code, err.count("\n")) == (2, 1)
        assert "--minutes" in err


def test_a_transformer_with_recall_has_the_same_tables_and_parameters(newllm, text, tmp_path):
    done = newllm("compare", "--data", text, *TINY, "--recall", 50, "--transformer-recall", "--out", tmp_path / "c")
    assert done.code == 0
    ours, theirs = (Run(tmp_path / "c" / name).model_config() for name in ("newllm", "transformer"))
    assert ours.recall == theirs.recall == 50
    rows = json.loads((tmp_path / "c" / "compare.json").read_text())["models"]
    assert rows[1]["parameters"] == pytest.approx(rows[0]["parameters"], rel=0.02)
    for wrong, message in (
        (["--recall", 0], "give --recall N"),
        (["--resume", tmp_path / "c"], "does not take --transformer-recall"),
    ):
        code, _, err = newllm("compare", "--transformer-recall", *wrong)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_a_model_without_a_transformer_of_its_size_is_one_line(newllm, text):
    code, _, err = newllm("compare", "--data", text, *TINY, "--architecture", "transformer")
    assert code == 2
    assert err.count("\n") == 1


def test_only_the_folder_of_a_comparison_will_do(newllm, trained):
    for folder in (trained, trained.parent, "nothing"):
        code, _, err = newllm("compare", "--resume", folder)
        assert code == 2
        assert "not the folder of a comparison" in err
        assert err.count("\n") == 1


def test_table_lines_up():
    row = {"model": "m", "parameters": 1234567, "perplexity": 12.348, "test_perplexity": 1.0, "tokens_per_s": 9876.5,
           "steps": 5, "seconds": 2.0, "peak_memory_bytes": 3 * 2**20, "state_bytes": 1536}  # fmt: skip
    lines = compare.table([row, row | {"model": "a longer name"}]).splitlines()
    assert len({len(line) for line in lines}) == 1
    for shown in ("1,234,567", "12.35", "1.00", "9,876", "3 MiB", "1.5 KiB"):
        assert shown in lines[2]
