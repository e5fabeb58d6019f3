"""The README's Python runs as written, top to bottom, given only the `hidden` it speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names = {"hidden": torch.randn(2, 5, 512)}
    for block in blocks:
        exec(block, names)
    assert names["contexts"].shape == (2, 5, 256)
    assert names["context"].shape == (2, 256)
    assert names["c"].shape == (8, 1024, 512)
