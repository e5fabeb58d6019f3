"""Training speed on the device at hand: `python benchmarks/train_speed.py [--preset 40m | --config RECIPE] [--results FILE]`.

Times steps of the Trainer that `newllm train` runs (data, loss, backward, clipping, AdamW) on random tokens:

    newllm                 the preset, coupling "none", or the recipe, on the kernels that `auto` takes
    transformer            the baseline with as many parameters, as `newllm compare` builds it
    newllm, reference      the same model on the reference backend: plain PyTorch, a Python loop over time

each launched kernel by kernel, as the CUDA graphs that training uses on a GPU, and as graphs of layers that torch.compile
made (the reference only the first way: its loop would become a graph of as many steps); medians over the steps after a
warm-up, and the share of the GPU's matrix-product rate that the model's products make up (MFU). `--profile` adds where the
time goes. Results are written after every run.

`--contexts 1024 ... 131072` instead: one stream of so many tokens a step, New-LLM and a Transformer that sees all of them, tokens/s
and peak memory; as a CUDA graph where that fits into memory, else kernel by kernel.
`python benchmarks/report.py FILE` prints a results file again.
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
import numpy as np
import program_tables
import report
import torch
import torch._dynamo
from torch.profiler import ProfilerActivity, profile

from newllm.cli.settings import model_settings, training_settings
from newllm.config import PRESETS, ModelConfig, preset, transformer_like
from newllm.errors import UserError, arguments_are_the_users, one_line
from newllm.recipe import apply_recipe
from newllm.run import Run
from newllm.speed import peak_flops, training_flops_per_token
from newllm.training import Trainer
from newllm.training_config import TRAINING_PRESETS, TrainingConfig, choose_device, compute_dtype
from newllm_kernels import use_backend

# The first step starts without a context, two more run kernel by kernel before the fourth is captured, the fifth replays.
WARM_UP = 5
PROFILED, SHOWN = 3, 15  # steps; operations of the table
TIMED_TOKENS = 2**18  # of a run of --contexts, at two steps or more
REFERENCE_STEPS = 3  # a Python loop over time is slow, and its spread small beside what it is compared with


def configurations(model: ModelConfig, length: int) -> list[tuple[str, ModelConfig, str]]:
    """Name, model and backend of everything that is measured."""
    baseline = transformer_like(model)
    baseline = dataclasses.replace(baseline, max_seq_len=min(length, baseline.max_seq_len))  # as the trainer does
    return [("newllm", model, "auto"), ("transformer", baseline, "auto"), ("newllm", model, "reference")]


def ways(backend: str, cuda: bool, compiled: bool) -> list[tuple[bool, bool]]:
    """(cuda_graph, compile) of the runs of one configuration."""
    found = [(False, False)]
    if backend != "reference":
        found += [(True, False)] if cuda else []
        found += [(cuda, True)] if compiled else []
    return found


def make_trainer(model: ModelConfig, config: TrainingConfig, steps: int) -> Trainer:
    """A trainer on random tokens, enough of them that no stream starts anew. It touches no run folder."""
    tokens = config.batch_size * (steps * config.segment * config.grad_accum + 1)
    draw = np.random.default_rng(0)
    train, valid = (draw.integers(model.vocab_size, size=size, dtype=np.uint32) for size in (tokens, 2))
    # Random tokens have no spelling, but a product with any matrix takes as long.
    spelling = torch.eye(model.vocab_size, config.spelling) if config.spelling else None
    return Trainer(Run(Path("unused")), model, config, train, valid, spelling)


def seconds_of_steps(trainer: Trainer, steps: int) -> list[float]:
    """On a GPU by events between the steps: the host runs ahead as it does in training, and waits for nothing."""
    if trainer.device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(steps):
            trainer._train_step()
            times.append(time.perf_counter())
        return list(np.diff(times))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        trainer._train_step()
        event.record()
    torch.cuda.synchronize()
    return [events[n].elapsed_time(events[n + 1]) / 1e3 for n in range(steps)]


def measure(
    name: str, model: ModelConfig, backend: str, config: TrainingConfig, steps: int, profiled: int
) -> dict[str, Any]:
    run: dict[str, Any] = {"model": name, "backend": backend, "compiled": config.compile, "graph": config.cuda_graph}
    torch._dynamo.reset()
    gc.collect()
    try:
        with use_backend(backend):
            trainer = make_trainer(model, config, WARM_UP + steps + profiled)
            cuda = trainer.device.type == "cuda"
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(trainer.device)
            seconds_of_steps(trainer, WARM_UP)
            seconds = seconds_of_steps(trainer, steps)
            median = statistics.median(seconds)
            run |= {
                "parameters": trainer.model.num_parameters(), "steps": steps, "median_ms": median * 1e3, "min_ms": min(seconds) * 1e3,
                "max_ms": max(seconds) * 1e3, "tokens_per_s": config.tokens_per_step / median,
                # Of a CPU only the whole process's peak is known, which earlier runs may have set.
                "peak_bytes": torch.cuda.max_memory_allocated(trainer.device) if cuda else None,
                "loss": trainer._loss_sum.item() / trainer._tokens,
            }  # fmt: skip
            run["flops_per_token"] = training_flops_per_token(model, config.segment)
            if peak := peak_flops(trainer.device):
                run["mfu"] = run["flops_per_token"] * run["tokens_per_s"] / peak
            if profiled:
                run["profile"] = where_time_goes(lambda: seconds_of_steps(trainer, PROFILED), cuda)
    except Exception as error:  # out of memory, a compiler that fails: the other configurations are still worth having
        run["failure"] = f"{type(error).__name__}: {one_line(error)[:200]}"
    return run


def contexts(
    model: ModelConfig, config: TrainingConfig, lengths: list[int], keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """One run per model and length; `keep` gets those there are after each of them."""
    found: list[dict[str, Any]] = []
    for length in lengths:
        # Equal in all but the window; what is longer than the preset's is what is asked here.
        others = dataclasses.replace(transformer_like(model), max_seq_len=length)
        for name, of in (("newllm", model), ("transformer", others)):
            print(f"{name}, context {length} ...", file=sys.stderr, flush=True)
            one = dataclasses.replace(config, batch_size=1, segment=length, grad_accum=1, compile=False)
            steps = max(2, min(config.steps, TIMED_TOKENS // length))
            for graph in dict.fromkeys((choose_device(config.device).type == "cuda", False)):
                run = measure(name, of, "auto", dataclasses.replace(one, cuda_graph=graph), steps, 0)
                if "OutOfMemory" not in run.get("failure", ""):
                    break
            found.append({"length": length, **run})
            keep(found)
    return found


def where_time_goes(steps: Callable[[], Any], cuda: bool) -> dict[str, Any]:
    """The operations that take longest by self time: GPU kernels, or PyTorch operators on a CPU."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        steps()
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    times = [
        (event.key, event.self_device_time_total if cuda else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]
    total = sum(us for _, us, _ in times)
    top = sorted(times, key=lambda entry: -entry[1])[:SHOWN]
    return {
        "of": "GPU kernels" if cuda else "operators, self CPU time",
        "total_us": total / PROFILED,
        "top": [
            {"name": name[:80], "us": us / PROFILED, "percent": 100 * us / max(total, 1e-9), "calls": round(count / PROFILED, 1)}
            for name, us, count in top
        ],
    }  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser("train_speed", __doc__)
    parser.add_argument("--preset", default="40m", help=f"one of {', '.join(PRESETS)} (default: 40m)")
    parser.add_argument("--config", metavar="NAME", help="a recipe instead of a preset, with its model as it stands")
    parser.add_argument("--vocab-size", type=int, metavar="V", help="of the model (default: the preset's)")
    parser.add_argument("--batch", type=int, metavar="B", help="streams side by side (default: the preset's)")
    parser.add_argument("--length", type=int, metavar="T", help="tokens of a stream per step (default: the preset's)")
    parser.add_argument("--contexts", nargs="*", type=int, metavar="T", help="training at lengths of context instead, one stream "
                        "(without T: powers of two from 1024 to 131072)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="timed steps of each (default: 20)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--profile", action="store_true", help="add the kernels that take longest")
    parser.add_argument("--no-compile", action="store_true", help="leave out the runs with torch.compile")
    parser.add_argument("--no-reference", action="store_true", help="leave out the reference backend")
    parser.add_argument("--results", type=Path, metavar="FILE", help="write the figures to this JSON file")
    return parser.parse_args(arguments)


def settings(args: argparse.Namespace) -> tuple[ModelConfig, TrainingConfig]:
    with arguments_are_the_users():
        if args.config:
            recipe = argparse.Namespace(config=args.config)
            apply_recipe(recipe)
            model, config = model_settings(recipe), training_settings(recipe)
        else:
            model, config = preset(args.preset), TRAINING_PRESETS[args.preset]
            if model.architecture == "newllm":
                model = dataclasses.replace(model, coupling="none", hops=1)
        if model.architecture != "newllm":
            named = f"--config {args.config}" if args.config else f"--preset {args.preset}"
            raise UserError(f"{named}: wanted a model of the newllm architecture, which the Transformer is set against")
        if args.vocab_size:
            model = dataclasses.replace(model, vocab_size=args.vocab_size)
        given = {"batch_size": args.batch, "segment": args.length, "steps": args.steps, "device": args.device}
        given = {name: value for name, value in given.items() if value is not None}
        # Drawn lengths would each need a warm-up of their own.
        return model, dataclasses.replace(config, random_segments=False, **given)


def main_contexts(args: argparse.Namespace, model: ModelConfig, config: TrainingConfig, command: str) -> int:
    device = choose_device(config.device)
    content: dict[str, Any] = {
        **report.environment(), "command": command, "preset": args.config or args.preset,
        "precision": str(compute_dtype(config.precision, device)).removeprefix("torch."), "contexts": [],
    }  # fmt: skip
    lengths = args.contexts or [2**k for k in range(10, 18)]
    content["contexts"] = contexts(
        model, config, lengths, lambda found: write(args.results, content | {"contexts": found})
    )
    print(program_tables.contexts_table(content))
    failures = [run["failure"] for run in content["contexts"] if "failure" in run]
    return 1 if any("OutOfMemory" not in failure for failure in failures) else 0


def write(path: Path | None, content: dict[str, Any]) -> None:
    """Where a file is wanted."""
    if path:
        report.save(path, content)


def main(arguments: list[str] | None = None) -> int:
    args, command = parse(arguments), command_line.typed("train_speed", arguments)
    try:
        model, config = settings(args)
        device = choose_device(config.device)
        if args.results and not args.results.parent.is_dir():
            raise UserError(f"--results {args.results}: no such folder {args.results.parent}")
        if args.contexts and min(args.contexts) < 1:
            raise UserError(f"--contexts {min(args.contexts)}: wanted lengths of at least 1")
        chosen = configurations(model, config.segment)
    except ValueError as error:
        return command_line.refuse("train_speed", error)
    if args.contexts is not None:
        return main_contexts(args, model, config, command)
    content: dict[str, Any] = {
        **report.environment(), "command": command, "preset": args.config or args.preset, "batch": config.batch_size, "length": config.segment, "runs": [],
        "precision": str(compute_dtype(config.precision, device)).removeprefix("torch."),
    }  # fmt: skip
    for name, of, backend in chosen:
        if backend == "reference" and args.no_reference:
            continue
        steps = min(config.steps, REFERENCE_STEPS) if backend == "reference" else config.steps
        for graph, compiled in ways(backend, device.type == "cuda", not args.no_compile):
            print(f"{name}, {backend}, {program_tables.way(graph, compiled)} ...", file=sys.stderr, flush=True)
            chosen_way = dataclasses.replace(config, cuda_graph=graph, compile=compiled)
            profiled = PROFILED if args.profile and backend != "reference" else 0
            content["runs"].append(measure(name, of, backend, chosen_way, steps, profiled))
            write(args.results, content)
    print(program_tables.training_table(content))
    return 1 if any("failure" in run for run in content["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
