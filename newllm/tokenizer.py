"""Text to token ids and back: a byte-level BPE, and whole words as the WikiText benchmarks count them.

Both are `tokenizers.Tokenizer`s, saved as that library's JSON in `tokenizer.json` of the run folder, and both know one
special token, `<eos>`. A BPE document ends in `<eos>`; in a word-level text every line does.
"""

from __future__ import annotations

import codecs
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from newllm.errors import UserError, one_line, os_reason

EOS, UNKNOWN = "<eos>", "<unk>"
KINDS = ("bpe", "word")
MAX_VOCABULARY = 2**24  # the tokenizers library allocates for what it is asked, and aborts where that is too much


class Tokenizer:
    """One interface over both kinds: `encode`, `encode_documents`, `decode`, `stream`. `kind` is "bpe" or "word"."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """Raises UserError where `inner` is not a tokenizer that newllm made."""
        self.kind = {models.BPE: "bpe", models.WordLevel: "word"}.get(type(inner.model))
        if self.kind is None:
            raise UserError(
                f"a tokenizer of type {type(inner.model).__name__}; wanted a byte-level BPE or a word-level one"
            )
        if inner.token_to_id(EOS) is None:
            raise UserError(f"a tokenizer without the token {EOS}")
        inner.encode_special_tokens = True  # "<eos>" written in a text is five characters, not the end of it
        self.inner = inner
        self.vocab_size: int = inner.get_vocab_size()
        self.eos_id: int = inner.token_to_id(EOS)
        self._bytes = [self._bytes_of(inner.id_to_token(index)) for index in range(self.vocab_size)]
        self.byte_counts = np.array([len(token) for token in self._bytes])  # (V,) int64, of the decoded text

    def _bytes_of(self, token: str | None) -> bytes:
        if token is None:
            raise UserError("a tokenizer whose ids have gaps")
        if token == EOS:
            return b"\n"
        if self.kind == "word":
            return token.encode() + b" "
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:
            raise UserError(f"a BPE tokenizer that is not byte-level (token {token!r})") from None

    def spelling(self, index: int) -> str:
        """A token as it is written, a BPE token's space before it included; "" of `<eos>`, and of a word-level `<unk>`."""
        if index == self.eos_id or (self.kind == "word" and self.inner.id_to_token(index) == UNKNOWN):
            return ""
        if self.kind == "word":
            return self.inner.id_to_token(index)
        return self._bytes[index].decode(errors="backslashreplace")

    def encode(self, text: str) -> list[int]:
        """The text's tokens as they stand, nothing added."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_documents(self, documents: list[str]) -> list[list[int]]:
        """Token ids of every document, closed by `<eos>`: after the document (BPE), after its last line (word)."""
        if self.kind == "word":
            documents = [document if document.endswith("\n") else document + "\n" for document in documents]
        encoded = [encoding.ids for encoding in self.inner.encode_batch_fast(documents, add_special_tokens=False)]
        return encoded if self.kind == "word" else [[*ids, self.eos_id] for ids in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; `<eos>` reads as a line break, bytes that are no UTF-8 as U+FFFD."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.close()

    def stream(self) -> TokenStream:
        """A decoder that is fed one token at a time."""
        return TokenStream(self._bytes)

    def to_json(self) -> str:
        return self.inner.to_str(pretty=False)


class TokenStream:
    """Decodes token by token: a character whose bytes are spread over several tokens comes out with the last of them."""

    def __init__(self, token_bytes: list[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._token_bytes[token])

    def close(self) -> str:
        """What was left of an unfinished character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def train_tokenizer(kind: str, documents: Iterable[str], vocab_size: int | None) -> Tokenizer:
    """A tokenizer of `kind` fitted to the documents, of at most `vocab_size` tokens (None: all words; BPE: 2048)."""
    if vocab_size is not None and vocab_size > MAX_VOCABULARY:
        raise UserError(f"--vocab-size {vocab_size}: more than the {MAX_VOCABULARY} tokens that are supported")
    if kind == "bpe":
        return _train_bpe(documents, 2048 if vocab_size is None else vocab_size)
    if kind == "word":
        return _train_words(documents, vocab_size)
    raise UserError(f"no tokenizer {kind!r}; there are {', '.join(KINDS)}")


def _train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size}: a byte-level BPE needs at least 257 (every byte, and {EOS})")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # every byte: no text is unknown
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, min_frequency=2,
        show_progress=sys.stderr.isatty(),  # the library's bars draw into a file as well
    )  # fmt: skip
    inner.train_from_iterator(documents, trainer)
    return Tokenizer(inner)


def _train_words(documents: Iterable[str], vocab_size: int | None) -> Tokenizer:
    """Words between white space, most frequent first. A text that marks its rare words (WikiText) has `<unk>` itself;
    in any other, words that occur once become `<unk>`, or the model would never have seen it when it meets a new word."""
    if vocab_size is not None and vocab_size < 2:
        raise UserError(f"--vocab-size {vocab_size}: a word-level vocabulary needs at least 2 ({EOS} and {UNKNOWN})")
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(document.split())
    rare = 0 if UNKNOWN in counts else 1
    words = [word for word, count in counts.items() if count > rare and word not in (EOS, UNKNOWN)]
    words.sort(key=lambda word: (-counts[word], word))
    vocabulary = [EOS, UNKNOWN, *words][:vocab_size]
    inner = tokenizers.Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=UNKNOWN)
    )
    inner.normalizer = normalizers.Replace("\n", f" {EOS} ")
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(inner)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises UserError naming the file where it is missing, cut short, damaged or of another kind."""
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)  # its error says where the file breaks off; that of tokenizers does not
        return Tokenizer(tokenizers.Tokenizer.from_str(text))
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer ({os_reason(error)})") from error
    except UserError as error:
        raise UserError(f"{path}: not a newllm tokenizer: {error}") from error
    except Exception as error:  # tokenizers raises plain Exception for whatever it does not like
        raise UserError(f"{path}: not a readable tokenizer, cut short or damaged ({one_line(error)})") from error


def _byte_of_character() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE writes bytes as: printable Latin-1 stands for itself, the 68 other
    bytes for U+0100 onwards, in order (the table GPT-2 introduced)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
