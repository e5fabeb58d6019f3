"""Corpora and streams: what is divided how, and which token is read when."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from newllm.data import VALID_FRACTION, Streams, builtin_documents, evaluation_segments, fingerprint, load_corpus
from newllm.errors import UserError


def drain(streams, steps):
    segments = [streams.next() for _ in range(steps)]
    return [(*streams.window(segment.offset, segment.length), segment.fresh) for segment in segments]


@pytest.mark.parametrize(("n", "B", "T"), [(60, 3, 5), (61, 4, 3), (64, 1, 8)])
def test_an_epoch_reads_every_token_once(n, B, T):
    streams = Streams(np.arange(n, dtype=np.uint16), B, T, seed=0)
    for _ in range(3):  # each from another place, each complete
        inputs = torch.cat([x for x, _, _ in drain(streams, streams.segments_per_epoch)]).flatten().tolist()
        assert len(inputs) == len(set(inputs)) == n // B // T * T * B  # all but the ragged ends


def test_rows_run_on_from_segment_to_segment():
    n, B, T = 101, 3, 4
    streams = Streams(np.arange(n, dtype=np.uint16), B, T, seed=1)
    for _ in range(2):
        segments = drain(streams, streams.segments_per_epoch)
        assert [fresh for *_, fresh in segments] == [True] + [False] * (len(segments) - 1)
        inputs, targets = (torch.cat(parts, dim=1) for parts in list(zip(*segments, strict=True))[:2])
        assert inputs.shape == (B, streams.segments_per_epoch * T)
        assert inputs.dtype == torch.int64
        assert torch.equal(targets, (inputs + 1) % n)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])  # so the context a row ends with is the one it goes on from
        assert torch.equal(inputs[1:, 0], (inputs[:-1, 0] + n // B) % n)


def test_epochs_start_elsewhere_as_the_seed_decides():
    def starts(seed):
        streams = Streams(np.arange(1000, dtype=np.uint16), 2, 50, seed)
        return [drain(streams, streams.segments_per_epoch)[0][0][0, 0].item() for _ in range(4)]

    assert starts(0) == starts(0) != starts(1)
    assert starts(0)[0] == starts(1)[0] == 0
    assert len(set(starts(0))) == 4


def test_streams_go_on_where_their_state_says():
    def make():
        return Streams(np.arange(90, dtype=np.uint16), 2, 7, seed=3)

    reference = drain(make(), 30)  # five epochs
    for stop in (0, 1, 6, 7, 17):
        first = make()
        drain(first, stop)
        second = make()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for got, want in zip(drain(second, 10), reference[stop : stop + 10], strict=True):
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
            assert got[2] == want[2]


def test_random_segments_run_on_have_few_lengths_and_go_on_where_their_state_says():
    n, B, T = 5000, 2, 16

    def make():
        return Streams(np.arange(n, dtype=np.uint16), B, T, seed=0, random=True)

    streams = make()
    for _ in range(2):
        segments = drain(streams, 1)
        segments += drain(streams, streams.segments_per_epoch - 1)
        assert [fresh for *_, fresh in segments] == [True] + [False] * (len(segments) - 1)
        assert {x.shape[1] for x, _, _ in segments} == {8, 14, 16, 18}
        inputs, targets = (torch.cat(parts, dim=1) for parts in list(zip(*segments, strict=True))[:2])
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert n // B - 18 <= inputs.shape[1] <= n // B
        assert len(inputs.unique()) == inputs.numel()
    for stop in (3, 200):
        first, second = make(), make()
        drain(first, stop)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for got, want in zip(drain(second, 200), drain(first, 200), strict=True):
            assert torch.equal(got[0], want[0])


def test_a_window_at_an_offset_in_a_tensor_is_that_at_the_number():
    streams = Streams(np.arange(90, dtype=np.uint16), 2, 7, seed=3)
    for one, other in zip(streams.window(torch.tensor(61), 7), streams.window(61, 7), strict=True):
        assert torch.equal(one, other)


def test_streams_refuse_a_text_too_short():
    Streams(np.zeros(2 * 6, np.uint16), 2, 5, 0)
    with pytest.raises(UserError, match=r"11 tokens.*at least 12.*lower"):
        Streams(np.zeros(2 * 6 - 1, np.uint16), 2, 5, 0)


@pytest.mark.parametrize("n", [2, 7, 8, 9, 20])
def test_evaluation_predicts_every_token_but_the_first_once(n):
    tokens = np.arange(n, dtype=np.uint16)
    segments = list(evaluation_segments(tokens, 7))
    assert torch.cat([x for x, _ in segments], dim=1)[0].tolist() == list(range(n - 1))
    assert torch.cat([y for _, y in segments], dim=1)[0].tolist() == list(range(1, n))


def test_fingerprints_tell_texts_apart():
    tokens = np.arange(10, dtype=np.uint16)
    assert fingerprint(tokens) == fingerprint(tokens.copy()) != fingerprint(tokens[:9])
    assert fingerprint(tokens) != fingerprint(tokens[::-1])


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


def test_a_folder_with_splits_keeps_them(tmp_path):
    spec = write(
        tmp_path, {"train-0.txt": "a", "train-1.txt": "b", "validation.txt": "c", "test.jsonl": '{"text": "d"}'}
    )
    corpus = load_corpus(spec)
    assert corpus.standard_split
    assert corpus.splits == {"train": ["a", "b"], "valid": ["c"], "test": ["d"]}
    assert corpus.documents() == ["a", "b", "c", "d"]


def test_test_text_without_a_validation_split_is_never_trained_on(tmp_path):
    lines = "".join(f"line {n} of training\n" for n in range(50))
    corpus = load_corpus(write(tmp_path, {"train.txt": lines, "test.txt": "for the test\n"}))
    assert corpus.splits["test"] == ["for the test\n"]
    assert "".join(corpus.splits["train"] + corpus.splits["valid"]) == lines


def test_a_folder_without_splits_is_read_whole_in_order(tmp_path):
    files = {"b.txt": "two " * 9, "a/z.txt": "one " * 9, ".hidden/x.txt": "no", "notes.csv": "no", ".x.txt": "no"}
    corpus = load_corpus(write(tmp_path, files))
    assert not corpus.standard_split
    assert "".join(corpus.documents()).count("no") == 0
    assert sorted("".join(corpus.documents()).split()) == ["one"] * 9 + ["two"] * 9


def test_one_text_gives_its_end_to_validation(tmp_path):
    text = "".join(f"line number {n}\n" for n in range(200))
    corpus = load_corpus(write(tmp_path, {"a.txt": text}) + "/a.txt")
    (train,), (valid,) = corpus.splits["train"], corpus.splits["valid"]
    assert train + valid == text
    assert train.endswith("\n")
    assert len(valid) == pytest.approx(VALID_FRACTION * len(text), abs=len("line number 199\n"))


def test_of_many_documents_whole_ones_are_set_aside_by_their_content_alone(tmp_path):
    documents = [f"document {n} " * 5 for n in range(100)]

    def load(order):
        rows = "".join(json.dumps({"text": documents[n]}) + "\n" for n in order)
        return load_corpus(write(tmp_path, {"a.jsonl": rows}) + "/a.jsonl").splits

    splits = load(range(100))
    assert sorted(splits["train"] + splits["valid"]) == sorted(documents)
    share = sum(map(len, splits["valid"])) / sum(map(len, documents))
    assert 0.8 * VALID_FRACTION <= share <= VALID_FRACTION
    assert set(load(range(99, -1, -1))["valid"]) == set(splits["valid"])


def test_a_text_too_short_to_divide_and_a_folder_of_nothing(tmp_path):
    with pytest.raises(UserError, match="too little text"):
        load_corpus(write(tmp_path, {"a.txt": "x"}) + "/a.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file of type"):
        load_corpus(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no such file or folder"):
        load_corpus(str(tmp_path / "none"))
    with pytest.raises(UserError, match="home"):
        load_corpus("~nobody-of-this-name/text.txt")


def test_the_builtin_text_is_english_and_no_long_paragraph_stands_twice():
    documents = builtin_documents()
    paragraphs = [" ".join(p.split()) for document in documents for p in document.split("\n\n")]
    long = [p for p in paragraphs if len(p) >= 40]
    assert len(long) == len(set(long))
    assert sum(map(len, documents)) > 300_000
    assert " the " in documents[0]


class FakeHub:
    """Stands in for the `datasets` library: load_dataset(name, configuration) -> rows by split."""

    def __init__(self, splits):
        self.splits = splits

    def load_dataset(self, name, configuration):
        if name == "none":
            raise FileNotFoundError("no data set\nof that name")
        self.asked = (name, configuration)
        return {split: Column(values) for split, values in self.splits.items()}


class Column(SimpleNamespace):
    def __init__(self, values):
        super().__init__(column_names=["text", "label"], values=values)

    def __getitem__(self, name):
        return self.values


def test_hub_data_sets(monkeypatch):
    hub = FakeHub({"train": ["a" * 50 + "\n" + "b" * 9, None, " "], "unsupervised": ["c"], "test": ["d"]})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    corpus = load_corpus("hub:owner/name:small")
    assert hub.asked == ("owner/name", "small")
    assert corpus.splits["test"] == ["d"]
    assert corpus.splits["valid"]
    assert sum(map(len, corpus.splits["train"] + corpus.splits["valid"])) == 61  # both training splits, all of them
    hub.splits = {"train": ["a"], "validation": ["b"]}
    assert load_corpus("hub:x").splits == {"train": ["a"], "valid": ["b"]}

    for spec, field, said in [("hub:none", "text", "could not load it"), ("hub:", "text", "names no data set"),
                              ("hub:x", "body", "no column 'body', it has 'text', 'label'")]:  # fmt: skip
        with pytest.raises(UserError, match=said) as caught:
            load_corpus(spec, field)
        assert "\n" not in str(caught.value)
    hub.splits = {"train": [1, 2]}
    with pytest.raises(UserError, match="does not hold text"):
        load_corpus("hub:x", "label")


def test_hub_without_its_library_says_which_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install"):
        load_corpus("hub:x")
