"""Every operation under compute-sanitizer, on shapes small enough for it, which slows kernels a hundredfold:

    python tools/sanitize.py --all --jobs 14                     # four tools x two backends x all operations, as a table
    python tools/sanitize.py --all --tools racecheck cuda scan   # some of them
    compute-sanitizer --tool memcheck python tools/sanitize.py cuda scan   # one by hand: forward and backward, once

With --all every (tool, backend, operation) is a process of its own, `--jobs` of them at a time; the exit code is 1 where one
found an error, failed or took longer than `--limit` seconds. Sequences are long enough for every way through time: streams,
chunks, look-back, clusters and passes. Kernels of PyTorch and cuBLAS are not checked.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
OPERATIONS = (
    "scan", "gated_scan", "gated_scan_packed", "gated_scan_layer_norm", "gated_scan_layer_norm_packed", "context_update",
    "context_update_packed", "context_scan", "context_scan_packed", "recurrent_context", "layer_norm", "add_layer_norm",
    "decode_linear",
)  # fmt: skip
TRITON_HAS_NOT = ("decode_linear",)
# (B, T, D). Of CUDA C++: a block alone, columns in pieces of 2 bytes; chunks of time, whose windows are of up to 128 steps;
# clusters, which take more than 8 blocks of 64 columns; (140, 3, 72): rows of context_scan that share a multiprocessor.
SHAPES = {
    "triton": [(2, 40, 33), (1, 300, 17), (1, 40, 136)],
    "cuda": [(2, 40, 33), (1, 520, 64), (1, 780, 584), (140, 3, 72), (3, 40, 264)],
}
# Steps of these cost tens of barriers each, and their ways through time show in fewer.
STEPPING = {
    "triton": [(2, 9, 33), (1, 70, 17), (1, 9, 136)],
    "cuda": [(2, 9, 33), (1, 140, 64), (1, 9, 584), (140, 3, 72), (3, 20, 264)],
}
# racecheck takes minutes over these where others take seconds; of the shapes past the first it has 16 bits only.
FOR_RACECHECK = {
    "triton": [(1, 20, 33), (1, 140, 17)],
    "cuda": [(1, 20, 33), (1, 520, 40), (1, 520, 584)],
}
# Every way of the full cell that CUDA C++ has: clusters (of 4 blocks; of 8, with matrices in registers), meshes of 8 and of 12
# clusters, and teams of blocks that meet through memory, which more rows than one mesh takes go to. A process each.
CELLS = [(2, 4, 64), (2, 4, 128), (2, 2, 512), (2, 2, 768), (50, 2, 512)]
NORM_SHAPES = [(1, 9, 2048), (1, 3, 4097), (1, 2, 16384)]  # rows of several warps, and of several blocks
PORTS, PORTS_EACH = 49152, 12  # compute-sanitizer talks to what it watches through one of ten ports from a base on


def problems(backend: str, operation: str, for_racecheck: bool = False) -> list[tuple[tuple[int, int, int], str]]:
    """Shapes and names of dtypes."""
    stepping = operation.startswith(("context_", "recurrent_"))
    shapes = (STEPPING if stepping else FOR_RACECHECK if for_racecheck else SHAPES)[backend]
    if backend == "cuda" and operation in ("layer_norm", "add_layer_norm"):
        shapes = shapes + NORM_SHAPES
    return [
        (shape, dtype)
        for shape in shapes
        for dtype in ("bfloat16", "float32")
        if dtype == "bfloat16" or stepping or not for_racecheck or shape == shapes[0]
    ]


# ---- what compute-sanitizer watches --------------------------------------------------------------------------------


def run_operation(
    backend: str, function: str, for_racecheck: bool = False, cells: Sequence[tuple[int, int, int]] = CELLS
) -> bool:
    """Forward and backward on all shapes; whether the backend serves any. Inputs and gradients are made on the CPU, so that
    few kernels but ours run."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels"))
    import cases

    import newllm_kernels as nk
    from newllm_kernels.backends import Call, verdicts

    torch.manual_seed(0)
    if function == "recurrent_context":
        run_recurrent_context(backend, cells)
        return True
    if function == "decode_linear":
        run_decode_linear()
        return True
    operation = "layer_norm" if function == "add_layer_norm" else function.removesuffix("_packed")
    served = False
    for shape, name in problems(backend, function, for_racecheck):
        dtype = getattr(torch, name)
        if shape[2] > 8192 and torch.cuda.get_device_capability() < (9, 0):
            continue
        if not verdicts(operation, Call(torch.device("cuda", 0), dtype, shape[2]))[backend].ok:
            continue
        served = True
        problem = cases.make(function, *shape, dtype).map(lambda name, x: x.cuda())
        with nk.use_backend(backend):
            grads = [torch.randn(x.shape, dtype=x.dtype).cuda() for x in problem.run()]
            if (backend, operation) == ("cuda", "gated_scan_layer_norm"):
                grads[1] = None  # with a gradient of c it is two operations
            cases.differentiate(problem.run, problem.tensors, grads)
    torch.cuda.synchronize()
    return served


