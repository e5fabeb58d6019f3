"""Every operation once, forward and backward, on shapes small enough for compute-sanitizer, which slows kernels a hundredfold:

    compute-sanitizer --tool memcheck python tools/sanitize.py
    compute-sanitizer --tool racecheck python tools/sanitize.py cuda      # one backend, the slow tools take minutes
    compute-sanitizer --tool racecheck python tools/sanitize.py cuda scan  # one operation

Sequences are long enough for every way through time: streams, chunks, look-back, clusters and passes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels"))

import cases

import newllm_kernels as nk
from newllm_kernels.backends import Call, verdicts

SHAPES = {
    "triton": [(2, 70, 33), (1, 700, 17), (1, 700, 260)],
    # (1, 700, 640) in clusters; (300, 3, 72) rows of context_scan that share a multiprocessor, on one of fewer than 300.
    "cuda": [(2, 70, 33), (1, 700, 17), (1, 3000, 64), (1, 700, 640), (300, 3, 72), (3, 200, 264)],
}


# Of the full cell (B, T, D), one hidden layer of 2 D: a cluster of 4 blocks, one of 16, and a team that meets in L2.
CELL_SHAPES = {"cuda": [(5, 4, 64), (18, 3, 256), (3, 3, 512)], "triton": [(5, 4, 33), (18, 3, 64)]}

# Of LayerNorm: rows of several warps, and of several blocks.
NORM_SHAPES = [(1, 9, 2048), (1, 5, 4097), (1, 3, 16384)]


def cells(backend: str) -> None:
    for B, T, D in CELL_SHAPES[backend]:
        dtype = torch.bfloat16
        problem = cases.make("recurrent_context", B, T, D, dtype)
        own = {"z": (B, T, 2 * D), "context_weight": (2 * D, D), "gate_weight": (3 * D, 2 * D)}
        problem.tensors |= {name: (0.1 * torch.randn(*shape)).to(dtype) for name, shape in own.items()}
        problem = problem.map(lambda name, x: x.cuda())
        with nk.use_backend(backend):
            cases.differentiate(problem.run, problem.tensors, [torch.randn_like(x) for x in problem.run()])


def main() -> int:
    if not torch.cuda.is_available():
        print("sanitize: error: needs an NVIDIA GPU; this PyTorch sees none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    only = set(sys.argv[1:])
    unknown = only - SHAPES.keys() - cases.TRUTH.keys()
    if unknown:
        print(
            f"sanitize: error: got {', '.join(unknown)}, wanted {', '.join((*SHAPES, *cases.TRUTH))}", file=sys.stderr
        )
        return 2
    for backend in only & SHAPES.keys() or SHAPES:
        for function in only & cases.TRUTH.keys() or cases.TRUTH:
            operation = "layer_norm" if function == "add_layer_norm" else function.removesuffix("_packed")
            served = False
            if function == "recurrent_context":
                cells(backend)
                print(f"{backend} {function}", flush=True)
                continue
            for shape in SHAPES[backend] + (NORM_SHAPES if operation == "layer_norm" and backend == "cuda" else []):
                if shape[2] > 8192 and torch.cuda.get_device_capability() < (9, 0):
                    continue
                for dtype in (torch.float32, torch.bfloat16):
                    if not verdicts(operation, Call(torch.device("cuda", 0), dtype, shape[2]))[backend].ok:
                        continue
                    served = True
                    problem = cases.make(function, *shape, dtype).map(lambda name, x: x.cuda())
                    with nk.use_backend(backend):
                        grads = [torch.randn_like(x) for x in problem.run()]
                        if (backend, operation) == ("cuda", "gated_scan_layer_norm"):
                            grads[1] = None  # with a gradient of c it is two operations
                        cases.differentiate(problem.run, problem.tensors, grads)
            if served:
                torch.cuda.synchronize()
                print(f"{backend} {function}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
