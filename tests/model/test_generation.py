"""Generation: the right distribution, reproducible draws, rows that do not know of each other, constant memory."""

from __future__ import annotations

import dataclasses
import itertools
from importlib.util import find_spec

import pytest
import torch
from configs import VOCAB, WALK, make_model

from newllm.generation import PREFILL_CHUNK, distribution, generate, sample
from newllm.model import state_bytes

NAMES = [
    "newllm-none-norm_output-fnn0",
    "newllm-hops2-norm_output-fnn1",
    "classic-full-norm_state-fnn1",
    "transformer-window5",
    "transformer-window64",
]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5]]
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="the kernel is in Triton")


def rows(steps):
    """Steps of tokens -> tokens of each row."""
    return [list(row) for row in zip(*steps, strict=True)]


# The distribution, against one computed by hand: p = 0.5, 0.25, 0.125, 0.125 for tokens 2, 0, 1, 3.
PROBS = torch.tensor([[0.25, 0.125, 0.5, 0.125]])


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, [0.25, 0.125, 0.5, 0.125]),
        ({"temperature": 0.5}, [4 / 22, 1 / 22, 16 / 22, 1 / 22]),  # p**2, renormalised
        ({"top_k": 1}, [0, 0, 1, 0]),
        ({"top_k": 2}, [1 / 3, 0, 2 / 3, 0]),
        ({"top_k": 3}, [2 / 7, 1 / 7, 4 / 7, 0]),  # of the two equal ones, the lower id
        ({"top_k": 99}, [0.25, 0.125, 0.5, 0.125]),
        ({"top_p": 1e-9}, [0, 0, 1, 0]),  # the most probable one always stays
        ({"top_p": 0.5}, [0, 0, 1, 0]),  # 0.5 is reached by the first alone
        ({"top_p": 0.51}, [1 / 3, 0, 2 / 3, 0]),
        ({"top_p": 0.8}, [2 / 7, 1 / 7, 4 / 7, 0]),
        ({"top_p": 1.0}, [0.25, 0.125, 0.5, 0.125]),
        ({"top_k": 2, "top_p": 0.6}, [0, 0, 1, 0]),  # top-p of what top-k left: 2/3 is enough
        ({"temperature": 0.5, "top_p": 0.75}, [4 / 20, 0, 16 / 20, 0]),  # tempered first: 16/22 is not
    ],
)
def test_distribution_by_hand(options, want):
    got = distribution(PROBS.log(), **{"temperature": 1.0, **options})
    torch.testing.assert_close(got, torch.tensor([want], dtype=torch.float32))


def test_distribution_of_each_row_is_its_own():
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, -5.0, 4.0]])
    both = distribution(logits, 0.7, top_k=2, top_p=0.9)
    for row in range(2):
        assert torch.equal(both[row : row + 1], distribution(logits[row : row + 1], 0.7, top_k=2, top_p=0.9))


def test_distribution_stands_extreme_logits_and_temperatures():
    logits = torch.tensor([[1e4, -1e4, 0.0, -float("inf")]])
    for temperature in (1e-320, 1e-30, 1.0, 1e30, 1e300):  # the outermost are 0 and infinity in float32
        probs = distribution(logits, temperature)
        assert probs.isfinite().all()
        assert probs.sum().item() == pytest.approx(1.0)
    for cold in (1e-320, 1e-30):
        assert distribution(logits, cold).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert distribution(logits, 1e30)[0, :3].tolist() == pytest.approx([1 / 3] * 3)


def test_drawn_frequencies_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([sample(PROBS.log(), 1.0, 3, None, [generator]) for _ in range(4000)])
    got = draws.bincount(minlength=4) / 4000
    # Standard error of a frequency of 4000 draws is below 0.008; five of them. And what was cut is never drawn.
    assert (got - torch.tensor([2 / 7, 1 / 7, 4 / 7, 0])).abs().max() < 0.04
    assert got[3] == 0


def test_nan_logits_are_an_error_not_a_token():
    with pytest.raises(ValueError, match="NaN"):
        sample(torch.tensor([[0.0, float("nan")]]), 0.0, None, None, [torch.Generator()])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_greedy_takes_the_argmax_of_the_parallel_forward(name):
    model = make_model(WALK[name])
    for prompt in PROMPTS:
        (written,) = rows(generate(model, [prompt], 12, temperature=0))
        logits, _ = model(torch.tensor([prompt + written]))
        assert written == logits[0, len(prompt) - 1 : -1].argmax(dim=-1).tolist()


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.3, "top_k": 9, "top_p": 0.95}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_writes_what_each_prompt_writes_alone(name, options):
    model = make_model(WALK[name])
    together = rows(generate(model, PROMPTS, 20, seed=11, **options))
    alone = [rows(generate(model, [prompt], 20, seed=11 + r, **options))[0] for r, prompt in enumerate(PROMPTS)]
    assert together == alone


def test_seed_makes_it_reproducible_and_another_seed_differs():
    model = make_model(WALK[NAMES[0]])
    first, second, other = (list(generate(model, PROMPTS, 30, seed=seed)) for seed in (5, 5, 6))
    assert first == second != other


def test_equal_prompts_of_a_batch_differ():
    model = make_model(WALK[NAMES[0]])
    one, two = rows(generate(model, [[1, 2], [1, 2]], 30, seed=5))
    assert one != two


def test_without_a_seed_the_global_generator_decides():
    model = make_model(WALK[NAMES[0]])

    def write():
        return list(generate(model, PROMPTS, 20))

    torch.manual_seed(1)
    first, second = write(), write()
    torch.manual_seed(1)
    assert write() == first != second


