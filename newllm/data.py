"""From a --data argument to the tokens of a training step.

    load_corpus("builtin" | "hub:NAME" | file | folder) -> Corpus: documents of the splits train, valid and perhaps test
    tokenise(documents, tokenizer)                      -> one flat array of token ids
    Streams(tokens, B, T, seed)                         -> B parallel streams of text, T tokens a segment

Nothing is cached on disk: a corpus is read and tokenised anew for every run.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from newllm.errors import UserError, one_line, typed_path
from newllm.readers import COMPRESSIONS, READERS, file_type, read_documents
from newllm.tokenizer import Tokenizer

VALID_FRACTION = 0.1  # of the characters, where the corpus has no split of its own
SPLIT_NAMES = {
    "train": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
_SPLIT_FILE = re.compile(rf"({'|'.join(SPLIT_NAMES)})[.-]", re.IGNORECASE)  # train.txt, train-00000-of-00008.parquet


@dataclass
class Corpus:
    """Documents by split. `standard_split` says whether the corpus came divided or was divided here."""

    name: str
    splits: dict[str, list[str]]
    standard_split: bool

    def documents(self) -> list[str]:
        """All of it, whatever the split."""
        return [document for documents in self.splits.values() for document in documents]


def load_corpus(spec: str, text_field: str = "text") -> Corpus:
    """Read what `--data` names. Raises UserError naming the file (and line) that cannot be used."""
    if spec == "builtin":
        return _divided("builtin", builtin_documents())
    if spec.startswith("hub:"):
        return _load_hub(spec, text_field)
    path = typed_path(spec)
    if path.is_dir():
        return _load_folder(path, text_field)
    if not path.exists():
        raise UserError(f"--data {spec}: no such file or folder; a named corpus is 'builtin' or 'hub:NAME'")
    return _divided(str(path), list(read_documents(path, text_field)))


def builtin_documents() -> list[str]:
    """The Python Language Reference as it ships in CPython (`pydoc_data.topics`), one document a topic.

    Topics quote each other's paragraphs at length: those that stood in an earlier topic are left out, or the
    validation documents would have been read in training.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for text in topics.values():
        kept = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) < 40 or words not in seen:
                kept.append(paragraph)
            seen.add(words)
        documents.append("\n\n".join(kept).strip() + "\n")
    return documents


def _load_folder(folder: Path, text_field: str) -> Corpus:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and file_type(path) is not None)
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise UserError(f"{folder}: holds no file of type {', '.join(READERS)} (also {', '.join(COMPRESSIONS)})")
    by_split: dict[str, list[Path]] = {}
    for path in files:
        match = _SPLIT_FILE.match(path.name) if path.parent == folder else None
        if match:
            by_split.setdefault(SPLIT_NAMES[match[1].lower()], []).append(path)

    def read(paths: list[Path]) -> list[str]:
        return [document for path in paths for document in read_documents(path, text_field)]

    if "train" in by_split and len(by_split) > 1:
        return _split_corpus(str(folder), {name: read(paths) for name, paths in by_split.items()})
    return _divided(str(folder), read(files))


def _split_corpus(name: str, by_split: dict[str, list[str]]) -> Corpus:
    """A corpus that came divided. Where it has train and test alone, validation comes out of train: test stays unseen."""
    if "valid" not in by_split:
        by_split = by_split | _divided(name, by_split["train"]).splits
    splits = {split: by_split[split] for split in ("train", "valid", "test") if split in by_split}
    return Corpus(name, splits, standard_split=True)


