"""Tables of what followed the last time: against dictionaries that are written token by token."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from configs import SMALL, VOCAB, WALK, make_model, make_tokens

from newllm import evaluation
from newllm.config import ModelConfig
from newllm.evaluation import calibrate, evaluate, token_losses
from newllm.generation import generate
from newllm.model import build_model
from newllm.model.common import Embedding, Mixing
from newllm.model.decoding import make_decoder
from newllm.model.recall import (
    DECAY,
    NONE,
    ORDERS,
    VISITS,
    WORDS,
    Recall,
    count,
    initial_tables,
    places,
    recall,
    recent_shares,
)


def tables(batch_size: int, entries: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    return initial_tables(batch_size, ModelConfig(vocab_size=2**17, recall=entries), device)


def by_hand(tokens: torch.Tensor, entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w (B, T, ORDERS, VISITS) and whether the last one was right (B, T, ORDERS), one token after the other."""
    words = torch.full((*tokens.shape, ORDERS, VISITS), NONE)
    right = torch.zeros(words.shape[:3], dtype=torch.bool)
    for b, row in enumerate(tokens.tolist()):
        tables = [{} for _ in range(ORDERS)]
        for t, token in enumerate(row):
            for n in range(1, ORDERS + 1):
                table = tables[n - 1]
                if t >= n:
                    slot, tag = slot_and_tag(row[t - n : t], entries)
                    right[b, t, n - 1] = words[b, t - 1, n - 1, 0] == token
                    table[slot] = [(tag, token), *table.get(slot, [])][:VISITS]
                if t + 1 >= n:
                    slot, tag = slot_and_tag(row[t + 1 - n : t + 1], entries)
                    for k, (other, followed) in enumerate(table.get(slot, [])):
                        if other == tag:
                            words[b, t, n - 1, k] = followed
    return words, right


def slot_and_tag(place: list[int], entries: int) -> tuple[int, int]:
    """As MurmurHash3 finishes: in Python's integers, cut to 64 bits by hand."""
    mask = 2**64 - 1
    value = 0
    for token in reversed(place):
        value = (value + token + 1) * 0x9E3779B97F4A7C15 & mask
    high = value >> 32
    if value >> 63:  # PyTorch shifts the sign in
        high |= 0xFFFFFFFF << 32
    value = (value ^ high) * 0xFF51AFD7ED558CCD & mask
    return (value >> 32 & 2**31 - 1) % entries, value >> 16 & 2**14 - 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("entries", [1, 7, 64, 4097])
@pytest.mark.parametrize("vocab", [2, 50])
def test_tables_are_what_dictionaries_hold_however_the_text_is_cut(vocab, entries, device):
    T = 150
    tokens = torch.randint(vocab, (3, T), generator=torch.Generator().manual_seed(entries))
    want = by_hand(tokens, entries)
    assert (want[0] != NONE).any()
    for sizes in ([T], [1] * T, [7, 1, 33, T - 41]):
        state, got = tables(3, entries, device), []
        for piece in tokens.to(device).split(sizes, dim=1):
            words, right, state = recall(piece, state)
            got.append((words.cpu(), right.cpu()))
        for one, other in zip(zip(*got, strict=True), want, strict=True):
            assert torch.equal(torch.cat(one, dim=1), other)


def test_a_phrase_is_recalled_after_one_two_and_three_of_its_tokens():
    phrase = [11, 5, 7, 3, 2]
    tokens = torch.tensor([[*phrase, 20, 21, *phrase]])
    words, right, _ = recall(tokens, tables(1, 1000))
    assert (words[..., 1:] == NONE).all()  # nothing came twice before
    words = words[..., 0]
    assert words[0, 7].tolist() == [5, NONE, NONE]  # after the first token of it, again
    assert words[0, 8].tolist() == [7, 7, NONE]
    assert words[0, 9].tolist() == [3, 3, 3]
    assert right[0, 9].tolist() == [True, True, False]
    assert right[0, 10].tolist() == [True, True, True]


def test_what_followed_last_comes_first():
    tokens = torch.tensor([[4, 1, 4, 2, 4, 2, 4, 3, 4, 5, 4]])
    words = recall(tokens, tables(1, 1000))[0][0, :, 0].tolist()
    assert [row[0] for row in words] == [NONE, NONE, 1, NONE, 2, 4, 2, NONE, 3, NONE, 5]
    assert words[6] == [2, 2, 1, NONE]
    assert words[10] == [5, 3, 2, 2]  # of five visits the last four


