"""Folders that are there whole or not at all."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRATCH = ".saving"
"""Name of the folder inside an output folder in which files are written before they move out."""

LOCK = ".lock"
"""Name of the file in an output folder that the run which is writing there holds locked."""

OWN = (SCRATCH, LOCK)
"""What a run may leave in a folder and the folder still counts as empty."""

_LAST = ("config.json", "adapter_config.json")


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, whose files are under ``path`` only when the block ends well.

    A ``path`` that is not there is made by one rename. An empty folder (or a link to one, or the
    current folder) stays the folder it is: files move into it, the configuration last, without
    which nothing loads. Files and folders get the modes that the umask allows.

    Raises:
        FileExistsError: ``path`` is there already and is no empty folder.
    """
    path = Path(os.path.abspath(path))
    if path.exists() or path.is_symlink():
        if not path.is_dir() or any(file.name not in OWN for file in path.iterdir()):
            raise FileExistsError(f"{path} is there already and is no empty folder: choose another")
        made = empty_scratch(path)
        try:
            made.mkdir()
            yield made
            move_out(made, path)
        except BaseException:
            clear(made)
            raise
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        made = Path(scratch) / path.name
        made.mkdir()
        yield made
        use_umask(made)
        os.replace(made, path)


def empty_scratch(folder: Path) -> Path:
    """The name of ``folder``'s scratch folder, with what a killed run left there removed."""
    clear(folder / SCRATCH)
    return folder / SCRATCH


def clear(path: Path) -> None:
    """Remove a folder, or a link or a file in its place; a link's target stays as it is."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def move_out(source: Path, target: Path, *, replaces: Sequence[str] = ()) -> None:
    """Move every file of ``source`` into ``target``, and remove ``source``.

    Over an older configuration all change at once (see :func:`_exchange`). Where the system cannot,
    the older configuration is removed first and the new one moved last, so that no mixture is ever
    loaded. If there was an older one, the files named in ``replaces`` are removed with it.
    """
    use_umask(source)
    older = [target / name for name in _LAST if (target / name).exists()]
    stale = {name for name in replaces if older and (target / name).is_file()}
    stale -= {file.name for file in source.iterdir()}
    if older and _exchange(source, target.resolve(), stale):
        return
    for file in older:
        if (source / file.name).exists():
            file.unlink()
    for name in stale:
        clear(target / name)
    for file in sorted(source.iterdir(), key=lambda file: file.name in _LAST):
        if file.is_dir():
            clear(target / file.name)
        os.replace(file, target / file.name)
    source.rmdir()


def _exchange(source: Path, target: Path, stale: set[str]) -> bool:
    """Put a folder of ``target``'s files, ``source``'s over them, in ``target``'s place.

    The folder is made beside ``target`` of links to the files, so none is copied, and none is lost
    whenever the process is killed; then one rename exchanges the two. Linux alone can do it, on
    most file systems, and not where ``target`` is a mount or the current folder.

    Returns:
        Whether it was done; else ``source`` and ``target`` are as before.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None or Path.cwd().is_relative_to(target):
        return False
    name, exchanged = f".{target.name}-", False
    try:
        made_as = re.compile(rf"{re.escape(name)}[a-z0-9_]{{8}}{re.escape(SCRATCH)}")
        for left in target.parent.iterdir():  # by a killed run; not a sibling's, named name-more
            if made_as.fullmatch(left.name):
                clear(left)
        made = Path(tempfile.mkdtemp(SCRATCH, name, target.parent))
    except OSError:
        return False
    try:
        _link_all(target, made, ignore=shutil.ignore_patterns(SCRATCH))
        for name in {file.name for file in source.iterdir()} | stale:
            clear(made / name)
        _link_all(source, made)
        made.chmod(stat.S_IMODE(target.stat().st_mode))
        here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        exchanged = rename(here, os.fsencode(made), here, os.fsencode(target), swap) == 0
    except OSError:
        pass
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return exchanged


def _link_all(source: Path, target: Path, **kwargs: Any) -> None:
    shutil.copytree(
        source, target, symlinks=True, copy_function=os.link, dirs_exist_ok=True, **kwargs
    )


def use_umask(folder: Path) -> None:
    """Give ``folder`` and all in it the modes new files get here: safetensors writes 0600."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o666
    probe.unlink()
    folder.chmod(mode | (mode & 0o444) >> 2)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


__all__ = [
    "LOCK",
    "OWN",
    "SCRATCH",
    "clear",
    "complete_folder",
    "empty_scratch",
    "move_out",
    "use_umask",
]
