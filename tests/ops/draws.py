"""Layers that the tests of operators draw: every space, and forms that are traced otherwise."""

from __future__ import annotations

import pytest

from secura_kernels import NormOptions
from secura_kernels.inspection.examples import Case, Example
from secura_kernels.norm import NORMS

SIZES = {"t": 5, "n": 13, "k": 6, "m": 4, "inner": 5}
OPTIONS = [
    NormOptions("none"),
    NormOptions("channel"),
    NormOptions("channel", "paper", "averaged"),
    NormOptions("weight"),
    NormOptions("weight", "calibrated", "gated"),
    NormOptions("activation"),
    NormOptions("activation", "released", "averaged"),
]


def name(options):
    return "-".join(part for part in options[:3] if part)


every_option = pytest.mark.parametrize("options", OPTIONS, ids=name)
# Form and combination stand in one packed string: they do not change what is traced.
every_space = pytest.mark.parametrize("options", [NormOptions(norm) for norm in NORMS], ids=name)


def draw(options, **flags) -> Example:
    return Case(options, **SIZES | flags).draw()
