"""Reading documents out of files: .txt, .jsonl, .json and .parquet, each also compressed as .gz or .xz.

`read_documents(path)` yields one string per document, and stops with a UserError that names the file, and the line where
there is one, as soon as the file is not what its name says. Nothing is skipped in silence but blank lines and documents
of white space.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from newllm.errors import UserError, one_line, os_reason

COMPRESSIONS: dict[str, Callable[..., BinaryIO]] = {".gz": gzip.open, ".xz": lzma.open}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, UTF-8 cannot


def file_type(path: Path) -> str | None:
    """The suffix that decides the reader ("a.jsonl.xz" -> ".jsonl"), None where there is no reader for it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def read_documents(path: Path, text_field: str = "text") -> Iterator[str]:
    """Yield the documents of one file: a .txt is one document, the others hold one per record, in `text_field`.

    Raises UserError for a file that is missing, of unknown type, empty, binary, not UTF-8, cut short or damaged.
    """
    kind = file_type(path)
    if kind is None:
        known = ", ".join(READERS)
        raise UserError(
            f"{path}: unknown type of file; wanted one of {known}, also compressed ({', '.join(COMPRESSIONS)})"
        )
    found = False
    try:
        with COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb") as file:
            for document in READERS[kind](path, file, text_field):
                if document.strip():
                    found = True
                    yield document
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be decompressed, cut short or damaged ({one_line(error)})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os_reason(error)})") from error
    if not found:
        raise UserError(f"{path}: holds no text")


def decode(path: Path, data: bytes, first_line: int = 1) -> str:
    """UTF-8 bytes -> str (a byte order mark dropped, line ends as \\n); raises UserError naming file and line."""
    nul = data.find(b"\0")
    if nul >= 0:
        line = first_line + data.count(b"\n", 0, nul)
        raise UserError(f"{path}, line {line}: binary data (a zero byte), not text")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x}: {error.reason}); convert it to UTF-8"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _read_txt(path: Path, file: BinaryIO, text_field: str) -> Iterator[str]:
    yield decode(path, file.read())


def _read_jsonl(path: Path, file: BinaryIO, text_field: str) -> Iterator[str]:
    for number, raw in enumerate(file, start=1):
        line = decode(path, raw, number)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
            cut = "" if raw.endswith(b"\n") else "; the file ends within this line, it may be cut short"
            raise UserError(f"{path}, line {number}: not valid JSON ({one_line(error)}){cut}") from error
        yield _text_of(record, f"{path}, line {number}", text_field)


def _read_json(path: Path, file: BinaryIO, text_field: str) -> Iterator[str]:
    try:
        records = json.loads(decode(path, file.read()))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); the file may be cut short"
        ) from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, lists nested without end
        raise UserError(f"{path}: JSON that cannot be read ({one_line(error)})") from error
    if not isinstance(records, list):
        raise UserError(f"{path}: holds a JSON {type(records).__name__}; wanted a list of records with a text each")
    for number, record in enumerate(records, start=1):
        yield _text_of(record, f"{path}, record {number}", text_field)


def _text_of(record: object, place: str, text_field: str) -> str:
    if isinstance(record, str):
        return _sound(record, place)
    if not isinstance(record, dict):
        raise UserError(f"{place}: a JSON {type(record).__name__}; wanted an object with the field {text_field!r}")
    if text_field not in record:
        has = ", ".join(map(repr, record)) or "nothing"
        raise UserError(f"{place}: no field {text_field!r}, it has {has}; name the field with --text-field")
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f"{place}: field {text_field!r} is a JSON {type(text).__name__}; wanted a string")
    return _sound(text, f"{place}, field {text_field!r}")


def _sound(text: str, place: str) -> str:
    if "\0" in text or _LONE_SURROGATE.search(text):
        raise UserError(f"{place}: binary data (a zero byte or half a surrogate pair), not text")
    return text


def _read_parquet(path: Path, file: BinaryIO, text_field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(
            f'{path}: reading .parquet needs pyarrow; install the extra "parquet": pip install -e ".[parquet]"'
        ) from error
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()))
        names = table.schema_arrow.names
        if text_field not in names:
            raise UserError(
                f"{path}: no column {text_field!r}, it has {', '.join(map(repr, names))}; name it with --text-field"
            )
        for batch in table.iter_batches(columns=[text_field]):
            for row in batch.column(0):
                text = row.as_py()
                yield _text_of({text_field: "" if text is None else text}, str(path), text_field)
    except (pyarrow.ArrowException, OSError) as error:  # damage is reported as either
        raise UserError(f"{path}: not a readable parquet file, cut short or damaged ({one_line(error)})") from error


READERS: dict[str, Callable[[Path, BinaryIO, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
