"""What models write, measured beside what people wrote: continuations of held-out prompts, and who finds which likely.

Every model goes on from the same prompts at the same seeds. All continuations, and the text that does follow the prompts,
are measured (newllm.quality) and scored by every model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from newllm.errors import UserError
from newllm.generation import evaluating, generate
from newllm.model import LanguageModel
from newllm.quality import figures, readable
from newllm.tokenizer import Tokenizer

HUMAN = "human"
ROWS = 16  # texts written at a time: as many as the fused decoder takes
REACH = 512  # tokens that a prompt may be moved on to begin where a line does

# Figure -> what a table calls it, and how it is printed.
MEASURES = {
    "distinct_1": ("distinct words", "{:.3f}"),
    "distinct_2": ("distinct pairs", "{:.3f}"),
    "distinct_3": ("distinct triples", "{:.3f}"),
    "repeated": ("4-grams repeated within 100 words", "{:.2%}"),
    "longest_repeat": ("longest span that recurs, words", "{:.1f}"),
    "names": ("names introduced per 100 words", "{:.2f}"),
    "names_again": ("of them mentioned again", "{:.1%}"),
    "names_span": ("words from first to last mention", "{:.1f}"),
    "names_longest": ("the longest such span of a text", "{:.1f}"),
    "faults": ("faults of grammar per 1,000 words", "{:.2f}"),
    "words": ("words", "{:.1f}"),
}


@dataclass(frozen=True)
class Sampling:
    """How many texts are written, and how."""

    samples: int = 16
    prompt_tokens: int = 32
    tokens: int = 256
    temperature: float = 0.8
    recall_share: float = 0.5
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


def choose_prompts(tokens: np.ndarray, tokenizer: Tokenizer, how: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Prompts (N, P) from all over the tokens (n,), from the start of a line where one is near, and what follows (N, L)."""
    P, L = how.prompt_tokens, how.tokens
    last = tokens.size - P - L
    if last < how.samples - 1:
        raise UserError(
            f"{tokens.size} tokens of text are too few for --samples {how.samples} of --prompt-tokens {P} and --tokens {L}"
        )
    starts = []
    for start in np.linspace(0, last, how.samples).astype(int):
        before = tokens[start : min(start + REACH, last)].tolist()
        ends = (k + 1 for k, token in enumerate(before) if tokenizer.decode([token]).endswith("\n"))
        starts.append(start + (next(ends, 0) if start else 0))
    pieces = np.stack([tokens[start : start + P + L] for start in starts])
    return pieces[:, :P].astype(np.int64), pieces[:, P:].astype(np.int64)


def write(model: LanguageModel, prompts: np.ndarray, eos_id: int, how: Sampling, progress: str | None) -> np.ndarray:
    """Continuations (N, L) of prompts (N, P); text n is drawn with the seed how.seed + n."""
    written = []
    with tqdm(total=len(prompts) * how.tokens, desc=progress, unit="token", leave=False, disable=None) as bar:
        for first in range(0, len(prompts), ROWS):
            rows = [[eos_id, *prompt] for prompt in prompts[first : first + ROWS].tolist()]
            steps = generate(
                model, rows, how.tokens, temperature=how.temperature, recall_share=how.recall_share, top_k=how.top_k, top_p=how.top_p,
                seed=how.seed + first,
            )  # fmt: skip
            columns = []
            for step in steps:
                columns.append(step)
                bar.update(len(rows))
            written.append(np.array(columns, np.int64).T)
    return np.concatenate(written)


def score(model: LanguageModel, prompts: np.ndarray, texts: np.ndarray, eos_id: int) -> list[float]:
    """Mean negative log-likelihood of each text (N, L) after its prompt (N, P), in nats per token."""
    device = next(model.parameters()).device
    whole = np.concatenate((np.full((len(prompts), 1), eos_id), prompts, texts), axis=1)
    losses: list[float] = []
    with torch.inference_mode(), evaluating(model.modules()):
        for rows in torch.from_numpy(whole).to(device).split(ROWS):
            x, _ = model.features(rows[:, :-1])
            nll = model.nll(x, rows[:, 1:])[:, prompts.shape[1] :].float()  # (B, L)
            losses += nll.mean(dim=1).tolist()
    return losses


def judge(
    models: dict[str, LanguageModel], tokenizer: Tokenizer, tokens: np.ndarray, how: Sampling,
    faults: Callable[[str], int] | None,
) -> dict[str, Any]:  # fmt: skip
    """Let every model write on from places of `tokens` (n,), held-out text, and measure what it wrote.

    Returns {"figures": {writer: {figure: {"mean", "error", "texts"}}}, "perplexity": {writer: {model: ...}},
    "samples": [{"prompt", writer: text}]}; writers are `HUMAN` and the names of the models. `error` is the standard error
    over texts, None of a single one. Raises UserError where the text is too short.
    """
    prompts, human = choose_prompts(tokens, tokenizer, how)
    eos_id = tokenizer.eos_id
    texts = {HUMAN: human}
    for name, model in models.items():
        texts[name] = write(model, prompts, eos_id, how, f"{name} writes")

    def read(ids: np.ndarray) -> str:
        return readable(tokenizer.decode(ids.tolist()), tokenizer.kind)

    openings = [read(prompt) for prompt in prompts]
    shown = {writer: [read(text) for text in rows] for writer, rows in texts.items()}
    measured = {
        writer: [figures(text, opening, faults) for text, opening in zip(rows, openings, strict=True)]
        for writer, rows in shown.items()
    }
    return {
        "figures": {
            writer: {key: _mean([row[key] for row in rows if row[key] is not None]) for key in MEASURES}
            for writer, rows in measured.items()
        },
        "perplexity": {
            writer: {name: _perplexity(score(model, prompts, rows, eos_id)) for name, model in models.items()}
            for writer, rows in texts.items()
        },
        "samples": [
            {"prompt": opening, **{writer: shown[writer][n] for writer in shown}} for n, opening in enumerate(openings)
        ],
    }


def _mean(values: list[float]) -> dict[str, Any] | None:
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "error": error, "texts": len(values)}


def _perplexity(losses: list[float]) -> dict[str, Any]:
    """The error is that of the mean loss, carried through the exponential."""
    loss = _mean(losses)
    perplexity = math.exp(min(loss["mean"], 700.0))
    error = None if loss["error"] is None else perplexity * loss["error"]
    return {"mean": perplexity, "error": error, "texts": loss["texts"]}


def table(result: dict[str, Any]) -> str:
    """Markdown: a line per figure, a column per writer, means and their standard errors."""
    writers = list(result["figures"])
    lines = [["", *writers]]
    for model in result["perplexity"][HUMAN]:
        row = [result["perplexity"][writer][model] for writer in writers]
        lines.append([f"perplexity to {model}", *(_cell(value, "{:.2f}") for value in row)])
    for key, (label, form) in MEASURES.items():
        row = [result["figures"][writer][key] for writer in writers]
        if any(row):
            lines.append([label, *(_cell(value, form) for value in row)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]  # fmt: skip
    rule = "|" + "|".join("-" * (width + 1) + ("-" if k == 0 else ":") for k, width in enumerate(widths)) + "|"
    return "\n".join([shown[0], rule, *shown[1:]])


def _cell(value: dict[str, Any] | None, form: str) -> str:
    if value is None:
        return "-"
    error = "" if value["error"] is None else f" ± {form.format(value['error'])}"
    return form.format(value["mean"]) + error
