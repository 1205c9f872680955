"""Shared fixtures: one small layer, and the grid of norms."""

from __future__ import annotations

import pytest
from layers import NORM_GRID, Layer

from secura_kernels import NormOptions


@pytest.fixture(params=NORM_GRID, ids=lambda grid: "-".join(str(part) for part in grid))
def options(request) -> NormOptions:
    """Every space, form and combination."""
    return NormOptions(*request.param)


@pytest.fixture
def layer() -> Layer:
    return Layer()
