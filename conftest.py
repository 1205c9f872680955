"""For every test: no hub, its own cache of data sets, `gpu` skipped where there is none."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile

import pytest
import torch

pytest_plugins = ["cli_fixtures"]

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers take the one of the process that began them
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="secura-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of the `gpu` marker as skipped where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Spares `gc.collect()`, which benchmarks call a lot, the half second for what is imported."""
    gc.collect()
    gc.freeze()
