"""Flags' help out of docstrings, so that a setting is described once."""

from __future__ import annotations

import re
import textwrap

_MARKUP = re.compile(r":\w+:(?=`)|`")
"""Of a word in code, and of a reference such as ``:func:`secura.anchor```."""


def docstring_entries(docstring: str) -> dict[str, str]:
    """The entries of a Google-style docstring's `Args:`, each on one line and without markup."""
    section = re.search(r"^ *Args:\n(.*?)(?:\n\n|\Z)", docstring, re.DOTALL | re.MULTILINE)
    body = textwrap.dedent(section[1]) if section else ""
    entries = re.findall(r"^(\w+): (.*(?:\n +.*)*)", body, re.MULTILINE)
    return {name: " ".join(_MARKUP.sub("", text).split()) for name, text in entries}


__all__ = ["docstring_entries"]
