"""Shared fixtures: the grid of norms, and a mesh of one process."""

from __future__ import annotations

from itertools import product

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

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


@pytest.fixture(scope="module")
def mesh():
    """One process, whose shards are whole, but DTensors all the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
