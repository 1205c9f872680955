from __future__ import annotations

import pytest
import retention_models
import torch
from rich.console import Console

from benchmarks.board import Board
from benchmarks.retention import data
from benchmarks.retention.runner import Runner


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    retention_models.save_model(folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def made_up_data(monkeypatch, cache):
    monkeypatch.setenv("SECURA_CACHE", str(cache))
    for name in ("load_task", "load_probe", "load_texts"):
        monkeypatch.setattr(data, name, getattr(retention_models, name))
    monkeypatch.setattr(data, "anchor_texts", lambda: retention_models.load_texts("anchor"))


@pytest.fixture
def runner(tmp_path, model_folder):
    """Makes a runner of a stage called "try" in a fresh folder."""

    def make(out=tmp_path, deadline=float("inf"), retry=False, bf16=False, **settings):
        board = Board(Console(quiet=True))
        chosen = retention_models.settings(model_folder, **settings)
        device = torch.device("cpu")
        return Runner(out, "try", chosen, device, bf16, board, deadline, retry)

    return make
