"""`newllm train`"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from datetime import UTC, datetime
from pathlib import Path

import torch

from newllm import checkpoint, plots, teacher
from newllm.cli.parser import MODEL_OPTIONS, RESUME_OPTIONS, TRAINING_OPTIONS
from newllm.cli.settings import data_settings, default_name, model_settings, note_unread, training_settings
from newllm.errors import UserError, typed_path
from newllm.evaluation import bits_per_byte, evaluate, peak_memory, unigram_score
from newllm.prepare import Data, new_trainer, resumed_trainer
from newllm.prepared import is_prepared
from newllm.recipe import apply_recipe
from newllm.run import find_run, new_run
from newllm.speed import device_name
from newllm.training import Trainer

NEW_RUN_FIELDS = {"data", "text_field", "tokenizer", "vocab_size", "run", "out", "preset"}


def run(args: argparse.Namespace) -> int:
    if args.stop_after is not None and args.stop_after < 1:
        raise UserError(f"--stop-after: got {args.stop_after}, wanted at least 1")
    if args.max_minutes is not None and not args.max_minutes > 0:
        raise UserError(f"--max-minutes: got {args.max_minutes}, wanted a number above 0")
    trainer, data = _resume(args) if args.resume is not None else _begin(args)
    signal_number = trainer.train(args.stop_after, args.max_minutes)
    plots.loss_plot(trainer.run.metrics(), trainer.run.plot_file, trainer.run.path.name)
    path = shlex.quote(shown(trainer.run.path))
    if trainer.step < trainer.config.steps:
        print(f"stopped at step {trainer.step} of {trainer.config.steps}, all of it saved; go on with:")
        print(f"  newllm train --resume {path}")
        return 128 + signal_number if signal_number else 0
    summary = summarise(trainer, data)
    print_summary(summary)
    print(f"run                    {shown(trainer.run.path)}")
    print("write with it:")
    print(f"  newllm generate {shlex.quote(_a_prompt(data))} --run {path}")
    return 128 + signal_number if signal_number else 0


def _begin(args: argparse.Namespace) -> tuple[Trainer, Data]:
    init = None if args.init is None else find_run(args.init, "--init")
    base = None if init is None or args.config is not None or hasattr(args, "preset") else init.model_config()
    apply_recipe(args)
    if base is not None:
        args.preset = "classic" if base.architecture == "classic" else "tiny"  # what it trains with
    if (
        init is not None
        and not hasattr(args, "tokenizer")
        and not is_prepared(typed_path(getattr(args, "data", "builtin")))
    ):
        args.tokenizer = str(init.path)  # its embedding stands for that tokenizer's tokens
    model, config = model_settings(args, base), training_settings(args)
    teachers = [find_run(which, "--teacher") for which in args.teacher or ()]
    if teachers and not hasattr(args, "teacher_share"):
        config = dataclasses.replace(config, teacher_share=0.5)
    teacher.check(model, config, teachers)  # before the data is read
    folder = new_run(getattr(args, "run", None), getattr(args, "out", None), default_name(args))
    data = data_settings(args, model)
    trainer = new_trainer(folder, model, config, data, init, args.typed, teachers)
    note_unread(args, model)
    describe(trainer, data)
    return trainer, data


def _resume(args: argparse.Namespace) -> tuple[Trainer, Data]:
    fields = NEW_RUN_FIELDS | {field for _, field, _, _ in (*MODEL_OPTIONS, *TRAINING_OPTIONS)}
    refused = sorted(field for field in fields - set(RESUME_OPTIONS.values()) if hasattr(args, field))
    refused += [name for name in ("config", "init", "teacher") if getattr(args, name) is not None]
    if refused:
        names = ", ".join("--" + field.replace("_", "-") for field in refused)
        raise UserError(f"--resume goes on with the run's own settings; it does not take {names}")
    changes = {field: getattr(args, field) for field in RESUME_OPTIONS.values() if hasattr(args, field)}
    trainer, data = resumed_trainer(find_run(args.resume, "--resume"), **changes)
    describe(trainer, data)
    print(f"going on from step {trainer.step} of {trainer.config.steps}", flush=True)
    return trainer, data


def describe(trainer: Trainer, data: Data) -> None:
    """What is about to be trained on what, in three lines."""
    config, tokens = trainer.config, {split: f"{ids.size:,}" for split, ids in data.tokens.items()}
    split = "its own split" if data.standard_split else "divided here"
    print(
        f"data    {data.name}: {', '.join(f'{count} tokens {name}' for name, count in tokens.items())} ({split}),"
        f" {data.tokenizer.kind} vocabulary of {data.tokenizer.vocab_size:,}"
    )
    model = trainer.model.config
    kind = model.architecture + (f" (coupling {model.coupling})" if model.architecture != "transformer" else "")
    print(f"model   {kind}, {trainer.model.num_parameters():,} parameters, on {trainer.device}")
    print(
        f"run     {shown(trainer.run.path)}: {config.steps} steps of {config.tokens_per_step:,} tokens"
        f" ({config.batch_size} streams x {config.segment} x {config.grad_accum})",
        flush=True,
    )


def summarise(trainer: Trainer, data: Data) -> dict[str, object]:
    """Score the best checkpoint on whole splits, write summary.json, return it."""
    folder = trainer.run
    peak = peak_memory(trainer.device)  # before the best model joins the last one
    tensors, info = checkpoint.load(folder.best_file)
    model = trainer.weights.computing
    checkpoint.load_model(model, checkpoint.with_prefix("model", tensors), folder.best_file)
    counts = folder.unigram_counts(model.config.vocab_size)
    summary: dict[str, object] = {"steps": trainer.step, "best_step": info["step"]}
    for split in ("valid", "test"):
        if split in data.tokens:
            with trainer.uncompiled():
                score = evaluate(model, data.tokens[split], progress=f"evaluating on {split}")
            unigram = unigram_score(counts, data.tokens[split])
            summary[split] = {
                "tokens": score.tokens, "loss": score.loss, "perplexity": score.perplexity,
                "bits_per_byte": bits_per_byte(score.loss, data.tokens[split], data.tokenizer),
                "unigram_perplexity": unigram.perplexity,
            }  # fmt: skip
    summary["parameters"] = trainer.model.num_parameters()
    summary["seconds"] = round(trainer.seconds, 3)
    summary["tokens_per_s"] = round(trainer.tokens / max(trainer.seconds, 1e-9), 1)
    summary["peak_memory_bytes"] = peak
    summary["device"] = device_name(trainer.device)
    summary["torch"] = torch.__version__
    summary["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    checkpoint.write_json(folder.summary_file, summary)
    return summary


def print_summary(summary: dict[str, object]) -> None:
    print(f"trained {summary['steps']} steps in {summary['seconds']:,.0f} s, {summary['tokens_per_s']:,.0f} tokens/s")
    for split, name in (("valid", "validation"), ("test", "test")):
        if split in summary:
            figures = summary[split]
            ratio = figures["unigram_perplexity"] / figures["perplexity"]
            print(
                f"{name + ' perplexity':<22} {figures['perplexity']:,.2f}  (checkpoint of step {summary['best_step']})"
            )
            print(f"{'unigram perplexity':<22} {figures['unigram_perplexity']:,.2f}  ({ratio:.1f} times as high)")


def shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _a_prompt(data: Data) -> str:
    """The first words of the validation text that make a prompt."""
    words = data.tokenizer.decode(data.tokens["valid"][:1000].tolist()).split()
    plain = [word for word in words if any(map(str.isalpha, word)) and word.isprintable()]
    return " ".join(plain[:3]) or "The"
