"""A results folder: one folder a cell, its figures in one JSON, each written whole or not at all.

settings.json                                  what every cell of the folder was made with
base/cell.json                                 the untouched model's scores
lora/lr0.001/seed0/gsm8k/cell.json             a cell's figures
lora/lr0.001/seed0/gsm8k/model/                what it trained
lora/lr0.001/seed0/gsm8k/trainer/checkpoint-N  while it runs
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secura._extras import require
from secura.cli.errors import UserError
from secura.experiments.grid import Cell
from secura.experiments.presets import Settings

FORMAT = 1
MODEL = "model"
RECORD = "cell.json"
DIGITS = 6


class BusyError(RuntimeError):
    """Another process is at this cell."""


class Store:
    """The results folder of one model and one set of settings.

    Args:
        root: the folder; made where it is missing.
        settings: what its cells are made with.

    Raises:
        ValueError: the folder holds results of other settings, or files that are no results.
    """

    def __init__(self, root: Path, settings: Settings) -> None:
        self.root = root
        path = root / "settings.json"
        wanted = settings.as_json()
        if path.exists():
            found = read_json(path) or {}
            changed = sorted(
                key for key in wanted.keys() | found if found.get(key) != wanted.get(key)
            )
            if changed:
                raise ValueError(
                    f"{root} holds results made with other settings ({', '.join(changed)}); give "
                    "another --out, or the settings in its settings.json"
                )
            return
        if root.is_file() or (root.is_dir() and any(p.name[0] != "." for p in root.iterdir())):
            raise ValueError(f"{root} is no results folder, and not empty; give another --out")
        root.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)

    def folder(self, cell: Cell) -> Path:
        """Where the cell's files lie."""
        return self.root / cell.path

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's figures; None where there are none, or none that can be read."""
        found = read_json(self.folder(cell) / RECORD)
        return found if found and found.get("format") == FORMAT else None

    def is_ready(self, cell: Cell) -> bool:
        """Whether the cell has been computed, and its model is here to go on from."""
        record = self.record(cell)
        done = record is not None and record["status"] == "done"
        return done and self.model(cell).is_dir()

    def model(self, cell: Cell) -> Path:
        """Where the cell's trained model lies."""
        return self.folder(cell) / MODEL

    def check_data(self, seed: int, data: dict[str, Any]) -> None:
        """Hold a seed's data against those the folder's other cells were made with.

        Raises:
            UserError: a checksum differs.
        """
        path = self.root / f"data-seed{seed}.json"
        checksums = {name: about["sha256"] for name, about in data.items()}
        kept = read_json(path)
        if kept is None:
            write_json(path, checksums)
        elif changed := sorted(name for name in checksums if kept.get(name) != checksums[name]):
            raise UserError(
                f"the data of {', '.join(changed)} are no longer those that the results in "
                f"{self.root} were made with (their checksums differ); give another --out"
            )

    def write(self, cell: Cell, record: dict[str, Any]) -> None:
        """Keeps a cell's figures, which ends it."""
        head = {
            "format": FORMAT,
            "cell": {
                "method": cell.method,
                "learning_rate": cell.learning_rate,
                "seed": cell.seed,
                "tasks": list(cell.tasks),
            },
        }
        write_json(self.folder(cell) / RECORD, rounded(head | record))

    @contextmanager
    def claim(self, cell: Cell) -> Iterator[Path]:
        """The cell's folder, for this process alone.

        Raises:
            BusyError: another process has it.
        """
        filelock = require("filelock", "experiments")
        folder = self.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(folder / ".lock", timeout=0):
                yield folder
        except filelock.Timeout as error:
            raise BusyError(f"{cell.title} is being computed by another process") from error


def read_records(root: Path) -> list[dict[str, Any]]:
    """The figures of every cell in a results folder, those cut short left out.

    Raises:
        ValueError: the folder holds none.
    """
    found = (read_json(path) for path in sorted(root.rglob(RECORD)))
    records = [record for record in found if record and record.get("format") == FORMAT]
    if not records:
        raise ValueError(
            f"{root} holds no results; run 'secura experiment exp4 --out {root}' first"
        )
    return records


def need_space(folder: Path, size: int) -> None:
    """Raise ``OSError`` unless the disk of `folder` has `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"a cell needs up to {size / 1e9:.1f} GB on the disk of {folder}, which has "
            f"{free / 1e9:.1f} GB free; make room, or give an --out elsewhere"
        )


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file; None where it is missing or was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, a line for each key, whole or not at all."""
    lines = (f"{json.dumps(key)}: {json.dumps(content[key], allow_nan=False)}" for key in content)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def rounded(value: Any) -> Any:
    """The same JSON with every float cut to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


__all__ = ["BusyError", "Store", "need_space", "read_json", "read_records", "rounded", "write_json"]
