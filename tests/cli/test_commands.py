"""train, eval and generate from end to end, on a model and a text so small that it takes seconds."""

from __future__ import annotations

import json
import math
import shlex
import shutil

import pytest
import torch
from cli_tools import TEXT, TINY

import newllm as package
from newllm import checkpoint
from newllm.prepare import run_data
from newllm.prepared import load_prepared
from newllm.run import Run, find_run

FILES = {
    "config.json", "tokenizer.json", "unigram.safetensors", "metrics.jsonl", "last.safetensors", "best.safetensors",
    "loss.png", "summary.json",
}  # fmt: skip


@pytest.mark.parametrize(
    "command", ["train", "fixpoint", "eval", "generate", "compare", "prepare", "diagnose", "judge"]
)
def test_help_of_every_command(newllm, command):
    code, out, err = newllm(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: newllm {command}")
    assert ("--device" in out) == (command not in ("prepare", "diagnose"))  # which compute on the CPU


def test_help_lists_the_commands_and_version_tells_it(newllm):
    out = newllm("--help").out
    assert all(
        f"\n    {command} " in out
        for command in ("train", "fixpoint", "prepare", "eval", "generate", "judge", "diagnose", "compare")
    )
    assert newllm("--version").out == f"newllm {package.__version__}\n"


def test_train_prints_perplexity_run_and_the_command_that_writes(newllm, text, runs_root):
    code, out, err = newllm("train", "--data", text, *TINY, "--run", "my run")
    assert (code, err) == (0, "")  # no progress bar where there is no terminal
    folder = runs_root / "my run"
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")

    summary = json.loads((folder / "summary.json").read_text())
    assert f"validation perplexity  {summary['valid']['perplexity']:,.2f}" in out
    assert f"unigram perplexity     {summary['valid']['unigram_perplexity']:,.2f}" in out
    assert summary["device"]
    assert summary["torch"] == torch.__version__
    command = shlex.split(json.loads((folder / "config.json").read_text())["command"])
    assert command[:4] == ["newllm", "train", "--data", text]
    assert command[-1] == "my run"
    tokens = run_data(find_run("my run"), find_run("my run").model_config())
    written = len(tokens.tokenizer.decode(tokens.tokens["valid"][1:].tolist()).encode())
    bits = summary["valid"]["loss"] * summary["valid"]["tokens"] / math.log(2)
    assert summary["valid"]["bits_per_byte"] == pytest.approx(bits / written)
    assert "run                    runs/my run\n" in out
    # The command it ends with is one that can be pasted.
    argv = shlex.split(out.splitlines()[-1])
    assert argv[0] == "newllm"
    code, text_out, _ = newllm(*argv[1:], "--max-tokens", 3)
    assert code == 0
    assert text_out.startswith(argv[2])


def test_the_same_seed_trains_the_same_model_and_another_does_not(newllm, text):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert newllm("train", "--data", text, *TINY, "--run", name, "--seed", seed).code == 0
    a, b, c = (checkpoint.load(find_run(name).best_file)[0] for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    "options",
    [
        ["--preset", "classic", "--hidden-dim", 16],
        ["--architecture", "transformer", "--heads", 2],
        ["--hops", 2, "--fnn-layers", 1, "--hidden-dim", 12, "--activation", "relu"],
        ["--coupling", "full", "--norm", "state", "--no-tie-embeddings", "--optimizer", "muon"],
        ["--norm", "none", "--grad-accum", 2, "--precision", "bfloat16"],
        ["--spelling", 30, "--noise", 0.2, "--grad-accum", 2, "--no-tie-embeddings"],
        [
            "--softmaxes",
            2,
            "--locked-dropout",
            "--random-segments",
            "--optimizer",
            "sgd",
            "--average",
            1,
            "--no-cuda-graph",
        ],
    ],
    ids=str,
)
def test_every_kind_of_model_trains_is_scored_and_writes(newllm, text, options):
    assert newllm("train", "--data", text, *TINY, "--steps", 4, *options).code == 0
    assert newllm("eval").code == 0
    assert newllm("generate", "The cat", "--max-tokens", 4).code == 0


@pytest.mark.parametrize("options", [[], ["--average", 0.5], ["--precision", "bfloat16"]], ids=str)
def test_a_run_with_spelling_keeps_what_it_evaluated(newllm, text, options):
    """The summary, `newllm eval` and the last line of metrics.jsonl are about one model."""
    assert (
        newllm("train", "--data", text, *TINY, "--spelling", 50, "--eval-tokens", 10**6, "--run", "s", *options).code
        == 0
    )
    best = min(record["valid_loss"] for record in find_run("s").metrics() if "valid_loss" in record)
    summary = json.loads((find_run("s").path / "summary.json").read_text())
    shared = checkpoint.load(find_run("s").last_file)[0]["spelling.weight"]
    assert shared.shape[0] == 50
    assert shared.norm() > 0
    evaluated = json.loads(newllm("eval", "s", "--json").out)["splits"]["valid"]["loss"]
    assert summary["valid"]["loss"] == pytest.approx(best, rel=1e-6)
    assert evaluated == pytest.approx(best, rel=1e-6)


def test_word_level_from_a_folder_with_its_own_split(newllm, tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text(TEXT)
    code, out, _ = newllm("train", "--data", folder, "--tokenizer", "word", *TINY, "--vocab-size", 25, "--run", "w")
    assert code == 0
    assert "test perplexity" in out
    assert "word vocabulary of 25" in out
    assert set(json.loads(newllm("eval", "--json").out)["splits"]) == {"valid", "test"}
    written = newllm("generate", "The cat", "--max-tokens", 30, "--seed", 0).out
    assert written.startswith("The cat ")
    one_line = newllm("generate", "The cat", "--max-tokens", 300, "--seed", 0, "--stop-at-eos").out
    assert one_line.rstrip("\n").count("\n") == 0
    # Its tokenizer serves another run, and is the bound of the model's vocabulary.
    assert newllm("train", "--data", folder, *TINY[:8], "--tokenizer", "runs/w", *TINY[10:], "--steps", 2).code == 0


def test_resuming_in_pieces_is_training_in_one_go(newllm, text, trained):
    code, out, _ = newllm("train", "--data", text, *TINY, "--run", "parts", "--stop-after", 7)
    assert code == 0
    assert "newllm train --resume runs/parts" in out
    assert newllm("train", "--resume", "latest", "--stop-after", 6).code == 0
    code, out, _ = newllm("train", "--resume", "runs/parts")
    assert code == 0
    assert "going on from step 13 of 20" in out
    got, want = (checkpoint.load(find_run(name).last_file)[0] for name in ("parts", "first"))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    timings = ("tokens_per_s", "elapsed_s")
    curves = [
        [{key: value for key, value in record.items() if key not in timings} for record in find_run(name).metrics()]
        for name in ("parts", "first")
    ]
    assert curves[0] == curves[1]


def test_a_finished_run_is_resumed_without_harm_and_can_be_trained_longer(newllm, trained):
    before = (trained / "last.safetensors").read_bytes()
    assert newllm("train", "--resume", "first").code == 0
    assert (trained / "last.safetensors").read_bytes() == before
    assert newllm("train", "--resume", "first", "--steps", 25, "--threads", 1).code == 0
    assert Run(trained).config()["training"]["steps"] == 25
    assert Run(trained).metrics()[-1]["step"] == 25


def test_eval_prints_what_training_printed(newllm, trained):
    summary = json.loads((trained / "summary.json").read_text())["valid"]
    code, out, err = newllm("eval", "--json", "--threads", 1)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["run"].endswith("first")
    assert result["splits"] == {"valid": summary}
    table = newllm("eval", "first").out
    assert f"{summary['perplexity']:,.2f}" in table
    assert f"{summary['unigram_perplexity']:,.2f}" in table


def test_eval_of_splits_and_of_another_text(newllm, trained, tmp_path):
    def scores(*options):
        return json.loads(newllm("eval", "--json", *options).out)["splits"]

    splits = scores("--split", "train") | scores("--split", "valid")
    whole = scores("--split", "all")["all"]
    assert whole["tokens"] == splits["train"]["tokens"] + splits["valid"]["tokens"] + 1  # and the first of the second
    other = tmp_path / "other.txt"
    other.write_text("Something else entirely; zebras, quartz!\n" * 5)
    (name, score), = scores("--data", str(other)).items()  # fmt: skip
    assert name == "all"
    assert score["perplexity"] > 2 * splits["train"]["perplexity"]


def test_a_prepared_text_trains_and_scores_as_the_text_itself(newllm, text, trained):
    code, out, _ = newllm("prepare", "--data", text, "--vocab-size", 280, "--out", "ready")
    assert code == 0
    assert "newllm train --data ready" in out
    options = [option for option in TINY if option not in ("--vocab-size", "280")]
    assert newllm("train", "--data", "ready", *options, "--run", "again").code == 0
    got, want = (checkpoint.load(find_run(name).last_file)[0] for name in ("again", "first"))
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert json.loads(newllm("eval", "first", "--data", "ready", "--json", "--split", "valid").out)[
        "splits"
    ].keys() == {"valid"}
    assert newllm("train", "--resume", "again", "--steps", 21).code == 0
    code, _, err = newllm("prepare", "--data", text, "--out", "ready")
    assert code == 2
    assert "not an empty folder" in err


def test_prepare_keeps_whole_documents_and_packs_them(newllm, text, tmp_path):
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": f"book {n} " * 40}) + "\n" for n in range(30)))
    options = ("--data", "books.jsonl", "--vocab-size", 280)
    assert newllm("prepare", *options, "--out", "whole").code == 0
    assert newllm("prepare", *options, "--max-tokens", 1000, "--compress", "--out", "part").code == 0
    whole, part = load_prepared(tmp_path / "whole"), load_prepared(tmp_path / "part")
    kept = part.tokens["train"]
    assert 0 < kept.size <= 1000 < whole.tokens["train"].size
    assert kept[-1] == whole.tokenizer.eos_id
    assert (whole.tokens["train"][: kept.size] == kept).all()
    assert (whole.tokens["valid"] == part.tokens["valid"]).all()
    for wrong in (0, 5):
        code, _, err = newllm("prepare", *options, "--max-tokens", wrong, "--out", "none")
        assert (code, err.count("\n")) == (2, 1)
        assert "--max-tokens" in err


def test_eval_by_position_and_dynamic_evaluation_stand_beside_the_static_figures(newllm, trained):
    options = ["--split", "valid", "--by-position", "--dynamic", "--dynamic-lr", 0.003, "--threads", 1]
    row = json.loads(newllm("eval", "--json", *options).out)["splits"]["valid"]
    plain = json.loads(newllm("eval", "--json", "--split", "valid", "--threads", 1).out)["splits"]["valid"]
    assert {name: row[name] for name in plain} == plain
    assert sum(place["tokens"] for place in row["by_position"]) == row["tokens"]
    assert row["dynamic"]["tokens"] == row["tokens"]
    assert row["dynamic"]["perplexity"] != row["perplexity"]
    assert (row["dynamic"]["lr"], row["dynamic"]["decay"], row["dynamic"]["segment"]) == (0.003, 0.003, 32)
    out = newllm("eval", *options).out
    assert f"{row['dynamic']['perplexity']:,.2f}" in out
    assert "by place in the document" in out


def test_minutes_stop_a_run_that_resumes(newllm, text):
    code, out, _ = newllm("train", "--data", text, *TINY, "--run", "slice", "--max-minutes", 1e-9)
    assert code == 0
    assert "stopped at step 0 of 20" in out
    assert newllm("train", "--resume", "slice", "--max-minutes", 5).code == 0
    assert Run(find_run("slice").path).metrics()[-1]["step"] == 20


def test_generate_with_a_seed_is_reproducible(newllm, trained):
    first, again, other = (newllm("generate", "The", "--max-tokens", 40, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other
    assert first.startswith("The")
    assert first.endswith("\n")


def test_generate_options_reach_the_sampler(newllm, trained):
    def write(*options):
        return newllm("generate", "The", "--max-tokens", 40, "--seed", 1, *options).out

    greedy = write("--temperature", 0)
    assert write("--top-k", 1) == write("--top-p", 1e-6) == greedy
    assert write("--temperature", 5) != greedy
    assert write("--temperature", 5, "--top-k", 2) != write("--temperature", 5)
    assert write("--temperature", 5, "--top-p", 0.1) != write("--temperature", 5)
    assert write("--max-tokens", 0) == "The\n"


def test_a_batch_of_prompts_writes_what_each_writes_alone(newllm, trained):
    options = ["--max-tokens", 20, "--temperature", 0]
    prompts = ["The 3th cat", "dog", "Ünïcode 😀"]
    code, out, _ = newllm("generate", *prompts, *options)
    assert code == 0
    alone = [newllm("generate", prompt, *options).out for prompt in prompts]
    assert out == "".join(f"--- {n} of 3\n{text}" for n, text in enumerate(alone, start=1))
    samples = newllm("generate", "The", "--num-samples", 2, "--seed", 5, "--max-tokens", 20).out.split("--- 2 of 2\n")
    assert samples[0].removeprefix("--- 1 of 2\n") != samples[1]


def test_generate_without_a_prompt_begins_a_text(newllm, trained):
    code, out, _ = newllm("generate", "--max-tokens", 5, "--seed", 0)
    assert code == 0
    assert len(out) > 1


def test_latest_is_the_run_that_was_trained_last(newllm, text, trained):
    shutil.copytree(trained, trained.parent / "second")
    assert newllm("train", "--resume", "second", "--steps", 21).code == 0
    assert json.loads(newllm("eval", "--json").out)["run"].endswith("second")
    assert newllm("train", "--resume", "first", "--steps", 22).code == 0
    assert json.loads(newllm("eval", "--json").out)["run"].endswith("first")


def test_a_run_can_be_moved_and_named_by_its_path(newllm, trained, tmp_path):
    shutil.move(trained, tmp_path / "moved")
    assert newllm("generate", "The", "--run", tmp_path / "moved", "--max-tokens", 2).code == 0
    assert newllm("eval", "moved").code == 0
    assert newllm("train", "--resume", tmp_path / "moved", "--steps", 21).code == 0


def test_a_run_learns_from_others_and_goes_on_from_another_folder(newllm, text, trained, tmp_path, monkeypatch):
    assert newllm("train", "--data", text, *TINY, "--run", "alone", "--seed", 1).code == 0
    options = ["--data", text, *TINY, "--seed", 1, "--teacher-words", 20]
    assert newllm("train", *options, "--run", "whole", "--teacher", "first", "alone").code == 0
    config = find_run("whole").config()
    assert config["training"]["teacher_share"] == 0.5
    assert config["teachers"] == [str(find_run(name).path.resolve()) for name in ("first", "alone")]
    assert newllm("train", *options, "--run", "parts", "--teacher", "first", "alone", "--stop-after", 7).code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert newllm("train", "--resume", "parts").code == 0
    tensors = [checkpoint.load(find_run(name).best_file)[0] for name in ("whole", "parts", "alone")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert not all(torch.equal(tensors[0][name], tensors[2][name]) for name in tensors[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--teacher", "nowhere"], "no run 'nowhere'"),
        (["--teacher-share", 0.5], "--teacher-share 0.5: wanted --teacher RUN beside it"),
        (["--teacher", "first", "--teacher-share", 0], "--teacher-share 0: wanted a number above 0 beside --teacher"),
        (["--teacher", "first", "--teacher-share", 1.5], "--teacher-share: got 1.5"),
        (["--teacher", "first", "--teacher-temperature", 0], "--teacher-temperature: got 0.0, wanted a number above 0"),
        (["--teacher", "first", "--softmaxes", 2], "--softmaxes 2: a mixture takes no --teacher"),
        (["--teacher", "first", "--vocab-size", 270], "was trained with another tokenizer; give --tokenizer"),
        (["--resume", "first", "--teacher", "first"], "it does not take --teacher"),
    ],
    ids=str,
)
def test_teachers_that_cannot_be(newllm, text, trained, options, said):
    data = [] if "--resume" in options else ["--data", text, *TINY]
    code, _, err = newllm("train", *data, *options)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_comparison_has_no_teachers(newllm, text):
    code, _, err = newllm("compare", "--data", text, *TINY, "--teacher-share", 0.5)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--teacher-share 0.5: a comparison has no teachers" in err


def test_a_teacher_that_is_gone_is_one_line(newllm, text, trained, runs_root):
    options = ["--data", text, *TINY, "--run", "pupil", "--teacher", "first", "--stop-after", 3]
    assert newllm("train", *options).code == 0
    trained.rename(runs_root / "elsewhere")
    code, _, err = newllm("train", "--resume", "pupil")
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"no run '{trained.resolve()}'" in err


def test_a_run_that_was_never_evaluated_says_so(newllm, text, runs_root):
    assert newllm("train", "--data", text, *TINY, "--run", "early", "--stop-after", 3).code == 0
    assert not (runs_root / "early" / "best.safetensors").exists()
    for command in (["eval", "early"], ["generate", "The", "--run", "early", "--max-tokens", 2]):
        code, _, err = newllm(*command)
        assert code == 0
        assert "early has not been evaluated yet, so this is its last checkpoint; its recall has no share yet" in err
    done = newllm("train", "--resume", "early", "--steps", 3)  # which it has taken already
    assert done.code == 0, done.err
    assert "(checkpoint of step 3)" in done.out
    assert newllm("eval", "early").err == ""
