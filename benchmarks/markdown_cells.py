"""Cells of a markdown table, aligned, so that it reads as plain text too."""

from __future__ import annotations


def cells(headers: list[str], lines: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(line[k]) for line in [headers, *lines]) for k in range(len(headers))]
    rule = ["-" * (widths[0] + 1) + "|", *("-" * (width + 1) + ":|" for width in widths[1:])]
    body = ["| " + " | ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True))) + " |" for line in [headers, *lines]]  # fmt: skip
    return "\n".join([body[0], "|-" + "".join(rule), *body[1:]])
