"""A text that was tokenised once: for many runs, or for a machine whose time is dear.

    prepared.json    name, whether it came divided, and per split the number and checksum of its tokens
    tokenizer.json   in the format of the `tokenizers` library
    <split>.npy      token ids (n,) uint16 or uint32

`newllm prepare` writes such a folder, `--data` takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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


def save_prepared(folder: Path, prepared: Prepared) -> None:
    """Write the folder, its index last: without it, it is none. Raises UserError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {os_reason(error)}") from error
    checkpoint.write_text(folder / "tokenizer.json", prepared.tokenizer.to_json())
    for split, tokens in prepared.tokens.items():
        with checkpoint.atomic_write(folder / f"{split}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, tokens)
    splits = {split: fingerprint(tokens) for split, tokens in prepared.tokens.items()}
    index = {"name": prepared.name, "standard_split": prepared.standard_split, "splits": splits}
    checkpoint.write_json(folder / INDEX, index)


def load_prepared(folder: Path) -> Prepared:
    """Read what `save_prepared` wrote. Raises UserError naming the file that is missing, damaged or another one's."""
    index = checkpoint.read_json(folder / INDEX)
    name, standard_split, splits = (index.get(key) for key in ("name", "standard_split", "splits"))
    well_formed = isinstance(name, str) and isinstance(standard_split, bool) and isinstance(splits, dict)
    if not well_formed or not {"train", "valid"} <= splits.keys():
        raise UserError(f"{folder / INDEX}: not the index of a prepared text")
    tokens = {}
    for split, wanted in splits.items():
        file = folder / f"{split}.npy"
        try:
            tokens[split] = np.load(file, allow_pickle=False)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({os_reason(error)})") from error
        except (ValueError, EOFError) as error:
            raise UserError(f"{file}: not a readable array, cut short or damaged ({one_line(error)})") from error
        if fingerprint(tokens[split]) != wanted:
            raise UserError(f"{file}: not the tokens that {INDEX} tells of; prepare the text again")
    return Prepared(name, standard_split, load_tokenizer(folder / "tokenizer.json"), tokens)
