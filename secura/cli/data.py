"""Training data from the hub, a local folder or file; and the columns it needs."""

from __future__ import annotations

import csv
import glob
import hashlib
import re
from pathlib import Path
from typing import Any

from secura._extras import require
from secura.cli.errors import UserError, one_line
from secura.cli.rows import blank_rows, check_filled, check_rows, holds_turns, listed

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
QUESTIONS = ("question", "answer")
SHAPES = (("messages",), ("prompt", "completion"), ("text",), QUESTIONS)
TEMPLATES = ("tools", "chat_template_kwargs")
"""Columns that TRL gives to the chat template beside a row's messages."""

WANTED = "'messages', or 'prompt' and 'completion', or 'text', or 'question' and 'answer'"


def load_split(name: str, config: str | None, split: str) -> Any:
    """One split of a data set.

    Args:
        name: a local file (`.jsonl`, `.json`, `.csv`, `.parquet`), a local folder, or a
            data set of the hub; looked for in this order.
        config: the data set's configuration, such as `main`, or None.
        split: a split's name, or a slice of one, such as `train[:90%]` (of a folder that
            `save_to_disk` wrote, a name alone).

    Returns:
        A `datasets.Dataset`.

    Raises:
        UserError: there is no such data set or split, it is empty, or it cannot be read.
    """
    datasets = require("datasets", "train")
    try:
        dataset = _load(datasets, name, config, split)
    except StopIteration:  # the JSON reader's answer to a file without a line
        dataset = ()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"data set {name!r}, split {split!r}: {_said(error)}") from error
    if len(dataset) == 0:
        raise UserError(f"data set {name!r}, split {split!r} has no rows")
    return dataset


def _said(error: BaseException) -> str:
    """What a reader of data says, lines counted from 1, and what to do about a split."""
    text = one_line(error.__cause__ or error)
    text = re.sub(r" in row (\d+)$", lambda found: f" in line {int(found[1]) + 1}", text)
    if "Unknown split" in text:
        text += "; name another, or a part of one, such as 'train[90%:]' of a single file"
    return text


def _load(datasets: Any, name: str, config: str | None, split: str) -> Any:
    path = Path(name).expanduser()
    if path.is_file():
        if config is not None:
            raise ValueError(f"a file has no configuration, such as {config!r}: leave it out")
        if path.suffix.lower() not in FORMATS:
            raise ValueError(f"unknown kind of file; {', '.join(FORMATS)} are read")
        return _load_file(datasets, path, split)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            return _load_saved(datasets, path, split)
        _check_one_kind(path)
        return datasets.load_dataset(str(path), config, split=split)
    is_file = path.suffix.lower() in FORMATS or ("/" not in name and path.suffix)
    if is_file or name.startswith((".", "/", "~")):
        raise FileNotFoundError("no such file or folder")
    return datasets.load_dataset(name, config, split=split)


def _check_one_kind(folder: Path) -> None:
    """Raise `ValueError` for a folder of files of several kinds, of which one would be read."""
    if (folder / "README.md").exists():  # which may say what is read
        return
    files = (file for file in folder.iterdir() if file.is_file())
    kinds = {FORMATS[file.suffix.lower()] for file in files if file.suffix.lower() in FORMATS}
    if len(kinds) > 1:
        raise ValueError(
            f"the folder has files of the kinds {' and '.join(sorted(kinds))}, of which one would "
            "be read: name a file, or keep one kind in it"
        )


def _load_file(datasets: Any, path: Path, split: str) -> Any:
    kind = FORMATS[path.suffix.lower()]
    files = {"train": glob.escape(str(path))}  # which datasets takes for a pattern
    if kind != "parquet":
        _check_utf8(path)
    more: dict[str, Any] = {}
    if kind == "csv":
        _check_fields(path)
        more = {"features": _as_text_columns(datasets, path)}
        more |= {"keep_default_na": False, "na_values": [""]}  # "None" is what is written there
    # By its content, or what was prepared of another file at that path and time is read again
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return datasets.load_dataset(kind, content, data_files=files, split=split, **more)


