"""Writing text: sample one token after another from a model, at constant memory.

Every prompt is read alone, in pieces, and only then do the states join in one batch; and every row draws from a
generator of its own. So a row of a batch gives what its prompt gives alone: row r of `seed` equals a single prompt of
seed + r.

On a GPU the whole step, sampling included, is one CUDA graph (newllm.graph_generation): between tokens the host does nothing
but launch it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from newllm.model import LanguageModel, State, stack_states
from newllm.model.common import AS_IT_IS, Mixing

PREFILL_CHUNK = 256  # tokens of the prompt read at a time: bounds the memory of long prompts


def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_id: int | None = None,
    recall_share: float = 1.0,
    cuda_graph: bool = True,
) -> Iterator[list[int]]:
    """Yield, step after step, the next token of every prompt.

    prompts: token ids, at least one each, of any lengths. temperature 0 takes the most probable token. top_k keeps the
    k most probable tokens, top_p of those the fewest whose probabilities sum to at least top_p. seed=None draws a seed
    from PyTorch's global generator. A row that has produced eos_id yields eos_id from there on; generation ends after
    max_new_tokens steps or when every row has ended. recall_share, from 0 to 1, is how much of its share of a prediction recall has: words that a model
    has written itself say less of what comes than those that people wrote (docs/model.md); it matters to models with recall alone.

    `cuda_graph`: on a GPU, generate in a CUDA graph, several steps ahead of what is yielded; the same texts but for roundings,
    because the fused kernels add in another order. Mixtures of softmaxes, more than 16 prompts, and as many as do not fit
    into the GPU's shared memory (16 of a very wide model) go step by step.

    Sampling is done in float32. The model is in eval mode while it computes and as it was in between. Raises ValueError
    naming the argument, at the call, before any token.
    """
    _check_arguments(model, prompts, max_new_tokens, temperature, top_k, top_p, seed, eos_id, recall_share)
    if seed is None:
        seed = int(torch.randint(2**48, ()))
    device = next(model.parameters()).device
    generators = [torch.Generator(device).manual_seed(seed + row) for row in range(len(prompts))]
    options = Sampling(temperature, top_k, top_p, eos_id, recall_share)
    if cuda_graph and device.type == "cuda" and max_new_tokens > 1:
        from newllm.graph_generation import graph_steps  # not at the top: it imports this file

        return graph_steps(model, prompts, max_new_tokens, options, generators)
    return eager_steps(model, prompts, max_new_tokens, options, generators)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: see `generate`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    eos_id: int | None = None
    recall_share: float = 1.0

    @property
    def mixing(self) -> Mixing:
        """What the logits are computed for; temperature 0 takes the likeliest as they are."""
        return Mixing(self.temperature if self.temperature > 0 else 1.0, self.recall_share)


def eager_steps(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    options: Sampling,
    generators: list[torch.Generator],
) -> Iterator[list[int]]:
    """Step after step, each through the model as it is."""
    eos_id = options.eos_id
    tokens: list[int] = []  # the last step's, one per row
    state: State | None = None
    modules = list(model.modules())  # walking the tree anew would be a tenth of a small model's step
    for _ in range(max_new_tokens):
        # Modes are entered afresh for each step: a suspended generator must not leave them on in its caller's code.
        with torch.inference_mode(), evaluating(modules):
            if state is None:
                logits, state = prefill(model, prompts, options.mixing)  # (B, V)
            else:
                logits, state = model(torch.tensor(tokens, device=logits.device)[:, None], state, options.mixing)
                logits = logits[:, 0]
            drawn = sample(logits, options.temperature, options.top_k, options.top_p, generators).tolist()
        # A row that has ended goes on being fed eos_id: no text depends on it any more.
        ended = [bool(tokens) and tokens[row] == eos_id for row in range(len(prompts))]
        tokens = [eos_id if over else token for over, token in zip(ended, drawn, strict=True)]
        yield list(tokens)
        if all(token == eos_id for token in tokens):
            return


def prefill(model: LanguageModel, prompts: list[list[int]], mixing: Mixing = AS_IT_IS) -> tuple[Tensor, State]:
    """Read every prompt, alone: (logits after its last token (B, V), states of all prompts as one)."""
    device = next(model.parameters()).device
    rows, states = [], []
    for prompt in prompts:
        state = None
        for chunk in torch.tensor([prompt], device=device).split(PREFILL_CHUNK, dim=1):
            logits, state = model(chunk, state, mixing)
        rows.append(logits[:, -1])
        states.append(state)
    return torch.cat(rows), stack_states(states)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generators: list[torch.Generator]
) -> Tensor:
    """logits (B, V) -> tokens (B,), row r drawn with generators[r]. Raises ValueError on NaN or +inf."""
    if not sane(logits).all():
        raise ValueError(BROKEN)
    return draw(logits, temperature, top_k, top_p, generators)


BROKEN = "the model's logits are NaN or infinite: its weights or its state are broken"


def sane(logits: Tensor) -> Tensor:
    """False where a logit is NaN or +inf, elementwise."""
    return logits < math.inf


def draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generators: list[torch.Generator]
) -> Tensor:
    """`sample` of sane logits, without a look at them from the host: it can be captured in a CUDA graph.

    A draw is a race of exponential clocks, token k's of rate p_k: the first to ring is k with probability p_k.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = distribution(logits, temperature, top_k, top_p)
    return (probs / clocks(probs, generators)).argmax(dim=-1)


