"""Parsers of flags whose errors are told in one line, with the nearest flag there is."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, NoReturn

from secura.cli.errors import UserError
from secura.wording import did_you_mean


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations, whose errors are `UserError`s."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `ArgumentParser.parse_args`, with a suggestion for a flag that is not known."""
        parsed, unknown = self.parse_known_args(args, namespace)
        refuse_unknown(unknown, self._option_string_actions, self.prog)
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` in place of printing the usage and leaving."""
        raise UserError(f"{message} (see '{self.prog} --help')")


def refuse_unknown(unknown: list[str], known: Iterable[str], prog: str) -> None:
    """Raise `UserError` for arguments a parser left over, naming the nearest flag there is."""
    if not unknown:
        return
    flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if not flags:
        raise UserError(f"unexpected argument {unknown[0]!r} (see '{prog} --help')")
    raise UserError(f"unknown flag {flags[0]}{did_you_mean(flags[0], known)} (see '{prog} --help')")


def refuse_repeated(words: list[str], actions: Iterable[Any]) -> None:
    """Raise `UserError` for a flag of several values that is given twice: the last would count."""
    lists = {word: a.dest for a in actions if a.nargs in ("+", "*") for word in a.option_strings}
    given = [lists[flag] for word in words if (flag := word.partition("=")[0]) in lists]
    for name in given:
        if given.count(name) > 1:
            raise UserError(f"--{name} is there twice: give all its values after one")


__all__ = ["Parser", "refuse_repeated", "refuse_unknown"]
