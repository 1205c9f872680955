"""Figures out of records: what is kept where as much is learned, and how sure that is.

A method's curve at a seed is made of lines: at each rate from the untouched model through the
quarters to the end, and through the ends of all rates. What a method pays for a level of learning
is the least KL on these lines where it has learned that much or more, so that it grows with the
level.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from benchmarks.retention.methods import get_method
from benchmarks.retention.record import Measure, Record

REFERENCE = "lora"
LEVELS = (0.9, 0.98, 1.0)  # shares of what the reference learns at its best rate
MAIN = 1  # the one that is shown by kinds: the last few hundredths few methods reach

# Student's t, 97.5%, by degrees of freedom.
_T = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Point = tuple[float, float]
Line = list[Point]
Value = Callable[[Measure], float]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval; both ends are nan below two values."""

    mean: float
    low: float
    high: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's t interval of at least one value."""
    count, mean = len(values), fmean(values)
    if count < 2:
        return Estimate(mean, math.nan, math.nan, count)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = _T[min(count - 1, len(_T) - 1)] * spread / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """The geometric mean of ours / theirs, paired by seed; None where no seed has both above 0."""
    seeds = sorted(s for s in ours.keys() & theirs.keys() if ours[s] > 0 and theirs[s] > 0)
    if not seeds:
        return None
    logs = estimate([math.log(ours[seed] / theirs[seed]) for seed in seeds])
    return Estimate(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), logs.count)


def kl_of(*kinds: str) -> Value:
    """The geometric mean of the KL on these kinds of old text or tasks; of all texts for none."""

    def value(measure: Measure) -> float:
        scores = {**measure.tasks, **measure.texts}
        chosen = [scores[kind].kl for kind in kinds or measure.texts]
        return math.exp(fmean(math.log(max(kl, 1e-12)) for kl in chosen))

    return value


def unseen(record: Record) -> tuple[str, ...]:
    """The kinds of old text whose source no statistic of the record's method saw."""
    news = get_method(record.cell.method).anchor == "text"
    return tuple(kind for kind in record.settings.texts if not (news and kind == "news"))