def test_places_spread_over_the_table():
    """All pairs of 100 tokens in a table of 997: a chi-squared of 996 degrees of freedom, within six standard deviations."""
    first, second = torch.meshgrid(torch.arange(100), torch.arange(100), indexing="ij")
    text = torch.stack((torch.full((10_000,), NONE), first.flatten(), second.flatten()), dim=1)
    slots, tags, known = places(text, 997)  # (10000, 3, 1)
    assert known[:, :2].all()
    assert not known[:, 2].any()
    assert (slots[:, 2] == 997).all()
    counts = torch.bincount(slots[:, 1, 0], minlength=997).double()
    expected = 10_000 / 997
    chi_squared = ((counts - expected).square() / expected).sum().item()
    assert abs(chi_squared - 996) < 6 * math.sqrt(2 * 996)
    assert len(tags[:, 1, 0].unique()) > 7_000  # of 16,384, 10,000 drawn: 7,490 are expected


def test_a_new_model_predicts_what_one_without_recall_does():
    config = ModelConfig(**SMALL, fnn_layers=0, recall=50)
    torch.manual_seed(0)
    model = build_model(config).eval()
    without = build_model(dataclasses.replace(config, recall=0)).eval()
    without.load_state_dict(model.state_dict(), strict=False)
    tokens = make_tokens(2, 40)
    torch.testing.assert_close(
        model(tokens)[0].log_softmax(-1), without(tokens)[0].log_softmax(-1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["newllm-recall7", "newllm-recall-hops-mixture"])
@torch.no_grad()
def test_probabilities_sum_to_one_and_losses_are_theirs(name):
    model, tokens = make_model(WALK[name]), make_tokens(2, 60) % 3  # so that places come again
    features, _ = model.features(tokens[:, :-1])
    logs = model.logits(features)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(2, 59, dtype=torch.float64))
    want = -logs.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(model.nll(features, tokens[:, 1:]), want)
    # By the formula.
    words, right, _ = recall(tokens[:, :-1], model.initial_state(2))
    counts = torch.zeros(2, VOCAB, dtype=torch.float64)
    softmax = model.logits(features.x).softmax(-1)
    seen = set()
    for t in range(59):
        counts = DECAY * counts + torch.nn.functional.one_hot(tokens[:, t], VOCAB)
        for row in range(2):
            n = max((n for n in range(1, ORDERS + 1) if words[row, t, n - 1, 0] != NONE), default=0)
            index = 0 if n == 0 else 2 * n - 1 + int(right[row, t, n - 1])
            shares = model.recall.shares[index].tolist()
            p = shares[-1] * counts[row] / counts[row].sum()
            left = 1 - shares[-1]
            for word, share in zip(words[row, t].flatten().tolist(), shares, strict=False):
                if word != NONE:
                    p[word] += share
                    left -= share
            torch.testing.assert_close(logs[row, t].exp(), p + left * softmax[row, t])
            seen.add(index)
    assert len(seen) >= 4


@pytest.mark.parametrize("T", [1, 7, 255, 256, 257, 1000])
def test_recent_words_are_counted_as_they_come(T):
    generator = torch.Generator().manual_seed(T)
    tokens, targets = torch.randint(11, (2, 3, T), generator=generator)
    counts = torch.rand(3, 11, dtype=torch.float64, generator=generator)
    shares, everywhere = recent_shares(tokens, counts, targets), recent_shares(tokens, counts)
    end = count(tokens, counts)
    for t in range(T):
        counts = DECAY * counts + torch.nn.functional.one_hot(tokens[:, t], 11)
        want = counts / counts.sum(1, keepdim=True)
        torch.testing.assert_close(everywhere[:, t], want)
        torch.testing.assert_close(shares[:, t], want.gather(1, targets[:, t, None])[:, 0])
    torch.testing.assert_close(end, counts)


def test_in_training_features_point_at_nothing():
    model = make_model(WALK["newllm-recall7"]).train()
    assert isinstance(model.features(make_tokens(2, 9))[0], torch.Tensor)


