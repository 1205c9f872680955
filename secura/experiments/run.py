"""Runs a grid of cells: each once, on whichever process gets to it, going on where one stopped."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from secura import machine
from secura._extras import MissingExtraError
from secura.assets import ASSETS, AssetError
from secura.cli.errors import UserError, one_line
from secura.experiments import stage
from secura.experiments.board import Board
from secura.experiments.grid import Cell
from secura.experiments.material import Material
from secura.experiments.methods import get_method
from secura.experiments.probes import DivergedError
from secura.experiments.store import BusyError, Store, need_space
from secura.experiments.team import Team

PACKAGES = ("secura", "torch", "transformers", "peft", "lm_eval", "numpy")
MEASURED = ("secura", "secura_kernels")
ADAPTER_BYTES = 500_000_000
BYTES_A_PARAMETER = 4 + 12


@dataclass
class Outcome:
    """How many cells ended in which way."""

    done: int = 0
    kept: int = 0
    failed: int = 0
    left: int = 0

    def describe(self, out: Path) -> str:
        """One line for people."""
        parts = [f"{self.done} cells computed", f"{self.kept} there before"]
        parts += [f"{self.failed} failed"] if self.failed else []
        if self.left:
            parts.append(
                f"{self.left} left to another process, or without the model they start from"
            )
        return f"{', '.join(parts)}; next: secura experiment report --out {out}"


class Runner:
    """Computes cells and keeps their figures.

    Args:
        store: where.
        material: model and data.
        board: what is shown meanwhile.
        team: the processes that share each cell's training.
        retry_failed: whether cells that failed before are tried again.
    """

    def __init__(
        self,
        store: Store,
        material: Material,
        board: Board,
        team: Team,
        *,
        retry_failed: bool = False,
    ) -> None:
        self.store, self.material, self.board, self.team = store, material, board, team
        self.retry_failed = retry_failed
        self.outcome = Outcome()
        self.environment = environment(material)
        self._seen: set[Cell] = set()

    def run(self, cells: Sequence[Cell]) -> None:
        """Computes those of `cells` that are not there yet, parents first.

        A cell that fails is recorded and the others go on. One that another process is at, or that
        starts from such a one, is left to it.
        """
        left = [cell for cell in dict.fromkeys(cells) if cell not in self._seen]
        self.board.expect(len(left))
        while left:
            passed_over = [cell for cell in left if not self._attempt(cell)]
            if len(passed_over) == len(left):
                break
            left = passed_over
        self.outcome.left += len(left)

    def _attempt(self, cell: Cell) -> bool:
        """Whether the cell needs no more attempts by this process."""
        record = self.store.record(cell)
        known = record is not None and (record["status"] == "done" or not self.retry_failed)
        if self.team.agree(known):
            self._seen.add(cell)
            self.outcome.kept += 1
            self.board.finished(cell)
            return True
        parent = cell.parent
        if parent is not None and not self.team.agree(self.store.is_ready(parent)):
            return False
        with ExitStack() as stack:
            if not self.team.agree(self._claim(cell, stack)):
                return False
            self._seen.add(cell)
            self.board.cell(cell.title)
            record = self._compute(cell)
            if self.team.is_main:
                self.store.write(cell, record)
                if record["status"] == "done":
                    stage.clean(self.store.folder(cell))
            record = self.team.agree(record)
        gc.collect()  # trainer and model refer to each other
        failed = record["status"] == "failed"
        self.outcome.failed += failed
        self.outcome.done += not failed
        self.board.finished(cell, record)
        return True

    def _claim(self, cell: Cell, stack: ExitStack) -> bool:
        """Whether the cell is this process's to compute, which `stack` then holds."""
        if not self.team.is_main:
            return False
        try:
            stack.enter_context(self.store.claim(cell))
        except BusyError:
            return False
        record = self.store.record(cell)
        return record is None or (self.retry_failed and record["status"] == "failed")

    def _compute(self, cell: Cell) -> dict[str, Any]:
        """The cell's record: its figures, or why there are none.

        What another cell would meet too is raised: a full disk, a package or data that are missing.
        """
        start = time.perf_counter()
        try:
            figures = {"status": "done", **self._figures(cell)}
            check_finite(figures)
        except (UserError, MissingExtraError, AssetError, OSError):
            raise
        except (RuntimeError, ValueError, ArithmeticError) as error:
            if self.team.size > 1:  # the other processes wait for this one
                raise
            figures = {"status": "failed", "error": one_line(error)}
        seconds = figures.pop("seconds", {}) | {"total": time.perf_counter() - start}
        return {
            **figures,
            "seconds": seconds,
            "settings": self.material.settings.as_json(),
            "environment": self.environment
            | {"finished": datetime.now(UTC).isoformat(timespec="seconds")},
        }

    def _figures(self, cell: Cell) -> dict[str, Any]:
        data = {"data": self.material.describe(cell)}
        if self.team.is_main:
            self.store.check_data(cell.seed, data["data"])
        if not cell.tasks:
            return data | self._scores(cell, self.material.load_model())
        folder = self.store.folder(cell)
        need_space(folder, self._bytes(cell))
        parent = self.store.folder(cell.parent) if cell.parent else None
        self.board.training(self.material.settings.steps)
        model, strategy, training = stage.train(
            cell, self.material, folder, parent, self.board.step
        )
        seconds = {"training": training.pop("seconds")}
        if not self.team.is_main:
            return {}
        stage.finish(model, strategy, folder)
        with strategy.inferring(model):
            figures = self._scores(cell, model)
            if len(cell.tasks) == 1:
                start = time.perf_counter()
                figures["spectra"] = stage.spectra(cell, model, self.material)
                seconds["spectra"] = time.perf_counter() - start
        training["validation_loss"] = figures.pop("validation_loss")
        figures["seconds"] |= seconds
        return data | {"training": training} | figures

    def _scores(self, cell: Cell, model: Any) -> dict[str, Any]:
        self.board.scoring(len(self.material.scored) + (2 if cell.tasks else 1))
        start = time.perf_counter()
        figures = stage.score(cell, model, self.material, self.board.part)
        return figures | {"seconds": {"scoring": time.perf_counter() - start}}

    def _bytes(self, cell: Cell) -> int:
        """What a cell may need on the disk: checkpoints hold a trained model's optimizer too."""
        if get_method(cell.method).make_config is not None:
            return ADAPTER_BYTES
        return 2 * BYTES_A_PARAMETER * self.material.load_model().num_parameters()


