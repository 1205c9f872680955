"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], labels: int = 1) -> str:
    """Write a Markdown table; the first ``labels`` columns to the left, figures to the right."""
    rule = ["---" if place < labels else "---:" for place in range(len(head))]
    return "\n".join(map(_line, [head, rule, *rows]))


def _line(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


__all__ = ["table"]