def test_recalled_words_are_forgotten_in_training_alone():
    config, tokens = ModelConfig(vocab_size=3, embed_dim=8, recall=1000, recall_dropout=0.3), make_tokens(4, 500) % 3
    module, embedding = Recall(config), Embedding(3, 8, 0.0)
    state = initial_tables(4, config, "cpu")
    _, kept, _, after = module.eval().parts(tokens, embedding, state)
    _, left, _, trained = module.train().parts(tokens, embedding, state)
    kept, left = (x.unflatten(-1, (ORDERS, 8)).abs().amax(-1) > 0 for x in (kept, left))
    assert not (left & ~kept).any()
    assert (left.sum() / kept.sum()).item() == pytest.approx(0.7, abs=0.03)
    assert all(torch.equal(after[key], trained[key]) for key in after)  # what the tables hold is as ever


def test_calibrated_shares_are_the_likeliest(monkeypatch):
    monkeypatch.setattr(evaluation, "POOLED", 0)
    model = make_model(WALK["newllm-recall1000"])
    tokens = make_tokens(1, 3000)[0].numpy()
    tokens[1500:2200] = tokens[400:1100]  # something to recall
    tokens[2500:] = tokens[2500:] % 5  # and words that come again
    score = calibrate(model, tokens)
    assert evaluate(model, tokens).loss == pytest.approx(score.loss, rel=1e-6)
    best = model.recall.shares.clone()
    assert (best[0, :-1] == 0).all()  # where no word is recalled it gets nothing
    assert (best > 0.01).sum() >= 4
    for index in range(best.numel()):
        for step in (-0.02, 0.02):
            other = best.clone()
            other.view(-1)[index] = (best.view(-1)[index] + step).clamp(min=0)
            if other.sum(1).max() < 1 and not (index < WORDS and step > 0):
                model.recall.shares.copy_(other)
                assert evaluate(model, tokens).loss >= score.loss - 1e-7
    model.recall.shares.copy_(best)


def test_groups_of_few_tokens_keep_to_what_all_have():
    """Shares of a group lie between those of its own tokens and of all, the nearer to its own the more tokens it has."""
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.rand(n, 5, dtype=torch.float64, generator=generator) for n in (20, 20_000))
    prior = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    alone, beside = (evaluation._likeliest_shares(few, prior, weight) for weight in (0, 100))
    assert (beside - prior).abs().sum() < 0.5 * (alone - prior).abs().sum()
    alone, beside = (evaluation._likeliest_shares(many, prior, weight) for weight in (0, 100))
    assert (beside - alone).abs().sum() < 0.1 * (alone - prior).abs().sum()


def test_calibration_of_a_text_that_repeats_nothing_leaves_the_softmax():
    model = make_model(dataclasses.replace(WALK["newllm-recall1000"], vocab_size=300))
    tokens = torch.randperm(300, generator=torch.Generator().manual_seed(0)).numpy()
    score = calibrate(model, tokens)
    assert model.recall.shares.max() < 1e-3
    without = model.nll(model.features(torch.from_numpy(tokens)[None, :-1])[0].x, torch.from_numpy(tokens)[None, 1:])
    assert without.mean().item() == pytest.approx(score.loss, rel=1e-3)
    assert token_losses(model, tokens).mean() == pytest.approx(score.loss, rel=1e-6)


def test_a_model_learns_to_copy_what_no_context_can_hold():
    """Texts of 24 random tokens, twice: the second time every token is known, but for the first two places."""
    torch.manual_seed(0)
    T, losses = 24, {}
    for entries in (0, 1000):
        config = ModelConfig(
            vocab_size=200, embed_dim=32, context_dim=16, num_layers=1, ffn_dim=32, fnn_layers=0, recall=entries
        )
        model = build_model(config)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(120):
            once = torch.randint(200, (16, T))
            text = torch.cat((once, once), dim=1)
            nll = model.nll(model.features(text[:, :-1])[0], text[:, 1:])
            optimizer.zero_grad()
            nll.mean().backward()
            optimizer.step()
        losses[entries] = nll[:, T + 2 :].mean().item()
    assert losses[0] > 0.9 * math.log(200)
    assert losses[1000] < 0.3 * math.log(200)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recall": -1}, "ModelConfig.recall is -1, wanted an integer of at least 0"),
        ({"recall": 5, "architecture": "classic", "coupling": "full"}, 'wanted 0 with architecture="classic"'),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**17, torch.int32), (2**17 + 1, torch.int64)])
