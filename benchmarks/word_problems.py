"""Word problems of finite groups: a text of group elements, after each of which the product of all so far is asked for.

    parity   Z2, is the number of ones odd          solvable, two states
    mod5     Z5, sum modulo 5: modular counting      solvable, five states
    a5       even permutations of five things        not solvable, 60 states: NC1-complete
    s5       all permutations of five things         not solvable, 120 states: NC1-complete

Attention of a fixed number of layers and recurrences that are linear in their state with gates that do not see it compute TC0 only,
and cannot track a group that is not solvable over any length unless TC0 = NC1 (Merrill, Petty and Sabharwal, "The illusion of
state in state-space models", 2024).
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

PROBLEMS = ("parity", "mod5", "a5", "s5")


def multiplication_table(problem: str) -> Tensor:
    """(G, G) int64: table[a, b] is the product of element a and then b; element 0 is the neutral one."""
    if problem in ("parity", "mod5"):
        elements = torch.arange(2 if problem == "parity" else 5)
        return (elements[:, None] + elements) % len(elements)
    members = [p for p in permutations(range(5)) if problem == "s5" or _is_even(p)]
    number = {p: n for n, p in enumerate(members)}
    return torch.tensor([[number[tuple(b[a[k]] for k in range(5))] for b in members] for a in members])


def _is_even(permutation: tuple[int, ...]) -> bool:
    pairs = [(a, b) for n, a in enumerate(permutation) for b in permutation[n + 1 :]]
    return sum(a > b for a, b in pairs) % 2 == 0


def running_products(table: Tensor, words: Tensor) -> Tensor:
    """words (N, T) int64 -> the product of the first t elements, for every t: (N, T) int64."""
    products = [words[:, 0]]
    for t in range(1, words.shape[1]):
        products.append(table[products[-1], words[:, t]])
    return torch.stack(products, dim=1)


def draw(table: Tensor, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` random words and their running products, (N, T) uint8 each, on the table's device."""
    generator = torch.Generator(table.device).manual_seed(seed)
    words = torch.randint(len(table), (count, length), generator=generator, device=table.device)
    return words.to(torch.uint8), running_products(table, words).to(torch.uint8)
