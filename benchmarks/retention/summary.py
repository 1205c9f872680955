"""Figures out of records: what is kept where as much is learned, and how sure that is.

A method's curve at a seed joins the ends of its rates, the KL in logarithms. Runs that have not
ended are no part of it: their rate has not decayed yet. A method's KL at a level of learning is the
least on the curve where it has learned that much or more, so that it grows with the level.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean

from benchmarks.retention.cells import Cell
from benchmarks.retention.methods import get_method
from benchmarks.retention.record import Measure, Record

REFERENCE = "lora"
RIVAL = "ewc-self"
RIVALS = (RIVAL, "lora-whitened")
"""What anchored cores are set against beside the reference: they are given the same samples."""
SCALED = ", scaled down after training"  # follows the name of what was trained whole
LEVELS = (0.96, 0.98, 1.0)
"""Of what the reference learns at its best; its lowest rate ends near the first."""
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
    """The kinds of old text whose source the record's method neither trained on nor anchored by.

    The news are of the same collection as the task ``xsum``, if other articles.
    """
    cell = record.cell
    news = get_method(cell.method).anchor == "text" or "xsum" in cell.tasks
    return tuple(kind for kind in record.settings.texts if not (news and kind == "news"))


class Front:
    """What methods learn of one task and how far they drift, in records of one stage and place.

    All scales of a method that is scaled down after training are one method: a curve for each rate,
    by scale, 1 at the end.

    Args:
        records: of any stage; those that failed or learned several tasks are left out.
        targets: the place; ``"all"``, where full fine-tuning is, counts to every place.

    Raises:
        ValueError: for records of several tasks or numbers of steps, which are no one curve's.
    """

    def __init__(self, records: Iterable[Record], targets: str) -> None:
        self.runs: dict[str, dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
        used = [
            record
            for record in records
            if record.status == "done"
            and len(record.cell.tasks) == 1
            and record.cell.targets in (targets, "all")
        ]
        if len({(record.task, record.cell.steps) for record in used}) > 1:
            raise ValueError(f"runs on {targets} of several tasks or lengths are no one front")
        scaled = {
            replace(record.cell, method=get_method(record.cell.method).trained_as)
            for record in used
            if _scale(record) != 1
        }
        for record in used:
            cell, whole = record.cell, get_method(record.cell.method).trained_as
            if _scale(record) == 1:
                self.runs[cell.method][cell.seed].append(record)
            if _scale(record) != 1 or cell in scaled:
                self.runs[whole + SCALED][cell.seed].append(record)
        for seeds in self.runs.values():
            for found in seeds.values():
                found.sort(key=lambda record: (record.cell.rate, _scale(record)))

    @property
    def methods(self) -> list[str]:
        """Those that ran, the reference first."""
        return sorted(self.runs, key=lambda name: (name != REFERENCE, name))

    def lines(self, method: str, seed: int, value: Value) -> list[Line]:
        """The curve's lines of (learned, value): one through all rates, or one a rate's scales."""
        lines: dict[float, Line] = defaultdict(list)
        for record in self.runs[method][seed]:
            own = record.cell.rate if method.endswith(SCALED) else 0.0
            lines[own].append((learned(record.end, record.task), value(record.end)))
        return list(lines.values())

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

    def above(self, method: str, level: float) -> bool:
        """Whether all of a method's runs end above a level, at one seed or more.

        Its KL there is then read off a run that learned more, and may be too large.
        """
        return any(
            all(learned(record.end, record.task) > level for record in found)
            for found in self.runs[method].values()
        )

    def kl_at(self, method: str, level: float, value: Value) -> dict[int, float]:
        """The least value where a method has learned `level` or more, by seed that reached it."""
        found = {seed: least(self.lines(method, seed, value), level) for seed in self.runs[method]}
        return {seed: kl for seed, kl in found.items() if kl is not None}

    def ratio(self, method: str, level: float, *kinds: str) -> Estimate | None:
        """A method's KL at a level over the reference's there, see :func:`kl_of`.

        Over all kinds of text where none is given, but for those an anchor's statistics saw.
        """
        value = kl_of(*(kinds or unseen(self.some(method))))
        return ratio(self.kl_at(method, level, value), self.kl_at(REFERENCE, level, value))

    def around(
        self, method: str, reference: str = REFERENCE
    ) -> list[tuple[float, float, Estimate, Estimate]]:
        """A method's ends beside another's that lie next below and above in learning.

        Returns:
            For each pair of rates, the method's and the other's, that share two seeds or more:
            both rates, what the method learned more, and its KL over the other's.
        """
        value, found = kl_of(*unseen(self.some(method))), []
        for rate, own in self._by_rate(method).items():
            beside = []
            for other, theirs in self._by_rate(reference).items():
                both = (own, theirs)
                levels = ({s: learned(r.end, r.task) for s, r in each.items()} for each in both)
                more = difference(*levels)
                kl = ratio(*({s: value(r.end) for s, r in each.items()} for each in both))
                if more and kl and more.count > 1:
                    beside.append((rate, other, more, kl))
            for side in (True, False):
                some = [one for one in beside if (one[2].mean >= 0) == side]
                found += [min(some, key=lambda one: abs(one[2].mean))] if some else []
        return found

    def multiples(self, method: str) -> dict[float, dict[int, float]]:
        """KL at a method's ends over the reference's where that learned as much, by rate and seed.

        Of the rates at which each of its ends lies between two of the reference's, on their line.
        """
        value, found = kl_of(*unseen(self.some(method))), {}
        for rate, own in self._by_rate(method).items():
            over: dict[int, float] = {}
            for seed, record in own.items():
                level = learned(record.end, record.task)
                lines = self.lines(REFERENCE, seed, value) if seed in self.runs[REFERENCE] else []
                theirs = least(lines, level)
                if theirs and any(min(line)[0] <= level for line in lines):
                    over[seed] = value(record.end) / theirs
            if len(over) == len(own):
                found[rate] = over
        return found

    def _by_rate(self, method: str) -> dict[float, dict[int, Record]]:
        found: dict[float, dict[int, Record]] = defaultdict(dict)
        for record in self.records(method):
            found[record.cell.rate][record.cell.seed] = record
        return found

    def records(self, method: str) -> list[Record]:
        """All records of a method."""
        return [record for found in self.runs[method].values() for record in found]

    def some(self, method: str) -> Record:
        """Any record of a method."""
        return next(iter(self.runs[method].values()))[0]

    def title(self, method: str) -> str:
        """A method's name for people."""
        whole = method.removesuffix(SCALED)
        return get_method(whole).title + method[len(whole) :]

    def ends(self, method: str, level: float) -> dict[int, Record]:
        """The run that ends nearest above a level, by seed that reached it."""
        above = {
            seed: [r for r in found if learned(r.end, r.task) >= level]
            for seed, found in self.runs[method].items()
        }
        return {
            seed: min(found, key=lambda r: learned(r.end, r.task))
            for seed, found in above.items()
            if found
        }