def test_generation_with_a_seed_leaves_the_global_generator_alone():
    model = make_model(WALK[NAMES[0]])
    before = torch.get_rng_state()
    list(generate(model, PROMPTS, 5, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_longer_than_a_chunk_are_read_exactly(name):
    model = make_model(WALK[name])
    prompt = torch.randint(VOCAB, (2 * PREFILL_CHUNK + 3,), generator=torch.Generator().manual_seed(0)).tolist()
    (written,) = rows(generate(model, [prompt], 3, temperature=0))
    with torch.no_grad():
        logits, _ = model(torch.tensor([prompt + written]))
    assert written == logits[0, len(prompt) - 1 : -1].argmax(dim=-1).tolist()


def test_eos_ends_its_row_and_then_the_generation():
    model = make_model(WALK[NAMES[0]])
    free = rows(generate(model, PROMPTS, 60, seed=3))
    eos = free[0][4]
    ends = [row.index(eos) if eos in row else None for row in free]
    steps = list(generate(model, PROMPTS, 60, seed=3, eos_id=eos))
    assert len(steps) == (60 if None in ends else max(ends) + 1)
    for got, want, end in zip(rows(steps), free, ends, strict=True):
        cut = len(steps) if end is None else end + 1
        assert got[:cut] == want[:cut]
        assert set(got[cut:]) <= {eos}


def test_modes_are_the_callers_between_tokens_and_after():
    config = dataclasses.replace(WALK[NAMES[0]], dropout=0.5)
    model = make_model(config).train()
    model.final_norm.eval()  # a module that its owner froze
    steps = generate(model, [[1, 2]], 3, seed=0)
    for _ in range(2):
        next(steps)
        assert model.training
        assert model.blocks[0].dropout.training
        assert not model.final_norm.training
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    steps.close()
    assert model.training
    assert not model.final_norm.training
    # Dropout did not act: the same tokens as in eval mode.
    assert list(generate(model, [[1, 2]], 9, seed=0)) == list(generate(model.eval(), [[1, 2]], 9, seed=0))


def test_no_tokens_asked_none_given():
    assert list(generate(make_model(WALK[NAMES[0]]), PROMPTS, 0)) == []


class Recorder(torch.nn.Module):
    """A model that writes down the size of every state that it hands out."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.sizes = model, model.config, []

    def forward(self, tokens, state, mixing):
        logits, state = self.model(tokens, state, mixing)
        self.sizes.append(state_bytes(state))
        return logits, state


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow(name):
    recorder = Recorder(make_model(WALK[name]))
    for _ in itertools.islice(generate(recorder, [[1]], 400, seed=0), 300):
        pass
    assert len(recorder.sizes) == 300
    settled = 64 if "window64" in name else 5 if "window5" in name else 0  # a window fills, then stays
    assert len(set(recorder.sizes[settled:])) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": [1, 2]}, r"prompts\[0\]"),
        ({"prompts": [[1], []]}, r"prompts\[1\]"),
        ({"prompts": [[1], [VOCAB]]}, r"prompts\[1\].*22"),
        ({"prompts": [[-1]]}, r"prompts\[0\].*-1"),
        ({"prompts": [[1.0]]}, r"prompts\[0\].*1.0"),
        ({"prompts": "abc"}, "prompts"),
        ({"max_new_tokens": -1}, "max_new_tokens.*-1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens.*2.5"),
        ({"temperature": -0.1}, "temperature.*-0.1"),
        ({"temperature": float("nan")}, "temperature.*nan"),
        ({"temperature": "hot"}, "temperature.*hot"),
        ({"recall_share": 1.5}, "recall_share.*1.5"),
        ({"top_k": 0}, "top_k.*0"),
        ({"top_k": 1.5}, "top_k.*1.5"),
        ({"top_p": 0.0}, "top_p.*0.0"),
        ({"top_p": 1.1}, "top_p.*1.1"),
        ({"seed": -1}, "seed.*-1"),
        ({"seed": 0.5}, "seed.*0.5"),
        ({"eos_id": VOCAB}, "eos_id.*23"),
    ],
)
def test_bad_arguments_raise_at_the_call(change, named):
    arguments = {"prompts": PROMPTS, "max_new_tokens": 3, **change}
    with pytest.raises(ValueError, match=named):
        generate(make_model(WALK[NAMES[0]]), **arguments)  # not even iterated


@needs_triton
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("how", ["likeliest", "tempered", "top-k"])
def test_the_fused_end_of_a_step_does_what_its_pieces_do(device, how, monkeypatch):
    from newllm import graph_generation
    from newllm.model import next_token

    monkeypatch.setattr(next_token, "MOST", 64)  # rows of several blocks of columns
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 40, (6, 200), generator=generator).float().to(device)  # with ties
    rates = times = None
    if how != "likeliest":
        times = torch.empty(6, 200).exponential_(generator=generator).to(device)
        times[0, 7] = 1e-9  # a clock that rings whatever its rate, unless top-k has cut it
    if how == "top-k":
        rates = distribution(logits, 1.7, top_k=20)
    logits[2, 70], logits[3, 5], logits[4] = float("nan"), float("inf"), -float("inf")
    results = []
    for ending in (graph_generation._next_token, next_token.next_token):
        tokens = torch.tensor([1, 7, 1, 1, 1, 7], device=device)
        written, number = torch.zeros(3, 6, dtype=torch.int64, device=device), torch.full((6,), 2, device=device)
        broken = torch.tensor([1, 0, 0, 0, 0, 0], dtype=torch.int32, device=device)
        ending(logits, rates, times, 1.7, tokens, written, number, broken, 7)
        tokens[2:5] = written[:, 2:5] = 0  # of broken logits, and of none above -inf, the token is any
        results.append((tokens, written, number, broken))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    assert results[1][3].tolist() == [1, 0, 1, 1, 0, 0]
    assert results[1][0][[1, 5]].tolist() == [7, 7]
