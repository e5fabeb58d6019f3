"""`newllm prepare`"""

from __future__ import annotations

import argparse

from newllm.cli.train import shown
from newllm.errors import UserError, typed_path
from newllm.prepare import prepare_data
from newllm.prepared import Prepared, save_prepared, whole_documents


def run(args: argparse.Namespace) -> int:
    folder = typed_path(args.out)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--out {args.out}: exists and is not an empty folder")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f"--max-tokens: got {args.max_tokens}, wanted at least 1")
    given = {name: getattr(args, name) for name in ("vocab_size", "text_field") if hasattr(args, name)}
    data = prepare_data(getattr(args, "data", "builtin"), getattr(args, "tokenizer", None), **given)
    if args.max_tokens is not None:
        data.tokens["train"] = whole_documents(data.tokens["train"], data.tokenizer.eos_id, args.max_tokens)
    prepared = Prepared(data.name, data.standard_split, data.tokenizer, data.tokens)
    save_prepared(folder, prepared, compress=args.compress)
    counts = ", ".join(f"{tokens.size:,} tokens {split}" for split, tokens in data.tokens.items())
    print(f"{data.name}: {counts}, {data.tokenizer.kind} vocabulary of {data.tokenizer.vocab_size:,}")
    print(f"train on it: newllm train --data {shown(folder)}")
    return 0
