"""Attention of one token per text over a key-value cache that stays in place, in Triton: rotary turn, append, attention.

qkv (B, 3E) float32, as the projection leaves it   cos, sin (B, head_dim / 2) of each row's position
keys, values (B, heads, W, head_dim): a ring, position p in slot p mod W; keys turned already   y (B, E) float32

The cache is cut into parts that run side by side, each with its own running maximum; a second kernel puts them together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # slots of the cache in work at a time
PROGRAMS = 528  # four per multiprocessor of an H100


def number_of_parts(batch_heads: int, window: int) -> int:
    """As many parts as fill the GPU, but no shorter than a few blocks."""
    wanted = min(triton.cdiv(window, 4 * BLOCK), max(PROGRAMS // batch_heads, 1))
    return triton.next_power_of_2(wanted)


@triton.jit
def _attend_part(
    qkv, cos, sin, position, keys, values, sums, tops, weights, W, heads, E, scale,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of one head: weighted values so far (HALF twice), top score and sum of weights."""
    pair, part = tl.program_id(0), tl.program_id(1)
    b, head = pair // heads, pair % heads
    p = tl.load(position + b)
    own, valid = p % W, tl.minimum(p + 1, W)
    j = tl.arange(0, BLOCK_HALF)
    inside = j < HALF
    c = tl.load(cos + b * HALF + j, inside, 0.0)
    s = tl.load(sin + b * HALF + j, inside, 0.0)
    row = qkv + b.to(tl.int64) * 3 * E + head * 2 * HALF + j
    q1, q2 = tl.load(row, inside, 0.0) * scale, tl.load(row + HALF, inside, 0.0) * scale
    k1, k2 = tl.load(row + E, inside, 0.0), tl.load(row + E + HALF, inside, 0.0)
    v1, v2 = tl.load(row + 2 * E, inside, 0.0), tl.load(row + 2 * E + HALF, inside, 0.0)
    q1, q2 = q1 * c - q2 * s, q1 * s + q2 * c
    k1, k2 = k1 * c - k2 * s, k1 * s + k2 * c
    cache = pair.to(tl.int64) * W * 2 * HALF
    k1, k2 = k1.to(keys.dtype.element_ty).to(tl.float32), k2.to(keys.dtype.element_ty).to(tl.float32)
    v1, v2 = v1.to(keys.dtype.element_ty).to(tl.float32), v2.to(keys.dtype.element_ty).to(tl.float32)
    # The first part also has the token's own key and value, which it appends; no part reads their slot.
    first = part == 0
    top = tl.where(first, tl.sum(q1 * k1) + tl.sum(q2 * k2), -float("inf"))
    weight = tl.where(first, 1.0, 0.0)
    sum1, sum2 = v1 * weight, v2 * weight
    at = cache + own * 2 * HALF + j
    appended = j < tl.where(first, HALF, 0)
    tl.store(keys + at, k1, appended)
    tl.store(keys + at + HALF, k2, appended)
    tl.store(values + at, v1, appended)
    tl.store(values + at + HALF, v2, appended)

    length = tl.cdiv(tl.cdiv(W, BLOCK), PARTS) * BLOCK
    begin = part * length
    for start in range(begin, tl.minimum(begin + length, valid), BLOCK):
        slot = start + tl.arange(0, BLOCK)
        seen = (slot < valid) & (slot != own)
        mask = seen[:, None] & inside[None, :]
        at_tile = cache + slot[:, None].to(tl.int64) * 2 * HALF + j[None, :]
        t1 = tl.load(keys + at_tile, mask, 0.0).to(tl.float32)
        t2 = tl.load(keys + at_tile + HALF, mask, 0.0).to(tl.float32)
        u1 = tl.load(values + at_tile, mask, 0.0).to(tl.float32)
        u2 = tl.load(values + at_tile + HALF, mask, 0.0).to(tl.float32)
        score = tl.sum(t1 * q1[None, :], 1) + tl.sum(t2 * q2[None, :], 1)
        score = tl.where(seen, score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        safe = tl.where(higher == -float("inf"), 0.0, higher)  # nothing seen yet: weights of 0, not NaN
        old = tl.exp(top - safe)
        each = tl.exp(score - safe)
        sum1 = sum1 * old + tl.sum(u1 * each[:, None], 0)
        sum2 = sum2 * old + tl.sum(u2 * each[:, None], 0)
        weight = weight * old + tl.sum(each, 0)
        top = higher
    out = (pair * PARTS + part).to(tl.int64)
    tl.store(sums + out * 2 * HALF + j, sum1, inside)
    tl.store(sums + out * 2 * HALF + HALF + j, sum2, inside)
    tl.store(tops + out, top)
    tl.store(weights + out, weight)


@triton.jit
def _join_parts(
    sums, tops, weights, y, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    pair = tl.program_id(0)
    part, j = tl.arange(0, PARTS), tl.arange(0, BLOCK_WIDTH)
    top = tl.load(tops + pair * PARTS + part)
    share = tl.exp(top - tl.max(top, 0))
    weight = tl.sum(tl.load(weights + pair * PARTS + part) * share, 0)
    at = (pair * PARTS + part).to(tl.int64)[:, None] * WIDTH + j[None, :]
    tile = tl.load(sums + at, (j < WIDTH)[None, :], 0.0)
    tl.store(y + pair.to(tl.int64) * WIDTH + j, tl.sum(tile * share[:, None], 0) / weight, j < WIDTH)


class CachedAttention:
    """Scratch for the attention of B texts, shared by the layers of a model."""

    def __init__(self, batch: int, heads: int, window: int, head_dim: int, device: torch.device) -> None:
        self.heads, self.window, self.head_dim = heads, window, head_dim
        self.parts = number_of_parts(batch * heads, window)
        shape = (batch * heads, self.parts)
        self.sums = torch.zeros(*shape, head_dim, device=device)
        self.tops, self.weights = torch.zeros(shape, device=device), torch.zeros(shape, device=device)

    def __call__(
        self, qkv: Tensor, rotation: tuple[Tensor, Tensor], position: Tensor, keys: Tensor, values: Tensor, y: Tensor
    ) -> None:
        """Append the token of `position` (B,) int64 to the cache and write its attention to y."""
        half, pairs = self.head_dim // 2, qkv.shape[0] * self.heads
        _attend_part[(pairs, self.parts)](
            qkv, *rotation, position, keys, values, self.sums, self.tops, self.weights, self.window, self.heads,
            y.shape[1], self.head_dim**-0.5, HALF=half, BLOCK_HALF=triton.next_power_of_2(half), PARTS=self.parts, BLOCK=BLOCK,
        )  # fmt: skip
        _join_parts[(pairs,)](
            self.sums, self.tops, self.weights, y,
            WIDTH=self.head_dim, BLOCK_WIDTH=triton.next_power_of_2(self.head_dim), PARTS=self.parts,
        )  # fmt: skip
