"""What the demo shows while it runs: one progress bar, and a line for each finished stage."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Board:
    """One live bar over all stages. A unit is about a second's work: a step, a batch scored.

    Args:
        console: where to draw; lines alone appear where it is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task = self._progress.add_task("Starting", total=None, detail="")
        self._start = time.perf_counter()

    def __enter__(self) -> Board:
        """Starts drawing."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the bar as it stands."""
        self._progress.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the bar was made."""
        return time.perf_counter() - self._start

    def expect(self, total: int) -> None:
        """Says how many units there are in all, once that is known."""
        self._progress.update(self._task, total=total)

    def stage(self, name: str) -> None:
        """Names what is being done now."""
        self._progress.update(self._task, description=name, detail="")

    def advance(self, units: int = 1, detail: str | None = None) -> None:
        """Moves on by `units`, with a new short text beside the bar if one is given."""
        self._progress.advance(self._task, units)
        if detail is not None:
            self._progress.update(self._task, detail=detail)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(f"[dim]{self.seconds:5.0f} s[/dim]  {line}", highlight=False)
