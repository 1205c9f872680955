"""Shared fixture: the grid of norms."""

from __future__ import annotations

from itertools import product

import pytest

from secura_kernels import NormOptions
from secura_kernels.norm import COMBINES, FORMS

NORM_GRID = [
    ("none", None, None),
    *product(("weight", "channel", "activation"), FORMS, COMBINES),
]


@pytest.fixture(params=NORM_GRID, ids=lambda grid: "-".join(str(part) for part in grid))
def options(request) -> NormOptions:
    """Every space, form and combination."""
    return NormOptions(*request.param)
