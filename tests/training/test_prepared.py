"""Prepared texts: what was tokenised once trains as the text itself would, and damage is named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from newllm.errors import UserError
from newllm.prepare import prepare_data
from newllm.prepared import Prepared, is_prepared, load_prepared, save_prepared, whole_documents
from newllm.tokenizer import train_tokenizer

TEXT = "the cat sat on the mat\nand the dog sat by the door\n" * 20


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    data = prepare_data(str(tmp_path / "text.txt"), "word")
    save_prepared(tmp_path / "ready", Prepared(data.name, data.standard_split, data.tokenizer, data.tokens))
    return tmp_path / "ready"


def test_it_comes_back_as_it_was(folder):
    straight = prepare_data(str(folder.parent / "text.txt"), "word")
    assert is_prepared(folder)
    for given in (None, "word", straight.tokenizer):
        again = prepare_data(str(folder), given)
        assert (again.name, again.standard_split) == (straight.name, straight.standard_split)
        assert again.tokenizer.to_json() == straight.tokenizer.to_json()
        assert again.tokens.keys() == straight.tokens.keys()
        for split, tokens in straight.tokens.items():
            assert again.tokens[split].dtype == tokens.dtype
            np.testing.assert_array_equal(again.tokens[split], tokens)


def test_another_tokenizer_is_refused(folder):
    with pytest.raises(UserError, match=r"--tokenizer bpe: .*tokenised already \(word\)"):
        prepare_data(str(folder), "bpe")
    with pytest.raises(UserError, match="another tokenizer than the model's"):
        prepare_data(str(folder), train_tokenizer("word", ["other words here words here"], None))
    with pytest.raises(UserError, match=r"--vocab-size 3: .*tokenised already, with"):
        prepare_data(str(folder), None, 3)


def test_damage_is_named(folder):
    train = folder / "train.npy"
    whole = train.read_bytes()
    for content, said in [(whole[:-4], "train.npy: not a readable array"), (b"", "train.npy: not a readable array"),
                          (whole[:-2] + b"\1\0", "train.npy: not the tokens that prepared.json tells of")]:  # fmt: skip
        train.write_bytes(content)
        with pytest.raises(UserError, match=said):
            load_prepared(folder)
    train.unlink()
    with pytest.raises(UserError, match=r"train.npy: cannot be read"):
        load_prepared(folder)
    (folder / "prepared.json").write_text(json.dumps({"name": "x", "splits": {}}))
    with pytest.raises(UserError, match="not the index of a prepared text"):
        load_prepared(folder)


def test_compressed_it_is_the_same_and_damage_is_named(folder):
    plain = load_prepared(folder)
    packed = folder.parent / "packed"
    save_prepared(packed, plain, compress=True)
    assert sorted(path.name for path in packed.iterdir()) == [
        "prepared.json", "tokenizer.json", "train.npy.xz", "valid.npy.xz",
    ]  # fmt: skip
    again = load_prepared(packed)
    for split, tokens in plain.tokens.items():
        assert again.tokens[split].dtype == tokens.dtype
        np.testing.assert_array_equal(again.tokens[split], tokens)
    train = packed / "train.npy.xz"
    whole = train.read_bytes()
    middle = len(whole) // 2
    for content in (whole[:middle], b"", whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :], b"no xz"):
        train.write_bytes(content)
        with pytest.raises(UserError, match=r"train.npy.xz: not (a readable array|the tokens)"):
            load_prepared(packed)


def test_only_whole_documents_are_kept():
    tokens = np.array([5, 6, 0, 7, 0, 8, 9, 0], np.uint16)
    for limit, kept in ((3, 3), (4, 3), (5, 5), (7, 5), (8, 8), (100, 8)):
        np.testing.assert_array_equal(whole_documents(tokens, 0, limit), tokens[:kept])
    with pytest.raises(UserError, match="--max-tokens 2: the first document"):
        whole_documents(tokens, 0, 2)
