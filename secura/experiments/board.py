"""What is shown while a grid is computed: a bar over cells, and one over the steps of this cell."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from secura.experiments.grid import Cell


class Board:
    """Two live bars, and a line for each finished cell.

    Args:
        console: where to draw; lines alone appear where it is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._cells = self._progress.add_task("[bold]Cells", total=None)
        self._steps = self._progress.add_task("", total=None)

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
        """Leaves the bars as they stand."""
        self._progress.stop()

    def expect(self, cells: int) -> None:
        """Adds `cells` to the bar over cells."""
        total = self._progress.tasks[0].total or 0
        self._progress.update(self._cells, total=total + cells)

    def cell(self, title: str) -> None:
        """Names the cell at hand."""
        self._progress.reset(self._steps, description=title, total=None)

    def training(self, steps: int) -> None:
        """Says how many steps the cell's training has."""
        self._progress.update(self._steps, total=steps)

    def step(self, done: int) -> None:
        """Moves on to `done` steps."""
        self._progress.update(self._steps, completed=done)

    def scoring(self, parts: int) -> None:
        """Says that the trained model is being scored, on so many parts."""
        title = self._progress.tasks[1].description
        self._progress.reset(self._steps, description=f"{title}, scoring", total=parts)

    def part(self) -> None:
        """One part was scored."""
        self._progress.advance(self._steps)

    def finished(self, cell: Cell, record: dict[str, Any] | None = None) -> None:
        """Counts a cell, with a line on one that was computed just now."""
        self._progress.advance(self._cells)
        if record is not None:
            self.console.print(describe(cell, record), highlight=False, soft_wrap=True)


def describe(cell: Cell, record: dict[str, Any]) -> str:
    """One line on a computed cell."""
    seconds = record["seconds"]["total"]
    if record["status"] == "failed":
        return f"[red]failed[/red]  {cell.title}: {record['error']} ({seconds:.0f} s)"
    losses = ", ".join(f"{name} {score['loss']:.3f}" for name, score in record["scores"].items())
    text = record["text"]["loss"]
    return f"[green]done[/green]    {cell.title}: loss {losses}, text {text:.3f} ({seconds:.0f} s)"


__all__ = ["Board", "describe"]