def _load_hub(spec: str, text_field: str) -> Corpus:
    """`hub:NAME` or `hub:NAME:CONFIGURATION`, downloaded by the `datasets` library."""
    name, _, configuration = spec.removeprefix("hub:").partition(":")
    if not name:
        raise UserError("--data hub: names no data set; wanted hub:NAME or hub:NAME:CONFIGURATION")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            f'--data {spec}: needs the datasets library; install the extra "hub": pip install -e ".[hub]"'
        ) from error
    try:
        found = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the library lets every failure of network, name and format through as it is
        raise UserError(f"--data {spec}: the datasets library could not load it ({one_line(error)})") from error
    by_split: dict[str, list[str]] = {}
    for split, rows in found.items():
        if text_field not in rows.column_names:
            has = ", ".join(map(repr, rows.column_names))
            raise UserError(f"--data {spec}: no column {text_field!r}, it has {has}; name it with --text-field")
        texts = [row for row in rows[text_field] if row is not None]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"--data {spec}: column {text_field!r} does not hold text; name another with --text-field")
        # Splits by other names ("unsupervised") are training text too.
        by_split.setdefault(SPLIT_NAMES.get(split, "train"), []).extend(text for text in texts if text.strip())
    if "train" in by_split and len(by_split) > 1:
        return _split_corpus(spec, by_split)
    return _divided(spec, [document for documents in by_split.values() for document in documents])


def _divided(name: str, documents: list[str]) -> Corpus:
    """Set VALID_FRACTION of the characters aside for validation: whole documents where they can be had.

    Documents are drawn in the order of their hashes, so the choice depends on nothing but the texts. Where documents are
    too few or too long for that, validation is the end of every one of them.
    """
    budget = VALID_FRACTION * sum(map(len, documents))
    valid: list[int] = []
    taken = 0
    for index in sorted(range(len(documents)), key=lambda i: hashlib.sha256(documents[i].encode()).digest()):
        if taken < 0.8 * budget and taken + len(documents[index]) <= budget:
            valid.append(index)
            taken += len(documents[index])
    if taken >= 0.8 * budget and len(valid) < len(documents):
        chosen = set(valid)
        train = [document for index, document in enumerate(documents) if index not in chosen]
        return Corpus(
            name, {"train": train, "valid": [documents[index] for index in sorted(valid)]}, standard_split=False
        )
    cuts = [_border(document) for document in documents]
    splits = {
        "train": [document[:cut] for document, cut in zip(documents, cuts, strict=True) if cut > 0],
        "valid": [document[cut:] for document, cut in zip(documents, cuts, strict=True) if cut < len(document)],
    }
    if not splits["train"] or not splits["valid"]:
        raise UserError(
            f"{name}: too little text ({sum(map(len, documents))} characters) to divide into training and validation"
        )
    return Corpus(name, splits, standard_split=False)


def _border(document: str) -> int:
    """Where the training part of a document ends: after a line, or else a word, near 1 - VALID_FRACTION of it."""
    target = round((1 - VALID_FRACTION) * len(document))
    for separator in ("\n", " "):
        cut = document.rfind(separator, 0, target) + 1
        if cut > 0.5 * len(document):
            return cut
    return target


