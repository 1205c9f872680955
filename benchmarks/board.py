"""What a long command shows: one progress bar, and a line for each part that is done."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Board:
    """A bar over the steps of the part at hand, and lines; lines alone where it is no terminal.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)
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
        """Since the board was made."""
        return time.perf_counter() - self._start

    def begin(self, title: str, steps: int | None = None) -> None:
        """Names the part at hand and how many steps it has."""
        self._progress.reset(self._task, description=title, total=steps)

    def step(self, done: int) -> None:
        """Moves on to `done` steps."""
        self._progress.update(self._task, completed=done)

    def end(self, line: str) -> None:
        """Prints a line above the bar."""
        self.console.print(f"{self.seconds:6.0f} s  {line}", highlight=False, soft_wrap=True)


__all__ = ["Board"]
