"""What each kernel costs on each chip, found by compiling it: no GPU needed.

The table needs triton and compiles every launch of :mod:`.launches`: half a second each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..dispatch import triton_missing

if TYPE_CHECKING:
    from .recorder import Report

COLUMNS = ("launch", "target", "registers", "spills", "shared KiB", "16-byte loads", "MMA", "")


class Row(NamedTuple):
    """A launch, what its code uses, and which rules it breaks."""

    launch: str
    report: Report
    problems: list[str]


def kernel_reports(targets: Sequence[str] | None = None, match: str = "") -> Iterator[Row]:
    """Compile each launch for each chip, one after the other.

    Args:
        targets: names of chips (``sm_90``, ``gfx942``), or None for all.
        match: only launches whose name contains it.

    Raises:
        RuntimeError: where triton is not installed or interprets its kernels.
        ValueError: for an unknown chip.
    """
    if reason := triton_missing():
        raise RuntimeError(f"no kernel table: {reason}; `pip install triton` (Linux)")
    from .launches import launches
    from .recorder import TARGETS, inspect_launch

    if unknown := set(targets or ()) - set(TARGETS):
        raise ValueError(f"unknown target {sorted(unknown)}: choose from {list(TARGETS)}")
    for target in TARGETS.values():
        if targets is None or target.name in targets:
            for name, launch, rule in launches(target, match):
                report = inspect_launch(launch, target)
                yield Row(name, report, report.problems(rule))


def kernel_table(rows: Iterable[Row]) -> Iterator[str]:
    """The reports as lines of a Markdown table; the last column names what breaks a rule."""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    for name, report, problems in rows:
        used = (report.registers, report.spill_bytes, f"{report.shared_bytes / 1024:.0f}")
        held = (report.wide_loads, report.mma, "; ".join(problems) or "ok")
        cells = (name, report.target, *used, *held)
        yield "| " + " | ".join(map(str, cells)) + " |"


__all__ = ["COLUMNS", "kernel_reports", "kernel_table"]
