"""Speed of the full cell, microseconds a step: recurrent_context in order and in chunks of time, its matrix products alone, and
torch.nn.LSTM; on a CPU a Python loop of the same cell.

    python benchmarks/recurrent.py [--run RUN ...] [--results FILE]

Weights are those of a fresh ContextRNN; with --run also those of a trained model with full cells, on the text that it was
validated on. Times are medians of single calls, forward as training runs it, backward torch.autograd.grad of a retained graph,
with gradients of all weights and inputs; on a GPU by events, and in a CUDA graph where there can be one (chunks ask the GPU
what has moved). `python benchmarks/report.py FILE` prints a results file again and draws it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import recurrent_report
import report
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import newllm_kernels as nk

TOLERANCE = 1e-3  # of the seams, unless a row says otherwise
PASSES = 8  # the most; then in order of time
LONGEST_LSTM = 4096  # steps: what cuDNN launches one by one takes as long a step however many there are
SECONDS = 0.1  # of repeats
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# (B, T, D), E = D, H = 2 D: by dtype the chunks that are tried: their number, steps of warm-up, tolerance of their seams.
SHAPES = {
    "cuda": {
        (16, 1024, 256): {BF16: [(7, 128, 1e-3)], F16: [(7, 128, 1e-3)]},
        (16, 1024, 768): {BF16: [(16, 128, 1e-3)], F16: []},
        (256, 128, 768): {BF16: [], F16: []},
        (1, 16384, 768): {BF16: [(256, 192, 1e-3), (16, 2048, 1e-3)], F16: []},
        (1, 16384, 256): {BF16: [(112, 192, 1e-3), (112, 2048, 1e-3)], F16: []},
    },
    "cpu": {(8, 256, 256): {F32: []}, (1, 1024, 256): {F32: [(8, 0, 1e-3), (8, 64, 1e-3)]}},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Call = Callable[[], Any]


# ---- times ----------------------------------------------------------------------------------------------------------


def median_us(run: Call) -> float:
    times: list[float] = []
    while len(times) < 2 or (sum(times) < SECONDS * 1e6 and len(times) < 15):
        if DEVICE == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        else:
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def graph_us(run: Call) -> float | None:
    """In a CUDA graph; None on a CPU."""
    if DEVICE == "cpu":
        return None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    graph.replay()
    return median_us(graph.replay)


def measure(name: str, call: Callable[[], Tensor], inputs: list[Tensor], T: int, graph: bool = True) -> dict[str, Any]:
    """A row: microseconds a step, forward and backward."""
    output = call()
    grad = torch.randn_like(output)

    def backward() -> Any:
        return torch.autograd.grad(output, inputs, grad, retain_graph=True)

    for _ in range(2):  # kernels are compiled, graphs of eager calls recorded, passes seen
        backward()
        call()
    row: dict[str, Any] = {"name": name}
    for direction, run in (("forward", call), ("backward", backward)):
        row[f"{direction}_us"] = median_us(run) / T
        in_graph = graph_us(run) if graph else None
        row[f"{direction}_graph_us"] = None if in_graph is None else in_graph / T
    return row


# ---- what is measured -----------------------------------------------------------------------------------------------


class Cell:
    """The tensors of one cell of one hidden layer, from inputs x (B, T, E) on."""

    def __init__(self, x: Tensor, projection: nn.Linear, options: dict[str, Any], start: Tensor) -> None:
        self.x, self.projection, self.start = x, projection, start
        self.tensors = {name: value for name, value in options.items() if isinstance(value, Tensor)}
        self.options = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
        self.inputs = [x, *projection.parameters(), start, *self.tensors.values()]
        self.B, self.T, _ = x.shape
        self.H, self.D = self.tensors["context_weight"].shape

    def call(self, **way: Any) -> Tensor:
        z = self.projection(self.x)
        return nk.recurrent_context(z, c0=self.start.expand(self.B, -1), **self.tensors, **self.options, **way)[0]


def fresh(B: int, T: int, D: int, dtype: torch.dtype) -> Cell:
    layer = nk.ContextRNN(D, 2 * D, D, batch_first=True, device=DEVICE, dtype=dtype).layers[0]
    x = torch.randn(B, T, D, device=DEVICE, dtype=dtype, requires_grad=True)
    options = {
        "context_weight": layer.context_weight, "gate_weight": layer.gates.weight, "gate_bias": layer.gates.bias,
        "weight": layer.norm.weight, "bias": layer.norm.bias,
    }  # fmt: skip
    return Cell(x, layer.from_input, options, layer.start)


def trained(run: Path, B: int, T: int, dtype: torch.dtype) -> Cell:
    """The first cell of a trained model on B pieces of its validation text, each read from its start context."""
    from newllm.model.mixer import ContextCell
    from newllm.prepare import run_data
    from newllm.run import find_run

    folder = find_run(run)
    model, _ = folder.load(torch.device(DEVICE))
    cell = next((module for module in model.modules() if isinstance(module, ContextCell)), None)
    if cell is None or cell.coupling != "full" or len(cell.hidden_layers) or cell.to_gates is None:
        raise ValueError(f"--run {run}: wanted a model with coupling=full and fnn_layers=1")
    tokens = run_data(folder, folder.model_config()).tokens["valid"]
    tokens = torch.from_numpy(tokens[: B * T].astype("int64")).to(DEVICE)
    tokens = tokens.repeat(-(-B * T // len(tokens)))[: B * T].view(B, T)
    seen: list[Tensor] = []
    with torch.no_grad(), cell.from_x.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model.eval().features(tokens)
    made = cell.to(dtype)
    options = {
        "context_weight": made.from_context.weight, "gate_weight": made.to_gates.weight,
        "gate_bias": made.to_gates.bias, "clamp": made.clamp, "activation": made.activation_name, "norm": made.norm_kind,
    }  # fmt: skip
    if made.norm is not None:
        options |= {"weight": made.norm.weight, "bias": made.norm.bias, "eps": made.norm.eps}
    return Cell(seen[0].to(dtype).requires_grad_(), made.from_x, options, made.start)


def products(cell: Cell) -> dict[str, Any]:
    """The matrix products of one call and nothing else: of the input and of weights' gradients over all steps, of contexts and
    hidden units step by step. Forward, and backward from pre-activations that were kept."""
    W_x, W_c, W_g = cell.projection.weight, cell.tensors["context_weight"], cell.tensors["gate_weight"]
    rows, own = cell.B * cell.T, {"device": DEVICE, "dtype": W_c.dtype}
    x = cell.x.detach().reshape(rows, -1)
    read, h, gates = (torch.randn(cell.B, width, **own) for width in (cell.D, cell.H, 3 * cell.D))
    all_read, all_h, all_gates = (torch.randn(rows, width, **own) for width in (cell.D, cell.H, 3 * cell.D))
    W_x, W_c, W_g = (W.detach() for W in (W_x, W_c, W_g))

    def forward() -> None:
        torch.mm(x, W_x.mT)
        for _ in range(cell.T):
            torch.mm(read, W_c.mT, out=h)
            torch.mm(h, W_g.mT, out=gates)

    def backward() -> None:
        for _ in range(cell.T):
            torch.mm(gates, W_g, out=h)
            torch.mm(h, W_c, out=read)
        for left, right in ((all_gates, all_h), (all_h, all_read), (all_h, x)):
            torch.mm(left.mT, right)
        torch.mm(all_h, W_x)

    row: dict[str, Any] = {"name": "products alone"}
    for direction, run in (("forward", forward), ("backward", backward)):
        run()
        row[f"{direction}_us"] = median_us(run) / cell.T
        in_graph = graph_us(run)
        row[f"{direction}_graph_us"] = None if in_graph is None else in_graph / cell.T
    return row


def python_loop(cell: Cell) -> Tensor:
    """The formula as one would write it -> contexts (B, T, D)."""
    t, outputs, W_x = cell.tensors, [], cell.projection
    W = torch.cat((W_x.weight, t["context_weight"]), dim=1)
    c = cell.start.expand(cell.B, -1)
    for x_t in cell.x.unbind(1):
        h = F.silu(F.linear(torch.cat((x_t, c), dim=-1), W, W_x.bias))
        f, i, d = F.linear(h, t["gate_weight"], t["gate_bias"]).chunk(3, dim=-1)
        u = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(d)
        c = F.layer_norm(u, u.shape[-1:], t["weight"], t["bias"]).clamp(-10, 10)
        outputs.append(c)
    return torch.stack(outputs, dim=1)


def automatic(cell: Cell) -> tuple[Callable[[], Tensor], Callable[[], int]]:
    """The call under solver="auto", and the number of chunks that it last took."""
    from newllm_kernels.recurrent_context.solver import Solver

    solver, taken = Solver("auto", tolerance=TOLERANCE), [1]

    def call() -> Tensor:
        z = cell.projection(cell.x)
        with solver.way(z, cell.D, cell.H) as way:
            taken[0] = way["chunks"]
            start = cell.start.expand(cell.B, -1)
            return nk.recurrent_context(z, c0=start, **cell.tensors, **cell.options, **way)[0]

    return call, lambda: taken[0]


def backend_of(cell: Cell, chunks: int = 1, warm_up: int = 0) -> str:
    module = sys.modules["newllm_kernels.recurrent_context"]
    z = cell.projection(cell.x)
    return module._select(
        z, cell.start.expand(cell.B, -1).float(), None, cell.tensors["gate_weight"], 1, (chunks, 0.0, 1, warm_up)
    ).backend


def rows_of(cell: Cell, weights: str, chunks: list[tuple[int, int, float]]) -> list[dict[str, Any]]:
    """In order, in chunks, and as "auto" decides, which is compared with the order of time measured right beside it."""
    dtype = str(cell.x.dtype).removeprefix("torch.")
    shared = {"shape": [cell.B, cell.T, cell.D], "hidden": cell.H, "dtype": dtype, "weights": weights}
    rows = [measure("in order", cell.call, cell.inputs, cell.T) | {"backend": backend_of(cell)}]
    reference = cell.call().detach()
    for K, warm_up, tolerance in chunks:
        way = {"chunks": K, "tolerance": tolerance, "passes": PASSES, "warm_up": warm_up}
        with nk.record_seams() as seams:
            output = cell.call(**way)
            torch.autograd.grad(output, cell.inputs, torch.randn_like(output))
        told = {
            "chunks": K, "warm_up": warm_up, "tolerance": tolerance, "backend": backend_of(cell, K, warm_up), "passes": [s.passes for s in seams],
            "mismatch": [s.mismatch for s in seams], "in_order": [s.in_order for s in seams],
            "difference": ((output - reference).double().norm() / reference.double().norm()).item(),
        }  # fmt: skip
        rows.append(
            measure(
                f"{K} chunks after {warm_up} to {tolerance:g}",
                lambda way=way: cell.call(**way),
                cell.inputs,
                cell.T,
                graph=False,
            )
            | told
        )
    call, taken = automatic(cell)
    for _ in range(8):  # learns, from both directions: an adjoint tells the call after it
        output = call()
        torch.autograd.grad(output, cell.inputs, torch.randn_like(output))
    row = measure("auto", call, cell.inputs, cell.T, graph=False) | {"chunks": taken()}
    again = measure("in order", cell.call, cell.inputs, cell.T, graph=False)
    total = [r["forward_us"] + r["backward_us"] for r in (row, again)]
    rows.append(row | {"over_sequential": total[0] / total[1]})
    return [shared | row for row in rows]


def peers_of(cell: Cell) -> list[dict[str, Any]]:
    shared = {"shape": [cell.B, cell.T, cell.D], "hidden": cell.H, "weights": "fresh"}
    if DEVICE == "cpu":
        dtype = str(cell.x.dtype).removeprefix("torch.")
        return [shared | {"dtype": dtype} | measure("Python loop", lambda: python_loop(cell), cell.inputs, cell.T)]
    rows = [shared | {"dtype": "bfloat16"} | products(cell)] if cell.T <= 1024 else []
    T = min(cell.T, LONGEST_LSTM)
    for dtype in (torch.float16, torch.bfloat16):
        lstm = nn.LSTM(cell.D, cell.D, batch_first=True, device=DEVICE, dtype=dtype)
        x = torch.randn(cell.B, T, cell.D, device=DEVICE, dtype=dtype, requires_grad=True)
        row = measure("torch.nn.LSTM", lambda lstm=lstm, x=x: lstm(x)[0], [x, *lstm.parameters()], T, graph=T <= 1024)
        rows.append(shared | {"shape": [cell.B, T, cell.D], "dtype": str(dtype).removeprefix("torch.")} | row)
    return rows


# ---- the program ----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", default=[], metavar="RUN", help="trained models with full cells")
    parser.add_argument("--shapes", nargs="+", metavar="BxTxD", help="of those there are; default: all")
    parser.add_argument("--results", type=Path, metavar="FILE", help="a JSON file to write")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    known = {"x".join(map(str, shape)): shape for shape in SHAPES[DEVICE]}
    unknown = [name for name in args.shapes or () if name not in known]
    if unknown:
        parser.error(f"--shapes: got {', '.join(unknown)}, wanted some of {', '.join(known)}")
    content: dict[str, Any] = {
        **report.environment(),
        "command": command_line.typed("recurrent", arguments),
        "recurrent": [],
    }
    side = torch.cuda.Stream() if DEVICE == "cuda" else None  # a graph is not captured on the default one
    with torch.cuda.stream(side):
        for name in args.shapes or known:
            (B, T, D), ways = known[name], SHAPES[DEVICE][known[name]]
            new: list[dict[str, Any]] = []
            for dtype, chunks in ways.items():
                cell = fresh(B, T, D, dtype)
                if not new:
                    new = peers_of(cell) + rows_of(cell, "fresh", chunks if DEVICE == "cpu" else chunks[:1])
                for run in args.run:
                    of_run = trained(run, B, T, dtype)
                    new += rows_of(of_run, "trained", chunks) if of_run.D == D else []
            content["recurrent"] += new
            print(recurrent_report.table(new), flush=True)
            if args.results:
                args.results.write_text(json.dumps(content, indent=1, default=_plain) + "\n")
    return 0


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else str(value)


if __name__ == "__main__":
    sys.exit(main())