def clocks(like: Tensor, generators: list[torch.Generator]) -> Tensor:
    """When clocks of rate 1 ring, (B, V) float32 as many as `like` has elements, row r's by generators[r]."""
    times = torch.empty_like(like, dtype=torch.float32)
    for row, generator in zip(times, generators, strict=True):
        row.exponential_(generator=generator)
    return times


def distribution(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """The probabilities (B, V) float32 that tokens are drawn from: logits (B, V) tempered, then top-k, then top-p.

    Ties at the border of top-k or top-p go to the lower token id, so exactly k tokens (or the fewest) are kept.
    """
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / held(
        temperature
    )  # the maximum first: no overflow however cold
    probs = logits.softmax(dim=-1)
    if top_k is None and top_p is None:
        return probs
    descending, order = probs.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        descending[:, top_k:] = 0
        descending /= descending.sum(dim=-1, keepdim=True)
    if top_p is not None:
        before = descending.cumsum(dim=-1) - descending  # mass of the more probable tokens: 0 for the first
        descending[before >= top_p] = 0
        descending /= descending.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, order, descending)


def held(temperature: float) -> float:
    """As far as float32 holds it: 0 / 0 otherwise."""
    return min(max(temperature, 1e-37), 1e37)


@contextlib.contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode inside; afterwards every module's mode as it was."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_arguments(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    eos_id: int | None,
    recall_share: float,
) -> None:
    vocab_size = model.config.vocab_size
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise ValueError(f"prompts: got {prompts!r}, wanted a list of at least one prompt")
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, (list, tuple)) or not prompt:
            raise ValueError(f"prompts[{row}]: got {prompt!r}, wanted a list of at least one token id")
        for token in prompt:
            if not _is_int(token) or not 0 <= token < vocab_size:
                raise ValueError(f"prompts[{row}]: got token {token!r}, wanted ids from 0 to {vocab_size - 1}")
    if not _is_int(max_new_tokens) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, wanted an integer of at least 0")
    if not _is_number(temperature) or temperature < 0:
        raise ValueError(f"temperature: got {temperature!r}, wanted a finite number of at least 0")
    if not _is_number(recall_share) or not 0 <= recall_share <= 1:
        raise ValueError(f"recall_share: got {recall_share!r}, wanted a number from 0 to 1")
    if top_k is not None and (not _is_int(top_k) or top_k < 1):
        raise ValueError(f"top_k: got {top_k!r}, wanted None or an integer of at least 1")
    if top_p is not None and (not _is_number(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p: got {top_p!r}, wanted None or a number in (0, 1]")
    if seed is not None and (not _is_int(seed) or not 0 <= seed < 2**63):
        raise ValueError(f"seed: got {seed!r}, wanted None or an integer from 0 to 2**63 - 1")
    if eos_id is not None and (not _is_int(eos_id) or not 0 <= eos_id < vocab_size):
        raise ValueError(f"eos_id: got {eos_id!r}, wanted None or an id from 0 to {vocab_size - 1}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
