"""Words that several error messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean ...?"`` for the entry of ``known`` nearest to a word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def plain(value: Any) -> Any:
    """What an enumeration's member stands for, as transformers' and PEFT's are written; else it."""
    return getattr(value, "value", value)


__all__ = ["did_you_mean", "plain"]