class Front:
    """What methods learn and pay in records of one stage and one place, first task alone.

    Args:
        records: of any stage; those that failed or learned several tasks are left out.
        targets: the place; ``"all"``, where full fine-tuning is, counts to every place.
    """

    def __init__(self, records: Iterable[Record], targets: str) -> None:
        self.runs: dict[str, dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
        for record in records:
            cell = record.cell
            if record.status != "done" or len(cell.tasks) > 1:
                continue
            if cell.targets in (targets, "all"):
                self.runs[cell.method][cell.seed].append(record)
        for seeds in self.runs.values():
            for found in seeds.values():
                found.sort(key=lambda record: record.cell.rate)

    @property
    def methods(self) -> list[str]:
        """Those that ran, the reference first."""
        return sorted(self.runs, key=lambda name: (name != REFERENCE, name))

    def lines(self, method: str, seed: int, value: Value) -> list[Line]:
        """The curve's lines of (learned, value)."""
        found = self.runs[method][seed]
        lines = [_trajectory(record, value) for record in found]
        ends = [(learned(record.end, record.task), value(record.end)) for record in found]
        return [*lines, ends] if len(ends) > 1 else lines

    def best(self, method: str) -> dict[int, float]:
        """The most it learns at any rate, by seed."""
        return {
            seed: max(learned(record.end, record.task) for record in found)
            for seed, found in self.runs[method].items()
        }

    def levels(self) -> list[float]:
        """Levels of learning to compare at: shares of what the reference reaches at every seed."""
        reached = self.best(REFERENCE)
        return [share * min(reached.values()) for share in LEVELS] if reached else []

    def paid(self, method: str, level: float, value: Value) -> dict[int, float]:
        """The least value where a method has learned `level` or more, by seed that reached it."""
        found = {seed: least(self.lines(method, seed, value), level) for seed in self.runs[method]}
        return {seed: paid for seed, paid in found.items() if paid is not None}

    def ratio(self, method: str, level: float, *kinds: str) -> Estimate | None:
        """The KL a method pays for a level over what the reference pays, see :func:`kl_of`.

        Over all kinds of text where none is given, but for those an anchor's statistics saw.
        """
        value = kl_of(*(kinds or unseen(self.some(method))))
        return ratio(self.paid(method, level, value), self.paid(REFERENCE, level, value))

    def some(self, method: str) -> Record:
        """Any record of a method."""
        return next(iter(self.runs[method].values()))[0]

    def ends(self, method: str, level: float, value: Callable[[Record], float]) -> list[float]:
        """A figure of the run that ends nearest above a level, or else learned most, by seed."""
        found = []
        for records in self.runs[method].values():
            above = [r for r in records if learned(r.end, r.task) >= level]
            found.append(
                value(
                    min(above, key=lambda r: learned(r.end, r.task))
                    if above
                    else max(records, key=lambda r: learned(r.end, r.task))
                )
            )
        return found


def learned(measure: Measure, task: str) -> float:
    """Fall of the held-out loss of the task."""
    return measure.tasks[task].learned


def least(lines: Iterable[Line], level: float) -> float | None:
    """The least second coordinate on the lines where the first is `level` or more; None nowhere."""
    found: list[float] = []
    for line in lines:
        found += [y for x, y in line if x >= level]
        for (x, y), (next_x, next_y) in pairwise(line):
            if min(x, next_x) < level < max(x, next_x):
                found.append(y + (level - x) / (next_x - x) * (next_y - y))
    return min(found, default=None)


def _trajectory(record: Record, value: Value) -> Line:
    """From the untouched model through the quarters to the end.

    The quarters are scored on a part of the texts; they are scaled as the end's part is to its
    whole.
    """
    task, end = record.task, record.end
    parts = [measure for measure in record.measures if measure.part]
    last = next((m for m in parts if m.step == end.step), None)
    scale_x = _over(learned(end, task), learned(last, task)) if last else 1.0
    scale_y = _over(value(end), value(last)) if last else 1.0
    points = [(scale_x * learned(m, task), scale_y * value(m)) for m in parts if m.step < end.step]
    return [(0.0, 0.0), *points, (learned(end, task), value(end))]


def _over(whole: float, part: float) -> float:
    return whole / part if part > 0 and whole > 0 else 1.0


@dataclass(frozen=True)
class InTurn:
    """What became of tasks learned in turn, by seed.

    Args:
        loss: mean held-out loss of the tasks at the end.
        forgetting: mean over earlier tasks of the loss at the end less the least it was.
        kl: geometric mean of the KL on old texts at the end.
    """

    loss: dict[int, float]
    forgetting: dict[int, float]
    kl: dict[int, float]


def sequences(records: Iterable[Record]) -> dict[str, InTurn]:
    """The figures of each method whose whole sequence was run, of the longest there is."""
    runs: dict[tuple[str, int], dict[int, Record]] = defaultdict(dict)
    for record in records:
        if record.status == "done":
            runs[record.cell.method, record.cell.seed][len(record.cell.tasks)] = record
    longest = max((max(run) for run in runs.values()), default=0)
    found: dict[str, InTurn] = {}
    for (method, seed), run in runs.items():
        if longest < 2 or len(run) < longest:
            continue
        last = run[longest]
        losses = [
            {task: score.loss for task, score in run[count].end.tasks.items()}
            for count in range(1, longest + 1)
        ]
        tasks = last.cell.tasks
        own = found.setdefault(method, InTurn({}, {}, {}))
        own.loss[seed] = fmean(losses[-1][task] for task in tasks)
        own.forgetting[seed] = fmean(
            losses[-1][task] - min(each[task] for each in losses[place:-1])
            for place, task in enumerate(tasks[:-1])
        )
        own.kl[seed] = kl_of()(last.end)
    return found


__all__ = [
    "LEVELS",
    "MAIN",
    "REFERENCE",
    "Estimate",
    "Front",
    "estimate",
    "kl_of",
    "learned",
    "least",
    "ratio",
    "sequences",
    "unseen",
]
