"""scan: h_t = a_t h_{t-1} + b_t."""

from __future__ import annotations

import pytest
import torch
from cases import BOUNDS, DTYPES, check, large_batch, make, randn

import newllm_kernels as nk

# Every size of {1, 7, 33, 1000, 4097} as T and as D. Not their cross product: D decides how columns are cut into blocks
# and vectors, T only how often the same code runs, so one partner for each size meets all code.
SHAPES = [(1, 1, 1), (2, 7, 33), (3, 33, 1000), (1, 7, 4097), (1, 4097, 33), (2, 1000, 7)]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truth(shape, dtype, reverse):
    state = {0: None, 1: "acc", 2: "own"}[sum(shape) % 3]  # each kind of h0 meets each dtype
    check(make("scan", *shape, dtype, state=state, reverse=reverse))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_outputs_that_are_written_past_the_caches(dtype, threads):
    threads(2)
    # Only aligned rows are (D = 1024). Either direction writes the same way: one each for two dtypes.
    reverse = dtype in (torch.float32, torch.bfloat16)
    check(make("scan", large_batch(100, 1024, dtype), 100, 1024, dtype, reverse=reverse))


@pytest.mark.parametrize("bounds_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("state", [None, "acc", "own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences(dtype, state, reverse, bounds_dtype):
    bounds = torch.tensor(BOUNDS, dtype=bounds_dtype)
    check(make("scan", 1, 33, 1000, dtype, state=state, reverse=reverse, cu_seqlens=bounds))


def test_packed_sequences_with_strided_boundaries():
    bounds = torch.tensor(BOUNDS).repeat_interleave(2)[::2]
    assert not bounds.is_contiguous()
    check(make("scan", 1, 33, 7, cu_seqlens=bounds))


def test_many_sequences_of_one_step():
    check(make("scan", 1, 200, 33, cu_seqlens=torch.arange(201)))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_carry_their_state(dtype, reverse):
    """Three calls, each starting from the last state of the one before, are one call: outputs and gradients."""
    problem = make("scan", 2, 33, 40, dtype, reverse=reverse)

    def in_pieces(tensors):
        state, pieces = tensors["h0"], []
        cuts = [(0, 1), (1, 20), (20, 33)]
        for begin, end in reversed(cuts) if reverse else cuts:
            a, b = tensors["a"][:, begin:end], tensors["b"][:, begin:end]
            h, state = nk.scan(a, b, state, reverse=reverse)
            assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            pieces.append(h)
        return torch.cat(pieces[::-1] if reverse else pieces, dim=1), state

    check(problem, run=in_pieces)


def test_reverse_is_the_flipped_scan_by_hand():
    a, b = torch.tensor([2.0, 3.0, 5.0]).view(1, 3, 1), torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1)
    h, last = nk.scan(a, b, torch.ones(1, 1), reverse=True)
    assert h.flatten().tolist() == [651.0, 325.0, 105.0]  # 5+100, 3*105+10, 2*325+1
    assert last.item() == 651.0


def test_state_of_an_empty_sequence_is_its_start():
    h0 = randn(2, 5, dtype=torch.float32)
    h, last = nk.scan(torch.ones(1, 3, 5), torch.ones(1, 3, 5), h0, cu_seqlens=torch.tensor([0, 0, 3]))
    assert torch.equal(last[0], h0[0])
    assert torch.equal(last[1], h[0, -1])


def test_decay_above_one_overflows_to_inf_not_nan():
    h, last = nk.scan(torch.full((1, 400, 3), 2.0), torch.ones(1, 400, 3))
    assert h[0, 100].isfinite().all()
    assert (last == torch.inf).all()
