"""Recall: what followed when the text stood at such a place before, looked up in tables of fixed size, and which words are recent.

For n = 1, 2, 3 a text has a table of S entries. After token x_t the place is the last n tokens; their hash names an entry, which holds
what followed the last VISITS times:

    w_t^nk = the token that followed when the same n tokens were seen for the k-th time before, k = 1 the last, or none       read
    entry(x_{t-n} ... x_{t-1}) := x_t, and what it held, but for the oldest                                                   written, before that
    c_t    = d c_{t-1} + onehot(x_t),   u_t = c_t / sum(c_t),   d = 2^(-1/100)                                                decayed counts of words

    x = E[x_t] + W [E[w_t^11] ; E[w_t^21] ; E[w_t^31]] + F[flags_t]                                what the first layer reads
    p(x_{t+1}) = (1 - sum_nk s_nk - m) softmax(logits_t) + sum_nk s_nk [x_{t+1} = w_t^nk] + m u_t[x_{t+1}]    where a model is used, not trained

flags_t are six bits: which w_t^n1 there are, and which of w_{t-1}^n1 turned out right, x_t = w_{t-1}^n1. In the last line the sums are over the
words that there are; s and m are numbers by g_t, the largest n that recalls anything (or none) and whether w_{t-1}^n1 was right: seven times
thirteen. They are not trained but set so that the validation text is likeliest (`newllm.evaluation.calibrate`): on a text it reads for the tenth
time a model needs no recall, and what it learns there of when to believe it is too little for a new one.

Reading and writing cost the same at every token. A table holds the latest S places or fewer: a place that hashes to an entry in use pushes out
what it held. What followed is kept with 14 further bits of its place's hash, so that another place that reads it finds nothing, but for one in
16,384.

Contexts are what a model makes of a text, and lose the letter of it; attention wins by looking up names and phrases that stand in its
window (docs/model.md). After the match model of Mahoney's PAQ compressors ("Adaptive weighing of context models for lossless data
compression", 2005), whose prediction is an input here instead of a vote, and the cache of Kuhn and De Mori (1990).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from newllm.config import ModelConfig
from newllm.model.common import AS_IT_IS, NONE, Embedding, Mixing

ORDERS = 3  # n from 1 to this many tokens
VISITS = 4  # k from 1 to this many times
WORDS = ORDERS * VISITS  # recalled at a token
# Of an entry: the token that followed, and a piece of its place's hash. Vocabularies beyond 2^17 take entries of 64 bits.
TOKEN_BITS, TAG_BITS = {torch.int32: 17, torch.int64: 48}, 14

# Odd multipliers of 64 bits (from the golden ratio, and of MurmurHash3's finaliser), as the signed integers that PyTorch has.
MIX, FINISH = 0x9E3779B97F4A7C15 - 2**64, 0xFF51AFD7ED558CCD - 2**64

DECAY = 2 ** (-1 / 100)  # d, a token: words of 100 tokens ago count half
TABLES = ("recall.recent", "recall.entries", "recall.tokens")  # keys of the state
CHUNK = 256  # tokens whose recent words are counted at once


def initial_tables(
    batch_size: int, config: ModelConfig, device: torch.device | str | None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The state of a text that has not begun: entries (B, ORDERS, S, VISITS) int32 or int64, the last ORDERS tokens (B, ORDERS) int64, the latest last, and
    decayed counts (B, V)."""
    entry = torch.int32 if config.vocab_size <= 2 ** TOKEN_BITS[torch.int32] else torch.int64
    return {
        "recall.recent": torch.zeros(batch_size, config.vocab_size, dtype=dtype, device=device),
        "recall.entries": torch.full((batch_size, ORDERS, config.recall, VISITS), NONE, dtype=entry, device=device),
        "recall.tokens": torch.full((batch_size, ORDERS), NONE, dtype=torch.int64, device=device),
    }


