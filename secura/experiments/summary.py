"""Figures out of a run's cells: what was learned, kept and forgotten, and how sure that is.

Everything here is computed from the records in a results folder and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from secura.experiments.estimates import estimate, mean, paired, rise_at
from secura.experiments.grid import BASE_CELL, EXPERIMENTS, Cell, Experiment, cells, rate_search
from secura.experiments.methods import METHODS, get_method, get_methods

Record = Mapping[str, Any]
REFERENCE = "lora"
"""The method the others are compared with."""

METRICS = ("accuracy", "exact_match", "rouge_l", "bleu")
"""Names of tasks' own scores, each from 0 to 1."""

SHARES = ("accuracy", "exact_match")
"""Those that are a share of right answers."""


def is_done(record: Record) -> bool:
    """Whether a record has figures."""
    return record["status"] == "done"


def loss(record: Record, task: str) -> float:
    """The held-out loss of a task, in nats a token."""
    return record["scores"][task]["loss"]


@dataclass(frozen=True)
class Entry:
    """A row of a table: a run, under every name it was asked for by.

    Args:
        name: the method of its cell, a method's name.
        title: for people; several names as ``LoRA (SEQ) = ER = EWC``.
    """

    name: str
    title: str

    @property
    def shared(self) -> bool:
        """Whether it goes by several names."""
        return " = " in self.title


