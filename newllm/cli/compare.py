"""`newllm compare`"""

from __future__ import annotations

import argparse
import shlex

from newllm import compare
from newllm.cli.parser import MODEL_OPTIONS, TRAINING_OPTIONS
from newllm.cli.settings import data_settings, default_name, model_settings, note_unread, training_settings
from newllm.cli.train import NEW_RUN_FIELDS, shown
from newllm.errors import UserError, typed_path
from newllm.recipe import apply_recipe
from newllm.run import Run, new_run, runs_root


def run(args: argparse.Namespace) -> int:
    folder = _interrupted(args) if args.resume is not None else _prepared(args)
    for contestant in compare.contestants(folder.path):
        print(f"\n=== {contestant.path.name}", flush=True)
        code = compare.train(contestant)
        if code:
            print(f"go on with: newllm compare --resume {shlex.quote(shown(folder.path))}")
            return code
    rows = compare.report(folder.path)
    print(f"\n{compare.table(rows)}\n")
    print(f"unigram perplexity  {rows[0]['unigram_perplexity']:,.2f}")
    print(f"figures and plot    {shown(folder.path)}/compare.json, compare.png")
    return 0


def _prepared(args: argparse.Namespace) -> Run:
    if args.minutes is not None and not args.minutes > 0:
        raise UserError(f"--minutes: got {args.minutes}, wanted a number above 0")
    if args.minutes is not None and hasattr(args, "steps"):
        raise UserError("--minutes and --steps both say how long to train; give one of them")
    apply_recipe(args)
    model, config = model_settings(args), training_settings(args)
    compare.check(model)  # before the data is read
    if args.transformer_recall and model.recall == 0:
        raise UserError("--transformer-recall: the model that it would have the tables of has none; give --recall N")
    if config.teacher_share > 0:
        raise UserError(
            f"--teacher-share {config.teacher_share:g}: a comparison has no teachers; train both with newllm train --teacher"
        )
    folder = new_run(getattr(args, "run", None), getattr(args, "out", None), f"compare-{default_name(args)}")
    data = data_settings(args, model)
    compare.prepare(folder, model, config, data, args.typed, args.minutes, args.transformer_recall)
    note_unread(args, model)  # nor about the Transformer, whose shape follows from the model
    return folder


def _interrupted(args: argparse.Namespace) -> Run:
    fields = NEW_RUN_FIELDS | {field for _, field, _, _ in (*MODEL_OPTIONS, *TRAINING_OPTIONS)}
    refused = sorted(field for field in fields if hasattr(args, field))
    refused += [field for field in ("config", "minutes") if getattr(args, field) is not None]
    refused += ["transformer_recall"] if args.transformer_recall else []
    if refused:
        names = ", ".join("--" + field.replace("_", "-") for field in refused)
        raise UserError(f"--resume goes on with the comparison's own settings; it does not take {names}")
    if not args.resume:
        raise UserError("--resume: got an empty name, wanted that of a comparison")
    named = runs_root() / args.resume
    return Run(named if named.is_dir() else typed_path(args.resume))
