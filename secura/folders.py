"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name ``path`` only when the block ends well.

    Raises:
        FileExistsError: ``path`` is there already and is no empty folder.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there already and is no empty folder: choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        made = Path(scratch) / path.name
        made.mkdir()
        yield made
        if path.exists():
            path.rmdir()
        os.replace(made, path)


__all__ = ["complete_folder"]
