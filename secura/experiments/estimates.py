"""The arithmetic of results: means with their intervals, transfer, curves read off."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from secura._extras import require

CONFIDENCE = 0.95


def mean(values: Iterable[float]) -> float:
    """The mean of at least one value, whatever their order."""
    found = list(values)
    return math.fsum(found) / len(found)


@dataclass(frozen=True)
class Estimate:
    """A figure over seeds.

    Args:
        values: one a seed; there may be none.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds; nan without any."""
        return mean(self.values) if self.values else math.nan

    @property
    def half_width(self) -> float | None:
        """Half the 95% interval of the mean (Student's t); None below two seeds."""
        count = len(self.values)
        if count < 2:
            return None
        spread = math.fsum((value - self.mean) ** 2 for value in self.values) / (count - 1)
        quantile = require("scipy.stats", "experiments").t.ppf((1 + CONFIDENCE) / 2, count - 1)
        return float(quantile) * math.sqrt(spread / count)

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval; not where there is none, or one without width."""
        return 0 < (self.half_width or 0) < abs(self.mean)


def estimate(by_seed: Mapping[int, float]) -> Estimate:
    """The estimate of one figure that each seed has a value of."""
    return Estimate(tuple(by_seed[seed] for seed in sorted(by_seed)))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """The difference ours − theirs, seed by seed, over the seeds both have."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


@dataclass(frozen=True)
class Transfer:
    """What became of earlier tasks at a sequence's end.

    With ``R[j][i]`` the score of task i after training on task j, and T tasks:

    Args:
        average: mean over i of ``R[T][i]`` (ACC, Lopez-Paz & Ranzato 2017).
        backward: mean over i < T of ``R[T][i] − R[i][i]`` (BWT, ibid.).
        forgetting: mean over i < T of the best ``R[l][i]``, l < T, less ``R[T][i]`` (Chaudhry et
            al. 2018); of a loss, ``R[T][i]`` less the least. Above 0 is forgotten in both.
    """

    average: float
    backward: float
    forgetting: float


def transfer(matrix: Sequence[Sequence[float]], *, lower_is_better: bool = False) -> Transfer:
    """The three figures of one sequence.

    Args:
        matrix: ``[j][i]``: score (or loss) of task i after training on task j, in order.
        lower_is_better: for losses.

    Raises:
        ValueError: the matrix is not square, or of fewer than two tasks.
    """
    count = len(matrix)
    if count < 2 or any(len(row) != count for row in matrix):
        raise ValueError("transfer needs a square matrix of two tasks or more")
    last, earlier = matrix[-1], range(count - 1)
    best, sign = (min, -1) if lower_is_better else (max, 1)
    peaks = [best(row[task] for row in matrix[:-1]) for task in earlier]
    return Transfer(
        average=mean(last),
        backward=mean(last[task] - matrix[task][task] for task in earlier),
        forgetting=sign * mean(peaks[task] - last[task] for task in earlier),
    )


def rise_at(points: Sequence[tuple[float, float]], learned: float) -> float | None:
    """What a method loses where it has learned as much as another.

    Args:
        points: ``(learned, text rise)`` at each rate, lowest rate first.
        learned: to read the line through the points at.

    Returns:
        The least rise the line has there; None where no stretch of it covers `learned`.
    """
    found = [rise for x, rise in points if x == learned]
    for (x, y), (next_x, next_y) in pairwise(points):
        if min(x, next_x) < learned < max(x, next_x):
            found.append(y + (learned - x) / (next_x - x) * (next_y - y))
    return min(found, default=None)


__all__ = ["Estimate", "Transfer", "estimate", "mean", "paired", "rise_at", "transfer"]