def test_the_last_token_of_a_large_vocabulary_is_kept(vocab_size, dtype):
    last = vocab_size - 1
    state = initial_tables(1, ModelConfig(vocab_size=vocab_size, recall=100), "cpu")
    assert state["recall.entries"].dtype == dtype
    tokens = torch.tensor([[last, last, last, 3, last, last, last]])
    words = recall(tokens, state)[0][..., 0]
    assert words[0, 1].tolist() == [last, NONE, NONE]
    assert words[0, 6].tolist() == [last, last, 3]


@torch.no_grad()
def test_a_temperature_sharpens_the_softmax_and_not_what_is_recalled():
    model, tokens, T = make_model(WALK["newllm-recall1000"]), make_tokens(2, 60) % 3, 0.7
    features, _ = model.features(tokens)
    tempered = (model(tokens, mixing=Mixing(T))[0] / T).softmax(-1)
    left = (features.shares * torch.cat((features.words != NONE, torch.ones(2, 60, 1)), dim=-1)).sum(-1, keepdim=True)
    softmax, sharper = ((model.logits(features.x) / by).softmax(-1) for by in (1, T))
    torch.testing.assert_close(tempered, model.logits(features).exp() + (1 - left) * (sharper - softmax))
    decoder = make_decoder(model, 2)
    decoder.mixing = Mixing(T)
    for t in range(10):
        decoder.tokens.copy_(tokens[:, t])
        decoder.run()
        torch.testing.assert_close((decoder.logits / T).softmax(-1), tempered[:, t])


@torch.no_grad()
def test_a_share_of_recall_leaves_the_rest_to_the_softmax():
    model, tokens = make_model(WALK["newllm-recall1000"]), make_tokens(2, 60) % 3
    features, _ = model.features(tokens)
    whole, none = model(tokens)[0].exp(), model(tokens, mixing=Mixing(recall_share=0.0))[0].exp()
    torch.testing.assert_close(none, model.logits(features.x).softmax(-1))
    torch.testing.assert_close(model(tokens, mixing=Mixing(recall_share=0.3))[0].exp(), 0.3 * whole + 0.7 * none)


def test_generation_draws_from_the_tempered_mixture():
    """One token after a prompt, many times: frequencies within five standard deviations."""
    model, prompt, T = make_model(WALK["newllm-recall1000"], torch.float32), [1, 2, 3, 1, 2], 0.6
    with torch.no_grad():
        want = (model(torch.tensor([prompt]), mixing=Mixing(T, 0.6))[0][0, -1] / T).softmax(-1)
    (drawn,) = generate(model, [prompt] * 4000, 1, temperature=T, recall_share=0.6, seed=0)
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCAB).double() / 4000
    assert ((counts - want).abs() < 5 * (want * (1 - want) / 4000).sqrt() + 1e-3).all()


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


