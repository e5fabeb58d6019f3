"""Figures of a text that need no person to read it: variety, repetition, names that keep being mentioned, faults of grammar.

All of them are of one text, in words; `newllm judge` takes their means over many, beside the same figures of human text.
Texts that are compared should be equally long: variety falls with length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from newllm.errors import UserError

WINDOW = 100  # words back that a repetition is looked for in
REPEATED = 4  # words of an n-gram that counts as repeated: shorter ones recur in any text
TITLES = {"Mr", "Mrs", "Ms", "Dr", "St", "Messrs", "Mme", "Mlle"}  # a full stop after them ends no sentence

# What Harper calls its findings, of those that are faults whatever the style: not spelling (it knows no names), not
# capitals, typography, long sentences or the choice of words. Of 64,000 words of held-out books it finds 1.2 in 1,000,
# where words are moved out of place at 5% of the positions 4.1, of the words in random order 23.
FAULTS = {"Agreement", "Grammar", "Miscellaneous", "Repetition", "Usage"}

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_WITHIN = re.compile(r",?[ \t]*\n?[ \t]*")  # between two words of one sentence


def words(text: str) -> list[str]:
    return _WORD.findall(text)


def distinct(items: Sequence[str], n: int) -> float | None:
    """Share of different ones among the n-grams ("distinct-n", Li et al., 2016). None of a text without any."""
    grams = _grams(items, n)
    return len(set(grams)) / len(grams) if grams else None


def repeated(items: Sequence[str], n: int = REPEATED, window: int = WINDOW) -> float | None:
    """Share of n-grams that have occurred before, beginning at most `window` words ahead of them."""
    grams, last, again = _grams(items, n), {}, 0
    for place, gram in enumerate(grams):
        again += gram in last and place - last[gram] <= window
        last[gram] = place
    return again / len(grams) if grams else None


def longest_repeat(items: Sequence[str]) -> int:
    """Words of the longest span that stands in the text twice; the two may overlap."""
    low, high = 0, len(items)  # a span of `low` words recurs, one of `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        grams = _grams(items, middle)
        low, high = (middle, high) if len(set(grams)) < len(grams) else (low, middle)
    return low


def _grams(items: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(items[start : start + n]) for start in range(len(items) - n + 1)]


def mentions(text: str) -> dict[str, list[int]]:
    """Names of a text and where they stand, counted in words.

    A name is a word with a capital in the middle of a sentence, unless the text has it without one too; a possessive counts
    as the name. In a text of paragraphs, a single line break is a space.
    """
    found = list(_WORD.finditer(text))
    bases = [re.sub(r"['’]s$", "", match.group()) for match in found]
    lower = {base for base in bases if base.islower()}
    names: set[str] = set()
    for before, match, previous, base in zip(found, found[1:], bases, bases[1:], strict=False):
        gap = text[before.end() : match.start()]
        inside = _WITHIN.fullmatch(gap) or (previous in TITLES and _WITHIN.fullmatch(gap.removeprefix(".")))
        capital = base[0].isupper() and len(base) > 1 and not re.match(r"I['’]", base)
        if inside and capital and base.lower() not in lower and base not in TITLES:
            names.add(base)
    places: dict[str, list[int]] = {}
    for place, base in enumerate(bases):
        if base in names:
            places.setdefault(base, []).append(place)
    return places


@dataclass(frozen=True)
class Names:
    """Of the names that a text introduces: how many, what share comes again, words from first to last mention."""

    introduced: int
    again: float | None
    span: float | None
    longest: int


def names_introduced(text: str, prompt: str) -> Names:
    """The names of `text` that its prompt does not have."""
    known = {re.sub(r"['’]s$", "", word) for word in words(prompt)}
    places = [found for name, found in mentions(text).items() if name not in known]
    spans = [found[-1] - found[0] for found in places]
    if not places:
        return Names(0, None, None, 0)
    again = sum(len(found) > 1 for found in places)
    return Names(len(places), again / len(places), sum(spans) / len(spans), max(spans))


def figures(text: str, prompt: str, faults: Callable[[str], int] | None) -> dict[str, float | None]:
    """Every figure of one text, None where it has none. `faults`: of `grammar_checker`."""
    items = [word.lower() for word in words(text)]
    names = names_introduced(text, prompt)
    return {
        "words": len(items),
        "distinct_1": distinct(items, 1),
        "distinct_2": distinct(items, 2),
        "distinct_3": distinct(items, 3),
        "repeated": repeated(items),
        "longest_repeat": longest_repeat(items),
        "names": 100 * names.introduced / len(items) if items else None,
        "names_again": names.again,
        "names_span": names.span,
        "names_longest": names.longest,
        "faults": 1000 * faults(text) / len(items) if faults and items else None,
    }


def grammar_checker(required: bool = False) -> Callable[[str], int] | None:
    """text -> faults of grammar in it, by Harper (the extra "judge"); None without it, or UserError if `required`."""
    try:
        import harper
    except ModuleNotFoundError as error:
        if required:
            raise UserError('--grammar: needs the extra "judge": pip install -e ".[judge]"') from error
        return None
    linter, language = harper.Linter(), harper.Language.PLAINTEXT
    return lambda text: sum(lint.lint_kind in FAULTS for lint in linter.lint(text, language=language))


def readable(text: str, kind: str) -> str:
    """A decoded text as people write it. Word-level ones stand in WikiText's spacing, one line a paragraph."""
    if kind != "word":
        return text
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?%)\]]|n't\b|'(?:s|re|ve|ll|d|m)\b)", r"\1", text)
    text = re.sub(r"([(\[$£]) ", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) ?"', r'"\1"', text)
    return re.sub(r" *\n+ *", "\n\n", text)
