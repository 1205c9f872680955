"""Few cases that hold every pair of values that those of a whole grid hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value an axis: any two values of two axes stand together in one of them."""

    def pairs(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(row), 2))

    grid = list(product(*(range(len(axis)) for axis in axes)))
    open_pairs, chosen = set().union(*map(pairs, grid)), []
    while open_pairs:
        best = max(grid, key=lambda row: len(pairs(row) & open_pairs))  # the first of the best
        open_pairs -= pairs(best)
        chosen.append(best)
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in sorted(chosen)]
