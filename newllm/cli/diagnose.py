"""`newllm diagnose`"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from newllm.cli.settings import thread_settings
from newllm.cli.train import shown
from newllm.data import load_corpus, tokenise
from newllm.diagnosis import TOLERANCE, Diagnosis, diagnose
from newllm.errors import UserError
from newllm.evaluation import check_tokens
from newllm.plots import diagnosis_plot
from newllm.prepare import run_data
from newllm.run import find_run


def run(args: argparse.Namespace) -> int:
    if args.tokens < 32:
        raise UserError(f"--tokens {args.tokens}: wanted at least 32")
    thread_settings(args)
    folder = find_run(args.run)
    model, tokenizer = folder.load(torch.device("cpu"))  # differences are followed in float64, which no GPU kernel does
    if args.data is None:
        tokens = run_data(folder, folder.model_config()).tokens["valid"]
    else:
        corpus = load_corpus(args.data, args.text_field)
        tokens = tokenise(next(iter(corpus.splits.values())), tokenizer, "tokens")
    tokens = tokens[: args.tokens]
    check_tokens(model, tokens)
    found = diagnose(model, torch.from_numpy(tokens.astype("int64")), progress=True)
    plot = folder.path / "diagnose.png"
    diagnosis_plot([one.to_dict() for one in found], plot, f"{folder.path.name}, {tokens.size:,} tokens")
    if args.json:
        print(json.dumps({"run": str(folder.path), "tokens": int(tokens.size), "cells": [x.to_dict() for x in found]}))
        return 0
    print(f"run {shown(folder.path)}, {tokens.size:,} tokens of text")
    for one in found:
        print("\n" + "\n".join(_lines(one)))
    print(f"\nplots: {shown(plot)}")
    return 0


def _lines(one: Diagnosis) -> list[str]:
    def steps(count: int | None) -> str:
        return f"{count}" if count is not None else f"more than {one.steps}"

    kind = "differences fade" if one.lyapunov < 0 else "differences grow: chaotic"
    horizon = ", ".join(f"{steps(count)} to {level}" for level, count in one.horizon.items())
    lines = [
        f"{one.layer}",
        f"  largest Lyapunov exponent  {one.lyapunov:+.4f} nats per step ({kind})",
        f"  memory horizon             steps until another start is forgotten: {horizon}",
        f"  contexts                   effective rank {one.effective_rank:.1f}, participation ratio {one.participation:.1f}"
        f" of {len(one.variances)} dimensions",
    ]
    for name, row in one.gates.items():
        spread = ", ".join(f"{key} {row[key]:.3f}" for key in ("10%", "50%", "90%"))
        lines.append(f"  {name:<26} mean {row['mean']:.3f}; {spread}; saturated {row['saturated']:.1%}")
    return lines + _forgetting(one.forgetting) + _passes(one.passes)


def _forgetting(rows: list[dict[str, float]]) -> list[str]:
    lines = ["  left of a wrong start, median and worst place of the text, by steps since"]
    lines.append(f"  {'':>8}" + "".join(f"{row['steps']:>12}" for row in rows))
    return lines + [f"  {name:>8}" + "".join(f"{row[name]:>12.1e}" for row in rows) for name in ("median", "worst")]


def _passes(rows: list[dict[str, Any]]) -> list[str]:
    chunks = sorted({row["chunk"] for row in rows})
    found = {(row["T"], row["chunk"]): f"{row['passes']} of {row['chunks']}" for row in rows}
    lines = [f"  passes to {TOLERANCE:g}, of as many as are exact, by length T of the text and steps of a chunk"]
    lines.append(f"  {'T':>8}" + "".join(f"{chunk:>12}" for chunk in chunks))
    lengths = sorted({row["T"] for row in rows})
    return lines + [f"  {T:>8}" + "".join(f"{found.get((T, chunk), ''):>12}" for chunk in chunks) for T in lengths]
