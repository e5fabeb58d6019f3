"""Distillation: a model in training is told not only the next word of the text but what trained models expect there.

    loss_t = - sum_k share q_tk log p(w_tk) - (1 - share sum_k q_tk) log p(x_{t+1})

q_t are the probabilities of the next word after x_1 ... x_t, softmax(logits / temperature), the mean over all teachers, each of which
reads the training text once, as one stream, before the first step; w_t1 ... w_tK are the likeliest K words. What those leave of the
probability goes to the word of the text. A teacher has read that text many times and is surer of it than of any other, which a
temperature above 1 makes up for; it is the teacher's alone, the one that learns is asked for plain probabilities. The teachers read the
text as it is, whatever `--noise` makes of it for the one that learns. Of a teacher with recall the softmax alone is asked: words recalled are
mixed into what the pupil says in their turn, and would count twice.

After: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (2015); that a model of the same size learns more
from itself than from the text alone: Furlanello, Lipton, Tschannen, Itti and Anandkumar, "Born-again neural networks" (2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from newllm.config import ModelConfig
from newllm.errors import UserError
from newllm.evaluation import GPU_SEGMENTS, SEGMENT, check_tokens, progress_bar
from newllm.generation import evaluating
from newllm.model import LanguageModel, State
from newllm.run import Run
from newllm.tokenizer import Tokenizer
from newllm.training_config import TrainingConfig
from newllm.weights import in_dtype

MOST_BYTES = 2**35  # of what teachers said; a text for which that is more wants fewer words


class Advice(NamedTuple):
    """Of every token of the training text what teachers expect after it: words (n, K) int32, probabilities (n, K) float16, the likeliest
    first."""

    words: Tensor
    probabilities: Tensor

    def at(self, positions: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """positions (B, T) of tokens -> words (B, T, K) int64 and their shares of the loss (B, T, K) float32."""
        return self.words[positions].long(), self.probabilities[positions].float() * share


def check(model: ModelConfig, config: TrainingConfig, teachers: Sequence[Run]) -> None:
    """Raise UserError where a share of the loss has no teacher, a teacher no share, or the model cannot be taught."""
    if config.teacher_share > 0 and not teachers:
        raise UserError(f"--teacher-share {config.teacher_share:g}: wanted --teacher RUN beside it")
    if teachers and config.teacher_share == 0:
        raise UserError("--teacher-share 0: wanted a number above 0 beside --teacher")
    if teachers and model.softmaxes > 1:
        raise UserError(f"--softmaxes {model.softmaxes}: a mixture takes no --teacher")


def load_teachers(runs: Sequence[Run], tokenizer: Tokenizer, device: torch.device) -> list[LanguageModel]:
    """The best models of these runs. Raises UserError where one was trained with another tokenizer: its words are others."""
    models = []
    for run in runs:
        model, own = run.load(device)
        if own.to_json() != tokenizer.to_json():
            raise UserError(
                f"--teacher {run.path}: was trained with another tokenizer; give --tokenizer {run.path}, or another teacher"
            )
        models.append(model)
    return models


def read(
    teachers: Sequence[LanguageModel], tokens: np.ndarray, words: int, dtype: torch.dtype, temperature: float = 1.0,
    progress: str | None = None,
) -> Advice:  # fmt: skip
    """What the mean of `teachers`, all on one device, expects after each of `tokens` (n,): the likeliest `words` words, or all there are.

    dtype: the teachers compute in. temperature: of the formula above. Raises UserError where the text does not fit a teacher, or the answer would not fit into memory.
    """
    if not teachers:
        raise ValueError("teachers: got none, wanted at least one")
    for teacher in teachers:
        check_tokens(teacher, tokens)
    K = min(words, *(teacher.config.vocab_size for teacher in teachers))
    if tokens.size * K * 6 > MOST_BYTES:
        raise UserError(
            f"--teacher-words {words}: {K} words at each of {tokens.size:,} tokens are {tokens.size * K * 6 / 2**30:.0f} GiB;"
            f" wanted at most {MOST_BYTES // (6 * tokens.size)}"
        )
    models = [in_dtype(teacher, dtype).eval() for teacher in teachers]
    device = next(models[0].parameters()).device
    advice = Advice(
        torch.empty(tokens.size, K, dtype=torch.int32, device=device),
        torch.empty(tokens.size, K, dtype=torch.float16, device=device),
    )
    stream = torch.from_numpy(tokens.astype(np.int64))[None].to(device)
    segment = SEGMENT * (GPU_SEGMENTS if device.type == "cuda" else 1)
    states: list[State | None] = [None] * len(models)
    modules = [module for model in models for module in model.modules()]
    with torch.inference_mode(), evaluating(modules), progress_bar(tokens.size, progress) as bar:
        for start in range(0, tokens.size, segment):
            piece = stream[:, start : start + segment]
            total: Tensor | float = 0.0
            for index, model in enumerate(models):
                x, states[index] = model.features(piece, states[index])
                logits = model.logits(x if isinstance(x, Tensor) else x.x)
                total = total + (logits[0].float() / temperature).softmax(-1)  # (T, V)
            likeliest = (total / len(models)).topk(K, dim=-1)
            advice.words[start : start + segment] = likeliest.indices
            advice.probabilities[start : start + segment] = likeliest.values
            bar.update(piece.shape[1])
    return advice
