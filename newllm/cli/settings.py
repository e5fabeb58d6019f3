"""From parsed options to configurations."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Set
from pathlib import Path

import torch

from newllm.cli.parser import MODEL_OPTIONS, TRAINING_OPTIONS
from newllm.config import ModelConfig, preset
from newllm.errors import UserError, arguments_are_the_users, one_line, typed_path
from newllm.prepare import Data, prepare_data
from newllm.prepared import is_prepared
from newllm.training_config import MAX_THREADS, TRAINING_PRESETS, TrainingConfig, choose_device

# Arguments of newllm.generation, as they are typed.
SAMPLING_OPTIONS = {
    "max_new_tokens": "--max-tokens", "temperature": "--temperature", "top_k": "--top-k", "top_p": "--top-p", "seed": "--seed",
    "recall_share": "--recall-share",
}  # fmt: skip


def model_settings(args: argparse.Namespace, base: ModelConfig | None = None) -> ModelConfig:
    """`base`, else the preset, with the options given put over it. Raises UserError where they make no model."""
    fields = [field for _, field, _, _ in MODEL_OPTIONS]
    given = {field: getattr(args, field) for field in fields if hasattr(args, field)}
    if given.get("norm") == "none":
        given["norm"] = None
    if "hops" in given:
        given.setdefault("coupling", "hops")
    elif given.get("coupling", "hops") != "hops":
        given["hops"] = 1  # whatever the preset has
    if given.get("architecture", "newllm") != "newllm":
        given.setdefault("recall", 0)  # likewise
    typed = getattr(args, "typed_fields", frozenset())
    with arguments_are_the_users():
        try:
            model = dataclasses.replace(base or preset(getattr(args, "preset", "tiny")), **given)
        except ValueError as error:
            raise UserError(_by_option(one_line(error), args, typed)) from error
    return model


def note_unread(args: argparse.Namespace, model: ModelConfig) -> None:
    """A line on stderr for every option typed that changes nothing about this model."""
    unread = args.typed_fields & model.unread
    for flag, field, _, _ in MODEL_OPTIONS:
        if field in unread:
            print(f"newllm: note: {flag} changes nothing about this model ({_kind(model)})", file=sys.stderr)


def _by_option(message: str, args: argparse.Namespace, typed: Set[str]) -> str:
    """An error about a field of ModelConfig, as one about the option, or about the recipe that has it."""
    field = message.removeprefix("ModelConfig.").partition(" ")[0]
    flag = next((flag for flag, name, _, _ in MODEL_OPTIONS if name == field), None)
    if flag is None or not message.startswith("ModelConfig."):
        return message
    source = "" if field in typed or getattr(args, "config", None) is None else f"--config {args.config}: "
    return f"{source}{flag}: {message.removeprefix('ModelConfig.')}"


def _kind(model: ModelConfig) -> str:
    if model.architecture != "newllm":
        return f"architecture {model.architecture}"
    return f"architecture newllm, fnn_layers {model.fnn_layers}, norm {'none' if model.norm is None else model.norm}"


def training_settings(args: argparse.Namespace) -> TrainingConfig:
    fields = [field for _, field, _, _ in TRAINING_OPTIONS]
    given = {field: getattr(args, field) for field in fields if hasattr(args, field)}
    config = dataclasses.replace(TRAINING_PRESETS[getattr(args, "preset", "tiny")], **given)
    choose_device(config.device)  # a device that is not there is better said before the data is read
    return config


def data_settings(args: argparse.Namespace, model: ModelConfig) -> Data:
    """Read and tokenise what --data names."""
    spec, tokenizer = getattr(args, "data", "builtin"), getattr(args, "tokenizer", None)
    vocab_size = getattr(args, "vocab_size", None)
    if vocab_size is None and tokenizer in (None, "bpe") and not is_prepared(typed_path(spec)):
        vocab_size = model.vocab_size
    return prepare_data(spec, tokenizer, vocab_size, getattr(args, "text_field", "text"))


def default_name(args: argparse.Namespace) -> str:
    """After the recipe or the preset, and the time."""
    kind = Path(args.config).stem if args.config is not None else getattr(args, "preset", "tiny")
    return f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"


def device_settings(args: argparse.Namespace) -> torch.device:
    """The device of eval, generate and fixpoint; also sets the number of threads."""
    thread_settings(args)
    return choose_device(args.device)


def thread_settings(args: argparse.Namespace) -> None:
    if not 0 <= args.threads <= MAX_THREADS:
        raise UserError(f"--threads: got {args.threads}, wanted 0 to {MAX_THREADS}")
    if args.threads:
        torch.set_num_threads(args.threads)
