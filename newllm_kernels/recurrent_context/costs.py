"""What a step of the full cell costs on a GPU, in microseconds: who is chosen, and which way through time, is decided by it.

Fitted to an H100 (docs/performance.md, "The full cell on an H100"). What counts is how two ways compare, so other GPUs go by the same
figures.
"""

from __future__ import annotations

from typing import NamedTuple

from newllm_kernels import native

# The persistent kernel: a step of one wave of teams, where a team is a cluster (of n blocks with 16 columns and 32 units each, and any
# other), a mesh of clusters, and n blocks that meet in L2.
CLUSTER = ((1.15, 0.115), (1.25, 0.13))
OTHER_CLUSTER = (4.3, 5.3)
MESH = {512: (4.8, 4.75), 768: (4.55, 6.2)}  # by D
BLOCKS = ((8.0, 0.0045), (9.6, 0.022))
# Fused steps in a CUDA graph: a launch, of a product or of what follows it; a weight read; floating point operations a
# microsecond. Seen between 16 and 512 rows at D = 256 and 768.
LAUNCH = (2.6, 2.55)
WEIGHT = (0.2e-6, 1.0e-6)
RATE = (4.4e8, 3.6e8)


class Step(NamedTuple):
    """A step's time, microseconds."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward

    def __str__(self) -> str:
        return f"some {self.forward:.3g} us a step forward and {self.backward:.3g} backward"


# Of a pass over chunks beside its steps: what has moved, and asking the GPU for it.
PASS = Step(350.0, 500.0)
PASS_ON_CPU = 25  # in steps
# Plain PyTorch, a launch for every operation.
REFERENCE = Step(500.0, 1000.0)


def persistent(D: int, H: int, rows: int, device: int) -> Step:
    """CUDA C++, all steps in one launch: 16 rows a team, as many teams at once as fit."""
    team, teams = native.cuda_recurrent_team(D, H, device), native.cuda_recurrent_teams(D, H, device)
    waves = max(1, -(-rows // (16 * max(1, teams))))
    meshes = native.cuda_recurrent_meshes(D, H, device)
    if meshes and -(-rows // (16 * meshes)) <= waves:
        return Step(*(waves * time for time in MESH[D]))
    if team < 0 and (team not in (-8, -16) or (-16 * team, -32 * team) != (D, H)):
        one = OTHER_CLUSTER
    else:
        one = tuple(base + each * abs(team) for base, each in (CLUSTER if team < 0 else BLOCKS))
    return Step(*(waves * time for time in one))


def steps(D: int, H: int, layers: int, rows: int) -> Step:
    """Fused steps, in a CUDA graph."""
    weights = 3 * D * D if layers == 0 else D * H + (layers - 1) * H * H + 3 * H * D
    return Step(
        *(
            2 * (layers + 1) * launch + weights * (weight + 2 * rows / rate)
            for launch, weight, rate in zip(LAUNCH, WEIGHT, RATE, strict=True)
        )
    )
