"""Checkpoints: what was there stays until the new one is whole, and nothing damaged is read."""

from __future__ import annotations

import errno
import os
import random
import subprocess

import numpy as np
import pytest
import safetensors.torch
import torch

from newllm import checkpoint
from newllm.errors import UserError

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b.half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
}
INFO = {"step": 123, "loss": 1.0 / 3.0, "nested": [1, None, "ü"]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, TENSORS, INFO)
    return path


def test_what_is_saved_comes_back_to_the_last_bit(file):
    tensors, info = checkpoint.load(file)
    assert info == INFO
    assert tensors.keys() == TENSORS.keys()
    for name, want in TENSORS.items():
        assert tensors[name].dtype == want.dtype
        assert torch.equal(tensors[name], want)
    assert os.listdir(file.parent) == [file.name]


def test_any_safetensors_reader_reads_it(file):
    assert torch.equal(safetensors.torch.load_file(file)["a"], TENSORS["a"])


def fails_at(call, occurrence=1):
    """A stand-in for an os function, that raises ENOSPC at the n-th call."""
    real, left = getattr(os, call), [occurrence]

    def stand_in(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    return stand_in


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(file, monkeypatch, call):
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails_at(call))
        with pytest.raises(UserError, match=r"No space left.*previous one is untouched"):
            checkpoint.save(file, {"a": torch.zeros(9)}, {})
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]  # no litter
    checkpoint.save(file, {"a": torch.zeros(9)}, {})
    assert checkpoint.load(file)[1] == {}


def test_an_interruption_while_writing_leaves_the_old_file(file):
    before = file.read_bytes()

    def interrupted():
        with checkpoint.atomic_write(file) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_first_file_that_cannot_be_written_promises_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", fails_at("replace"))
    with pytest.raises(UserError, match="No space left") as caught:
        checkpoint.save(tmp_path / "new", TENSORS, INFO)
    assert "previous" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB of its own, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_old_file_stays(small_disk):
    path = small_disk / "last.safetensors"
    checkpoint.save(path, TENSORS, INFO)
    with pytest.raises(UserError, match=r"No space left.*previous one is untouched"):
        checkpoint.save(path, {"a": torch.zeros(100_000)}, {})
    assert checkpoint.load(path)[1] == INFO
    assert os.listdir(small_disk) == [path.name]


def test_a_read_only_disk_is_one_line(small_disk):
    path = small_disk / "config.json"
    checkpoint.write_json(path, {"a": 1})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"Read-only file system.*previous one is untouched"):
        checkpoint.write_json(path, {"a": 2})
    assert checkpoint.read_json(path) == {"a": 1}


def test_a_path_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="Not a directory"):
        checkpoint.save(tmp_path / "file" / "last", TENSORS, INFO)


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(file, monkeypatch):
    """As by a run in training: safetensors opens it twice, and may find the header of one file and the tensors of the next."""
    real, readings = checkpoint._load, []

    def replaced_between(path):
        readings.append(path)
        if len(readings) == 1:
            checkpoint.save(path, TENSORS, {**INFO, "step": 124})
            raise UserError("it does not match its checksum")
        return real(path)

    monkeypatch.setattr(checkpoint, "_load", replaced_between)
    assert checkpoint.load(file)[1]["step"] == 124
    assert len(readings) == 2


def test_a_file_cut_anywhere_is_refused(file):
    whole = file.read_bytes()
    for length in {*range(0, len(whole), 7), len(whole) - 1}:
        file.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            checkpoint.load(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_any_byte_that_changed_is_refused(file):
    """Every byte of the file in turn: header, step, checksum, tensors. What loads all the same must be the same."""
    whole = file.read_bytes()
    refused = 0
    for at in range(len(whole)):
        for bit in (0, 5):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                tensors, info = checkpoint.load(file)
            except UserError:
                refused += 1
                continue
            assert info == INFO
            assert all(torch.equal(tensors[name], want) for name, want in TENSORS.items())
    # Unseen stays the case of hexadecimal digits in a \\u00fc of the header, nothing that was saved.
    assert refused > 2 * len(whole) - 20


def test_foreign_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    for content, said in [(b"", "cut short"), (b"text" * 99, "cut short"),
                          (safetensors.torch.save(TENSORS), "not a checkpoint of newllm"),
                          (safetensors.torch.save(TENSORS, {"format": checkpoint.FORMAT}), "checksum")]:  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UserError, match=said) as caught:
            checkpoint.load(path)
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "none")
    with pytest.raises(UserError):
        checkpoint.load(tmp_path)


def test_weights_of_another_model_are_refused_and_nothing_is_copied(tmp_path):
    model = torch.nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    for tensors, said in [({"weight": good["weight"]}, "lacks bias"), ({**good, "more": good["bias"]}, "has more"),
                          ({**good, "bias": torch.zeros(3)}, r"bias has shape \(3,\).*\(2,\)")]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            checkpoint.load_model(model, tensors, tmp_path)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    checkpoint.load_model(model, good, tmp_path)
    assert model.weight.count_nonzero() == 0


def test_generators_go_on_as_they_would_have(tmp_path):
    tensors, info = checkpoint.rng_state()
    checkpoint.save(tmp_path / "rng", tensors, info)
    want = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002
    checkpoint.set_rng_state(*checkpoint.load(tmp_path / "rng"))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == want  # noqa: NPY002


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff", b"[1]", b"[" * 100_000])
def test_json_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: "):
        checkpoint.read_json(tmp_path / "config.json")