def run_decode_linear() -> None:
    """Layers alone, of rows of whole 16 bytes and not, and the program of a small model: several launches of it."""
    import torch

    import newllm_kernels as nk
    from newllm.config import ModelConfig
    from newllm.model import build_model
    from newllm.model.decoding import make_decoder

    with torch.no_grad():
        for (B, N, K), dtype in product([(1, 7, 5), (3, 40, 1032), (16, 33, 136)], (torch.float32, torch.bfloat16)):
            x, weight = (torch.randn(*shape, dtype=torch.float32).to(dtype).cuda() for shape in ((B, K), (N, K)))
            with nk.use_backend("cuda"):
                nk.decode_linear(x, weight, norm=(None, None))
        for rows, dtype in product((1, 3), (torch.float32, torch.bfloat16)):
            config = ModelConfig(vocab_size=50, embed_dim=72, context_dim=40, ffn_dim=88, fnn_layers=0, num_layers=2)
            decoder = make_decoder(build_model(config).to("cuda", dtype).eval(), rows)
            for _ in range(3):
                decoder.run()
    torch.cuda.synchronize()


def run_recurrent_context(backend: str, shapes: Sequence[tuple[int, int, int]]) -> None:
    """Here a CPU makes the matrix products, those around CUDA C++'s launches and those between Triton's: initcheck does not see what
    cuBLAS stores, and racecheck, told to look away from it, breaks down."""
    import torch

    import newllm_kernels as nk
    from newllm_kernels.recurrent_context import products
    from newllm_kernels.recurrent_context import triton as fused_steps

    def to(device: str, x: object) -> object:
        return tuple(to(device, y) for y in x) if isinstance(x, tuple) else x.to(device) if torch.is_tensor(x) else x

    def on_cpu(function: Callable[..., object]) -> Callable[..., object]:
        return lambda *arguments: to("cuda", function(*to("cpu", arguments)))

    def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(a.cpu().float() @ b.cpu().float())

    products.pre_activations, products.gradients = map(on_cpu, (products.pre_activations, products.gradients))
    fused_steps._product = multiply
    for B, T, D in shapes:
        H = 2 * D
        sizes = {
            "z": (B, T, H), "context_weight": (H, D), "c0": (B, D), "gate_weight": (3 * D, H), "gate_bias": (3 * D,),
            "weight": (D,), "bias": (D,),
        }  # fmt: skip
        tensors = {
            name: (torch.randn(shape) * D**-0.5).bfloat16().cuda().requires_grad_() for name, shape in sizes.items()
        }
        with nk.use_backend(backend):
            outputs = nk.recurrent_context(**tensors)
            grads = [torch.randn(x.shape).to(x.dtype).cuda() for x in outputs]
            torch.autograd.grad(outputs, list(tensors.values()), grads)
    torch.cuda.synchronize()


# ---- all of them, in parallel --------------------------------------------------------------------------------------


