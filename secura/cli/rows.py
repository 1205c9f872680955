"""What training rows must look like: text where text is wanted, turns where messages are."""

from __future__ import annotations

import datetime
from typing import Any

from secura.cli.errors import UserError

_ANSWERS = ("completion", "answer")
"""Columns of text that is learned beside another."""

_REMEDIES: dict[type, str] = {
    **dict.fromkeys((int, float, bool), "; write it in quotes"),
    **dict.fromkeys(
        (datetime.datetime, datetime.date),
        "; where all are dates they are read as times: give them as text, in a .csv or .parquet",
    ),
}
"""What to do about a value that is no text, by its type."""

_SHOWN = 5
"""How many rows a message names."""


def check_rows(dataset: Any, name: str, columns: tuple[str, ...]) -> None:
    """Refuse the first row that a chat template or tokenizer would stumble over.

    Args:
        dataset: a `datasets.Dataset`.
        name: what to call it in an error.
        columns: those to train on; each holds text, or each lists of messages.

    Raises:
        UserError: names the file, the column and the row, counted from 1.
    """
    kinds = {column: _kind(dataset.features[column]) for column in columns}
    for column, kind in kinds.items():
        check_filled(dataset, name, column, blank=column in _ANSWERS and kind == "text")
        if kind == "text" and column != "messages":
            continue
        if kind == "turns" and column not in ("text", "question", "answer"):
            check_turns(dataset[column], name, column)
            continue
        wanted = "a list of messages" if column == "messages" else "text"
        first = repr(dataset[0][column])
        raise UserError(
            f"data set {name!r}, column {column!r}, row 1: wanted {wanted}, found "
            f"{first if len(first) < 60 else first[:59] + '…'}"
            + _REMEDIES.get(type(dataset[0][column]), "")
        )
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{column!r} holds {kind}" for column, kind in kinds.items())
        raise UserError(f"data set {name!r}: {found}; make them both text or both messages")


def check_filled(dataset: Any, name: str, column: str, *, blank: bool = False) -> None:
    """Refuse rows that have no value in a column, or with `blank` nothing but spaces."""
    rows = blank_rows(dataset, column) if blank else []
    if dataset.data.column(column).null_count:
        rows = sorted(
            {*rows, *(row for row, value in enumerate(dataset[column], 1) if value is None)}
        )
    if rows:
        raise UserError(
            f"data set {name!r}: {len(rows)} of {len(dataset)} rows have no {column!r} "
            f"({listed(rows)}); fill or remove them"
        )


def blank_rows(dataset: Any, column: str) -> list[int]:
    """The rows, counted from 1, whose text in a column is nothing but spaces."""
    values = enumerate(dataset[column], 1)
    return [row for row, value in values if isinstance(value, str) and not value.strip()]


def check_turns(rows: Any, name: str, column: str) -> None:
    """Refuse the first row of `rows` that is no list of messages with a role and a content."""
    for number, turns in enumerate(rows, 1):
        problem = _problem(turns)
        if problem:
            raise UserError(f"data set {name!r}, column {column!r}, row {number}: {problem}")


def listed(rows: list[int]) -> str:
    """`"rows 3, 8, …"`, the first few of them."""
    word = "row" if len(rows) == 1 else "rows"
    more = ", …" if len(rows) > _SHOWN else ""
    return f"{word} {', '.join(map(str, rows[:_SHOWN]))}{more}"


def _problem(turns: Any) -> str | None:
    if not turns:
        return "no message; fill or remove the row"
    for place, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            keys = ", ".join(map(repr, turn)) if isinstance(turn, dict) else repr(turn)
            return f"message {place} has {keys}; wanted 'role' and 'content'"
        if not isinstance(turn["role"], str) or not turn["role"]:
            return f"message {place} has the role {turn['role']!r}; wanted text such as 'user'"
        content = turn["content"]
        if content is None and turn.get("tool_calls"):
            continue
        if not isinstance(content, str | list):
            what_to_do = _REMEDIES.get(type(content), "")
            return f"message {place} has the content {content!r}; wanted text{what_to_do}"
    return None


def holds_turns(dataset: Any, column: str) -> bool:
    """Whether a column holds lists, such as those of messages."""
    return _kind(dataset.features[column]) == "turns"


def _kind(feature: Any) -> str:
    """`"text"`, `"turns"` (lists of anything), or the feature's own name."""
    if getattr(feature, "dtype", None) in ("string", "large_string", "string_view"):
        return "text"
    if isinstance(feature, list) or type(feature).__name__ in ("List", "LargeList", "Sequence"):
        return "turns"
    return str(getattr(feature, "dtype", feature))


__all__ = ["blank_rows", "check_filled", "check_rows", "holds_turns", "listed"]