class Run:
    """The records of a results folder, and what was asked of it.

    Args:
        records: in any order; a cell may be missing or failed.
        experiments: names in `EXPERIMENTS`.
        methods: names asked for; None takes those that any record is of, with those that are the
            same run on a first task.

    Raises:
        ValueError: no records, an unknown experiment or method, or records of different settings.
    """

    def __init__(
        self,
        records: Sequence[Record],
        experiments: Sequence[str],
        methods: Sequence[str] | None = None,
    ) -> None:
        if not records:
            raise ValueError("there are no records to report on; run an experiment first")
        if unknown := [name for name in experiments if name not in EXPERIMENTS]:
            raise ValueError(
                f"unknown experiment {unknown[0]!r}: choose from {', '.join(EXPERIMENTS)}"
            )
        self.settings = records[0]["settings"]
        if any(record["settings"] != self.settings for record in records):
            raise ValueError("the records were made with different settings: report on each alone")
        self.records = {_cell(record): record for record in records}
        self.tasks: tuple[str, ...] = tuple(self.settings["tasks"])
        self.probes: tuple[str, ...] = tuple(self.settings["probes"])
        self.rate: float = self.settings["learning_rate"]
        trained = [cell for cell in self.records if cell.tasks]
        self.seeds = sorted({cell.seed for cell in trained})
        asked = [e for name, e in EXPERIMENTS.items() if name in experiments]
        self.experiments = [e for e in asked if self._is_started(e)]
        self.not_run = [e for e in asked if e not in self.experiments]
        names = {cell.method for cell in trained}
        self.methods = get_methods(
            [*names, *(name for name, m in METHODS.items() if m.first_as in names)]
            if methods is None
            else methods
        )

    def _is_started(self, experiment: Experiment) -> bool:
        """Whether there is a record of it that is not the first task's alone, if it has others."""
        sequences = experiment.sequences(self.tasks)
        own = sequences if len(sequences) == 1 else [s for s in sequences if s != self.tasks[:1]]
        return any(cell.tasks in own for cell in self.records)

    @cached_property
    def base(self) -> Record | None:
        """The untouched model's record; None where it is missing or failed."""
        record = self.records.get(BASE_CELL)
        return record if record and is_done(record) else None

    def record(self, name: str, tasks: Sequence[str], rate: float, seed: int) -> Record | None:
        """A finished cell's record, under whichever name it was computed; None without one."""
        record = self.records.get(Cell(seed, tuple(tasks), name, rate).canonical)
        return record if record and is_done(record) else None

    def entries(self, tasks: int = 1) -> list[Entry]:
        """The rows for sequences of so many tasks: on a first task some methods are one run."""
        titles: dict[str, list[str]] = {}
        for method in self.methods:
            name = (method.first_as if tasks == 1 else None) or method.name
            titles.setdefault(name, []).append(method.title)
        return [Entry(name, _joined(found)) for name, found in titles.items()]

    def over_seeds(
        self,
        name: str,
        tasks: Sequence[str],
        rate: float,
        figure: Callable[[Record], float | None],
    ) -> dict[int, float]:
        """A figure by seed, of the seeds whose cell is finished and has it."""
        found = {seed: self.record(name, tasks, rate, seed) for seed in self.seeds}
        values = {seed: figure(record) for seed, record in found.items() if record}
        return {seed: value for seed, value in values.items() if value is not None}

    def rates(self, name: str) -> list[float]:
        """The rates a method was run at on the first task, lowest first."""
        wanted = Cell(0, self.tasks[:1], name, 0.0).canonical
        return sorted(
            {
                cell.learning_rate
                for cell, record in self.records.items()
                if (cell.method, cell.tasks) == (wanted.method, wanted.tasks) and is_done(record)
            }
        )

    @cached_property
    def is_searched(self) -> bool:
        """Whether methods were run at other rates than the one."""
        return any(cell.tasks and cell.learning_rate != self.rate for cell in self.records)

    @cached_property
    def search_seed(self) -> int:
        """The seed each method's own rate is chosen on: the one with most rates on record."""
        first = [cell for cell in self.records if cell.tasks == self.tasks[:1]]
        return max(self.seeds, key=lambda seed: (sum(c.seed == seed for c in first), -seed))

    def best_rate(self, name: str) -> float | None:
        """A method's own rate: that of least validation loss among its rates, on one seed."""
        losses = {}
        for rate in get_method(name).rates:
            if record := self.record(name, self.tasks[:1], rate, self.search_seed):
                losses[rate] = record["training"]["validation_loss"]
        return min(losses, key=lambda rate: losses[rate], default=None)

    @cached_property
    def wanted(self) -> list[Cell]:
        """Every cell that the experiments are made of."""
        names = [method.name for method in self.methods]
        found = cells(self.experiments, names, self.tasks, self.seeds, self.rate)
        if self.is_searched and any(experiment.own_rate for experiment in self.experiments):
            found += rate_search(names, self.tasks[0], self.search_seed)
            found += [
                Cell(seed, self.tasks[:1], name, rate).canonical
                for name in names
                if (rate := self.best_rate(name)) is not None
                for seed in self.seeds
            ]
        return list(dict.fromkeys(found))

    @cached_property
    def missing(self) -> list[Cell]:
        """The wanted cells no record is of."""
        return [cell for cell in self.wanted if cell not in self.records]

    @cached_property
    def failed(self) -> dict[Cell, str]:
        """What went wrong in each failed cell, wanted or not."""
        return {
            cell: record.get("error", "no reason on record")
            for cell, record in sorted(self.records.items())
            if not is_done(record)
        }

    def metric(self, task: str) -> str:
        """The name of a task's own score."""
        scored = (record["scores"][task] for record in self.records.values() if is_done(record))
        return next((name for scores in scored for name in METRICS if name in scores), "score")

    def score(self, record: Record, task: str) -> float:
        """A task's own score."""
        return record["scores"][task][self.metric(task)]

    def learned(self, record: Record, task: str) -> float | None:
        """How far the held-out loss of a task fell below the base model's, in nats a token."""
        if not self.base:
            return None
        return loss(self.base, task) - loss(record, task)

    def text_rise(self, record: Record) -> float | None:
        """How far the loss on general text rose above the base model's, in nats a token."""
        return record["text"]["loss"] - self.base["text"]["loss"] if self.base else None

    @cached_property
    def telling_probes(self) -> list[str]:
        """The probes the base model scores above 0 on: of the others no share can be kept."""
        return [p for p in self.probes if self.base and self.score(self.base, p)]

    def retention(self, record: Record) -> float | None:
        """Mean over the probes of score / the base model's score."""
        base = self.base
        if not base or not self.telling_probes:
            return None
        return mean(self.score(record, p) / self.score(base, p) for p in self.telling_probes)

    def probe_loss_rise(self, record: Record) -> float | None:
        """How far the mean loss on the probes rose above the base model's, in nats a token."""
        if not self.base or not self.probes:
            return None
        return mean(loss(record, probe) - loss(self.base, probe) for probe in self.probes)

    def matrices(
        self, name: str, figure: Callable[[Record, str], float]
    ) -> dict[int, list[list[float]]]:
        """``[j][i]``: the figure of task i after training on tasks 0…j, of each complete seed."""
        found = {}
        for seed in self.seeds:
            stages = [self.tasks[:count] for count in range(1, len(self.tasks) + 1)]
            records = [self.record(name, stage, self.rate, seed) for stage in stages]
            rows = [[figure(record, task) for task in self.tasks] for record in records if record]
            if len(rows) == len(stages):
                found[seed] = rows
        return found


