"""`newllm generate`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from tqdm import tqdm

from newllm.cli.settings import SAMPLING_OPTIONS, device_settings
from newllm.errors import UserError, arguments_are_the_users
from newllm.generation import generate
from newllm.prepare import training_config
from newllm.run import find_run
from newllm.tokenizer import TokenStream
from newllm.training_config import compute_dtype
from newllm.weights import in_dtype


def run(args: argparse.Namespace) -> int:
    if args.num_samples < 1:
        raise UserError(f"--num-samples: got {args.num_samples}, wanted at least 1")
    for prompt in args.prompts:
        if not _is_unicode(prompt):
            raise UserError(f"PROMPT {prompt!r}: not UTF-8 text")
    device = device_settings(args)
    folder = find_run(args.run, "--run")
    model, tokenizer = folder.load(device)
    model = in_dtype(model, compute_dtype(training_config(folder).precision, device))
    prompts = [prompt for prompt in args.prompts or [""] for _ in range(args.num_samples)]
    # Every text begins where a text began in training: after the end of the one before.
    tokens = [[tokenizer.eos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    eos_id = tokenizer.eos_id if args.stop_at_eos else None
    with arguments_are_the_users(SAMPLING_OPTIONS):
        steps = generate(
            model, tokens, args.max_tokens, temperature=args.temperature, recall_share=args.recall_share, top_k=args.top_k, top_p=args.top_p,
            seed=args.seed, eos_id=eos_id, cuda_graph=args.cuda_graph,
        )  # fmt: skip
    # Words stand apart, bytes do not: what follows a word-level prompt is a new word.
    gap = " " if tokenizer.kind == "word" else ""
    openings = [prompt + gap if prompt and not prompt.endswith((" ", "\n")) else prompt for prompt in prompts]
    if len(prompts) == 1:
        return _stream(openings[0], steps, tokenizer.stream())
    texts = [[opening] for opening in openings]
    streams = [tokenizer.stream() for _ in prompts]
    for step in tqdm(steps, total=args.max_tokens, unit="step", disable=None, leave=False):
        for text, stream, token in zip(texts, streams, step, strict=True):
            text.append(stream.push(token))
    for number, (text, stream) in enumerate(zip(texts, streams, strict=True), start=1):
        print(f"--- {number} of {len(prompts)}")
        print("".join(text) + stream.close())
    return 0


def _is_unicode(text: str) -> bool:
    """False for a command-line argument whose bytes were no UTF-8: Python keeps them as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _stream(opening: str, steps: Iterator[list[int]], stream: TokenStream) -> int:
    """Print the text as it is made; nothing of it is kept."""
    try:
        sys.stdout.write(opening)
        for (token,) in steps:
            sys.stdout.write(stream.push(token))
            sys.stdout.flush()
        sys.stdout.write(stream.close())
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return 0
