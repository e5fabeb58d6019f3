"""Readers: every format, plain and compressed, gives the same documents; every kind of damage is one line that names it."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import sys

import pytest

from newllm.errors import UserError
from newllm.readers import file_type, read_documents

DOCUMENTS = ["Erste Zeile, ä€😀.\nZweite.\n", "Another document."]


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parquet(columns):
    pa = pytest.importorskip("pyarrow", reason="reading .parquet is the extra `parquet`")
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def content(kind):
    """The bytes of DOCUMENTS as a file of that kind, and the documents to be read from it."""
    if kind == ".txt":
        return DOCUMENTS[0].encode(), DOCUMENTS[:1]
    if kind == ".jsonl":
        return jsonl({"text": text, "other": 1} for text in DOCUMENTS), DOCUMENTS
    if kind == ".json":
        return json.dumps([{"text": DOCUMENTS[0]}, DOCUMENTS[1]]).encode(), DOCUMENTS
    return parquet({"text": DOCUMENTS}), DOCUMENTS


PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".parquet"])
def test_every_format_plain_and_compressed(tmp_path, kind, packing):
    data, want = content(kind)
    path = tmp_path / f"file{kind}{packing}".upper()  # suffixes count in any case
    path.write_bytes(PACK[packing](data))
    assert list(read_documents(path)) == want


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", ".txt"),
        ("a.b.jsonl.xz", ".jsonl"),
        ("a.PARQUET", ".parquet"),
        ("a.gz", None),
        ("a.csv", None),
        ("txt", None),
        ("a.txt.gz.gz", None),
    ],
)
def test_file_type(tmp_path, name, kind):
    assert file_type(tmp_path / name) == kind


def test_line_ends_and_byte_order_marks_are_dropped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert list(read_documents(path)) == ["one\ntwo\n"]


def test_blank_lines_and_blank_documents_are_skipped_and_another_field_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"body": "one"}, {"body": "  \n"}]) + b"\n  \n" + jsonl([{"body": "two"}]))
    assert list(read_documents(path, "body")) == ["one", "two"]


def test_rows_of_parquet_that_are_null_are_skipped(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet({"text": ["one", None, "two"]}))
    assert list(read_documents(tmp_path / "a.parquet")) == ["one", "two"]


def error_of(path, field="text"):
    with pytest.raises(UserError) as caught:
        list(read_documents(path, field))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


GOOD = jsonl([{"text": "one"}, {"text": "two"}])
LATIN = "Zeile\nStraße\n".encode("latin-1")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.json", b"[]", "holds no text"),
        ("a.txt", b"line\n\x89PNG\0\0", "line 2: binary data"),
        ("a.txt", "text".encode("utf-16"), "line 1: binary data"),
        ("a.txt", LATIN, "line 2: not UTF-8 text \\(byte 0xdf"),
        ("a.txt", "ä".encode()[:1], "line 1: not UTF-8"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "line 3: not UTF-8"),
        ("a.jsonl", GOOD[:-6], "line 2: not valid JSON.*cut short"),
        ("a.jsonl", b"not json\n" + GOOD, "line 1: not valid JSON"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1: not valid JSON"),
        ("a.jsonl", b"9" * 10_000 + b"\n", "line 1: not valid JSON"),
        ("a.jsonl", b'{"title": "x"}\n', "line 1: no field 'text', it has 'title'.*--text-field"),
        ("a.jsonl", b"{}\n", "line 1: no field 'text', it has nothing"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' is a JSON int"),
        ("a.jsonl", b'{"text": null}\n', "line 1: field 'text' is a JSON NoneType"),
        ("a.jsonl", b"3\n", "line 1: a JSON int; wanted an object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1.*half a surrogate"),
        ("a.jsonl", b'"a\\u0000b"\n', "line 1.*binary"),
        ("a.json", b'[{"text": "one"}, {"te', "line 1, column 20: not valid JSON.*cut short"),
        ("a.json", b'{"text": "one"}', "holds a JSON dict; wanted a list"),
        ("a.json", b'["one", "\\udc80"]', "record 2.*surrogate"),
        ("a.json", b"[" * 100_000, "cannot be read"),
        ("a.json", b"[" + b"9" * 10_000 + b"]", "cannot be read"),
        ("a.txt.gz", b"not gzip at all", "cannot be decompressed"),
        ("a.txt.xz", b"not xz at all", "cannot be decompressed"),
        ("a.txt.gz", gzip.compress(b"words " * 999, mtime=0)[:-20], "cannot be decompressed, cut short"),
        ("a.txt.xz", lzma.compress(b"words " * 999)[:-20], "cannot be decompressed, cut short"),
        ("a.txt.gz", gzip.compress(b"words " * 999, mtime=0)[:-8] + b"\0" * 8, "cannot be decompressed"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "holds no text"),
        ("a.txt.gz", b"", "holds no text"),
        ("a.txt.xz", b"", "cut short|holds no text"),
        ("a.parquet", b"", "cut short or damaged"),
        ("a.parquet", b"PAR1 and no more", "cut short or damaged"),
        ("a.csv", b"text\nwords\n", "unknown type of file; wanted one of .txt"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, name, data, said):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="reading .parquet is the extra `parquet`")
    path = tmp_path / name
    path.write_bytes(data)
    assert re.search(said, error_of(path))


def test_damaged_parquet_of_every_length(tmp_path):
    whole = parquet({"text": DOCUMENTS * 50})
    path = tmp_path / "a.parquet"
    for length in range(4, len(whole), 97):
        path.write_bytes(whole[:length])
        assert "cut short or damaged" in error_of(path)


def test_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet({"body": ["one"], "number": [0], "raw": [b"x"]}))
    assert "no column 'text', it has 'body', 'number', 'raw'" in error_of(path)
    assert "'number' is a JSON int" in error_of(path, "number")  # 0 is no missing text
    assert "'raw' is a JSON bytes" in error_of(path, "raw")


def test_parquet_without_pyarrow_says_which_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install" in error_of(tmp_path / "a.parquet")


def test_files_that_are_not_there_or_are_folders(tmp_path):
    assert "No such file" in error_of(tmp_path / "a.txt")
    (tmp_path / "b.txt").mkdir()
    assert "Is a directory" in error_of(tmp_path / "b.txt")


def test_what_was_whole_before_the_damage_is_yielded_first(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{")
    documents = read_documents(tmp_path / "a.jsonl")
    assert [next(documents), next(documents)] == ["one", "two"]
    with pytest.raises(UserError, match="line 3"):
        next(documents)


def test_books_are_read_compressed(shared_data):
    path = shared_data / "books" / "valid.jsonl.xz"
    if not path.exists():
        pytest.skip(f"needs {path.name} of the books")
    documents = list(read_documents(path))
    assert len(documents) == 12
    assert sum(map(len, documents)) == pytest.approx(5.4e6, rel=0.01)  # the figure of the README, rounded
