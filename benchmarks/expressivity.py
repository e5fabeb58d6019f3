"""Which models can track a state: `python benchmarks/expressivity.py [--problems ...] [--models ...] [--results FILE]`.

Word problems of finite groups (word_problems.py), learnt from words of up to 32 elements and asked of words up to 1024: New-LLM with
every coupling, the Transformer baseline and torch.nn.LSTM, of equal parameter count, for the same steps, every model with all of
the learning rates and seeds. Words begin with 2 elements and are made twice as long, as many elements a step, whenever the last
product of a word is right four times in five, up to 32: the same curriculum for all.

On a GPU runs go side by side on streams of their own, steps in CUDA graphs that draw their data from a pool on the GPU; New-LLM and
the Transformer compute in bfloat16 over float32 weights, as `newllm train` does, torch.nn.LSTM in float32. Results are
added to --results after every wave of runs, and what is there already is not run again: a stopped command goes on where it was when
it is given once more, and several, started side by side, share one file. `python benchmarks/report.py FILE` prints and draws it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import command_line
import report
import torch
import word_problems
from expressivity_results import add, identity, load
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from newllm.config import ModelConfig, count_parameters, transformer_like
from newllm.errors import UserError
from newllm.graphs import Graphs
from newllm.model import build_model
from newllm.training_config import TrainingConfig, choose_device, compute_dtype, learning_rate
from newllm.weights import Weights

TRAINED, ASKED = 32, (32, 64, 128, 256, 512, 1024)  # lengths of words
MODELS = ("full", "lstm", "transformer", "none", "hops-2", "hops-4")
POOL = 2**19  # words that are drawn at once; a run goes through them from a place of its own
ASKED_WORDS = 512  # of a length that training never saw
UNROLLED = 2  # steps of one CUDA graph
SHORTEST = 2  # words of the first steps
LEARNT = 0.8  # share of right answers at which words are made twice as long
FORGETS = 0.9  # of the running mean that is compared with it
LOOKED_AFTER = 40  # steps between two looks at it


# ---- the models -----------------------------------------------------------------------------------------------------


def full_cell(elements: int, width: int, layers: int) -> ModelConfig:
    """The model whose parameter count the others meet: D the width, H twice that, as the classic preset has, E half of it."""
    return ModelConfig(
        vocab_size=elements, embed_dim=width // 2, hidden_dim=2 * width, context_dim=width, num_layers=layers, ffn_dim=width // 2,
        fnn_layers=1, coupling="full", norm="state", tie_embeddings=False,
    )  # fmt: skip


class LSTM(nn.Module):
    """torch.nn.LSTM between an embedding and an output matrix: tokens (B, T) -> logits (B, T, V)."""

    def __init__(self, elements: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(elements, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, elements, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Any]:
        x, state = self.lstm(self.embedding(tokens))
        return self.head(x), state


def make_model(name: str, full: ModelConfig) -> tuple[nn.Module, str]:
    """A model with as many parameters as the full cell's, and what it is in words."""
    target = count_parameters(full)
    if name == "lstm":
        layers = full.num_layers

        def size(width: int) -> int:  # of embedding and head, and of a layer's two matrices and two biases
            return 2 * full.vocab_size * width + layers * (8 * width * width + 8 * width)

        width = min(range(4, 4096, 4), key=lambda width: abs(size(width) - target))
        return LSTM(full.vocab_size, width, layers), f"{layers} layers of {width}"
    if name == "transformer":
        config = transformer_like(full)
        config = dataclasses.replace(config, max_seq_len=max(ASKED), num_heads=max(config.num_heads, 4))
        return build_model(config), f"{config.num_layers} layers of {config.embed_dim}, F={config.ffn_dim}"
    config = full
    if name != "full":
        coupling, _, hops = name.partition("-")
        config = dataclasses.replace(full, coupling=coupling, hops=int(hops or 1), norm="output")
        spare = (target - count_parameters(config)) / (
            3 * config.embed_dim * config.num_layers
        )  # SwiGLU's three matrices
        config = dataclasses.replace(config, ffn_dim=config.ffn_dim + round(spare))
    return build_model(config), f"{config.num_layers} layers of D={config.context_dim}, F={config.ffn_dim}"


# ---- training -------------------------------------------------------------------------------------------------------


