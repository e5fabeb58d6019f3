"""Whatever is wrong: exit code 2, exactly one line on stderr that says what, and nothing that was there is lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from cli_tools import TEXT, TINY

from newllm.prepare import prepare_data
from newllm.tokenizer import train_tokenizer


def snapshot(folder):
    """Every file below a folder, and what is in it."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def refused(result, said):
    code, _, err = result
    assert code == 2, err
    assert err.startswith("newllm: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert said in err, err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["train", "--step", "3"], "unrecognized arguments: --step 3"),  # no guessing at abbreviations
        (["train", "--steps"], "expected one argument"),
        (["train", "--steps", "many"], "invalid int value: 'many'"),
        (["train", "--lr", "fast"], "invalid float value: 'fast'"),
        (["train", "--precision", "float8"], "invalid choice: 'float8'"),
        (["train", "extra"], "unrecognized arguments: extra"),
        (["train", "--steps", "0"], "--steps: got 0"),
        (["train", "--stop-after", "0"], "--stop-after: got 0"),
        (["train", "--max-minutes", "0"], "--max-minutes: got 0"),
        (["eval", "--dynamic-lr", "0.1"], "--dynamic-lr: is of dynamic evaluation; give --dynamic too"),
        (["train", "--max-minutes", "nan"], "--max-minutes: got nan"),
        (["train", "--lr", "nan"], "--lr: got nan"),
        (["train", "--seed", str(2**70)], "--seed"),
        (["train", "--batch-size", "-4"], "--batch-size: got -4"),
        (["train", "--device", "tpu"], "--device tpu"),
        (["train", "--preset", "huge"], "no preset 'huge'; there are classic, tiny"),
        (["train", "--embed-dim", "0"], "--embed-dim: embed_dim is 0"),
        (["train", "--layers", "0"], "--layers: num_layers is 0"),
        (["train", "--recall", str(2**40)], "--recall: recall is 1099511627776, wanted at most 16,777,216"),
        (["train", "--threads", "100000"], "--threads: got 100000, wanted 0 to 1024"),
        (["eval", "--threads", "100000"], "--threads: got 100000, wanted 0 to 1024"),
        (["train", "--resume", ""], "--resume: got an empty name"),
        (["compare", "--resume", ""], "--resume: got an empty name"),
        (["train", "--data", ""], "--data: got an empty name"),
        (["eval", "--dynamic", "--dynamic-lr", "0"], "--dynamic-lr: got 0.0, wanted a number above 0"),
        (["eval", "--dynamic", "--dynamic-decay", "-1"], "--dynamic-decay: got -1.0"),
        (["eval", "--dynamic", "--dynamic-segment", "0"], "--dynamic-segment: got 0"),
        (["train", "--dropout", "1"], "dropout is 1"),
        (["train", "--hops", "2", "--coupling", "full"], "hops"),
        (["train", "--preset", "classic", "--coupling", "none"], "coupling"),
        (["train", "--run", "a/b"], "one folder's name"),
        (["train", "--run", "latest"], "not 'latest'"),
        (["train", "--run", ".."], "one folder's name"),
        (["train", "--run", "a", "--out", "b"], "give one of them"),
        (["train", "--data", "nowhere.txt"], "no such file or folder"),
        (["train", "--data", "~nobody-of-this-name/x"], "home"),
        (["train", "--data", "x" * 300], "name too long"),
        (["train", "--data", "hub:"], "names no data set"),
        (["train", "--tokenizer", "char"], "wanted bpe or word"),
        (["train", "--vocab-size", "100"], "at least 257"),
        (["train", "--vocab-size", "9999999999999"], "16777216"),
        (["train", "--batch-size", "1000000"], "lower one of them"),
        (["train", "--resume", "nothing"], "--resume: no run 'nothing'"),
        (["train", "--resume", "latest"], "no runs in"),
        (["train", "--resume", "x", "--lr", "1"], "does not take --lr"),
        (["train", "--resume", "x", "--data", "builtin", "--compile"], "does not take --compile, --data"),
        (["compare", "--resume", "x", "--steps", "5"], "does not take --steps"),
        (["compare", "--architecture", "transformer"], "wants the model to set against"),
        (["eval"], "no runs in"),
        (["eval", "nothing"], "no run 'nothing'"),
        (["eval", "--split", "dev"], "invalid choice: 'dev'"),
        (["eval", "--threads", "-1"], "--threads: got -1"),
        (["generate"], "make one with: newllm train"),
        (["generate", "a", "--run", "nothing"], "--run: no run 'nothing'"),
        (["generate", "--num-samples", "0"], "--num-samples: got 0"),
        (["generate", "\udcff"], "not UTF-8"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_options(newllm, argv, said, runs_root):
    refused(newllm(*argv), said)
    assert not runs_root.exists()  # nothing was begun


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "-1"], "--temperature: got -1"),
        (["--temperature", "nan"], "temperature"),
        (["--recall-share", "2"], "--recall-share: got 2"),
        (["--top-k", "0"], "--top-k: got 0"),
        (["--top-p", "1.5"], "--top-p: got 1.5"),
        (["--max-tokens", "-1"], "--max-tokens: got -1"),
        (["--seed", "-1"], "--seed: got -1"),
    ],
    ids=str,
)
def test_generate_options(newllm, trained, options, said):
    result = newllm("generate", "The", *options)
    refused(result, said)
    assert result.out == ""


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\x7fELF\x02\x01\x01\0\0", "binary data"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8"),
        ("a.txt", b"x", "too little text"),
        ("a.txt", b"too short for the streams", "too few for --batch-size"),
        ("a.json", b'[{"text": "whole"}, {"text": "cut', "may be cut short"),
        ("a.jsonl", b'{"text": "whole"}\n{"text": "cut', "line 2: not valid JSON"),
        ("a.jsonl", b'{"body": "words"}\n', "name the field with --text-field"),
        ("a.txt.xz", b"\xfd7zXZ\x00", "cannot be decompressed"),
        ("a.pdf", b"%PDF-1.7", "unknown type of file"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_text(newllm, tmp_path, runs_root, command, name, content, said):
    (tmp_path / name).write_bytes(content)
    refused(newllm(command, "--data", name, *TINY), said)
    assert not runs_root.exists()


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)