def learned(measure: Measure, task: str) -> float:
    """Fall of the held-out loss of the task."""
    return measure.tasks[task].learned


def least(lines: Iterable[Line], level: float) -> float | None:
    """The least second coordinate on the lines where the first is `level` or more; None nowhere.

    Between two points it is interpolated in logarithms.
    """
    found: list[float] = []
    for line in lines:
        found += [y for x, y in line if x >= level]
        for (x, y), (next_x, next_y) in pairwise(line):
            if min(x, next_x) < level < max(x, next_x):
                found.append(y * (next_y / y) ** ((level - x) / (next_x - x)))
    return min(found, default=None)


def _scale(record: Record) -> float:
    return get_method(record.cell.method).scale


@dataclass(frozen=True)
class InTurn:
    """What became of tasks learned in turn by a method at a place and rate, by seed.

    Args:
        steps: of each task.
        loss: mean held-out loss of the tasks at the end.
        forgetting: mean over earlier tasks of the loss at the end less the least it was.
        kls: geometric mean of the KL after each task, by how many there were, on old texts whose
            source none of them is of.
    """

    method: str
    targets: str
    rate: float
    steps: int
    loss: dict[int, float] = field(default_factory=dict)
    forgetting: dict[int, float] = field(default_factory=dict)
    kls: dict[int, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def kl(self) -> dict[int, float]:
        """After the last task."""
        return self.kls[max(self.kls)]


def sequences(records: Iterable[Record]) -> list[InTurn]:
    """The figures of the whole sequences that were run, of the longest there is; LoRA's first."""
    runs: dict[Cell, dict[int, Record]] = defaultdict(dict)
    for record in records:
        if record.status == "done":
            cell = record.cell
            runs[replace(cell, tasks=cell.tasks[:1])][len(cell.tasks)] = record
    longest = max((max(run) for run in runs.values()), default=0)
    found: dict[tuple[str, str, float, int], InTurn] = {}
    for cell, run in sorted(runs.items()):
        if longest < 2 or len(run) < longest:
            continue
        last = run[longest]
        losses = [
            {task: score.loss for task, score in run[count].end.tasks.items()}
            for count in range(1, longest + 1)
        ]
        tasks = last.cell.tasks
        key = cell.method, cell.targets, cell.rate, cell.steps
        own = found.setdefault(key, InTurn(*key))
        own.loss[cell.seed] = fmean(losses[-1][task] for task in tasks)
        own.forgetting[cell.seed] = fmean(
            losses[-1][task] - min(each[task] for each in losses[place:-1])
            for place, task in enumerate(tasks[:-1])
        )
        for count, record in run.items():
            own.kls[count][cell.seed] = kl_of(*unseen(last))(record.end)
    return sorted(found.values(), key=lambda run: run.method != REFERENCE)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """The mean of ours - theirs, paired by seed; None where they share no seed."""
    seeds = sorted(ours.keys() & theirs.keys())
    return estimate([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


__all__ = [
    "LEVELS",
    "MAIN",
    "REFERENCE",
    "RIVAL",
    "RIVALS",
    "SCALED",
    "Estimate",
    "Front",
    "InTurn",
    "difference",
    "estimate",
    "kl_of",
    "learned",
    "least",
    "ratio",
    "sequences",
    "unseen",
]