class Lane:
    """One run: model, optimizer, place in the pool, curriculum. Everything that changes lies in tensors, for the graph."""

    def __init__(
        self, name: str, full: ModelConfig, config: TrainingConfig, table: Tensor, pool: Tensor, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(config.seed)
        model, self.shape = make_model(name, full)
        self.name, self.config, self.table, self.pool, self.device = name, config, table, pool, table.device
        self.parameters = sum(p.numel() for p in model.parameters())
        self.weights = Weights(model.to(self.device), config, torch.float32 if name == "lstm" else dtype)
        self.graphs = Graphs(self.device, enabled=True)
        self.outside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.rates = torch.tensor([learning_rate(config, step) for step in range(config.steps)], device=self.device)
        self.losses = torch.zeros(config.steps, device=self.device)
        self.done = torch.zeros(1, dtype=torch.int64, device=self.device)  # steps, as the graphs count them
        self.right = torch.zeros((), device=self.device)  # running mean, of the last product of a word
        self.rows = torch.arange(config.batch_size, device=self.device) + config.seed * 100_003
        self.length, self.taken = SHORTEST, 0  # of words; steps
        self.grown: list[tuple[int, int]] = []  # (step, length from there on)

    def step(self) -> None:
        rows = (self.done * self.config.batch_size + self.rows) % len(self.pool)
        words = self.pool[rows].long().view(-1, self.length)  # (B, T), B * T always the same
        products = word_problems.running_products(self.table, words)
        logits = self.weights.computing(words)[0].float()  # (B, T, G)
        loss = F.cross_entropy(logits.flatten(0, 1), products.flatten())
        loss.backward()
        self.weights.collect_gradients(True)
        rate = self.rates[self.done]
        for group in self.weights.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(rate[0])
            else:
                group["lr"] = rate.item()
        self.weights.update(False)
        with torch.no_grad():
            right = (logits[:, -1].argmax(-1) == products[:, -1]).float().mean()
            self.right.mul_(FORGETS).add_((1 - FORGETS) * right)
            self.losses[self.done] = loss.detach()
            self.done += 1

    def advance(self) -> None:
        """UNROLLED steps, on a GPU launched as one graph; then perhaps longer words."""
        if self.outside is None:
            self._steps()
            self._look()
            return
        with torch.cuda.stream(self.outside):
            with self.graphs.stream():
                self.graphs.run(self.length, self._steps)
            self._look()

    def _steps(self) -> None:
        for _ in range(UNROLLED):
            self.step()

    def _look(self) -> None:
        self.taken += UNROLLED
        if self.length < TRAINED and self.taken % LOOKED_AFTER == 0 and self.right.item() > LEARNT:
            self.length *= 2
            self.grown.append((self.taken, self.length))
            self.right.zero_()

    @torch.no_grad()
    def ask(self, words: Tensor, products: Tensor) -> Tensor:
        """words, products (N, T) uint8 -> share of right answers at every position (T,)."""
        model, right = self.weights.computing.eval(), []
        for some, wanted in zip(words.split(128), products.split(128), strict=True):
            right.append((model(some.long())[0].argmax(-1) == wanted.long()).float().sum(dim=0))
        return torch.stack(right).sum(dim=0) / len(words)

    def result(self, words: Tensor, products: Tensor) -> dict[str, Any]:
        right = self.ask(words, products).tolist()
        accuracy = {}
        for length in ASKED:  # of the last quarter of the positions up to there
            last = right[length - length // 4 : length]
            accuracy[str(length)] = round(sum(last) / len(last), 5)
        return {
            "model": self.name, "shape": self.shape, "parameters": self.parameters, "lr": self.config.lr,
            "seed": self.config.seed, "accuracy": accuracy, "at": {str(n): round(right[n - 1], 5) for n in ASKED},
            "length": self.length, "loss": round(self.losses[-100:].mean().item(), 5),
            "full_length_after": next((step for step, length in self.grown if length == TRAINED), None),
        }  # fmt: skip


def train(lanes: list[Lane], steps: int, verbose: bool) -> float:
    """All of them side by side; seconds it took."""
    begin = time.perf_counter()
    label = ", ".join(sorted({lane.name for lane in lanes}))
    for turn in trange(steps // UNROLLED, desc=label, unit="turn", leave=False, disable=None):
        for lane in lanes:
            lane.advance()
        if verbose and turn * UNROLLED % 500 == 0:
            lengths = ", ".join(f"{lane.name} {lane.config.lr:g}: {lane.length}" for lane in lanes)
            print(f"step {turn * UNROLLED}, {time.perf_counter() - begin:.1f} s, words of {lengths}", file=sys.stderr, flush=True)  # fmt: skip
    if lanes[0].device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


# ---- the command ----------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser("expressivity", __doc__)
    parser.add_argument("--problems", nargs="+", default=list(word_problems.PROBLEMS), choices=word_problems.PROBLEMS,
                        metavar="P", help=f"of {', '.join(word_problems.PROBLEMS)} (default: all)")  # fmt: skip
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="M",
                        help=f"of {', '.join(MODELS)} (default: all)")  # fmt: skip
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-3, 1e-2], metavar="X", help="peak learning rates")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], metavar="N", help="of weights and data order")
    parser.add_argument("--steps", type=int, default=4000, metavar="N", help="optimizer steps of a run (default: 4000)")
    parser.add_argument(
        "--batch",
        type=int,
        default=128,
        metavar="B",
        help="words of 32 elements in a step, or as many elements in shorter ones (default: 128)",
    )
    parser.add_argument("--width", type=int, default=128, metavar="D", help="of embedding and context (default: 128)")
    parser.add_argument("--layers", type=int, default=1, metavar="N", help="of the full cell and the LSTM (default: 1)")
    parser.add_argument("--lanes", type=int, default=8, metavar="N", help="runs side by side on a GPU (default: 8)")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="of New-LLM and the Transformer (default: auto, bfloat16 on a GPU)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--verbose", action="store_true", help="tell every 500 steps how long the words are by now")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="add the figures to this JSON file; runs that it holds are not made again",
    )
    return parser.parse_args(arguments)


