"""`newllm eval`"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from newllm.cli.settings import device_settings
from newllm.cli.train import shown
from newllm.dynamic import dynamic_losses
from newllm.errors import UserError
from newllm.evaluation import bits_per_byte, by_position, document_starts, perplexity, token_losses, unigram_score
from newllm.prepare import prepare_data, run_data, training_config
from newllm.run import Run, find_run
from newllm.tokenizer import Tokenizer
from newllm.training_config import compute_dtype
from newllm.weights import in_dtype

DYNAMIC = {"lr": 5e-5, "decay": 3e-3, "segment": 32}  # unless the options say otherwise


def run(args: argparse.Namespace) -> int:
    given = {name: getattr(args, f"dynamic_{name}") for name in DYNAMIC}
    asked = {name: value for name, value in given.items() if value is not None}
    if asked and not args.dynamic:
        raise UserError(f"--dynamic-{next(iter(asked))}: is of dynamic evaluation; give --dynamic too")
    for name, least in (("lr", "above 0"), ("decay", "at least 0"), ("segment", "at least 1")):
        value = asked.get(name, 1)
        if not (value > 0 or (name == "decay" and value == 0)):
            raise UserError(f"--dynamic-{name}: got {value}, wanted a number {least}")
    settings = DYNAMIC | asked
    device = device_settings(args)
    folder = find_run(args.run)
    trained, tokenizer = folder.load(device)
    counts = folder.unigram_counts(trained.config.vocab_size)
    dtype = compute_dtype(training_config(folder).precision, device)
    model = in_dtype(trained, dtype)
    results = {}
    for name, tokens in _texts(args, folder, tokenizer).items():
        losses = token_losses(model, tokens, progress=f"evaluating on {name}")
        results[name] = _figures(losses)
        results[name] |= {"bits_per_byte": bits_per_byte(results[name]["loss"], tokens, tokenizer)}
        results[name] |= {"unigram_perplexity": unigram_score(counts, tokens).perplexity}
        if args.by_position:
            results[name]["by_position"] = by_position(losses, document_starts(tokens, tokenizer))
        if args.dynamic:
            train = run_data(folder, trained.config).tokens["train"]
            adapted = dynamic_losses(
                trained, tokens, train, dtype=dtype, progress=f"dynamic evaluation on {name}", **settings
            )
            results[name]["dynamic"] = _figures(adapted) | settings
    if args.json:
        print(json.dumps({"run": str(folder.path), "splits": results}))
        return 0
    print(f"run {shown(folder.path)}, {trained.num_parameters():,} parameters")
    print(
        f"{'text':<8} {'tokens':>12} {'loss':>8} {'perplexity':>12} {'unigram':>12} {'dynamic':>12}"[
            : None if args.dynamic else -13
        ]
    )
    for name, row in results.items():
        dynamic = f" {row['dynamic']['perplexity']:>12,.2f}" if args.dynamic else ""
        print(
            f"{name:<8} {row['tokens']:>12,} {row['loss']:>8.4f} {row['perplexity']:>12,.2f}"
            f" {row['unigram_perplexity']:>12,.2f}{dynamic}"
        )
    for name, row in results.items() if args.by_position else ():
        print(f"\n{name}, by place in the document\n{'tokens':>20} {'scored':>12} {'loss':>8} {'perplexity':>12}")
        for place in row["by_position"]:
            span = f"{place['first']:,} to {place['last']:,}"
            print(f"{span:>20} {place['tokens']:>12,} {place['loss']:>8.4f} {place['perplexity']:>12,.2f}")
    return 0


def _figures(losses: np.ndarray) -> dict[str, Any]:
    loss = float(losses.astype(np.float64).mean())
    return {"tokens": losses.size, "loss": loss, "perplexity": perplexity(loss)}


def _texts(args: argparse.Namespace, folder: Run, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The tokens to score, by name."""
    if args.data is None:
        splits, standard = run_data(folder, folder.model_config()).tokens, True
    else:
        data = prepare_data(args.data, tokenizer, text_field=args.text_field)
        splits, standard = data.tokens, data.standard_split
    wanted = args.split or ("valid and test" if standard else "all")
    if wanted == "valid and test":
        return {split: tokens for split, tokens in splits.items() if split != "train"}
    if wanted == "all":
        return {"all": np.concatenate(list(splits.values()))}
    if wanted not in splits:
        raise UserError(f"--split {wanted}: the data has no such split; it has {', '.join(splits)}")
    return {wanted: splits[wanted]}
