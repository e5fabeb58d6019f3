"""Tokenizers: no text is lost on the way to ids and back, and words are counted as the WikiText benchmarks do."""

from __future__ import annotations

import json

import numpy as np
import pytest

from newllm.data import load_corpus, tokenise
from newllm.errors import UserError
from newllm.tokenizer import EOS, UNKNOWN, Tokenizer, load_tokenizer, train_tokenizer

TEXT = "the cat sat on the mat, the cat ran to the man.\nthen the rat sat on the cat.\n" * 4
HARD = [
    "",
    " ",
    "\n\n \t\r\n",
    "naïve café — “quotes”, 東京, 😀👩‍👩‍👧, \u0301combining",
    "".join(map(chr, range(1, 256))),
    "\ufffd and \U0010ffff and \x7f",
    EOS + " is text here, " + UNKNOWN + " too",
    "a" * 3000,
]


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer("bpe", [TEXT], 300)


@pytest.fixture(scope="module")
def words():
    return train_tokenizer("word", [TEXT], None)


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_bpe_gives_back_any_text(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.eos_id not in ids
    assert all(0 <= index < bpe.vocab_size for index in ids)


def test_bpe_merges_what_is_frequent(bpe):
    assert 257 < bpe.vocab_size <= 300
    assert len(bpe.encode("the cat")) < len("the cat")


def test_bpe_documents_end_in_eos_and_only_there(bpe):
    first, second = bpe.encode_documents(["one\ntwo\n", EOS])
    assert first[-1] == second[-1] == bpe.eos_id
    assert first.count(bpe.eos_id) == second.count(bpe.eos_id) == 1
    assert bpe.decode(first) == "one\ntwo\n\n"


def test_stream_holds_back_a_character_until_its_last_byte(bpe):
    ids = bpe.encode("x€😀")  # never seen in training: one token a byte
    stream = bpe.stream()
    pieces = [stream.push(index) for index in ids]
    assert pieces == ["x", "", "", "€", "", "", "", "😀"]
    assert stream.close() == ""


def test_stream_shows_bytes_that_are_no_character(bpe):
    start, *_ = bpe.encode("😀")
    stream = bpe.stream()
    assert stream.push(start) == ""
    assert stream.push(bpe.encode("a")[0]) == "\ufffda"
    assert stream.push(start) + stream.close() == "\ufffd"
    assert bpe.decode([start, start]) == "\ufffd\ufffd"


def test_every_token_decodes_alone_as_in_a_text(bpe):
    ids = bpe.encode(TEXT)
    stream = bpe.stream()
    assert "".join(map(stream.push, ids)) + stream.close() == TEXT


def test_words_every_line_ends_in_eos(words):
    (ids,) = words.encode_documents(["the cat \n\nsat"])
    tokens = [words.inner.id_to_token(index) for index in ids]
    assert tokens == ["the", "cat", EOS, EOS, "sat", EOS]
    assert words.decode(ids) == "the cat \n\nsat \n"


def test_words_come_most_frequent_first_and_rare_ones_are_unknown(words):
    assert words.inner.id_to_token(0) == EOS
    assert words.inner.id_to_token(1) == UNKNOWN
    assert words.inner.id_to_token(2) == "the"
    assert train_tokenizer("word", ["a a a b b c"], None).vocab_size == 4  # c occurs once: unknown
    assert train_tokenizer("word", ["a a a b b c <unk>"], None).vocab_size == 5  # a text that marks its own keeps all
    cut = train_tokenizer("word", ["a a a b b c c"], 3)
    assert cut.vocab_size == 3
    assert cut.encode("a b a") == [2, 1, 2]


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_saved_and_loaded_it_is_the_same(tmp_path, kind):
    tokenizer = train_tokenizer(kind, [TEXT], None)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert (again.kind, again.vocab_size, again.eos_id) == (kind, tokenizer.vocab_size, tokenizer.eos_id)
    text = TEXT + " new words, ünïcode <eos>\n"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.encode_documents([text, "b"]) == tokenizer.encode_documents([text, "b"])


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_training_is_deterministic(kind):
    assert train_tokenizer(kind, [TEXT], 280).to_json() == train_tokenizer(kind, [TEXT], 280).to_json()


@pytest.mark.parametrize(
    ("kind", "size", "said"),
    [
        ("bpe", 256, "at least 257"),
        ("word", 1, "at least 2"),
        ("bpe", 10**12, "16777216"),  # the library would allocate for it, and abort the process
        ("char", None, "no tokenizer 'char'"),
    ],
)
def test_impossible_vocabularies(kind, size, said):
    with pytest.raises(UserError, match=said):
        train_tokenizer(kind, [TEXT], size)


def test_damaged_and_foreign_files(tmp_path, bpe, words):
    path = tmp_path / "tokenizer.json"
    for data, said in [
        (b"", "cut short or damaged"),
        (bpe.to_json().encode()[:1000], "cut short or damaged"),
        (b"{}", "cut short or damaged"),
        (b"\xff\xfe", "cut short or damaged"),
        (words.to_json().replace(EOS, "<end>").encode(), "without the token <eos>"),
        (bpe.to_json().replace('"\\u0120', '"\u4e00').replace('"Ġ', '"\u4e00').encode(), "not byte-level|damaged"),
    ]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=said) as caught:
            load_tokenizer(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        load_tokenizer(tmp_path / "none.json")


def test_ids_with_gaps_are_refused(words):
    stored = json.loads(words.to_json())
    stored["model"]["vocab"]["the"] = 999
    from tokenizers import Tokenizer as Inner

    with pytest.raises(UserError, match="gaps"):
        Tokenizer(Inner.from_str(json.dumps(stored)))


def test_wikitext_2_has_the_counts_of_the_benchmark(shared_data):
    folder = shared_data / "wikitext-2"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/wikitext-2")
    corpus = load_corpus(str(folder))
    assert corpus.standard_split
    tokenizer = train_tokenizer("word", corpus.splits["train"], None)
    assert tokenizer.vocab_size == 33278
    counts = {split: tokenise(documents, tokenizer).size for split, documents in corpus.splits.items()}
    assert counts == {"train": 2_088_628, "valid": 217_646, "test": 245_569}
    valid = tokenise(corpus.splits["valid"], tokenizer)
    assert valid.dtype == np.uint16
    assert (valid == tokenizer.eos_id).sum() == corpus.splits["valid"][0].count("\n")
