"""Runs cells: each once, on whichever process gets to it, going on where one stopped."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from benchmarks import machine
from benchmarks.board import Board
from benchmarks.retention import record as records
from benchmarks.retention.cells import Cell, Settings
from benchmarks.retention.material import Material
from benchmarks.retention.methods import get_method
from benchmarks.retention.record import Record
from benchmarks.retention.train import TRAINED, needs, run

_PACKAGES = ("torch", "transformers", "peft", "numpy")


@dataclass
class Runner:
    """Computes a stage's cells into a folder.

    Args:
        root: of all stages' results.
        stage: its name.
        settings: its settings.
        device: where to compute.
        bf16: whether under autocast to bfloat16.
        board: what is shown meanwhile.
        deadline: no cell is started that would probably end after it (:func:`time.perf_counter`).
        retry: whether cells that failed before are tried again.
        on_trained: given each trained cell and its model, before its record is kept.
    """

    root: Path
    stage: str
    settings: Settings
    device: torch.device
    bf16: bool
    board: Board
    deadline: float = float("inf")
    retry: bool = False
    on_trained: Callable[[Cell, Any], None] | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"done": 0, "failed": 0, "left": 0})
    _longest: float = 0.0

    def __post_init__(self) -> None:
        self.material = Material(self.settings, self.device, self.bf16)

    def run(self, cells: Sequence[Cell]) -> None:
        """Computes those of `cells` that are not there yet and whose start is.

        A cell that fails is recorded and the others go on. One that another process is at, or that
        starts from such a one, is left to it.

        Raises:
            ValueError: a cell that is there was made with other settings.
        """
        left = list(dict.fromkeys(cells))
        while left:
            passed = [cell for cell in left if not self._attempt(cell)]
            if len(passed) == len(left):
                break
            left = passed
        self.counts["left"] += len(left)

    def _attempt(self, cell: Cell) -> bool:
        """Whether the cell needs no more attempts by this process."""
        path = self.root / self.stage / cell.path
        if self._known(path):
            return True
        start = needs(cell)
        at = (self.root / self.stage / start.path).with_suffix("") if start else None
        if at is not None and not (at / TRAINED).is_file():
            return False
        if time.perf_counter() + self._longest > self.deadline:
            return False
        folder = path.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=0):
                if not self._known(path) and not self._taken(cell, path, folder):
                    self._compute(cell, path, folder, at)
        except Timeout:
            return False
        return True

    def _known(self, path: Path) -> bool:
        found = records.read(path)
        if found is not None and found.settings != self.settings:
            ours, theirs = vars(self.settings), vars(found.settings)
            raise ValueError(
                f"{path} was made with another {', '.join(k for k in ours if ours[k] != theirs[k])}"
                ": give the same with --set, or another stage or --out"
            )
        return found is not None and not (found.status == "failed" and self.retry)

    def _taken(self, cell: Cell, path: Path, folder: Path) -> bool:
        """Copy an identical cell's result if there is one; return whether it was copied.

        A first task is another method's if a method differs by what it keeps of earlier tasks.
        """
        same = replace(cell, method=get_method(cell.method).first_as)
        at = self.root / self.stage / same.path
        if same == cell or cell.parent is not None or not self._known(at):
            return False
        found = records.read(at)
        trained = at.with_suffix("") / TRAINED
        if self.on_trained or not found or found.status == "failed" or not trained.is_file():
            return False
        shutil.copyfile(trained, folder / TRAINED)
        records.write(path, replace(found, cell=cell, seconds={}))
        self.counts["done"] += 1
        self.board.end(f"{cell.title}: as {same.method}")
        return True

    def _compute(self, cell: Cell, path: Path, folder: Path, start: Path | None) -> None:
        record = Record(self.stage, cell, self.settings)
        began = time.perf_counter()
        self.board.begin(cell.title, cell.steps)
        try:
            model = run(record, self.material, folder, start, self.board.step)
            if self.on_trained is not None:
                self.on_trained(cell, model)
        except (ArithmeticError, RuntimeError, ValueError) as error:
            record.status, record.error = "failed", " ".join(str(error).split())[:400]
            record.gradient_norms = {}  # which may hold NaN
            self.counts["failed"] += 1
        else:
            self.counts["done"] += 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record.environment = self._environment | {"finished": now}
        records.write(path, record)
        self._longest = max(self._longest, time.perf_counter() - began)
        self.board.end(describe(record))
        gc.collect()

    @cached_property
    def _environment(self) -> dict[str, Any]:
        return {
            **machine.package_versions(_PACKAGES),
            "commit": machine.commit(),
            "machine": machine.describe(self.device),
            **self.material.describe(),
        }


def describe(record: Record) -> str:
    """One line on a computed cell."""
    title = record.cell.title
    if record.status == "failed":
        return f"{title}: failed, {record.error}"
    task, end = record.task, record.end
    kinds = ", ".join(f"{kind} {score.kl:.3f}" for kind, score in end.texts.items())
    return (
        f"{title}: learned {end.tasks[task].learned:.3f}, KL {kinds}; "
        f"{record.seconds['total']:.0f} s, {record.seconds['scoring']:.0f} of it scoring"
    )


__all__ = ["Runner", "describe"]