def configurations(args: argparse.Namespace) -> list[TrainingConfig]:
    return [
        TrainingConfig(steps=args.steps, batch_size=args.batch, segment=TRAINED, lr=lr, seed=seed, warmup=min(100, args.steps))
        for lr in args.lrs
        for seed in args.seeds
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        device, configs = choose_device(args.device), configurations(args)
        dtype = compute_dtype(args.precision, device)
        if args.steps % UNROLLED or min(args.width, args.layers, args.lanes) < 1:
            raise UserError(f"--steps: wanted a multiple of {UNROLLED}; --width, --layers, --lanes: at least 1")
        if args.results and not args.results.parent.is_dir():
            raise UserError(f"--results {args.results}: no such folder {args.results.parent}")
        header = {
            **report.environment(), "precision": str(dtype).removeprefix("torch."), "trained": TRAINED, "words": ASKED_WORDS,
        }  # fmt: skip
        there = set()
        if args.results:
            there = {identity(run) for run in load(args.results, header)["expressivity"]}
    except ValueError as error:
        return command_line.refuse("expressivity", error)
    command = command_line.typed("expressivity", arguments)
    for problem in args.problems:
        table = word_problems.multiplication_table(problem).to(device)
        pool, _ = word_problems.draw(table, min(POOL, args.steps * args.batch), TRAINED, seed=1)
        asked = word_problems.draw(table, ASKED_WORDS, max(ASKED), seed=2)
        full = full_cell(len(table), args.width, args.layers)
        shapes = {name: make_model(name, full)[1] for name in args.models}
        jobs = [
            (name, config)
            for name in args.models
            for config in configs
            if (problem, name, shapes[name], config.lr, config.seed, args.steps, args.batch) not in there
        ]
        for first in range(0, len(jobs), args.lanes):
            lanes = [Lane(name, full, config, table, pool, dtype) for name, config in jobs[first : first + args.lanes]]
            seconds = train(lanes, args.steps, args.verbose)
            runs = [
                {"problem": problem, "steps": args.steps, "batch": args.batch, **lane.result(*asked), "wave_seconds": round(seconds, 2)}
                for lane in lanes
            ]  # fmt: skip
            for run in runs:
                print(f"{problem:<7} {run['model']:<12} lr {run['lr']:g} seed {run['seed']}: words of {run['length']:>2}, loss "
                      f"{run['loss']:.4f}, right {' '.join(f'{x:.3f}' for x in run['accuracy'].values())}, {seconds:.1f} s",
                      file=sys.stderr, flush=True)  # fmt: skip
            if args.results:
                add(args.results, header, command, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