def places(text: Tensor, entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """text (B, ORDERS - 1 + L) -> of every place but the first ORDERS - 1 and every order: which entry it has (B, ORDERS, L) int64, `entries`
    where a token is missing; its tag, int64; whether no token is missing, bool."""
    L = text.shape[1] - ORDERS + 1
    hashes, known = torch.zeros_like(text[:, :L]), torch.ones_like(text[:, :L], dtype=torch.bool)
    slots, tags, real = [], [], []
    for n in range(ORDERS):
        token = text[:, ORDERS - 1 - n :][:, :L]
        hashes, known = (hashes + token + 1) * MIX, known & (token != NONE)
        mixed = (hashes ^ (hashes >> 32)) * FINISH
        tags.append((mixed >> 16) & (2**TAG_BITS - 1))
        slots.append(torch.where(known, ((mixed >> 32) & (2**31 - 1)) % entries, entries))
        real.append(known)
    return torch.stack(slots, 1), torch.stack(tags, 1), torch.stack(real, 1)


def neighbours(slots: Tensor) -> tuple[Tensor, Tensor]:
    """slots (..., L) of a text's places -> of every place the last one before it that has the same entry, and the next: (..., L) int64
    each, -1 and L where there is none."""
    L = slots.shape[-1]
    if L == 2:  # one token, as in generation: nothing to sort
        same = (slots[..., :1] == slots[..., 1:]).long()
        return torch.cat((torch.full_like(same, -1), same - 1), -1), torch.cat((2 - same, torch.full_like(same, 2)), -1)
    at = torch.arange(L, device=slots.device)
    ordered = (slots * L + at).sort(dim=-1).values  # unequal numbers, so that every sort agrees
    slot, place = ordered // L, ordered % L
    same = slot[..., 1:] == slot[..., :-1]
    before = torch.full_like(place, -1)
    after = torch.full_like(place, L)
    before[..., 1:] = torch.where(same, place[..., :-1], -1)
    after[..., :-1] = torch.where(same, place[..., 1:], L)
    return torch.empty_like(place).scatter_(-1, place, before), torch.empty_like(place).scatter_(-1, place, after)


def recall(tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Walk through tokens (B, T) int64 from a state.

    Returns w (B, T, ORDERS, VISITS) int64, NONE where nothing is recalled; whether the word that each order recalled last was right a step
    before, bool (B, T, ORDERS); and the new state.
    """
    if tokens.shape[1] == 1 and tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        return _recall_one(tokens, state)
    entries, last = state["recall.entries"], state["recall.tokens"]
    S, bits = entries.shape[2], TOKEN_BITS[entries.dtype]
    text = torch.cat((last, tokens), dim=1)  # (B, ORDERS + T)
    slots, tags, known = places(text, S)  # (B, ORDERS, 1 + T): the first is the place that the last text ended at
    follows = text[:, None, ORDERS:]  # (B, 1, T) of all places but the last
    written = (tags[..., :-1] << bits) | follows
    before, after = neighbours(slots)
    # Of every place the last VISITS before it that have its entry, -1 where there is none.
    visits = [before]
    for _ in range(VISITS - 1):
        earlier = before.gather(-1, visits[-1].clamp(min=0))
        visits.append(torch.where(visits[-1] >= 0, earlier, -1))
    visit = torch.stack(visits, dim=-1)  # (B, ORDERS, 1 + T, VISITS)
    # A place reads what those wrote, then what the table had.
    inside = visit >= 0
    row = slots[..., None].expand(*slots.shape, VISITS)
    table = torch.cat((entries, entries[:, :, :1]), dim=2)  # one row more, for places without an entry
    older = torch.arange(VISITS, device=tokens.device) - inside.sum(-1, keepdim=True)
    had = table.gather(2, row).gather(-1, older.clamp(min=0)).long()
    wrote = torch.cat((written, written[..., :1]), dim=-1).gather(-1, visit.clamp(min=0).flatten(-2)).view(visit.shape)
    read = torch.where(inside, wrote, had)
    found = known[..., None] & (read >= 0) & (read >> bits == tags[..., None])
    words = torch.where(found, read & (2**bits - 1), NONE)  # (B, ORDERS, 1 + T, VISITS)
    right = words[..., :-1, 0] == follows
    # The last to write an entry leaves it; the others, and places without one, write beyond the table.
    T = tokens.shape[1]
    leaves = torch.where(after[..., :-1] >= T, slots[..., :-1], S)
    left = torch.cat((written[..., None], read[..., :-1, : VISITS - 1]), dim=-1).to(entries.dtype)
    beyond = table.scatter_(2, leaves[..., None].expand(left.shape), left)
    new = {
        "recall.recent": count(tokens, state["recall.recent"]),
        "recall.entries": beyond[:, :, :S].contiguous(),
        "recall.tokens": text[:, -ORDERS:].contiguous(),
    }
    return words[..., 1:, :].transpose(1, 2), right.transpose(1, 2), new


def _recall_one(tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`recall` of one token (B, 1) on a CPU, in NumPy, whose small operations cost a tenth of PyTorch's."""
    entries, last = state["recall.entries"], state["recall.tokens"]
    S, bits = entries.shape[2], TOKEN_BITS[entries.dtype]
    text = torch.cat((last, tokens), dim=1)  # (B, ORDERS + 1)
    after = entries.clone()
    table, read = after.numpy(), text.numpy()
    rows, token = np.arange(read.shape[0]), read[:, -1]
    hashes, known = np.zeros((read.shape[0], 2), np.int64), True
    words = np.full((read.shape[0], 1, ORDERS, VISITS), NONE)
    right = np.zeros(words.shape[:3], np.bool_)
    for n in range(ORDERS):
        of = read[:, ORDERS - 1 - n : ORDERS + 1 - n]  # (B, 2): of the place before the token, and of the one after it
        hashes, known = (hashes + of + 1) * MIX, known & (of != NONE)
        mixed = (hashes ^ (hashes >> 32)) * FINISH
        tags, slots = (mixed >> 16) & (2**TAG_BITS - 1), ((mixed >> 32) & (2**31 - 1)) % S
        written = tags[:, 0] << bits | token
        here = known[:, 0]
        had = table[rows, n, slots[:, 0]]  # (B, VISITS), a copy
        right[:, 0, n] = here & (had[:, 0] == written)
        had = np.concatenate((written[:, None].astype(had.dtype), had[:, :-1]), axis=1)
        table[rows[here], n, slots[here, 0]] = had[here]
        found = table[rows, n, slots[:, 1]].astype(np.int64)
        there = known[:, 1, None] & (found >= 0) & (found >> bits == tags[:, 1, None])
        words[:, 0, n] = np.where(there, found & (2**bits - 1), NONE)
    new = {
        "recall.recent": count(tokens, state["recall.recent"]),
        "recall.entries": after,
        "recall.tokens": text[:, -ORDERS:].contiguous(),
    }
    return torch.from_numpy(words), torch.from_numpy(right), new


def _ages(steps: int, like: Tensor) -> Tensor:
    """What the token j counts after token i: d^(i - j) up to i, then 0. (T, T)"""
    at = torch.arange(steps, device=like.device)
    age = at[:, None] - at
    return torch.where(age >= 0, DECAY ** age.clamp(min=0).to(like.dtype), 0.0)


def count(tokens: Tensor, recent: Tensor) -> Tensor:
    """Decayed counts (B, V) after tokens (B, T)."""
    T = tokens.shape[1]
    if T == 1:
        return (recent * DECAY).scatter_add(1, tokens, recent.new_ones(tokens.shape))
    weights = DECAY ** torch.arange(T - 1, -1, -1, device=recent.device, dtype=recent.dtype)
    return (recent * DECAY**T).scatter_add(1, tokens, weights.expand(tokens.shape))


def recent_shares(tokens: Tensor, recent: Tensor, targets: Tensor | None = None) -> Tensor:
    """u_t after each of tokens (B, T), from the counts before them: of targets (B, T) alone, or of all words (B, T, V)."""
    if tokens.shape[1] == 1:
        counts = count(tokens, recent)
        total = counts.sum(1, keepdim=True)
        return (counts[:, None] if targets is None else counts.gather(1, targets)) / (
            total[..., None] if targets is None else total
        )
    pieces = []
    for start in range(0, tokens.shape[1], CHUNK):
        read = tokens[:, start : start + CHUNK]  # (B, L)
        ages = _ages(read.shape[1], recent)
        before = DECAY * ages[:, 0]  # what the counts before have left after each of them: (L,)
        total = recent.sum(1, keepdim=True) * before + ages.sum(1)  # (B, L)
        if targets is None:
            at = read[:, None].expand(-1, read.shape[1], -1)  # (B, L, L)
            counts = (recent[:, None] * before[:, None]).scatter_add(2, at, ages.expand(at.shape))
            pieces.append(counts / total[..., None])
        else:
            wanted = targets[:, start : start + CHUNK]
            counts = recent.gather(1, wanted) * before + ((wanted[..., None] == read[:, None]) * ages).sum(-1)
            pieces.append(counts / total)
        recent = count(read, recent)
    return torch.cat(pieces, dim=1)


class Pointed(NamedTuple):
    """Features x (B, T, F), and what is beside the softmax that they give: the words recalled (B, T, WORDS) int64, NONE for none, an index of the
    shares (B, T), the shares of those words and of recent words (B, T, WORDS + 1), the tokens read (B, T) and the counts (B, V) before them."""

    x: Tensor
    words: Tensor
    groups: Tensor
    shares: Tensor
    tokens: Tensor
    recent: Tensor

    def parts(self, softmax: Tensor, targets: Tensor) -> Tensor:
        """The probability that each says targets (B, T) have: the softmax, whose is given (B, T), every word recalled, recent words. (B, T, 2 + WORDS)
        float64. What the share of a word that is not there stands for is the softmax."""
        softmax = softmax.double()[..., None]
        words = torch.where(self.words == NONE, softmax, (self.words == targets[..., None]).double())
        recent = recent_shares(self.tokens, self.recent, targets).double()
        return torch.cat((softmax, words, recent[..., None]), dim=-1)

    def _split(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Shares of the words that there are (B, T, WORDS), and of recent words (B, T)."""
        shares = self.shares.to(dtype)
        return shares[..., :WORDS] * (self.words != NONE), shares[..., WORDS]

    def mixed(self, nll: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood (B, T) by the softmax -> by all of it."""
        word, recent = self._split(nll.dtype)
        u = recent_shares(self.tokens, self.recent, targets).to(nll.dtype)
        rest = torch.log1p(-word.sum(-1) - recent) - nll
        others = (word * (self.words == targets[..., None])).sum(-1) + recent * u
        return -torch.logaddexp(rest, others.log())

    def mixed_logits(self, logits: Tensor, mixing: Mixing = AS_IT_IS) -> Tensor:
        """Logits (B, T, V) of the softmax -> logarithms of probabilities by all of it.

        A temperature sharpens the softmax only: what is returned, divided by it, are the logarithms of softmax(logits / temperature) mixed
        with the shares. Sharpened with the rest, recall of what a model has just written itself would be written once more, and again; a
        `recall_share` below 1 holds it back further.
        """
        temperature, recall_share = mixing
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        word, recent = (recall_share * part for part in self._split(wide))
        others = recent[..., None] * recent_shares(self.tokens, self.recent).to(wide)
        others = others.scatter_add(-1, self.words.clamp(min=0), word)  # 0 where there is no word
        softmax = (logits.to(wide) / temperature).log_softmax(-1)
        rest = torch.log1p(-word.sum(-1) - recent)[..., None]
        return torch.logaddexp(softmax + rest, others.log()) * temperature


class Recall(nn.Module):
    """What recalled words add to the embedded tokens, and what they are of a prediction. See the formulas at the top of this file."""

    shares: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.out = nn.Linear(ORDERS * config.embed_dim, config.embed_dim, bias=False)
        self.flags = nn.Embedding(4**ORDERS, config.embed_dim)
        self.forgets = config.recall_dropout
        # s and m, where no word is recalled (s is 0), then of n = 1, 2, 3, whose last word was wrong or right.
        self.register_buffer("shares", torch.zeros(1 + 2 * ORDERS, WORDS + 1))
        nn.init.zeros_(self.out.weight)  # a model begins as one without
        nn.init.zeros_(self.flags.weight)

    def forward(
        self, tokens: Tensor, embedding: Embedding, state: dict[str, Tensor]
    ) -> tuple[Tensor, Pointed, dict[str, Tensor]]:
        """tokens (B, T) -> embedded tokens with what is recalled (B, T, E); what goes beside the features that become of them, with those
        in their place; the new state."""
        base, recalled, pointed, new = self.parts(tokens, embedding, state)
        x = base + self.out(recalled)
        return x, pointed._replace(x=x), new

    def parts(
        self, tokens: Tensor, embedding: Embedding, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Pointed, dict[str, Tensor]]:
        """What `forward` adds up, before the product: E[x] + F[flags] (B, T, E) and the recalled words' embeddings (B, T, 3 E), which are in
        the place of the features too; the new state."""
        every, right, new = recall(tokens, state)
        words = every[..., 0]  # of the last visits (B, T, ORDERS)
        if self.training and self.forgets > 0:
            words = torch.where(torch.rand(words.shape, device=words.device) < self.forgets, NONE, words)
        found = words != NONE
        # Together with the tokens: one mask of dropped words for both.
        embedded = embedding(torch.cat((tokens[..., None], words.clamp(min=0)), dim=-1))  # (B, T, 1 + ORDERS, E)
        recalled = embedded[..., 1:, :] * found[..., None]
        bits = 2 ** torch.arange(2 * ORDERS, device=tokens.device)
        flags = (torch.cat((found, right), dim=-1) * bits).sum(-1)
        base, recalled = embedded[..., 0, :] + self.flags(flags), recalled.flatten(-2)
        longest = (found * torch.arange(1, ORDERS + 1, device=tokens.device)).amax(-1)  # n, or 0
        was_right = right.gather(-1, longest.sub(1).clamp(min=0)[..., None])[..., 0]
        groups = torch.where(longest > 0, 2 * longest - 1 + was_right, 0)
        pointed = Pointed(recalled, every.flatten(-2), groups, self.shares[groups], tokens, state["recall.recent"])
        return base, recalled, pointed, new
