"""Pieces of the report: sections, tables, and figures as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from secura.experiments.estimates import estimate
from secura.experiments.summary import Entry, Run

NOTHING = "–"
BySeed = Mapping[int, float]


@dataclass
class Section:
    """A part of the report.

    Args:
        lines: Markdown.
        pictures: PNGs by file name.
    """

    lines: list[str] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def picture(self, name: str, caption: str, content: bytes) -> None:
        """Adds a picture below what is there."""
        self.pictures[name] = content
        self.lines += [f"![{caption}]({name})", ""]


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, align: str = "---:"
) -> list[str]:
    """A Markdown table and an empty line; its first column is to the left, the others `align`."""
    lines = ["| " + " | ".join(columns) + " |", "|---" + f"|{align}" * (len(columns) - 1) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def show(
    run: Run, by_seed: BySeed, *, sign: str = "", spec: str = ".3f", flag: bool = False
) -> str:
    """A figure as mean ± half its interval, with the number of seeds where some are missing.

    Args:
        run: whose seeds it should have.
        by_seed: the figure.
        sign: ``"+"`` to write a plus.
        spec: how numbers are written.
        flag: whether it is bold where its interval excludes 0.
    """
    found = estimate(by_seed)
    if not found.values:
        return NOTHING
    text = f"{found.mean:{sign}z{spec}}"
    if found.half_width is not None:
        text += f" ± {found.half_width:{spec}}"
    if flag and found.excludes_zero:
        text = f"**{text}**"
    return text if len(by_seed) == len(run.seeds) else f"{text} (n={len(by_seed)})"


def plain(value: float | None) -> str:
    """A figure without seeds."""
    return NOTHING if value is None else f"{value:.3f}"


def title(entry: Entry) -> str:
    """A row's head, with the footnote's mark where it goes by several names."""
    return f"{entry.title} ¹" if entry.shared else entry.title


__all__ = ["NOTHING", "BySeed", "Section", "plain", "show", "table", "title"]