def set_config(part, key, value):
    def damage(path):
        config = json.loads(path.read_text())
        config[part][key] = value
        path.write_text(json.dumps(config))

    return damage


def other_vocabulary(path):
    path.write_text(train_tokenizer("bpe", [TEXT], 290).to_json(), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("best.safetensors", cut_in_half, "cut short or damaged"),
        ("best.safetensors", flip_a_bit, "does not match its checksum"),
        ("best.safetensors", lambda path: path.write_bytes(b""), "cut short or damaged"),
        (
            "best.safetensors",
            lambda path: safetensors.torch.save_file({"a": torch.ones(2)}, path),
            "not a checkpoint of",
        ),
        ("tokenizer.json", cut_in_half, "cut short or damaged"),
        ("tokenizer.json", os.remove, "No such file"),
        ("tokenizer.json", other_vocabulary, "put back the tokenizer"),
        ("config.json", cut_in_half, "not valid JSON, cut short"),
        ("config.json", lambda path: path.write_text("[]"), "wanted an object"),
        ("config.json", lambda path: path.write_text("{}"), "has no 'model'"),
        ("config.json", set_config("model", "embed_dim", "wide"), "embed_dim is 'wide'"),
        ("config.json", set_config("model", "magic", 1), "no field magic"),
        ("config.json", set_config("model", "embed_dim", 18), "another model or vocabulary"),
        ("config.json", set_config("model", "num_layers", 2), "weights of another model"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "eval", "train"])
def test_damaged_runs(newllm, trained, command, file, damage, said):
    if command == "train" and file == "best.safetensors":
        file = "last.safetensors"
    damage(trained / file)
    before = snapshot(trained)
    argv = {"generate": ["generate", "The", "--run", trained], "eval": ["eval", trained],
            "train": ["train", "--resume", trained, "--steps", 25]}  # fmt: skip
    result = newllm(*argv[command])
    refused(result, said)
    assert str(trained / file) in result.err or "weights of" in said or "another model" in said
    assert snapshot(trained) == before


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("config.json", set_config("training", "lr", "high"), "--lr: got 'high'"),
        ("config.json", set_config("training", "momentum", 0.9), "unknown training setting momentum"),
        ("config.json", set_config("data", "corpus", None), "must name a corpus"),
        ("config.json", set_config("data", "corpus", "gone.txt"), "no such file"),
        ("last.safetensors", os.remove, "no such checkpoint"),
        ("metrics.jsonl", lambda path: path.write_text("not JSON\n"), "metrics.jsonl, line 1"),
        ("metrics.jsonl", lambda path: path.write_text("[1]\n"), "metrics.jsonl, line 1"),
    ],
)
def test_runs_that_cannot_go_on(newllm, trained, file, damage, said):
    damage(trained / file)
    before = snapshot(trained)
    refused(newllm("train", "--resume", trained), said)
    assert snapshot(trained) == before


