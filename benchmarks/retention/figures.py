"""How the report writes figures."""

from __future__ import annotations

import math

from benchmarks.retention.summary import Estimate

NOTHING = "–"
"""Where there is no figure."""


def interval(found: Estimate, digits: int = 3, mark: str = "") -> str:
    """A mean, ``mark`` before and behind it, with the ends of its interval."""
    mean, low, high = (f"{end:.{digits}f}" for end in (found.mean, found.low, found.high))
    return f"{mark}{mean}{mark} [{low}, {high}]"


def plus_minus(found: Estimate, *, sign: bool = False) -> str:
    """A mean and half its interval; the mean alone where there is none."""
    mean = f"{found.mean:+.3f}" if sign else f"{found.mean:.3f}"
    return mean if math.isnan(found.low) else f"{mean} ± {found.high - found.mean:.3f}"


def percent(found: Estimate) -> str:
    """A mean and half its interval in percent; the mean alone where there is none."""
    mean = f"{found.mean:.0%}"
    return mean if math.isnan(found.low) else f"{mean} ± {found.high - found.mean:.0%}"


__all__ = ["NOTHING", "interval", "percent", "plus_minus"]