def _check_utf8(path: Path) -> None:
    """Raise `ValueError` for the first line that is in another encoding."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"line {number} is not UTF-8 text ({error.reason}): save the file as UTF-8"
                ) from None


def _check_fields(path: Path) -> None:
    """Raise `ValueError` for the first row that has more fields than the header.

    The reader would take the first of them for the row's name, and move the others.
    """
    limit = csv.field_size_limit(2**31 - 1)  # a text may be long
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            for row in rows:
                if len(row) > len(header):
                    raise ValueError(
                        f"line {rows.line_num} has {len(row)} fields, and the header "
                        f"{len(header)}: put what holds a comma in double quotes"
                    )
    finally:
        csv.field_size_limit(limit)


def _as_text_columns(datasets: Any, path: Path) -> Any:
    """Features that keep a CSV file's cells as written, where its columns are named for certain.

    The reader would make numbers of an answer such as 007.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file), [])
    if not all(names) or len(set(names)) != len(names):
        return None
    return datasets.Features({name: datasets.Value("string") for name in names})


def _load_saved(datasets: Any, path: Path, split: str) -> Any:
    """A split of what `save_to_disk` wrote; a folder of one split goes by the name `train`."""
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        saved = {"train": saved}
    if split not in saved:
        raise ValueError(f"the folder has the splits {', '.join(saved)}")
    return saved[split]


def to_training_columns(
    dataset: Any, name: str, text_field: str, *, chat: bool
) -> tuple[Any, str | None]:
    """The data set with the columns TRL trains on, and a note that names those left out.

    `messages`, `prompt`/`completion` and `text` stay as they are; `question`/`answer` become
    `prompt`/`completion`: a user's turn and the assistant's with `chat`, plain text otherwise.
    What a chat template is given stays beside messages.

    Args:
        dataset: a `datasets.Dataset`.
        name: what to call it in an error.
        text_field: another name of the column `text` (TRL's `--dataset_text_field`).
        chat: the tokenizer has a chat template.

    Raises:
        UserError: the needed columns are not there (lists those found), or rows lack a value.
    """
    columns = dataset.column_names
    shape = next((shape for shape in SHAPES if set(shape) <= set(columns)), None)
    if text_field in columns and text_field != "text":
        shape = (text_field,)
    if shape is None:
        raise UserError(
            f"data set {name!r} has the columns {_quoted(columns) or 'none'}; wanted: "
            f"{WANTED} (rename its columns, or name the text's with --dataset_text_field)"
        )
    check_rows(dataset, name, shape)
    kept = list(shape)
    if holds_turns(dataset, shape[0]) or (chat and shape == QUESTIONS):
        kept += [column for column in TEMPLATES if column in columns]
    if "chat_template_kwargs" in kept:
        check_filled(dataset, name, "chat_template_kwargs")
    lost = [column for column in columns if column not in kept]
    notes = [f"training reads {_quoted(kept)}; not read: {_quoted(lost)}"] if lost else []
    dataset = dataset.select_columns(kept)
    if len(shape) == 1 and not holds_turns(dataset, shape[0]):
        dataset, left_out = _without_blanks(dataset, name, shape[0])
        notes += left_out
    if shape == QUESTIONS:
        dataset = dataset.map(_as_chat if chat else _as_text, remove_columns=list(shape))
    return dataset, "; ".join(notes) or None


def _without_blanks(dataset: Any, name: str, column: str) -> tuple[Any, list[str]]:
    """The rows that hold text, and a note on the others."""
    blank = blank_rows(dataset, column)
    if len(blank) == len(dataset):
        raise UserError(f"data set {name!r}: no row has any {column!r}")
    if not blank:
        return dataset, []
    without = set(blank)
    kept = [row - 1 for row in range(1, len(dataset) + 1) if row not in without]
    note = f"{len(blank)} of {len(dataset)} rows have no {column!r} and are left out"
    return dataset.select(kept), [f"{note} ({listed(blank)})"]


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _as_chat(row: dict[str, str]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


def _as_text(row: dict[str, str]) -> dict[str, str]:
    return {"prompt": f"{row['question']}\n", "completion": row["answer"]}


__all__ = ["FORMATS", "load_split", "to_training_columns"]
