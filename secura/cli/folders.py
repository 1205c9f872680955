"""Output folders: never on top of other work, never half written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secura._extras import require
from secura.cli.errors import UserError
from secura.folders import LOCK, OWN

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINER_STATE = "trainer_state.json"
_OPTIMIZER = ("optimizer*", "global_step*")  # the latter is DeepSpeed's
_STATE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")
"""Files that a trainer writes by `torch.save`."""
SUMS = "checksums.json"
"""Of the files of a checkpoint, written after them."""
_SUMMED = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINER_STATE, "optimizer.pt", "scheduler.pt")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def check_output_folder(path: Path, *, hint: str) -> None:
    """Raise `UserError` unless `path` is an empty folder or does not exist.

    Args:
        path: the folder a command is about to fill.
        hint: what else the user can do, for the message.
    """
    refuse_no_folder(path)
    if path.exists() and any(file.name not in OWN for file in path.iterdir()):
        raise UserError(f"the output folder {path} is not empty; {hint}")


def refuse_no_folder(path: Path) -> None:
    """Raise `UserError` where `path` is a file, or a link to nothing."""
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        what = "a file" if path.exists() else "a link to nothing"
        raise UserError(f"{path} is {what}, not a folder; choose another --output_dir")


def refuse_written_over(output: Path, named: dict[str, str | None]) -> None:
    """Raise `UserError` where what a flag names is the output folder, or in a checkpoint of it.

    Args:
        output: where a run writes its adapter, and its checkpoints.
        named: by flag what it was given, a path or anything else.
    """
    own = output.expanduser().resolve()
    for flag, value in named.items():
        path = Path(value or "").expanduser().resolve()
        if not value or not path.exists() or not path.is_relative_to(own):
            continue
        within = path.relative_to(own).parts
        if not within or _CHECKPOINT.fullmatch(within[0]):
            raise UserError(
                f"{flag} {value} lies where the run writes, in --output_dir {output}, and would "
                "be overwritten: choose another --output_dir"
            )


@contextmanager
def fresh_folder(path: Path) -> Iterator[None]:
    """Keep an output folder, which has to be empty or not there, for this run alone.

    Raises:
        UserError: it is neither, or another run holds it.
    """
    check_output_folder(path, hint="choose another --output_dir")
    with sole_use(path):
        yield


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder; remove it again if nothing came into it.

    Raises:
        UserError: another run holds it.
    """
    filelock = require("filelock", "train")
    refuse_no_folder(folder)
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        with lock:
            try:
                yield
            finally:
                (folder / LOCK).unlink(missing_ok=True)
    except filelock.Timeout as error:
        raise UserError(
            f"another run is writing into {folder}; wait until it ends, or choose another "
            "--output_dir"
        ) from error
    finally:
        for part in made:
            with suppress(OSError):  # something is in it
                part.rmdir()


def checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders in `folder`, by N."""
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def record_sums(checkpoint: Path) -> None:
    """Write the checksums of a checkpoint's files beside them; :func:`why_incomplete` reads them.

    Of the files that one process writes: the adapter, the optimizer, the schedule and the run.
    """
    sums = {name: _digest(checkpoint / name) for name in _SUMMED if (checkpoint / name).is_file()}
    scratch = checkpoint / f".{SUMS}"
    scratch.write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, checkpoint / SUMS)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _why_not_as_saved(checkpoint: Path) -> str | None:
    """What says that a file is not the one that was saved with the others, or None."""
    if not (checkpoint / SUMS).is_file():  # of an older version, or stopped before it was written
        return None
    sums = json.loads((checkpoint / SUMS).read_text(encoding="utf-8"))
    for name, digest in sums.items():
        if not (checkpoint / name).is_file() or _digest(checkpoint / name) != digest:
            return (
                f"{name} is not the one that was saved there: it was damaged, changed or comes "
                f"from another checkpoint; restore it, or remove {SUMS} to go on with it"
            )
    return None


def why_incomplete(checkpoint: Path) -> str | None:
    """What keeps a training run from resuming at `checkpoint`, or None.

    A trainer writes `trainer_state.json` last, so a run that was stopped while it saved is
    recognised by its absence. Without the optimizer's state it would go on with a fresh one, and
    without the schedule's with both fresh. A file that is whole, but not the one that was saved, is
    told by its checksum (:func:`record_sums`).
    """
    from secura.integrity import check_file

    if not checkpoint.is_dir():
        return "no such folder"
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINER_STATE):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    if not any(any(checkpoint.glob(name)) for name in _OPTIMIZER):
        return "optimizer.pt is missing (a checkpoint saved with --save_only_model has none)"
    if any(checkpoint.glob("optimizer*")) and not (checkpoint / "scheduler.pt").is_file():
        return "scheduler.pt is missing, without which neither is read"
    for file in (file for name in _STATE for file in checkpoint.glob(name)):
        if file.is_file() and not zipfile.is_zipfile(file):
            return f"{file.name} is damaged (it was cut short, or is no file of torch's)"
    try:
        check_file(checkpoint / ADAPTER_WEIGHTS)
    except ValueError as error:
        return f"{ADAPTER_WEIGHTS} is damaged ({error.__cause__})"
    for name in (ADAPTER_CONFIG, TRAINER_STATE, SUMS):
        try:
            found = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        except FileNotFoundError:  # SUMS alone may be
            continue
        except ValueError as error:
            return f"{name} is damaged ({error})"
        if not isinstance(found, dict):
            return f"{name} is damaged (it holds a {type(found).__name__})"
    return _why_not_as_saved(checkpoint)


__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "SUMS",
    "TRAINER_STATE",
    "check_output_folder",
    "checkpoints",
    "fresh_folder",
    "record_sums",
    "refuse_written_over",
    "sole_use",
    "why_incomplete",
]
