"""Trains one cell, measured on the way, checkpointed so that a stopped one goes on bit-equal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import secura
from benchmarks.files import replacing
from benchmarks.retention.build import (
    adapter_state,
    build,
    gradient_norms,
    make_optimizer,
    scale_update,
)
from benchmarks.retention.cells import Cell
from benchmarks.retention.gradients import Gradients
from benchmarks.retention.material import Material
from benchmarks.retention.methods import Method, get_method
from benchmarks.retention.record import Record, measure_from
from benchmarks.retention.strategies import STRATEGIES, Context, State, Strategy

WARMUP = 0.1
TRAINED = "trained.safetensors"
CHECKPOINT = "checkpoint.safetensors"


class DivergedError(ArithmeticError):
    """Training arrived at NaN or inf."""


def needs(cell: Cell) -> Cell | None:
    """The cell whose trained adapter this one starts from or scales; None for the untouched model.

    One that is scaled after training is made of the cell that was not.
    """
    whole = get_method(cell.method).trained_as
    return replace(cell, method=whole) if whole != cell.method else cell.parent


def quarters(steps: int) -> list[int]:
    """The steps after which a cell is measured, the last among them."""
    return sorted({math.ceil(steps * part / 4) for part in (1, 2, 3, 4)})


def rate_factor(step: int, steps: int) -> float:
    """Share of the peak rate at a step from 0: up over a tenth, then down a cosine to 0."""
    warm = math.ceil(WARMUP * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def run(
    record: Record,
    material: Material,
    folder: Path,
    start: Path | None,
    on_step: Callable[[int], None],
) -> Any:
    """Fills in a cell's record, going on from a checkpoint in `folder`; gives the trained model.

    Args:
        record: the cell and its stage's settings.
        material: of its stage.
        folder: for what the cell keeps.
        start: the folder of the cell it needs, see :func:`needs`.
        on_step: called with the steps done.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    run_ = _Run(record, material, folder, start)
    if get_method(record.cell.method).scale == 1:
        run_.train(on_step)
    run_.finish()
    record.seconds["total"] = run_.total()
    return run_.model