@dataclass(frozen=True)
class AtEqualLearning:
    """What a method and the reference lose where both have learned as much.

    Args:
        entry: the method.
        learned: how much that is, by seed.
        rise: the method's rise of text loss there, by seed.
        reference: the reference's.
        direct: whether it is where the reference is at the one rate; else it is where the method
            came nearest to that.
    """

    entry: Entry
    learned: dict[int, float] = field(default_factory=dict)
    rise: dict[int, float] = field(default_factory=dict)
    reference: dict[int, float] = field(default_factory=dict)
    direct: bool = True

    def add(self, seed: int, learned: float, rise: float, reference: float) -> None:
        """A seed's figures."""
        self.learned[seed], self.rise[seed], self.reference[seed] = learned, rise, reference


def at_equal_learning(run: Run) -> list[AtEqualLearning]:
    """Every method against `REFERENCE` at equal learning of the first task, by what it loses.

    It is read off the straight lines between a method's rates, each seed's own. Where no seed's
    line covers what the reference has learned at the one rate, the reference's line is read where
    the method came nearest; a method that neither can be done for has no seeds. Those compared at
    the reference's learning come first, those without seeds last.
    """
    rows = [_at_equal_learning(run, entry) for entry in run.entries()]
    return sorted(
        rows,
        key=lambda row: (
            not row.rise,
            not row.direct,
            estimate(paired(row.rise, row.reference)).mean if row.rise else 0.0,
        ),
    )


def _at_equal_learning(run: Run, entry: Entry) -> AtEqualLearning:
    direct, nearest = AtEqualLearning(entry), AtEqualLearning(entry, direct=False)
    for seed in run.seeds:
        theirs = _curve(run, REFERENCE, seed)
        ours = _curve(run, entry.name, seed)
        if run.rate not in theirs or not ours:
            continue
        learned, lost = theirs[run.rate]
        if (rise := rise_at([*ours.values()], learned)) is not None:
            direct.add(seed, learned, rise, lost)
            continue
        reached, rise = min(ours.values(), key=lambda point: abs(point[0] - learned))
        if (lost_there := rise_at([*theirs.values()], reached)) is not None:
            nearest.add(seed, reached, rise, lost_there)
    return direct if direct.rise else nearest


def _curve(run: Run, name: str, seed: int) -> dict[float, tuple[float, float]]:
    """What a method learned and lost at each rate, lowest first; below several, the base model."""
    points = {}
    for rate in run.rates(name):
        record = run.record(name, run.tasks[:1], rate, seed)
        if record and (learned := run.learned(record, run.tasks[0])) is not None:
            points[rate] = learned, run.text_rise(record) or 0.0
    return {0.0: (0.0, 0.0), **points} if len(points) > 1 else points


def _cell(record: Record) -> Cell:
    head = record["cell"]
    return Cell(head["seed"], tuple(head["tasks"]), head["method"], head["learning_rate"])


def _joined(titles: Sequence[str]) -> str:
    """``SECURA weight M1`` and ``SECURA weight M2`` as ``SECURA weight M1 = M2``."""
    first = titles[0].split()
    rest = []
    for title in titles[1:]:
        words = title.split()
        start = next((i for i, (a, b) in enumerate(zip(first, words, strict=False)) if a != b), 0)
        rest.append(" ".join(words[start:]))
    return " = ".join([titles[0], *rest])


__all__ = [
    "METRICS",
    "REFERENCE",
    "SHARES",
    "AtEqualLearning",
    "Entry",
    "Record",
    "Run",
    "at_equal_learning",
    "is_done",
    "loss",
]
