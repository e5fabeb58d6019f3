"""One token of recall (newllm/model/recall.py) as two kernels, where PyTorch's operations are two hundred. In Triton.

    look_up   before the layers: what stood here last time, and the tables one token on
    mix       after them: the shares of recalled and of recent words, and counts one token on

A program is a text. All tensors stay where they are, so that both fit into a CUDA graph.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from newllm.model.common import Mixing
from newllm.model.recall import DECAY, FINISH, MIX, NONE, ORDERS, TAG_BITS, TOKEN_BITS, VISITS, WORDS

MOST = 32768  # columns in work at a time
assert ORDERS == 3  # as written out in `_place` and `_look_up`


@triton.jit
def _place(first, second, third, n: tl.constexpr, S, MULTIPLIER: tl.constexpr, LAST: tl.constexpr, TAG: tl.constexpr):
    """(entry, tag, whether no token is missing) of the place after `n` tokens, the latest first: `recall.places`."""
    hashes = (first + 1) * MULTIPLIER
    known = first >= 0
    if n >= 2:
        hashes = (hashes + second + 1) * MULTIPLIER
        known = known & (second >= 0)
    if n >= 3:
        hashes = (hashes + third + 1) * MULTIPLIER
        known = known & (third >= 0)
    mixed = (hashes ^ (hashes >> 32)) * LAST
    return ((mixed >> 32) & 0x7FFFFFFF) % S, (mixed >> 16) & ((1 << TAG) - 1), known


@triton.jit
def _look_up(
    tokens, entries, last, embedding, flag_embedding, recalled, base, words, groups, S, E, row_stride, order_stride,
    BITS: tl.constexpr, TAG: tl.constexpr, MULTIPLIER: tl.constexpr, LAST: tl.constexpr, NOTHING: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(tokens + row)
    third, second, first = tl.load(last + 3 * row), tl.load(last + 3 * row + 1), tl.load(last + 3 * row + 2)
    k, visit = tl.arange(0, BLOCK), tl.arange(0, K)
    inside = k < E
    group, flags = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    for n in tl.static_range(1, 4):
        table = entries + (3 * row + n - 1) * S * K
        before, tag_before, known_before = _place(first, second, third, n, S, MULTIPLIER, LAST, TAG)
        now, tag_now, known_now = _place(x, first, second, n, S, MULTIPLIER, LAST, TAG)
        written = (tag_before << BITS) | x
        right = known_before & (tl.load(table + before * K).to(tl.int64) == written)
        older = tl.load(table + before * K + visit - 1, visit > 0, 0).to(tl.int64)
        left = tl.where(visit == 0, written, older)
        read = tl.load(table + now * K + visit).to(tl.int64)
        read = tl.where(known_before & (before == now), left, read)
        last_read = tl.load(table + now * K).to(tl.int64)
        last_read = tl.where(known_before & (before == now), written, last_read)
        found = known_now & (last_read >= 0) & (last_read >> BITS == tag_now)
        tl.debug_barrier()  # every warp has read before one writes
        tl.store(table + before * K + visit, left.to(entries.dtype.element_ty), visit < tl.where(known_before, K, 0))
        there = (read >= 0) & (read >> BITS == tag_now) & (visit < tl.where(known_now, K, 0))
        tl.store(words + (3 * row + n - 1) * K + visit, tl.where(there, read & ((1 << BITS) - 1), NOTHING))
        flags += found.to(tl.int64) * (1 << (n - 1)) + right.to(tl.int64) * (1 << (n + 2))
        group = tl.where(found, 2 * n - 1 + right.to(tl.int64), group)
        word = last_read & ((1 << BITS) - 1)
        value = tl.load(embedding + tl.where(found, word, 0) * E + k, k < tl.where(found, E, 0), 0.0)
        tl.store(recalled + row * row_stride + (n - 1) * order_stride + k, value.to(tl.float32), inside)
    value = tl.load(embedding + x * E + k, inside, 0.0).to(tl.float32)
    value += tl.load(flag_embedding + flags * E + k, inside, 0.0).to(tl.float32)
    tl.store(base + row * E + k, value, inside)
    tl.store(groups + row, group)
    tl.store(last + 3 * row, second)
    tl.store(last + 3 * row + 1, first)
    tl.store(last + 3 * row + 2, x)


@triton.jit
def _mix(
    logits, tokens, words, groups, shares, recent, total, temperature, recall_share, V, N: tl.constexpr, DECAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = row * V
    x = tl.load(tokens + row)
    own = shares + (N + 1) * tl.load(groups + row)
    common = tl.load(own + N).to(tl.float32) * recall_share
    said = 0.0
    for n in tl.static_range(N):
        said += tl.where(tl.load(words + N * row + n) >= 0, tl.load(own + n).to(tl.float32) * recall_share, 0.0)
    whole = tl.load(total + row) * DECAYS + 1.0
    highest, sum_ = -3e38, 0.0  # finite: -inf less -inf is not a number
    for start in range(0, V, BLOCK):
        k = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at + k, k < V, -float("inf")) / temperature
        new = tl.maximum(highest, tl.max(z, 0))
        sum_ = sum_ * tl.exp(highest - new) + tl.sum(tl.exp(z - new), 0)
        highest = new
    rest = tl.log(1.0 - said - common) - highest - tl.log(sum_)
    for start in range(0, V, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < V
        count = tl.load(recent + at + k, inside, 0.0) * DECAYS + tl.where(k == x, 1.0, 0.0)
        tl.store(recent + at + k, count, inside)
        softmax = tl.load(logits + at + k, inside, -float("inf")) / temperature + rest
        others = common * (count / whole)
        for n in tl.static_range(N):  # no column is that of a word that is not there
            others += tl.where(k == tl.load(words + N * row + n), tl.load(own + n).to(tl.float32) * recall_share, 0.0)
        log_others = tl.log(tl.where(others > 0, others, 1.0))
        both = tl.maximum(softmax, log_others) + tl.log(1.0 + tl.exp(-tl.abs(softmax - log_others)))
        mixed = tl.where(others > 0, both, softmax)
        tl.store(logits + at + k, mixed * temperature, inside)
    tl.debug_barrier()
    tl.store(total + row, whole)


def look_up(
    tokens: Tensor, entries: Tensor, last: Tensor, embedding: Tensor, flags: Tensor, recalled: Tensor, base: Tensor,
    words: Tensor, groups: Tensor,
) -> None:  # fmt: skip
    """Read tokens (B,) into entries (B, 3, S, VISITS) and last (B, 3), and write what is recalled then.

    embedding (V, E) and flags (64, E) -> recalled (B, 3, E) float32, the words of the last visits, zeros where there is none; base (B, E)
    float32, E[x] + F[flags]; words (B, WORDS) int64; groups (B,) int64, the index of their shares.
    """
    E = embedding.shape[1]
    _look_up[(tokens.shape[0],)](
        tokens, entries, last, embedding, flags, recalled, base, words, groups, entries.shape[2], E, *recalled.stride()[:2],
        BITS=TOKEN_BITS[entries.dtype], TAG=TAG_BITS, MULTIPLIER=MIX, LAST=FINISH, NOTHING=NONE, K=VISITS,
        BLOCK=triton.next_power_of_2(E),
        num_warps=4,
    )  # fmt: skip


def mix(
    logits: Tensor, tokens: Tensor, words: Tensor, groups: Tensor, shares: Tensor, recent: Tensor, total: Tensor,
    mixing: Mixing,
) -> None:  # fmt: skip
    """logits (B, V) float32 become what `Pointed.mixed_logits` says; recent (B, V) float32 and its sums total (B,) move on by tokens (B,)."""
    B, V = logits.shape
    _mix[(B,)](
        logits, tokens, words, groups, shares, recent, total, mixing.temperature, mixing.recall_share, V, N=WORDS, DECAYS=DECAY,
        BLOCK=min(triton.next_power_of_2(V), MOST), num_warps=32 if V > 8192 else 8 if V > 1024 else 1,
    )  # fmt: skip