class Job(NamedTuple):
    tool: str
    backend: str
    operation: str
    cell: str = ""  # of recurrent_context: the one shape


class Outcome(NamedTuple):
    job: Job
    seconds: float
    verdict: str  # "ok", or what was wrong
    output: str


def command(job: Job, number: int) -> list[str]:
    """`number`: of the job; it decides the ports."""
    options = [
        "--tool", job.tool, "--error-exitcode", "86", "--target-processes", "application-only", "--launch-timeout", "120",
        "--port", str(PORTS + PORTS_EACH * number), "--print-limit", "0", "--show-backtrace", "device",
    ]  # fmt: skip
    # initcheck has to see what others write, and a kernel that racecheck is told to look away from breaks down if it uses barriers in
    # shared memory, as cuBLAS's do (and ours): "failed to handle a hardware exception". `verdict_of` leaves others out.
    not_watched = {"initcheck": (), "racecheck": ("at6native", "at4cuda")}
    for of_others in not_watched.get(job.tool, ("at6native", "at4cuda", "nvjet", "cutlass")):
        options += ["--kernel-name-exclude", f"kns={of_others}"]
    if job.tool == "synccheck":  # of blocks of recurrent_context there are more than it tracks by itself
        options += ["--num-cuda-barriers", "65536"]
    script = [sys.executable, str(Path(__file__).resolve()), job.backend, job.operation]
    script += ["--cell", job.cell] if job.cell else []
    script += ["--for-racecheck"] if job.tool == "racecheck" else []
    return [shutil.which("compute-sanitizer") or "compute-sanitizer", *options, *script]


def is_ours(kernel: str) -> bool:
    """CUDA C++ has our namespace in its name, Triton the name of its file, which others' Triton kernels do not run beside."""
    return "newllm" in kernel or "triton" in kernel


def verdict_of(returncode: int, output: str) -> str:
    """What compute-sanitizer's exit code and words come to. That it has nothing to say is no proof that it looked.

    Triton lets several threads that hold the same value all store it where it changes a layout: races of one instruction
    with itself, which are counted and called clean. So are races within kernels of PyTorch and cuBLAS, and what these read under
    initcheck, which does not see all that cuBLAS stores.
    """
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+ \w+(?: displayed \((\d+) error.*?\))?)", output)
    races = re.findall(r"Race reported between (.+)\n=+ +and (.+?) \[", output)
    with_itself = sum(one == other and one.startswith("Write") and is_ours(one) for one, other in races)
    by_others = sum(not is_ours(one) and not is_ours(other) for one, other in races)
    if returncode in (0, 86) and found and found[2] and 0 < int(found[2]) == with_itself + by_others == len(races):
        stores = f"{with_itself} stores of one value by several threads" if with_itself else ""
        return (
            f"ok ({stores}{', ' * bool(with_itself and by_others)}{f'{by_others} within others' if by_others else ''})"
        )
    unset = re.findall(r"Uninitialized .+\n=+ +at (.+)", output)
    if returncode == 86 and found and found[1] == f"{len(unset)} errors" and not any(map(is_ours, unset)):
        return f"ok ({len(unset)} reads by others)"
    if returncode == 0 and found:
        return "ok" if found[1].startswith("0 ") else found[1]
    if found and not found[1].startswith("0 "):
        return found[1]
    return f"exit code {returncode}" + ("" if found else ", no summary")


def run_job(job: Job, number: int, limit: float) -> Outcome:
    """Once more where the process failed without a finding: many at a time run out of memory or ports."""
    outcome = run_once(job, number, limit)
    if (
        outcome.verdict.startswith("exit code")
        or "Device not supported" in outcome.output
        or "out of memory" in outcome.output
    ):
        again = run_once(job, number, limit)
        return again._replace(verdict=again.verdict + ("" if again.verdict.startswith("ok") else ", at the second try"))
    return outcome