def environment(material: Material) -> dict[str, Any]:
    """Where the figures are made, and of which model."""
    model = material.settings.model
    return {
        **machine.versions(PACKAGES),
        "commit": machine.commit(*MEASURED),
        "machine": machine.describe(torch.device(material.device)),
        "processes": material.processes,
        "model": ASSETS[model].describe() if model in ASSETS else model,
    }


def check_finite(figures: dict[str, Any]) -> None:
    """Raise `DivergedError` for figures that are NaN or infinite, with their names."""
    for name, value in figures.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError as error:
            raise DivergedError(f"after training, figures of {name} are NaN or infinite") from error


def best_rates(store: Store, cells: Sequence[Cell]) -> dict[str, float]:
    """For each method the rate of the cell with the least validation loss.

    A method is left out while cells of it are still to come, and where all of them failed.

    Args:
        store: where the cells' figures lie.
        cells: one task, one seed, several rates of each method.
    """
    best: dict[str, tuple[float, float]] = {}
    waiting: set[str] = set()
    for cell in cells:
        record = store.record(cell)
        if record is None:
            waiting.add(cell.method)
        if record is None or record["status"] != "done":
            continue
        found = (record["training"]["validation_loss"], cell.learning_rate)
        best[cell.method] = min(best.get(cell.method, found), found)
    return {method: rate for method, (_, rate) in best.items() if method not in waiting}


__all__ = ["Outcome", "Runner", "best_rates", "environment"]
