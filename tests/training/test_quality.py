"""Figures of texts whose answers can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from newllm import quality
from newllm.errors import UserError
from newllm.judge import HUMAN, Sampling, choose_prompts, table
from newllm.tokenizer import train_tokenizer


def test_variety_and_repetition_by_hand():
    items = ["a", "b", "a", "b", "a", "b", "c"]
    assert quality.distinct(items, 1) == pytest.approx(3 / 7)
    assert quality.distinct(items, 2) == pytest.approx(3 / 6)  # ab ba bc
    assert quality.distinct(items, 8) is None
    assert quality.repeated(items, 2) == pytest.approx(3 / 6)  # the second and third ab, the second ba
    assert quality.repeated(items, 2, window=1) == 0
    assert quality.longest_repeat(items) == 4  # abab, overlapping
    assert quality.longest_repeat(list("abc")) == 0
    assert quality.longest_repeat([]) == 0
    far = [*"abcd", *map(str, range(99)), *"abcd"]
    assert quality.repeated(far, 4) == 0  # 103 words on
    assert quality.repeated(far[:50] + far[-4:], 4) == pytest.approx(1 / 51)


@pytest.mark.parametrize("seed", range(3))
def test_the_longest_repeat_is_that_of_a_slow_search(seed):
    items = [str(n) for n in np.random.default_rng(seed).integers(3, size=40)]
    spans = [b - a for a in range(40) for b in range(a + 1, 41) for c in range(a + 1, 40 - (b - a) + 1)
             if items[a:b] == items[c : c + b - a]]  # fmt: skip
    assert quality.longest_repeat(items) == max(spans)


def test_names_are_capitals_within_sentences():
    text = (
        'Then old Fenn met Mr. Kay, and I said "Well" to Fenn\'s\ndog. The Dog ran. Kay did not. Fenn wept.\n\n'
        "The house of Walton stood; Nobody saw it, and I'm sure Will will."
    )
    found = quality.mentions(text)
    at = quality.words(text).index
    assert found.keys() == {"Fenn", "Kay", "Walton"}  # not Mr, Well, Dog, The, Nobody, I'm, Will
    assert found["Fenn"][0] == at("Fenn")
    assert len(found["Fenn"]) == 3
    assert found["Kay"] == [at("Kay"), at("Kay") + 11]
    names = quality.names_introduced(text, "It was Walton's day.")
    assert (names.introduced, names.again, names.longest) == (2, 1.0, found["Fenn"][-1] - found["Fenn"][0])
    assert names.span == pytest.approx((names.longest + 11) / 2)
    assert quality.names_introduced("nothing here", "") == quality.Names(0, None, None, 0)


def test_word_level_texts_read_as_written():
    text = "He did n't see the 1 @,@ 000 well @-@ known ( old ) men , \" he said . \" It 's\nEnd ."
    assert quality.readable(text, "word") == "He didn't see the 1,000 well-known (old) men, \"he said.\" It's\n\nEnd."
    assert quality.readable(text, "bpe") == text


def test_figures_take_faults_from_the_checker_they_are_given():
    row = quality.figures("Four words stand here.", "", lambda text: 2)
    assert (row["words"], row["faults"], row["distinct_1"]) == (4, 500, 1)
    assert quality.figures("...", "", lambda text: 2)["faults"] is None
    assert quality.figures("Four words stand here.", "", None)["faults"] is None


def test_grammar_checker_finds_faults_or_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "harper", None)
    assert quality.grammar_checker() is None
    with pytest.raises(UserError, match=r"--grammar: needs the extra"):
        quality.grammar_checker(required=True)


def test_harper_counts_faults_and_not_names():
    pytest.importorskip("harper", reason='the extra "judge" is not installed')
    faults = quality.grammar_checker(required=True)
    assert faults("Fenn and Kayite sat by the river, and the dog slept.") == 0
    assert faults("He go to the the store. An dog were here.") >= 3


def test_prompts_begin_lines_and_are_followed_by_what_follows():
    documents = [f"line {n} is here\n" * 3 for n in range(60)]
    tokenizer = train_tokenizer("bpe", documents, 280)
    tokens = np.concatenate([np.array(ids) for ids in tokenizer.encode_documents(documents)])
    how = Sampling(samples=7, prompt_tokens=6, tokens=20)
    prompts, human = choose_prompts(tokens, tokenizer, how)
    assert (prompts.shape, human.shape) == ((7, 6), (7, 20))
    for prompt, rest in zip(prompts, human, strict=True):
        whole = np.concatenate((prompt, rest))
        places = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(tokens, whole.size) == whole).all(1))
        assert places.size
        assert tokenizer.decode(whole.tolist()).lstrip("\n").startswith("line")
    with pytest.raises(UserError, match="too few for --samples 7"):
        choose_prompts(tokens[:30], tokenizer, how)


def test_a_table_lines_up_and_leaves_out_what_nobody_has():
    one = {"mean": 0.5, "error": 0.01, "texts": 2}
    lone = {"mean": 2.0, "error": None, "texts": 1}
    keys = {"distinct_1": one} | dict.fromkeys(("distinct_2", "distinct_3", "repeated", "longest_repeat", "names",
            "names_again", "names_span", "names_longest", "faults", "words"))  # fmt: skip
    result = {"figures": {HUMAN: keys, "ours": keys | {"faults": lone}},
              "perplexity": {HUMAN: {"ours": lone}, "ours": {"ours": one}}}  # fmt: skip
    lines = table(result).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "perplexity to ours", "distinct words", "faults of grammar per 1,000 words",
    ]  # fmt: skip
    assert "0.500 ± 0.010" in lines[3]
    assert lines[4].split("|")[2].strip() == "-"
