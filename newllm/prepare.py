"""From options to a Trainer: make a new run folder, or open an old one as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from newllm import checkpoint, teacher
from newllm.config import ModelConfig
from newllm.data import load_corpus, tokenise
from newllm.errors import UserError, typed_path
from newllm.model import LanguageModel
from newllm.prepared import is_prepared, load_prepared
from newllm.run import Run, find_run
from newllm.spelling import spelling_matrix
from newllm.tokenizer import KINDS, Tokenizer, load_tokenizer, train_tokenizer
from newllm.training import Trainer
from newllm.training_config import TrainingConfig, choose_device


@dataclass
class Data:
    """A corpus as tokens: `tokens` by split, and where they came from."""

    spec: str
    text_field: str
    name: str
    standard_split: bool  # whether the corpus came divided
    tokenizer: Tokenizer
    tokens: dict[str, np.ndarray]


def prepare_data(
    spec: str, tokenizer: str | Tokenizer | None, vocab_size: int | None = None, text_field: str = "text"
) -> Data:
    """Read a corpus and tokenise it, with a tokenizer at hand, one to be trained ("bpe", "word"; None: "bpe") or one in a
    file or run. A folder that `newllm prepare` wrote is tokenised already, and comes with its own."""
    if not spec:
        raise UserError("--data: got an empty name, wanted a file, a folder or the name of a corpus")
    named = spec == "builtin" or spec.startswith("hub:")
    if not named and is_prepared(typed_path(spec)):
        return _prepared(spec, tokenizer, vocab_size, text_field)
    corpus = load_corpus(spec, text_field)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = _tokenizer_for(tokenizer or "bpe", corpus.splits["train"], vocab_size)
    tokens = {split: tokenise(documents, tokenizer, f"tokens, {split}") for split, documents in corpus.splits.items()}
    return Data(spec, text_field, corpus.name, corpus.standard_split, tokenizer, tokens)


def _prepared(spec: str, tokenizer: str | Tokenizer | None, vocab_size: int | None, text_field: str) -> Data:
    found = load_prepared(typed_path(spec))
    if isinstance(tokenizer, Tokenizer) and tokenizer.to_json() != found.tokenizer.to_json():
        raise UserError(f"{spec}: was tokenised with another tokenizer than the model's")
    if isinstance(tokenizer, str) and tokenizer != found.tokenizer.kind:
        raise UserError(f"--tokenizer {tokenizer}: {spec} is tokenised already ({found.tokenizer.kind})")
    if vocab_size is not None and found.tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: {spec} is tokenised already, with {found.tokenizer.vocab_size} tokens"
        )
    return Data(spec, text_field, found.name, found.standard_split, found.tokenizer, found.tokens)


def _tokenizer_for(name: str, documents: list[str], vocab_size: int | None) -> Tokenizer:
    if name in KINDS:
        return train_tokenizer(name, documents, vocab_size)
    path = typed_path(name)
    if not path.exists():
        raise UserError(
            f"--tokenizer {name}: wanted {' or '.join(KINDS)}, or a tokenizer.json or run folder to take it from"
        )
    tokenizer = load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"--tokenizer {name}: has a vocabulary of {tokenizer.vocab_size} tokens,"
            f" larger than the model's --vocab-size {vocab_size}"
        )
    return tokenizer


def new_trainer(
    run: Run, model: ModelConfig, config: TrainingConfig, data: Data, init: Run | None = None, command: str = "",
    teachers: Sequence[Run] = (),
) -> Trainer:  # fmt: skip
    """Make the run folder, fill it and save a checkpoint of step 0, so that the run can be resumed from its first moment on:
    with the weights of the run `init`, where it starts from one. `teachers`: runs it learns from, where config.teacher_share is not 0.

    The model takes the tokenizer's vocabulary. A Transformer's window is the segment it is trained on where it would be
    longer: it never learns what lies further back. `command`: what was typed, for the record.
    """
    model = dataclasses.replace(model, vocab_size=data.tokenizer.vocab_size)
    if model.architecture == "transformer" and model.max_seq_len > config.segment:
        model = dataclasses.replace(model, max_seq_len=config.segment)
    threads = config.threads or torch.get_num_threads()  # sums depend on it: a resumed run must use as many
    config = dataclasses.replace(config, threads=threads)
    trainer = _trainer(run, model, config, data, teachers)
    if init is not None:
        trainer.start_from(weights_of(init, trainer.model, data.tokenizer))
    fill_run(run, model, data)
    trainer.save()
    write_config(run, model, config, data_record(data), command, init, teachers)
    return trainer


def _trainer(run: Run, model: ModelConfig, config: TrainingConfig, data: Data, teachers: Sequence[Run]) -> Trainer:
    teacher.check(model, config, teachers)
    models = teacher.load_teachers(teachers, data.tokenizer, choose_device(config.device))
    spelling = _spelling(config, data)
    return Trainer(run, model, config, data.tokens["train"], data.tokens["valid"], spelling, models)


def _spelling(config: TrainingConfig, data: Data) -> Tensor | None:
    return spelling_matrix(data.tokenizer, config.spelling) if config.spelling else None


def fill_run(run: Run, model: ModelConfig, data: Data) -> None:
    """Make the run folder, with tokenizer and token counts."""
    run.make()
    checkpoint.write_text(run.tokenizer_file, data.tokenizer.to_json())
    run.save_unigram(np.bincount(data.tokens["train"], minlength=model.vocab_size))


def data_record(data: Data) -> dict[str, str]:
    """What config.json tells of the data. A path is made absolute, so that the run can be resumed from another folder."""
    named = data.spec == "builtin" or data.spec.startswith("hub:")
    return {
        "corpus": data.spec if named else str(typed_path(data.spec).resolve()),
        "text_field": data.text_field,
    }


def weights_of(run: Run, model: LanguageModel, tokenizer: Tokenizer) -> checkpoint.Tensors:
    """The best weights of a run, for another model. Raises UserError where a tensor does not fit, or stands for other tokens."""
    named = f"--init {run.path}"
    if run.tokenizer(run.model_config()).to_json() != tokenizer.to_json():
        raise UserError(
            f"{named}: was trained with another tokenizer, its embedding stands for other tokens; give --tokenizer {run.path}"
        )
    tensors = run.weights()
    own = checkpoint.model_tensors(model)
    for name in sorted(own.keys() | tensors.keys()):
        theirs, ours = (tuple(x[name].shape) if name in x else "not there" for x in (tensors, own))
        if theirs != ours:
            raise UserError(
                f"{named}: its {name} is {theirs}, this model's {ours}; give the model options of that run, or none"
            )
    return tensors


def training_config(run: Run) -> TrainingConfig:
    """The settings a run was trained with. Raises UserError naming config.json where they make no sense."""
    try:
        return TrainingConfig.from_dict(run.config()["training"])
    except UserError as error:
        named = str(error).startswith(str(run.config_file))
        raise error if named else UserError(f"{run.config_file}: {error}") from error


def write_config(
    run: Run,
    model: ModelConfig,
    config: TrainingConfig,
    data: dict[str, str],
    command: str = "",
    init: Run | None = None,
    teachers: Sequence[Run] = (),
) -> None:
    """`command`: what was typed. `init`: for the reader; its weights are in the checkpoints. `teachers`: a run that is resumed
    asks them again."""
    content = {"model": model.to_dict(), "training": dataclasses.asdict(config), "data": data, "command": command}
    if init is not None:
        content["init"] = str(init.path.resolve())
    if teachers:
        content["teachers"] = [str(taught_by.path.resolve()) for taught_by in teachers]
    checkpoint.write_json(run.config_file, content)


def resumed_trainer(run: Run, **changes: object) -> tuple[Trainer, Data]:
    """The trainer of a run as its last checkpoint left it. `changes`: training settings that may differ (steps, device)."""
    stored = run.config()
    if "fixpoint" in stored:
        raise UserError(
            f"{run.path}: a run of newllm fixpoint; go on with newllm fixpoint --resume, or start from it with --init {run.path}"
        )
    model = run.model_config()
    config = dataclasses.replace(training_config(run), **changes)
    for stale in run.path.glob(".*.tmp"):  # what a kill in the middle of writing left
        stale.unlink()
    data = run_data(run, model)
    trainer = _trainer(run, model, config, data, [find_run(path, "--teacher") for path in stored.get("teachers", [])])
    trainer.load()
    if trainer.step > config.steps:
        raise UserError(f"--steps {config.steps}: {run.path} has already trained {trainer.step} steps")
    if changes:
        checkpoint.write_json(run.config_file, stored | {"training": dataclasses.asdict(config)})
    return trainer, data


def run_data(run: Run, model: ModelConfig) -> Data:
    """The data of a run, read again."""
    stored = run.config()["data"]
    if not isinstance(stored.get("corpus"), str) or not isinstance(stored.get("text_field"), str):
        raise UserError(f"{run.config_file}: 'data' must name a corpus and a text_field")
    return prepare_data(stored["corpus"], run.tokenizer(model), text_field=stored["text_field"])
