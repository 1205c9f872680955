"""The rate that the weights give (``secura.learning_rate``) beside those found by trying.

    python -m benchmarks.rates --out benchmarks/results/rates.json

``quick`` adapts the packaged models as the retention experiment's committed cells of one task did,
and computes the rate of each; the table sets beside it what the cells learned at theirs. ``tiny``
is a random model, for tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import nn

import secura
from secura.rates import SHARE

from .files import RESULTS
from .markdown import table
from .retention.methods import get_method
from .retention.record import read_all
from .schema import Result, Row
from .session import Session, command, parser
from .tables import provenance
from .training import load_model, packaged_or_tiny

STEPS = 128


class Adapted(NamedTuple):
    """An adapter of committed cells: their stage and its model, the method, where it is."""

    stage: str
    model: str
    method: str
    targets: str


_FOUND = tuple(
    Adapted(stage, model, method, targets)
    for stage, model, methods in (
        (
            "screen",
            "smollm2-135m",
            {
                "anchored-self": ("mlp", "qv"),
                "core-u": ("mlp", "qv"),
                "cabr": ("mlp", "qv"),
                "secura-weight": ("mlp", "qv"),
            },
        ),
        (
            "anchor",
            "smollm2-135m",
            {f"anchored-self@rank={rank}": ("mlp",) for rank in (32, 96, 128, 192)},
        ),
    )
    for method, places in methods.items()
    for targets in places
)