def run_once(job: Job, number: int, limit: float) -> Outcome:
    began = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "CUDA_MODULE_LOADING": "LAZY"}
    if (
        job.tool == "memcheck"
    ):  # tensors of one allocation each: a neighbour in a block of the allocator's hides what lies outside
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    process = subprocess.Popen(
        command(job, number), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        verdict = verdict_of(process.returncode, output)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the sanitizer and what it watches: a session of our own making
        output, _ = process.communicate()
        verdict = f"took longer than {limit:g} s"
    return Outcome(job, time.monotonic() - began, verdict, output)


def outcomes(jobs: list[Job], parallel: int, limit: float) -> Iterator[Outcome]:
    with ThreadPoolExecutor(parallel) as pool:
        yield from pool.map(lambda numbered: run_job(numbered[1], numbered[0], limit), enumerate(jobs))


def check_all(jobs: list[Job], parallel: int, limit: float) -> int:
    bad = []
    for outcome in outcomes(jobs, parallel, limit):
        job = outcome.job
        print(
            f"{job.tool:<9} {job.backend:<6} {f'{job.operation} {job.cell}':<28} {outcome.seconds:5.1f} s  {outcome.verdict}",
            flush=True,
        )
        if not outcome.verdict.startswith("ok"):
            bad.append(outcome)
    for outcome in bad:
        print(f"\n---- {' '.join(outcome.job)}: {outcome.verdict}\n" + "\n".join(outcome.output.splitlines()[:25]))
    print(f"\n{len(jobs) - len(bad)} of {len(jobs)} ok")
    return 1 if bad else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", metavar="BACKEND | OPERATION", help="only these; default: all")
    parser.add_argument("--all", action="store_true", help="start compute-sanitizer for each, in parallel")
    parser.add_argument("--tools", default=",".join(TOOLS), metavar="TOOL,...", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--for-racecheck", action="store_true", help="fewer and smaller shapes")
    parser.add_argument("--cell", metavar="B,T,D", help="of recurrent_context only this shape; default: all")
    parser.add_argument("--limit", type=float, default=60, help="seconds for each of them")
    options = parser.parse_args(arguments)
    unknown = set(options.which) - SHAPES.keys() - set(OPERATIONS)
    if unknown:
        parser.error(f"got {', '.join(sorted(unknown))}, wanted {', '.join((*SHAPES, *OPERATIONS))}")
    tools = options.tools.split(",")
    if not set(tools) <= set(TOOLS):
        parser.error(f"--tools: got {options.tools}, wanted some of {','.join(TOOLS)}")
    backends = [backend for backend in SHAPES if backend in options.which] or list(SHAPES)
    operations = [operation for operation in OPERATIONS if operation in options.which] or list(OPERATIONS)
    pairs = [
        (backend, operation)
        for operation, backend in product(operations, backends)
        if not (backend == "triton" and operation in TRITON_HAS_NOT)
    ]
    import torch

    if not torch.cuda.is_available():
        print("sanitize: error: needs an NVIDIA GPU; this PyTorch sees none", file=sys.stderr)
        return 2
    if options.all:
        if shutil.which("compute-sanitizer") is None:
            print(
                "sanitize: error: compute-sanitizer is not on the PATH; it comes with the CUDA toolkit", file=sys.stderr
            )
            return 2
        # The slow ones first: nothing is to start when all others have ended.
        tools = sorted(tools, key=("racecheck", "initcheck", "memcheck", "synccheck").index)
        every_cell = [",".join(map(str, cell)) for cell in CELLS]
        jobs = [
            Job(tool, *pair, cell)
            for tool, pair in product(tools, pairs)
            for cell in ([options.cell] if options.cell else every_cell if pair[1] == "recurrent_context" else [""])
        ]
        return check_all(jobs, max(1, options.jobs), options.limit)
    cells = [tuple(map(int, options.cell.split(",")))] if options.cell else CELLS
    for pair in pairs:
        if not run_operation(*pair, options.for_racecheck, cells):
            print(f"sanitize: error: {' '.join(pair)}: this backend does not serve it here", file=sys.stderr)
            return 1
        print(*pair, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
