"""Decoders and the CUDA graph of generation: token for token what the model does."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import pytest
import torch
from configs import RECURRENT, VOCAB, WALK, make_model, make_tokens
from test_golden import relative_error

from newllm.generation import generate
from newllm.model.decoding import make_decoder
from newllm_kernels.decode_linear import TooManyRows
from newllm_kernels.decode_linear.program import DecodeProgram

# As in test_golden.py; in bfloat16, each of some ten layers a token rounds what it reads, to 2^-9, and contexts remember.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 5e-2}
WITH_DECODER = [name for name, config in RECURRENT.items() if config.softmaxes == 1]
TRANSFORMERS = [name for name, config in WALK.items() if config.architecture == "transformer"]
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="the cache's attention is in Triton")


def step_by_step(decoder, tokens):
    """Logits (B, T, V) of tokens (B, T), one at a time."""
    logits = []
    for column in tokens.unbind(1):
        decoder.tokens.copy_(column)
        decoder.run()
        logits.append(decoder.logits.clone())
    return torch.stack(logits, dim=1)


def check_golden(name, dtype, device="cpu"):
    model, tokens = make_model(WALK[name], dtype).to(device), make_tokens(3, 12).to(device)
    want, end = model.double()(tokens) if dtype == torch.bfloat16 else model(tokens)
    model = model.to(dtype)
    decoder = make_decoder(model, 3)
    assert relative_error(step_by_step(decoder, tokens), want) < TOLERANCE[dtype]
    for key, value in decoder.state().items():
        assert relative_error(value.double(), end[key].double()) < TOLERANCE[dtype], key
    # And from a state in the middle of the text.
    _, state = model(tokens[:, :5])
    decoder.load(state)
    assert relative_error(step_by_step(decoder, tokens[:, 5:]), want[:, 5:]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", WITH_DECODER)
@torch.no_grad()
def test_a_decoder_gives_the_logits_of_the_whole(name, dtype):
    check_golden(name, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WITH_DECODER)
@torch.no_grad()
def test_a_decoder_gives_the_logits_of_the_whole_on_a_gpu(name, dtype):
    check_golden(name, dtype, "cuda")


@needs_triton
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_the_transformers_decoder_gives_the_logits_of_the_whole(name, device):
    model, tokens = make_model(WALK[name], torch.float32).to(device), make_tokens(3, 12).to(device)
    want, _ = model(tokens)
    for begin in (0, 3, 8):  # an empty cache, one that is not full, and one whose ring has turned (window 5)
        decoder = make_decoder(model, 3)
        if begin:
            decoder.load(model(tokens[:, :begin])[1])
        assert relative_error(step_by_step(decoder, tokens[:, begin:]), want[:, begin:]) < TOLERANCE[torch.float32]


def test_what_has_no_decoder():
    assert make_decoder(make_model(WALK["newllm-mixture"]), 1) is None
    assert make_decoder(make_model(WALK[WITH_DECODER[0]]), 17) is None


def test_rows_that_do_not_fit_on_the_gpu_have_no_decoder_either(monkeypatch):
    """A model as wide as `1b` beside 16 texts: `generate` goes step by step then."""

    def pack(program):
        raise TooManyRows("decode_linear: 16 rows of 6144 take more than there is")

    monkeypatch.setattr(DecodeProgram, "__init__", lambda self, layers, rows: pack(self))
    assert make_decoder(make_model(WALK[WITH_DECODER[0]]), 16) is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["newllm-recall1000", pytest.param("transformer-window5-recall", marks=needs_triton)])
@torch.no_grad()
def test_a_product_with_recalled_words_that_is_too_wide_goes_in_three(name, device, monkeypatch):
    make, widths = DecodeProgram.__init__, []

    def narrow(program, layers, rows):
        widths.append([layer.weights[0].shape[1] for layer in layers])
        if max(widths[-1]) > 20:
            raise TooManyRows("decode_linear: too wide")
        make(program, layers, rows)

    monkeypatch.setattr(DecodeProgram, "__init__", narrow)
    model = make_model(WALK[name], torch.float32).to(device)
    tokens = make_tokens(3, 12).to(device) % 4
    decoder = make_decoder(model, 3)
    E = model.config.embed_dim
    assert (widths[0][0], widths[1][:3]) == (3 * E, [E, E, E])
    assert relative_error(step_by_step(decoder, tokens), model(tokens)[0]) < TOLERANCE[torch.float32]


@pytest.mark.gpu
def test_more_rows_than_fit_are_generated_step_by_step():
    wide = dataclasses.replace(WALK[WITH_DECODER[0]], ffn_dim=8192, embed_dim=64)
    model = make_model(wide, torch.float32).cuda()
    assert make_decoder(model, 16) is None
    assert len(next(iter(generate(model, [[1]] * 16, 2, seed=0)))) == 16


PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5]]
GRAPHS = [
    "newllm-none-norm_output-fnn0", "newllm-hops2-norm_output-fnn1", "newllm-full-norm_state-fnn0", "newllm-recall7",
    "classic-full-norm_state-fnn1", *TRANSFORMERS,
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"temperature": 0.9}, {"temperature": 1.3, "top_k": 9, "top_p": 0.95, "recall_share": 0.4}],
    ids=str,
)
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_writes_what_the_model_writes(name, options):
    """Also across the edge of a block, and with a batch whose rows are of different lengths."""
    model = make_model(WALK[name], torch.float32).cuda()
    graph, eager = (list(generate(model, PROMPTS, 40, seed=7, cuda_graph=on, **options)) for on in (True, False))
    assert graph == eager
    alone = [row for (row,) in generate(model, PROMPTS[1:2], 40, seed=8, **options)]
    assert alone == [row[1] for row in graph]


@pytest.mark.gpu
def test_a_graph_stops_at_eos_and_leaves_modes_alone():
    model = make_model(dataclasses.replace(WALK[GRAPHS[0]], dropout=0.5), torch.float32).cuda().train()
    free = [row for (row,) in generate(model, [[1]], 60, seed=3)]
    eos = free[20]
    steps = [row for (row,) in generate(model, [[1]], 60, seed=3, eos_id=eos)]
    assert steps == free[: free.index(eos) + 1]
    assert model.training
    assert not torch.is_inference_mode_enabled()
    assert len(list(generate(model, [[1]], 1))) == 1


@pytest.mark.gpu
def test_a_graph_says_that_logits_are_broken():
    model = make_model(WALK[GRAPHS[0]], torch.float32).cuda()
    steps = generate(model, [[1]], 100, seed=0)
    next(steps)
    with torch.no_grad():
        model.blocks[0].ffn.out.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        list(steps)


def test_vocabulary_of_the_walk():
    assert make_decoder(make_model(WALK[WITH_DECODER[0]]), 2).logits.shape == (2, VOCAB)
