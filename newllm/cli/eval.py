"""`newllm eval`"""

from __future__ import annotations

import argparse
import json

import numpy as np

from newllm.cli.settings import device_settings
from newllm.cli.train import shown
from newllm.data import load_corpus, tokenise
from newllm.errors import UserError
from newllm.evaluation import evaluate, unigram_score
from newllm.prepare import run_data, training_config
from newllm.run import Run, find_run
from newllm.tokenizer import Tokenizer
from newllm.training import autocast_dtype


def run(args: argparse.Namespace) -> int:
    device = device_settings(args)
    folder = find_run(args.run)
    model, tokenizer = folder.load(device)
    counts = folder.unigram_counts(model.config.vocab_size)
    autocast = autocast_dtype(training_config(folder).precision, device)
    results = {}
    for name, tokens in _texts(args, folder, tokenizer).items():
        score = evaluate(model, tokens, autocast=autocast, progress=f"evaluating on {name}")
        results[name] = {
            "tokens": score.tokens, "loss": score.loss, "perplexity": score.perplexity,
            "unigram_perplexity": unigram_score(counts, tokens).perplexity,
        }  # fmt: skip
    if args.json:
        print(json.dumps({"run": str(folder.path), "splits": results}))
        return 0
    print(f"run {shown(folder.path)}, {model.num_parameters():,} parameters")
    print(f"{'text':<8} {'tokens':>12} {'loss':>8} {'perplexity':>12} {'unigram':>12}")
    for name, row in results.items():
        print(
            f"{name:<8} {row['tokens']:>12,} {row['loss']:>8.4f} {row['perplexity']:>12,.2f} {row['unigram_perplexity']:>12,.2f}"
        )
    return 0


def _texts(args: argparse.Namespace, folder: Run, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The tokens to score, by name."""
    if args.data is None:
        splits = run_data(folder, folder.model_config()).tokens
        standard = True
    else:
        corpus = load_corpus(args.data, args.text_field)
        splits = {
            split: tokenise(documents, tokenizer, f"tokens, {split}") for split, documents in corpus.splits.items()
        }
        standard = corpus.standard_split
    wanted = args.split or ("valid and test" if standard else "all")
    if wanted == "valid and test":
        return {split: tokens for split, tokens in splits.items() if split != "train"}
    if wanted == "all":
        return {"all": np.concatenate(list(splits.values()))}
    if wanted not in splits:
        raise UserError(f"--split {wanted}: the data has no such split; it has {', '.join(splits)}")
    return {wanted: splits[wanted]}
