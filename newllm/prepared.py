"""A text that was tokenised once: for many runs, or for a machine whose time is dear.

    prepared.json    name, whether it came divided, and per split the number and checksum of its tokens
    tokenizer.json   in the format of the `tokenizers` library
    <split>.npy      token ids (n,) uint16 or uint32; or <split>.npy.xz, the same compressed

`newllm prepare` writes such a folder, `--data` takes it.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from newllm import checkpoint
from newllm.data import fingerprint
from newllm.errors import UserError, one_line, os_reason
from newllm.tokenizer import Tokenizer, load_tokenizer

INDEX = "prepared.json"


@dataclass
class Prepared:
    name: str
    standard_split: bool
    tokenizer: Tokenizer
    tokens: dict[str, np.ndarray]


def is_prepared(path: Path) -> bool:
    return (path / INDEX).is_file()


def save_prepared(folder: Path, prepared: Prepared, *, compress: bool = False) -> None:
    """Write the folder, its index last: without it, it is none. `compress` packs the arrays with xz.
    Raises UserError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {os_reason(error)}") from error
    checkpoint.write_text(folder / "tokenizer.json", prepared.tokenizer.to_json())
    for split, tokens in prepared.tokens.items():
        name = f"{split}.npy.xz" if compress else f"{split}.npy"
        with checkpoint.atomic_write(folder / name) as temporary, _created(temporary, compress) as file:
            np.save(file, tokens)
    splits = {split: fingerprint(tokens) for split, tokens in prepared.tokens.items()}
    index = {"name": prepared.name, "standard_split": prepared.standard_split, "splits": splits}
    checkpoint.write_json(folder / INDEX, index)


def whole_documents(tokens: np.ndarray, eos_id: int, limit: int) -> np.ndarray:
    """The first of tokens (n,), at most `limit`, up to the end of a document. Raises UserError where none ends so soon."""
    if tokens.size <= limit:
        return tokens
    ends = np.flatnonzero(tokens[:limit] == eos_id)
    if not ends.size:
        raise UserError(f"--max-tokens {limit}: the first document of the training text is longer")
    return tokens[: ends[-1] + 1]


def _created(path: Path, compress: bool) -> BinaryIO:
    return lzma.open(path, "wb", preset=9) if compress else open(path, "wb")


def load_prepared(folder: Path) -> Prepared:
    """Read what `save_prepared` wrote. Raises UserError naming the file that is missing, damaged or another one's."""
    index = checkpoint.read_json(folder / INDEX)
    name, standard_split, splits = (index.get(key) for key in ("name", "standard_split", "splits"))
    well_formed = isinstance(name, str) and isinstance(standard_split, bool) and isinstance(splits, dict)
    if not well_formed or not {"train", "valid"} <= splits.keys():
        raise UserError(f"{folder / INDEX}: not the index of a prepared text")
    tokens = {}
    for split, wanted in splits.items():
        file, packed = folder / f"{split}.npy", folder / f"{split}.npy.xz"
        if packed.exists() and not file.exists():
            file = packed
        try:
            with (lzma.open if file is packed else open)(file, "rb") as array:
                tokens[split] = np.load(array, allow_pickle=False)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({os_reason(error)})") from error
        except (ValueError, EOFError, lzma.LZMAError) as error:
            raise UserError(f"{file}: not a readable array, cut short or damaged ({one_line(error)})") from error
        if fingerprint(tokens[split]) != wanted:
            raise UserError(f"{file}: not the tokens that {INDEX} tells of; prepare the text again")
    return Prepared(name, standard_split, load_tokenizer(folder / "tokenizer.json"), tokens)
