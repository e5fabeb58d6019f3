"""How fast passes over chunks of time close the seams of `context_scan`, by gates and by LayerNorm's weight: no GPU needed.

    python benchmarks/context_passes.py [--steps 4096] [--columns 1024] [--chunk 128] [--passes 8]

Multiple shooting as newllm_kernels/context_scan/triton.py does it, on the C++ kernel: all chunks from guessed starts, each then from
where the one before it ended. Prints by how much, relative to itself, the start of any chunk still moves after every pass; with
plain mending, and with the diagonal seam correction, which also carries a start's move through the chunk by the product of
sigmoid(f) weight / std, the direct path of dc_t / dc_{t-1}, clipped at one.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from tqdm import tqdm

import newllm_kernels as nk

# Mean of the forget gates' pre-activations, spread of LayerNorm's weight around one (and of its bias).
SETTINGS = [(mean, spread) for mean in (0.0, 1.0, 2.0) for spread in (0.0, 0.05, 0.1, 0.25)]
CLAMP = 10.0


def slopes(f: Tensor, i: Tensor, d: Tensor, before: Tensor, after: Tensor, weight: Tensor) -> Tensor:
    """dc_t / dc_{t-1} along the direct path, (chunks, steps, D); 0 where the clamp cut."""
    keep = torch.sigmoid(f)
    u = keep * before + torch.sigmoid(i) * torch.tanh(d)
    rstd = (u.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    return keep * weight * rstd * (after.abs() < CLAMP)


def moves(mean: float, spread: float, args: argparse.Namespace, corrected: bool) -> list[float]:
    """The largest relative move of a chunk's start after every pass."""
    torch.manual_seed(0)
    T, D, C = args.steps, args.columns, args.chunk
    f, i, d = (torch.randn(T // C, C, D) for _ in "fid")
    f += mean
    weight, bias, c0 = 1 + spread * torch.randn(D), spread * torch.randn(D), torch.randn(1, D)
    starts, found = c0.expand(T // C, D).clone(), []
    for _ in range(args.passes):
        c, ends = nk.context_scan(f, i, d, starts, weight, bias, clamp=CLAMP)
        new = torch.cat((c0, ends[:-1]))
        if corrected:
            before = torch.cat((starts[:, None], c[:, :-1]), dim=1)
            through = slopes(f, i, d, before, c, weight).log().sum(1).exp().clamp(0, 1)  # (chunks, D)
            for k in range(1, len(new)):
                new[k] = (ends[k - 1] + through[k - 1] * (new[k - 1] - starts[k - 1])).clamp(-CLAMP, CLAMP)
        found.append(float(((new - starts).norm(dim=1) / new.norm(dim=1)).max()))
        starts = new
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    for name, default, meaning in (
        ("steps", 4096, "of the sequence, a multiple of --chunk"),
        ("columns", 1024, "of the context"),
        ("chunk", 128, "steps of a chunk"),
        ("passes", 8, "over all chunks"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} (default: {default})")
    args = parser.parse_args()
    if min(vars(args).values()) < 1 or args.steps % args.chunk:
        parser.exit(
            2, f"context_passes: error: --steps {args.steps}: wanted a multiple of --chunk {args.chunk}, all above 0\n"
        )
    print("| forget gates | weight | mending | moves after each pass |\n|---|---|---|---|")
    for mean, spread in tqdm(SETTINGS, leave=False):
        for corrected in (False, True):
            found = " ".join(f"{move:.0e}" for move in moves(mean, spread, args, corrected))
            tqdm.write(f"| N({mean:g}, 1) | 1 +- {spread:g} | {'corrected' if corrected else 'plain'} | {found} |")


if __name__ == "__main__":
    main()