@needs_triton
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("entries", "vocab_size", "dtype"),
    [(1, 5, torch.float32), (7, 3, torch.bfloat16), (1000, 4, torch.float32), (97, 2**17 + 9, torch.float32)],
)
@torch.no_grad()
def test_kernels_of_a_token_are_what_the_model_does(entries, vocab_size, dtype, device, monkeypatch):
    """Token after token, rows at different places of their texts, from a state that is not new; E is no power of two."""
    from newllm.model import recall_triton

    monkeypatch.setattr(recall_triton, "MOST", 2048)  # rows of several blocks of columns
    config = ModelConfig(vocab_size=vocab_size, embed_dim=12, recall=entries)
    torch.manual_seed(entries)
    module, embedding = Recall(config), Embedding(vocab_size, 12, 0.0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    module.shares.uniform_(0.0, 0.07)
    module.shares[3] = 0
    module, embedding = module.to(device, dtype), embedding.to(device, dtype)
    T = 12 if vocab_size > 5 else 40
    tokens = (torch.randint(4, (3, T + 9)) * (vocab_size - 1) // 3).to(device)
    state = recall(tokens[:, :9], initial_tables(3, config, device))[2]
    state["recall.tokens"][1], state["recall.recent"][1] = NONE, 0  # a text that begins, in tables that are in use
    entries_, last, recent = (state[f"recall.{name}"].clone() for name in ("entries", "tokens", "recent"))
    total = recent.sum(1)
    base = torch.empty(3, 12, device=device)
    recalled = torch.empty(3, 3, 12, device=device)
    if entries == 7:  # an order in one piece, as where the program has a layer for each
        recalled = torch.empty(3, 3, 12, device=device).transpose(0, 1)
    words, groups = (torch.empty(shape, dtype=torch.int64, device=device) for shape in ((3, WORDS), (3,)))
    seen = set()
    for token in tokens[:, 9:].T.contiguous():
        want_base, want_recalled, pointed, state = module.parts(token[:, None], embedding, state)
        look_up = (token, entries_, last, embedding.weight, module.flags.weight, recalled, base, words, groups)
        recall_triton.look_up(*look_up)
        assert torch.equal(recalled.flatten(1), want_recalled[:, 0].float())
        torch.testing.assert_close(
            base, want_base[:, 0].float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-5
        )
        assert torch.equal(words, pointed.words[:, 0])
        assert torch.equal(groups, pointed.groups[:, 0])
        logits = 3 * torch.randn(3, vocab_size, device=device)
        logits[0, 1] = -math.inf
        for mixing in (Mixing(),) if vocab_size > 5 else (Mixing(), Mixing(0.6, 0.5), Mixing(recall_share=0.0)):
            got, counts, sums = logits.clone(), recent.clone(), total.clone()
            recall_triton.mix(got, token, words, groups, module.shares, counts, sums, mixing)
            want = pointed.mixed_logits(logits[:, None], mixing)[:, 0]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        recent, total = counts, sums
        for name, value in (("entries", entries_), ("tokens", last), ("recent", recent)):
            torch.testing.assert_close(value, state[f"recall.{name}"], rtol=1e-6, atol=1e-6)
        seen |= set(groups.tolist())
    assert len(seen) >= (3 if entries == 1 else 5)
    logits[1, 2] = math.nan
    recall_triton.mix(logits, token, words, groups, module.shares, recent, total, Mixing())
    assert logits[1].isnan().any()
    assert not logits[0].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16])
@torch.no_grad()
def test_a_decoder_on_a_gpu_is_fused_and_moves_the_state_as_the_model_does(rows):
    model = make_model(WALK["newllm-recall1000"], torch.float32).cuda()
    tokens = make_tokens(rows, 50).cuda() % 3
    _, before = model(tokens[:, :20])
    want, after = model(tokens[:, 20:], before)
    decoder = make_decoder(model, rows)
    assert decoder.recall.fused == (find_spec("triton") is not None)
    decoder.load(before)
    for t in range(30):
        decoder.tokens.copy_(tokens[:, 20 + t])
        decoder.run()
        # Logarithms of float32 probabilities from products that are added up in another order.
        torch.testing.assert_close(decoder.logits, want[:, t], rtol=1e-3, atol=1e-3)
    for key, value in decoder.state().items():
        torch.testing.assert_close(value, after[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("vocab_size", [3, 2**17 + 9])
def test_one_token_on_a_cpu_is_what_several_are(vocab_size, batch):
    """The way of one token against that of two, whose second has no part in it."""
    tokens = torch.randint(3, (batch, 60)) * (vocab_size - 1) // 2
    config = ModelConfig(vocab_size=vocab_size, recall=11)
    one = two = initial_tables(batch, config, "cpu")
    for t in range(59):
        words, right, one = recall(tokens[:, t : t + 1], one)
        want_words, want_right, _ = recall(tokens[:, t : t + 2], two)
        _, _, two = recall(tokens[:, : t + 1], initial_tables(batch, config, "cpu")) if t else (0, 0, one)
        assert torch.equal(words, want_words[:, :1])
        assert torch.equal(right, want_right[:, :1])
        for key, value in two.items():
            torch.testing.assert_close(one[key], value)


@needs_triton
def test_the_kernels_compile_where_there_is_no_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, Path(__file__).with_name("compile_recall.py"), "90"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(int(line.split()[1]) > 1000 for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == 4
