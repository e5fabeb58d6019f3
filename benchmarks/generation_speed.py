"""Speed of generation on the device at hand: `python benchmarks/generation_speed.py [--presets 40m 100m 1b] [--results FILE]`.

Times steps of the decoders that `newllm generate` runs, the draw included (the likeliest token), on random weights in
bfloat16 (float32 on a CPU, where the model runs step by step):

    newllm         the preset, whose state is of one size however long the text
    transformer    the baseline with as many parameters, its cache full with --contexts tokens

With --long N also one text of N tokens, drawn as `newllm generate` draws them: tokens/s and memory at 1k, 4k, 16k ... N tokens.

Beside tokens/s: what share of a step the weights alone must take, their bytes over the rate at which this device reads memory,
measured in the same run. `python benchmarks/report.py FILE` prints a results file again and draws it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import program_tables
import report
import torch
from tqdm import tqdm

from newllm.config import PRESETS, ModelConfig, preset, transformer_like
from newllm.errors import UserError, arguments_are_the_users, one_line
from newllm.generation import Sampling, generate
from newllm.model import LanguageModel, build_model, state_bytes
from newllm.training_config import choose_device

READ_BYTES = 2**31  # far more than any cache
WARM_UP = 2  # blocks


def read_gbps(device: torch.device) -> float:
    """How fast memory can be read here: the best of sums over a large tensor."""
    x = torch.zeros(READ_BYTES // 4 if device.type == "cuda" else READ_BYTES // 32, device=device)
    seconds = []
    for _ in range(8):
        begin = time.perf_counter()
        x.amax().item()
        seconds.append(time.perf_counter() - begin)
    if device.type == "cuda":  # without the host
        seconds = _cuda_seconds(lambda: x.amax(), 8)
    return x.numel() * 4 / min(seconds) / 1e9


def _cuda_seconds(run: Callable[[], Any], times: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [events[n].elapsed_time(events[n + 1]) / 1e3 for n in range(times)]


def weight_bytes(model: LanguageModel) -> int:
    """Of everything a step reads in full: all but an embedding that is not the output matrix too."""
    unread = 0 if model.head.weight is model.embedding.weight else model.embedding.weight.numel()
    return (model.num_parameters() - unread) * model.head.weight.element_size()


def full_cache(model: LanguageModel, context: int, batch: int) -> dict[str, torch.Tensor]:
    """A state of the Transformer, full but for the token to come."""
    state = {
        key: torch.zeros(batch, *value.shape[1:], dtype=value.dtype, device=value.device)
        for key, value in model.initial_state(1).items()
    }
    state["position"] += context - 1
    for key, value in state.items():
        if value.dim() == 4:
            state[key] = value.new_zeros(value.shape[0], value.shape[1], context - 1, value.shape[3])
    return state


class DoesNotFit(Exception):
    """A configuration that has no decoder."""


def cuda_steps(model: LanguageModel, batch: int, context: int | None, blocks: int) -> tuple[list[float], int]:
    """(seconds of a step, block after block; bytes of the state)."""
    from newllm.graph_generation import BLOCK, StepGraph
    from newllm.model.decoding import make_decoder

    decoder = make_decoder(model, batch)
    if decoder is None:
        raise DoesNotFit(f"no decoder for {batch} texts of this model; newllm generate goes step by step")
    if context is not None:
        decoder.position.fill_(context)  # the cache is full: every step reads all of it
    step = StepGraph(decoder, Sampling(temperature=0), [])
    step.capture()
    step.start(torch.zeros(batch, dtype=torch.int64, device=decoder.tokens.device))
    _cuda_seconds(step.run_block, WARM_UP)
    seconds = [block / BLOCK for block in _cuda_seconds(step.run_block, blocks)]
    if context is None:
        return seconds, state_bytes(decoder.state())
    return seconds, sum(x.numel() * x.element_size() for x in (*decoder.keys, *decoder.values))


def eager_steps(model: LanguageModel, batch: int, context: int | None, blocks: int) -> tuple[list[float], int]:
    """The same through the model, for CPUs; a block is one step."""
    state = None if context is None else full_cache(model, context, batch)
    tokens = torch.zeros(batch, 1, dtype=torch.int64)
    seconds = []
    for _ in range(WARM_UP + blocks):
        begin = time.perf_counter()
        logits, state = model(tokens, state)
        tokens = logits[:, -1:].argmax(dim=-1)
        seconds.append(time.perf_counter() - begin)
    return seconds[WARM_UP:], state_bytes(state)


def measure(
    name: str, config: ModelConfig, batch: int, context: int | None, device: torch.device, blocks: int, rate: float
) -> dict[str, Any]:
    run: dict[str, Any] = {"model": name, "batch": batch, "context": context}
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.inference_mode(), torch.device(device):
            model = build_model(config).to(torch.bfloat16 if cuda else torch.float32).eval()
            seconds, state = (cuda_steps if cuda else eager_steps)(model, batch, context, blocks)
        median = statistics.median(seconds)
        bound = weight_bytes(model) / rate / 1e9
        run |= {
            "parameters": model.num_parameters(), "weight_bytes": weight_bytes(model), "state_bytes": state,
            "median_ms": median * 1e3, "min_ms": min(seconds) * 1e3, "tokens_per_s": batch / median,
            "percent_of_bound": 100 * bound / median,
            "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        }  # fmt: skip
    except Exception as error:  # out of memory: the other configurations are still worth having
        run["failure"] = f"{type(error).__name__}: {one_line(error)[:200]}"
    return run


def long_text(name: str, config: ModelConfig, tokens: int, device: torch.device) -> list[dict[str, Any]]:
    """One text, by `generate` at temperature 1: at every mark tokens/s since the mark before, and the bytes that are allocated."""
    cuda = device.type == "cuda"
    marks = sorted({*(1024 * 4**n for n in range(16) if 1024 * 4**n < tokens), tokens})
    rows, written = [], 0
    with torch.device(device):
        model = build_model(config).to(torch.bfloat16 if cuda else torch.float32).eval()
    steps = generate(model, [[0]], tokens, temperature=1.0, seed=0)
    next(steps)  # the graph is captured before the first token is there
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    begin, at = time.perf_counter(), 1
    bar = tqdm(total=tokens, initial=1, unit="token", unit_scale=True, leave=False, disable=None)
    for written, _ in enumerate(steps, 2):
        if written % 1024 == 0:  # seldom: this is timed
            bar.update(1024)
        if written in marks:
            now = time.perf_counter()
            memory = (
                (torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)) if cuda else (None, None)
            )
            rows.append(
                {"preset": name, "tokens": written, "tokens_per_s": (written - at) / (now - begin),
                 "allocated_bytes": memory[0], "peak_bytes": memory[1]}
            )  # fmt: skip
            begin, at = now, written
    bar.close()
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser("generation_speed", __doc__)
    parser.add_argument("--presets", nargs="+", default=["40m", "100m", "1b"], help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], metavar="B", help="texts side by side")
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 16384, 65536], metavar="T",
                        help="tokens in the Transformer's cache; none: leave the Transformer out")  # fmt: skip
    parser.add_argument("--blocks", type=int, default=20, metavar="N", help="timed blocks of 16 steps (default: 20)")
    parser.add_argument("--long", type=int, metavar="N", help="write one text of N tokens with each preset, too")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="write the figures to this JSON file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        device = choose_device(args.device)
        with arguments_are_the_users():
            models = {name: preset(name) for name in args.presets}
        if min(*args.batches, *args.contexts, args.blocks) < 1:
            raise UserError("--batches, --contexts, --blocks: wanted numbers of at least 1")
        if args.long is not None and args.long < 1024:
            raise UserError(f"--long {args.long}: wanted at least 1024 tokens")
        if args.results and not args.results.parent.is_dir():
            raise UserError(f"--results {args.results}: no such folder {args.results.parent}")
    except ValueError as error:
        return command_line.refuse("generation_speed", error)
    rate = read_gbps(device)
    content: dict[str, Any] = {
        **report.environment(), "command": command_line.typed("generation_speed", arguments), "read_gbps": rate, "generation": [],
    }  # fmt: skip

    def keep() -> None:
        if args.results:
            report.save(args.results, content)

    for name, model in models.items():
        for batch in args.batches:
            baseline = transformer_like(model)
            configurations = [("newllm", model, None)] + [
                ("transformer", dataclasses.replace(baseline, max_seq_len=context), context)
                for context in args.contexts
            ]
            for kind, config, context in configurations:
                print(f"{name}, {kind}, batch {batch}, context {context} ...", file=sys.stderr, flush=True)
                run = measure(kind, config, batch, context, device, args.blocks, rate)
                content["generation"].append({"preset": name, **run})
                keep()
    for name, model in models.items() if args.long else ():
        print(f"{name}, a text of {args.long} tokens ...", file=sys.stderr, flush=True)
        content.setdefault("long", []).extend(long_text(name, model, args.long, device))
        keep()
    print(program_tables.generation_table(content))
    failures = [run["failure"] for run in content["generation"] if "failure" in run]
    return 1 if any("OutOfMemory" not in why and DoesNotFit.__name__ not in why for why in failures) else 0


if __name__ == "__main__":
    sys.exit(main())
