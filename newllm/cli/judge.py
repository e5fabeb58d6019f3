"""`newllm judge`"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shutil
import textwrap
from typing import Any

from newllm import checkpoint
from newllm.cli.settings import SAMPLING_OPTIONS, device_settings
from newllm.cli.train import shown
from newllm.compare import contestants
from newllm.errors import UserError, arguments_are_the_users, typed_path
from newllm.judge import HUMAN, Sampling, judge, table
from newllm.model import LanguageModel
from newllm.prepare import run_data, training_config
from newllm.quality import grammar_checker
from newllm.run import Run, find_run, runs_root
from newllm.tokenizer import load_tokenizer
from newllm.training_config import compute_dtype
from newllm.weights import in_dtype


def run(args: argparse.Namespace) -> int:
    how = Sampling(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling)})
    for name, least in (("samples", 1), ("prompt_tokens", 1), ("tokens", 8), ("show", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, wanted at least {least}")
    faults = grammar_checker(required=args.grammar is True) if args.grammar is not False else None
    device = device_settings(args)
    runs = _runs(args.runs)
    models: dict[str, LanguageModel] = {}
    for name, folder in runs.items():
        model, tokenizer = folder.load(device)
        models[name] = in_dtype(model, compute_dtype(training_config(folder).precision, device))
        if tokenizer.to_json() != load_tokenizer(next(iter(runs.values())).tokenizer_file).to_json():
            raise UserError(f"{folder.path}: has another tokenizer than the first run; perplexities would not compare")
    first = next(iter(runs.values()))
    splits = run_data(first, first.model_config()).tokens
    split = args.split or ("test" if "test" in splits else "valid")
    if split not in splits:
        raise UserError(f"--split {split}: the data has no such split; it has {', '.join(splits)}")
    with arguments_are_the_users(SAMPLING_OPTIONS):
        result = judge(models, tokenizer, splits[split], how, faults)
    about = {
        "runs": {name: {"path": shown(folder.path), "parameters": models[name].num_parameters()} for name, folder in runs.items()},
        "split": split, "sampling": dataclasses.asdict(how), "grammar": "harper" if faults else None,
    }  # fmt: skip
    out = first.path if args.out is None else typed_path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(out / "judge.json", about | result)
    checkpoint.write_text(out / "judge.md", _markdown(about, result))
    for number, sample in enumerate(result["samples"][: args.show], start=1):
        print(_side_by_side(number, sample, list(models)) + "\n")
    print(table(result))
    if faults is None and args.grammar is None:
        print('grammar was not checked: that takes the extra "judge" (pip install -e ".[judge]")')
    print(f"all samples: {shown(out / 'judge.md')}, judge.json")
    return 0


def _runs(names: list[str]) -> dict[str, Run]:
    """The runs by the names tables use. One folder of a comparison stands for its two."""
    if len(names) == 1:
        for folder in (typed_path(names[0]), runs_root() / names[0]):
            if not (folder / "config.json").exists() and (folder / "transformer" / "config.json").exists():
                return {found.path.name: found for found in contestants(folder)}
    found = [find_run(name) for name in names or ["latest"]]
    labels = [run.path.name for run in found]
    if len({*labels, HUMAN}) <= len(labels):
        labels = [shown(run.path) for run in found]
    if len(set(labels)) < len(labels):
        raise UserError(f"the run {next(label for label in labels if labels.count(label) > 1)} is named twice")
    return dict(zip(labels, found, strict=True))


def _side_by_side(number: int, sample: dict[str, str], models: list[str]) -> str:
    """One prompt, and what each model wrote, in columns as wide as the terminal allows."""
    whole = shutil.get_terminal_size((120, 24)).columns
    width = max(24, (whole - 3 * (len(models) - 1)) // len(models))
    columns = [[name, "-" * len(name), *_wrapped(sample[name], width)] for name in models]
    lines = [
        " | ".join(cell.ljust(width) for cell in row).rstrip() for row in itertools.zip_longest(*columns, fillvalue="")
    ]
    return "\n".join([f"=== {number}. {' '.join(sample['prompt'].split())} ...", *lines])


def _wrapped(text: str, width: int) -> list[str]:
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return [line for paragraph in paragraphs if paragraph for line in textwrap.wrap(paragraph, width)]


def _markdown(about: dict[str, Any], result: dict[str, Any]) -> str:
    sampling = ", ".join(f"{key} {value}" for key, value in about["sampling"].items() if value is not None)
    parts = [f"# Continuations of the {about['split']} text\n", f"{sampling}.\n", table(result)]
    for number, sample in enumerate(result["samples"], start=1):
        parts.append(f"\n## {number}\n")
        for writer, text in sample.items():
            parts.append(f"**{writer}**\n\n```\n{text.strip()}\n```\n")
    return "\n".join(parts)
