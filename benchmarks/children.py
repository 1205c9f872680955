"""Commands run as processes that end when they are told to, with all that they have started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .machine import ROOT

GRACE_S = 5.0
"""Seconds between asking a process to end and ending it."""
_EVERYWHERE = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


class Child:
    """A command in a process group of its own, run from the repository's root.

    As a context it is ended, if need be, on the way out.

    Args:
        command: the program and its arguments.
        log: the file that its output is appended to.
        environment: what to add to this process's.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | _EVERYWHERE | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *raised: object) -> None:
        self.end()

    def wait(self, seconds: float) -> int | None:
        """Its exit status, or None where it still runs after so many seconds."""
        try:
            return self._process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None

    def ask_to_end(self) -> None:
        """Send the whole group SIGTERM, if it still runs."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)

    def end(self) -> None:
        """Ask the group to end, and see to it."""
        if self._process.poll() is not None:
            return
        self.ask_to_end()
        self.wait(GRACE_S)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


def end_by(children: Sequence[Child], until: float) -> None:
    """Wait for children until a ``time.monotonic()``, then end those that still run together."""
    try:
        for child in children:
            child.wait(until - time.monotonic())
    finally:
        for child in children:
            child.ask_to_end()
        for child in children:
            child.end()


def exit_when_asked() -> None:
    """Let SIGTERM raise ``SystemExit`` in this process, so that it ends its own children."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def last_line(log: Path) -> str:
    """What a process said last, or that it said nothing."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")