def test_a_text_that_changed_since_is_refused_on_resuming(newllm, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    assert newllm("train", "--data", "a.txt", *TINY, "--run", "r", "--stop-after", 3).code == 0
    (tmp_path / "a.txt").write_text(TEXT.replace("dog", "cow"))
    refused(newllm("train", "--resume", "r"), "the data is not what this run was trained on")


def test_fewer_steps_than_were_trained(newllm, trained):
    refused(newllm("train", "--resume", "first", "--steps", 5), "has already trained 20 steps")


def test_a_vocabulary_larger_than_the_models(newllm, text, trained):
    result = newllm("train", "--data", text, "--tokenizer", trained, "--vocab-size", 260)
    refused(result, "larger than the model's --vocab-size 260")


def test_a_split_that_is_not_there(newllm, text, trained):
    refused(newllm("eval", "--split", "test"), "no such split; it has train, valid")
    refused(newllm("eval", "--data", text, "--text-field", "x", "--split", "test"), "no such split")


def test_an_existing_folder_is_never_trained_over(newllm, text, trained, tmp_path):
    before = snapshot(trained)
    refused(newllm("train", "--data", text, *TINY, "--run", "first"), "--resume")
    refused(newllm("train", "--data", text, *TINY, "--out", trained), "not an empty folder")
    (tmp_path / "file").write_text("x")
    refused(newllm("train", "--data", text, *TINY, "--out", tmp_path / "file"), "not an empty folder")
    assert snapshot(trained) == before


def test_a_folder_that_another_run_took_meanwhile(newllm, text, tmp_path, monkeypatch):
    """Two runs of one name begun at once: one of them reads its text longer, and leaves the folder to the other."""

    def slowly(*args, **kwargs):
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "config.json").write_text("the other's")
        return prepare_data(*args, **kwargs)

    monkeypatch.setattr("newllm.cli.settings.prepare_data", slowly)
    refused(newllm("train", "--data", text, *TINY, "--out", tmp_path / "r"), "another run's now")
    assert snapshot(tmp_path / "r").keys() == {tmp_path / "r" / "config.json"}


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_run_folder_that_cannot_be_made(newllm, text, tmp_path, command):
    (tmp_path / "file").write_text("x")
    refused(newllm(command, "--data", text, *TINY, "--out", tmp_path / "file" / "run"), "Not a directory")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MiB of its own, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(path):
    """Take all that is left of a disk."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)


def test_a_disk_that_fills_up_while_training(newllm, text, small_disk):
    """The last good checkpoint stands, and once there is room the run goes on from it."""
    folder = small_disk / "run"
    assert newllm("train", "--data", text, *TINY, "--out", folder, "--stop-after", 4).code == 0
    filler = small_disk / "filler"
    fill(filler)
    before = snapshot(folder)
    refused(newllm("train", "--resume", folder), "No space left on device")
    kept = snapshot(folder)
    for name in ("last.safetensors", "config.json", "tokenizer.json"):
        assert kept[folder / name] == before[folder / name]
    filler.unlink()
    assert newllm("train", "--resume", folder).code == 0


def test_a_read_only_run_folder(newllm, text, small_disk):
    folder = small_disk / "run"
    assert newllm("train", "--data", text, *TINY, "--out", folder, "--stop-after", 4).code == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = snapshot(folder)
    refused(newllm("train", "--resume", folder), "Read-only file system")
    refused(newllm("train", "--data", text, *TINY, "--out", small_disk / "new"), "Read-only file system")
    assert snapshot(folder) == before
    assert newllm("generate", "The", "--run", folder, "--max-tokens", 2).code == 0


def test_a_model_too_large_for_memory(newllm, text):
    refused(newllm("train", "--data", text, *TINY, "--ffn-dim", 10**12), "out of memory")


def test_divergence_is_one_line_and_the_run_can_still_be_used(newllm, text, runs_root):
    result = newllm("train", "--data", text, *TINY, "--run", "wild", "--lr", 1e18, "--warmup", 0)
    refused(result, "diverged")
    assert newllm("generate", "The", "--run", "wild", "--max-tokens", 2).code == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("NEWLLM_KERNELS_BACKEND", "fast"), ("NEWLLM_KERNELS_BACKEND", "cuda"), ("NEWLLM_CPU_ISA", "mmx")],
)
def test_settings_of_the_environment(newllm, text, tmp_path, name, value):
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("this backend serves here")
    environment = os.environ | {name: value, "NEWLLM_RUNS": str(tmp_path / "runs")}
    command = [sys.executable, "-m", "newllm", "train", "--data", text, *TINY, "--run", "r"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    refused((done.returncode, done.stdout, done.stderr), name)
    assert value in done.stderr


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        (["--hidden-dim", 9, "--activation", "tanh"], ["--hidden-dim", "--activation"]),
        (["--norm", "none", "--clamp", 3], ["--clamp"]),
        (["--heads", 2, "--max-seq-len", 9], ["--heads", "--max-seq-len"]),
        (
            ["--architecture", "transformer", "--heads", 2, "--hops", 1, "--clamp", 3],
            ["--context-dim", "--hops", "--clamp"],
        ),
        (["--fnn-layers", 1, "--hidden-dim", 9, "--clamp", 3], []),
    ],
)
def test_options_that_change_nothing_are_named(newllm, text, options, unread):
    code, _, err = newllm("train", "--data", text, *TINY, "--stop-after", 1, *options)
    assert code == 0
    notes = [line for line in err.splitlines() if "note:" in line]
    assert sorted(line.split()[2] for line in notes) == sorted(unread)
    assert all("changes nothing about this model (architecture " in line for line in notes)