def tokenise(documents: Iterable[str], tokenizer: Tokenizer, progress: str | None = None) -> np.ndarray:
    """All documents as one array of token ids, each document closed as the tokenizer closes it: uint16 where the
    vocabulary allows, else uint32. `progress` labels a progress bar."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    documents = list(documents)
    pieces = [np.empty(0, dtype)]
    with tqdm(
        total=sum(map(len, documents)), desc=progress, unit="char", unit_scale=True, leave=False,
        disable=None if progress else True,
    ) as bar:  # fmt: skip
        for start in range(0, len(documents), 64):  # bounds what the tokenizer holds beside its result
            group = documents[start : start + 64]
            pieces.extend(np.array(ids, dtype) for ids in tokenizer.encode_documents(group))
            bar.update(sum(map(len, group)))
    return np.concatenate(pieces)


def fingerprint(tokens: np.ndarray) -> str:
    """Tells whether two runs read the same tokens: their number and checksum."""
    return f"{tokens.size}-{zlib.crc32(np.ascontiguousarray(tokens).tobytes()):08x}"


class Segment(NamedTuple):
    """Where the next piece of every stream lies: `length` tokens from `offset` on; `fresh`: streams start anew here."""

    offset: int
    length: int
    fresh: bool


class Streams:
    """B streams of text side by side, cut into consecutive segments of T tokens: what truncated backpropagation reads.

    Stream b starts L = n // B tokens after stream b - 1, so that over one epoch the B rows of the batch read every token
    once, and the context at the end of a row's segment is the context its next segment starts from. Each epoch starts
    at another place of the text (drawn from `seed` and the epoch), so that segment borders move. With `random` they move
    within the epoch too: lengths are drawn from T/2 (one in twenty), 7T/8, T and 9T/8, few enough to capture a CUDA graph
    of each.

    The tokens lie on `device` as a whole, so that a step copies nothing. The position is two integers, `epoch` and
    `segment`; `state_dict` saves them.
    """

    def __init__(
        self, tokens: np.ndarray, batch_size: int, segment: int, seed: int, *, random: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        length = tokens.size // batch_size
        if length < segment + 1:
            raise UserError(
                f"the training text has {tokens.size} tokens, too few for --batch-size {batch_size} streams of --segment {segment}"
                f" (wanted at least {batch_size * (segment + 1)}); lower one of them or give more text"
            )
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self.T, self.seed, self.random = segment, seed, random
        self.starts = torch.arange(batch_size, device=device)[:, None] * length  # (B, 1)
        self.length = length
        self.epoch = 0
        self.segment = 0
        self._borders = self._plan()

    @property
    def segments_per_epoch(self) -> int:
        """Of the present epoch."""
        return len(self._borders) - 1

    def _plan(self) -> list[int]:
        """Borders of the segments of this epoch, from 0 on; what is left after the last would be too short."""
        if not self.random:
            return list(range(0, self.length + 1, self.T))
        draw = np.random.default_rng((self.seed, self.epoch, 1))
        half, eighth = max(1, self.T // 2), self.T // 8
        borders = [0]
        while True:
            full = self.T + eighth * int(draw.integers(-1, 2))
            length = half if draw.random() < 0.05 else full
            if borders[-1] + length > self.length:
                break
            borders.append(borders[-1] + length)
        return borders if len(borders) > 1 else [0, self.T]

    def next(self) -> Segment:
        """The next segment; `window` reads it."""
        if self.segment == self.segments_per_epoch:
            self.epoch, self.segment = self.epoch + 1, 0
            self._borders = self._plan()
        start, stop = self._borders[self.segment : self.segment + 2]
        segment = Segment(self._shift() + start, stop - start, self.segment == 0)
        self.segment += 1
        return segment

    def window(self, offset: int | Tensor, length: int) -> tuple[Tensor, Tensor]:
        """inputs (B, length) int64, targets (B, length) int64, the inputs one token on. Offset: of a `Segment`, as an
        integer or as a tensor () on the device."""
        window = self.tokens[self.positions(offset, length + 1)].long()  # (B, length + 1)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def positions(self, offset: int | Tensor, length: int) -> Tensor:
        """Where in the text the tokens stand that every stream reads from `offset` on: (B, length) int64."""
        ahead = torch.arange(length, device=self.starts.device)
        return (self.starts + offset + ahead) % self.tokens.numel()

    def _shift(self) -> int:
        draw = np.random.default_rng((self.seed, self.epoch))
        return int(draw.integers(self.tokens.numel())) if self.epoch else 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "segment": self.segment}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.segment = state["epoch"], state["segment"]
        self._borders = self._plan()


def evaluation_segments(tokens: np.ndarray, segment: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens as one stream, in order: inputs (1, T), targets (1, T) int64, the last pair shorter."""
    stream = torch.from_numpy(tokens.astype(np.int64))[None]  # (1, n)
    for start in range(0, tokens.size - 1, segment):
        stop = min(start + segment, tokens.size - 1)
        yield stream[:, start:stop], stream[:, start + 1 : stop + 1]
