"""The one schema of every benchmark's results.

A file holds where and how it was made (commit, date, machine, versions, dtype, settings, measured
ceilings) and one row for each case and provider: what happened (``status``) and the figures. It is
written anew, atomically, after each finished case, so an interrupted run keeps what it has.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .files import write_text
from .machine import commit, describe, dtype_name, package_versions

SCHEMA = 1
STATUSES = ("ok", "missing", "wrong", "failed", "out of memory", "skipped")
SPENT = "the time budget was spent"
"""The note of what was skipped for time."""
LOST = "another provider's error left the device useless: leave that one out of --providers"
"""The note of what was not run after it."""


@dataclass
class Row:
    """One provider on one case.

    Attributes:
        case: what was measured: T, N, K, m, r, or model, sequence, batch, …
        provider: whose implementation.
        status: one of ``STATUSES``; figures stand only where it is ``"ok"``.
        note: why the status is not ``"ok"``, or what to know about the figures.
        figures: times in ``*_ms`` as ``{"median", "q20", "q80", "samples"}``, memory in ``*_mib``,
            shares and errors as plain numbers.
    """

    case: dict[str, Any]
    provider: str
    status: str = "ok"
    note: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"unknown status {self.status!r}: choose one of {STATUSES}")

    def fail(self, status: str, note: str) -> None:
        """Say why there are no figures."""
        self.status, self.note, self.figures = status, note, {}


@dataclass
class Result:
    """A benchmark's run. Times are UTC, ``complete`` says whether every case was reached."""

    benchmark: str
    preset: str
    command: str
    commit: str
    date: str
    dtype: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    complete: bool = False
    schema: int = SCHEMA

    def finished(self) -> list[Row]:
        """The rows of the cases that were reached in full, those cut short left out."""
        cut = [row.case for row in self.rows if row.status == "skipped"]
        return [row for row in self.rows if row.case not in cut]

    def save(self, path: Path) -> None:
        """Write the file at once or not at all."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        write_text(path, f"{text}\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a file.

        Raises:
            ValueError: for a file that cannot be read, or of another schema.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path} is no result: it holds a {type(data).__name__}")
        known = {entry.name for entry in fields(cls)}
        if data.get("schema") != SCHEMA or not data.keys() <= known:
            raise ValueError(
                f"{path} is not of schema {SCHEMA}: run its benchmark again ("
                f"{data.get('command', 'see benchmarks/README.md')})"
            )
        return cls(**data | {"rows": [Row(**row) for row in data["rows"]]})


def new_result(
    benchmark: str,
    preset: str,
    device: torch.device,
    dtype: torch.dtype,
    settings: dict[str, Any],
    commit_name: str | None = None,
) -> Result:
    """An empty result of this machine, this code and this command line."""
    return Result(
        benchmark=benchmark,
        preset=preset,
        command=shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
        commit=commit_name or commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        dtype=dtype_name(dtype),
        machine=describe(device),
        versions=package_versions(),
        settings=settings,
    )


class Recorder:
    """Keeps the file equal to the rows that are finished.

    Args:
        result: what to record.
        path: the file, or None to keep the rows in memory alone.
        resume: go on from the file at ``path`` where its settings are this run's.

    Raises:
        ValueError: where the file to resume is of other settings, code or machine.
    """

    def __init__(self, result: Result, path: Path | None, *, resume: bool = False) -> None:
        self.result, self.path = result, path
        if resume and path is not None and path.exists():
            earlier = Result.load(path)
            for name in ("benchmark", "commit", "dtype", "machine", "versions", "settings"):
                if getattr(earlier, name) != getattr(result, name):
                    raise ValueError(
                        f"{path} was made with another {name}: give another --out, or run without "
                        "--resume to start it anew"
                    )
            result.rows = earlier.finished()
            result.ceilings = earlier.ceilings
            result.command = f"{earlier.command} && {result.command}"
            result.date = earlier.date

    def add(self, rows: Iterable[Row]) -> None:
        """Take the rows of a finished case."""
        self.result.rows.extend(rows)
        self._save()

    def close(self) -> None:
        """Mark the run complete unless something was skipped for time."""
        self.result.complete = all(row.status != "skipped" for row in self.result.rows)
        self._save()

    def _save(self) -> None:
        if self.path is not None:
            self.result.save(self.path)
