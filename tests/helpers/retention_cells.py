"""Cells of the tiny model: methods at ranks it has room for, what a cell left, and stopping one."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from benchmarks.retention import record as records
from benchmarks.retention import train
from benchmarks.retention.cells import Cell
from benchmarks.retention.methods import METHODS
from benchmarks.retention.record import Record

RANKS = {"secura": "rank=4", "lora": "rank=2", "dora": "rank=2"}


def short(name: str) -> str:
    """The method at a rank that the tiny model has room for."""
    base = name.partition("@")[0]
    rank = "rank=4,inner_r=4" if "released" in base else RANKS.get(METHODS[base].adapter)
    return name if rank is None else f"{name}{',' if '@' in name else '@'}{rank}"


def read(runner, cell: Cell) -> Record:
    found = records.read(runner.root / "try" / cell.path)
    assert found is not None
    return found


def figures(record: Record) -> dict:
    """What was measured, without clock and machine."""
    content = record.to_json()
    return {k: v for k, v in content.items() if k not in ("seconds", "environment", "stage")}


@contextmanager
def stopping(monkeypatch, at: int):
    """Within it, a cell is interrupted before the step after ``at``."""
    take = train._Run._take

    def stop(run, rows):
        if run.step == at:
            raise KeyboardInterrupt
        take(run, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train._Run, "_take", stop)
        yield
