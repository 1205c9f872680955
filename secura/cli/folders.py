"""Output folders: never on top of other work, never half written."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from secura.cli.errors import UserError
from secura.folders import complete_folder as complete_folder

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def check_output_folder(path: Path, *, hint: str) -> None:
    """Raises `UserError` unless `path` is an empty folder or does not exist.

    Args:
        path: the folder a command is about to fill.
        hint: what else the user can do, for the message.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file, not a folder; choose another --output_dir")
    if any(path.iterdir()):
        raise UserError(f"the output folder {path} is not empty; {hint}")


def publish(source: Path, target: Path) -> None:
    """Moves a finished adapter's files into `target`, the config last: without it nothing loads."""
    files = sorted(source.iterdir(), key=lambda file: file.name == ADAPTER_CONFIG)
    for file in files:
        if file.is_dir():
            shutil.rmtree(target / file.name, ignore_errors=True)
        os.replace(file, target / file.name)
    source.rmdir()


def checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders in `folder`, by N."""
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def why_incomplete(checkpoint: Path) -> str | None:
    """What keeps a training run from resuming at `checkpoint`, or None.

    A trainer writes `trainer_state.json` last, so a run that was stopped while it saved is
    recognised by its absence.
    """
    from safetensors import SafetensorError, safe_open

    if not checkpoint.is_dir():
        return "no such folder"
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "trainer_state.json"):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    try:
        with safe_open(checkpoint / ADAPTER_WEIGHTS, framework="numpy"):
            pass
    except SafetensorError as error:
        return f"{ADAPTER_WEIGHTS} is damaged ({error})"
    for name in (ADAPTER_CONFIG, "trainer_state.json"):
        try:
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        except ValueError as error:
            return f"{name} is damaged ({error})"
    return None