class _Run:
    """One cell at work: model, optimizer, strategy and the step it is at."""

    def __init__(
        self, record: Record, material: Material, folder: Path, start: Path | None
    ) -> None:
        self.began = time.perf_counter()
        self.record, self.material, self.folder = record, material, folder
        self.cell: Cell = record.cell
        self.method: Method = get_method(self.cell.method)
        self.step = 0
        with self._timed("building"):
            kept, notes = read_state(folder / CHECKPOINT)
            before, _ = read_state(start / TRAINED if start else None)
            whole = before.get("adapter", {})
            if self.method.scale != 1:
                self.model, _ = build(self.cell, self.method, material, {}, whole)
                scale_update(self.model, self.method.scale)
            else:
                self.model, record.anchor = build(
                    self.cell, self.method, material, whole, kept.get("adapter")
                )
        self.strategy: Strategy = STRATEGIES[self.method.against](
            Context(self.cell, self.method, material, self.model, _under("strategy", before))
        )
        self.optimizer = make_optimizer(self.model, self.cell, self.method)
        record.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if kept:
            self._resume(kept, notes)
        plain = type(self.strategy).loss is Strategy.loss
        recorded = plain and self.method.fold != "step"
        self.gradients = Gradients(self.strategy, recorded=recorded)

    def train(self, on_step: Callable[[int], None]) -> None:
        """Takes the steps that are left, measuring after each quarter."""
        cell, settings = self.cell, self.record.settings
        batches = self.material.batches(cell.tasks[-1], cell.seed, cell.steps)
        measured = quarters(cell.steps)[:-1]
        while self.step < cell.steps:
            with self._timed("training"):
                self._take(self.strategy.rows(batches[self.step]))
            on_step(self.step)
            if self.step in measured:
                self._measure(part=True)
            if self.step % settings.save_every == 0 and self.step < cell.steps:
                self._save()

    def finish(self) -> None:
        """Measures the trained model, and keeps it for the cells that go on from it."""
        self.step = self.cell.steps
        self._measure(part=False)
        with self._timed("scoring"), self._inferring():
            self.record.probes = self.material.probe(self.model)
            self.record.exact_match = self.material.exact_match(self.model)
        if self.method.adapter != "full" and self.method.scale == 1:
            parts = self.strategy.state().items()
            strategy = {f"strategy.{part}": values for part, values in parts}
            write_state(self.folder / TRAINED, {"adapter": self._adapter(), **strategy})
        (self.folder / CHECKPOINT).unlink(missing_ok=True)

    def _take(self, rows: list[Any]) -> None:
        record = self.record
        for group in self.optimizer.param_groups:
            group["lr"] = self.cell.rate * rate_factor(self.step, self.cell.steps)
        record.losses.append(self.gradients(rows))
        if not math.isfinite(record.losses[-1]):
            raise DivergedError(f"the loss became {record.losses.pop()} at step {self.step + 1}")
        for kind, norm in gradient_norms(self.model, self.cell.targets).items():
            record.gradient_norms.setdefault(kind, []).append(norm)
        self.strategy.before_step()
        self.optimizer.step()
        self.step += 1
        if self.method.fold == "step":
            secura.fold(self.model)
        self.strategy.after_step()

    def _measure(self, *, part: bool) -> None:
        with self._timed("scoring"), self._inferring():
            measures = self.material.measure(self.model, self.step, part=part)
        scores = (*measures[-1].tasks.values(), *measures[-1].texts.values())
        if not all(math.isfinite(score.loss) and math.isfinite(score.kl) for score in scores):
            raise DivergedError(f"a held-out loss is no number at step {self.step}")
        self.record.measures += measures

    @contextmanager
    def _inferring(self) -> Iterator[None]:
        """The model as it answers; W' of norm ``weight`` is formed once, not at every batch."""
        with self.strategy.inferring():
            if self.method.config.get("norm") != "weight":
                yield
                return
            self.model.merge_adapter()
            try:
                yield
            finally:
                self.model.unmerge_adapter()

    def _adapter(self) -> dict[str, Tensor]:
        folds_base = self.method.whiten and self.cell.parent is not None
        return adapter_state(self.model, base=folds_base)

    def total(self) -> float:
        """Seconds that the cell took up to now, those before a checkpoint among them."""
        return self.record.seconds.get("total", 0.0) + time.perf_counter() - self.began

    def _save(self) -> None:
        record = self.record.to_json(exact=True)
        kept = {
            name: record[name]
            for name in ("measures", "losses", "gradient_norms", "anchor", "seconds")
        }
        kept["seconds"] = kept["seconds"] | {"total": self.total()}
        moments = self.optimizer.state_dict()["state"]
        state = {
            "adapter": self._adapter(),
            **{f"optimizer.{index}": values for index, values in moments.items()},
            **{f"strategy.{part}": values for part, values in self.strategy.state().items()},
        }
        write_state(self.folder / CHECKPOINT, state, {"step": self.step, "record": kept})

    def _resume(self, state: State, notes: dict[str, Any]) -> None:
        self.step = notes["step"]
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {int(k): v for k, v in _under("optimizer", state).items()}
        self.optimizer.load_state_dict(optimizer)
        self.strategy.resume(_under("strategy", state))
        record, found = self.record, notes["record"]
        record.measures = [measure_from(entry) for entry in found["measures"]]
        record.losses, record.gradient_norms = found["losses"], found["gradient_norms"]
        record.anchor = found["anchor"]
        for part, seconds in found["seconds"].items():
            record.seconds[part] = record.seconds.get(part, 0.0) + seconds

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds = self.record.seconds
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - began


def write_state(path: Path, state: State, notes: dict[str, Any] | None = None) -> None:
    """Writes tensors by part and name, and notes that JSON can hold, as one safetensors file."""
    tensors = {
        f"{part}/{name}": value.detach().cpu().clone().contiguous()
        for part, values in state.items()
        for name, value in values.items()
    }
    with replacing(path) as scratch:
        save_file(tensors, scratch, metadata={"notes": json.dumps(notes or {})})


def read_state(path: Path | None) -> tuple[State, dict[str, Any]]:
    """What :func:`write_state` wrote; nothing where there is no file."""
    state: State = {}
    if path is None or not path.is_file():
        return state, {}
    with safe_open(path, "pt") as file:
        notes = json.loads(file.metadata()["notes"])
        for key in file.keys():  # noqa: SIM118
            part, _, name = key.partition("/")
            state.setdefault(part, {})[name] = file.get_tensor(key)
    return state, notes


def _under(group: str, state: State) -> State:
    """The parts ``group.name`` of a state, by name."""
    prefix = f"{group}."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


__all__ = [
    "CHECKPOINT",
    "TRAINED",
    "DivergedError",
    "needs",
    "quarters",
    "rate_factor",
    "read_state",
    "run",
    "write_state",
]
