"""The grid: which cells an experiment is made of.

A cell is one training run on the last of its tasks, which starts where the cell with one task less
ended, and the scores after it. Experiments on one task and sequences of tasks so share their cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from secura.experiments.methods import BASE, get_method


@dataclass(frozen=True, order=True)
class Cell:
    """One point of the grid.

    Args:
        seed: of the training examples, their order, and whatever of the adapter is drawn (rows and
            columns of least norm and A from W, SECURA's defaults, are not).
        tasks: names of the tasks trained on, in order; the cell's run is on the last.
        method: a method's name, or `BASE` with no tasks: the untouched model.
        learning_rate: the peak rate.
    """

    seed: int
    tasks: tuple[str, ...]
    method: str
    learning_rate: float

    @property
    def parent(self) -> Cell | None:
        """The cell this one starts from; None where that is the untouched model."""
        return replace(self, tasks=self.tasks[:-1]).canonical if len(self.tasks) > 1 else None

    @property
    def canonical(self) -> Cell:
        """The cell that is computed for this one: the same run may have several names."""
        method = get_method(self.method)
        first = method.first_as if len(self.tasks) == 1 else None
        return replace(self, method=first or method.name)

    @property
    def root(self) -> str:
        """The method of the first task's cell, which this one goes back to."""
        return replace(self, tasks=self.tasks[:1]).canonical.method

    @property
    def path(self) -> Path:
        """Where the cell lies in a results folder."""
        if not self.tasks:
            return Path(BASE)
        rate = f"lr{self.learning_rate:g}"
        return Path(self.method, rate, f"seed{self.seed}", "+".join(self.tasks))

    @property
    def title(self) -> str:
        """One line for people."""
        if not self.tasks:
            return BASE
        sequence = " → ".join(self.tasks)
        return f"{self.method}, {sequence}, lr {self.learning_rate:g}, seed {self.seed}"


BASE_CELL = Cell(seed=0, tasks=(), method=BASE, learning_rate=0.0)


@dataclass(frozen=True)
class Experiment:
    """What is trained, and what is then looked at.

    Args:
        name: on the command line.
        title: for people.
        sequence: whether the preset's tasks are learned one after another; else each alone.
        every_task: for experiments on one task each, whether on every task of the preset or on
            its first.
        own_rate: whether each method is also run at its own best rate.
    """

    name: str
    title: str
    sequence: bool = False
    every_task: bool = False
    own_rate: bool = False

    def sequences(self, tasks: Sequence[str]) -> list[tuple[str, ...]]:
        """The task sequences of its cells, shortest first."""
        if self.sequence:
            return [tuple(tasks[:count]) for count in range(1, len(tasks) + 1)]
        return [(task,) for task in (tasks if self.every_task else tasks[:1])]


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment("exp0", "Singular values of the adapted weights"),
        Experiment("exp2", "One task each", every_task=True),
        Experiment("exp3", "Gradient norms of the adapters"),
        Experiment("exp4", "Knowledge kept after one task", own_rate=True),
        Experiment("exp5", "Tasks in sequence", sequence=True),
    )
}


def cells(
    experiments: Sequence[Experiment],
    methods: Sequence[str],
    tasks: Sequence[str],
    seeds: Sequence[int],
    learning_rate: float,
) -> list[Cell]:
    """Every cell of the experiments at one rate, each once; parents before their children.

    They are ordered by seed, so that a run that is cut short has compared every method.
    """
    sequences = {s for experiment in experiments for s in experiment.sequences(tasks)}
    wanted = (
        Cell(seed, sequence, method, learning_rate).canonical
        for seed in seeds
        for sequence in sorted(sequences, key=lambda s: (len(s), [tasks.index(t) for t in s]))
        for method in methods
        if sequence == tuple(tasks[:1]) or not get_method(method).first_only
    )
    return list(dict.fromkeys([BASE_CELL, *wanted]))


def split(cells: Sequence[Cell], index: int, count: int) -> list[Cell]:
    """The `index`-th of `count` parts of a grid; cells that start from one another stay together.

    Every part has the untouched model's cell.
    """
    roots = sorted({cell.root for cell in cells if cell.tasks})
    return [c for c in cells if not c.tasks or roots.index(c.root) % count == index]


def rate_search(methods: Sequence[str], task: str, seed: int) -> Iterator[Cell]:
    """The cells among which each method's own best rate is chosen: one task, one seed."""
    seen = dict.fromkeys(
        Cell(seed, (task,), method, rate).canonical
        for method in methods
        for rate in get_method(method).rates
    )
    yield from seen


__all__ = ["BASE_CELL", "EXPERIMENTS", "Cell", "Experiment", "cells", "rate_search", "split"]
