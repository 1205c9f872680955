"""A cell's figures: typed, one JSON file each, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.files import write_text
from benchmarks.retention.cells import Cell, Settings

FORMAT = 2
_DIGITS = 6


@dataclass(frozen=True)
class Score:
    """How a model reads some texts, beside how its base reads them. Means over tokens, in nats.

    Args:
        tokens: predicted.
        base_loss: cross-entropy of the base model.
        loss: cross-entropy of the tuned model.
        kl: KL(base ‖ tuned) of the next token's distribution.
        accuracy: share of tokens the tuned model finds likeliest, the right ones before them given.
        base_accuracy: the same of the base model.
    """

    tokens: int
    base_loss: float
    loss: float
    kl: float
    accuracy: float
    base_accuracy: float

    @property
    def learned(self) -> float:
        """Fall of the loss."""
        return self.base_loss - self.loss

    @property
    def rise(self) -> float:
        """Rise of the loss."""
        return self.loss - self.base_loss


@dataclass(frozen=True)
class Measure:
    """Scores after a step.

    Args:
        step: of the cell's last task.
        part: whether on a part of the texts alone, as at the quarters.
        tasks: held-out examples of each task.
        texts: each kind of old text.
    """

    step: int
    part: bool
    tasks: dict[str, Score]
    texts: dict[str, Score]


@dataclass(frozen=True)
class Probe:
    """Multiple choice: shares of questions whose right choice is the likeliest.

    Args:
        n: questions.
        accuracy: by the choices' log-likelihoods.
        accuracy_norm: by their log-likelihoods a byte.
        base_accuracy, base_accuracy_norm: the base model's.
    """

    n: int
    accuracy: float
    accuracy_norm: float
    base_accuracy: float
    base_accuracy_norm: float


@dataclass
class Record:
    """One cell's figures.

    Args:
        stage: its name.
        cell: what was trained.
        settings: the stage's.
        status: ``"done"`` or ``"failed"``.
        error: why it failed.
        measures: of a part of the texts at the quarters and at the end, and of all at the end.
        probes: at the end.
        exact_match: share of GSM8K answers that are right; None where none were written.
        losses: of each step's batch.
        gradient_norms: of each step, by the adapted layers' kind, such as ``"q_proj"``.
        trained: numbers that are trained.
        anchor: what the anchoring pass says of itself, where there is one.
        seconds: by part of the work.
        environment: versions, machine, commit, checksum of the texts.
        format: of this file.
    """

    stage: str
    cell: Cell
    settings: Settings
    status: str = "done"
    error: str = ""
    measures: list[Measure] = field(default_factory=list)
    probes: dict[str, Probe] = field(default_factory=dict)
    exact_match: float | None = None
    losses: list[float] = field(default_factory=list)
    gradient_norms: dict[str, list[float]] = field(default_factory=dict)
    trained: int = 0
    anchor: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def task(self) -> str:
        """The task that was trained on last."""
        return self.cell.tasks[-1]

    @property
    def end(self) -> Measure:
        """The measure after the last step."""
        return self.measures[-1]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Record:
        """The record that :meth:`to_json` gave."""
        content = dict(content)
        content["cell"] = Cell(**_tuples(content["cell"]))
        content["settings"] = Settings(**_tuples(content["settings"]))
        content["measures"] = [measure_from(entry) for entry in content["measures"]]
        content["probes"] = {name: Probe(**probe) for name, probe in content["probes"].items()}
        return cls(**content)

    def to_json(self, *, exact: bool = False) -> dict[str, Any]:
        """The record as JSON, floats cut to six significant digits unless they are to be exact."""
        content = dataclasses.asdict(self)
        return content if exact else _rounded(content)


def measure_from(entry: dict[str, Any]) -> Measure:
    """A measure from its JSON."""
    scores = {
        group: {name: Score(**score) for name, score in entry[group].items()}
        for group in ("tasks", "texts")
    }
    return Measure(entry["step"], entry["part"], **scores)


def read(path: Path) -> Record | None:
    """A cell's record; None where there is none, or one that was cut short or is of old format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return Record.from_json(content) if content.get("format") == FORMAT else None


def read_all(folder: Path) -> list[Record]:
    """Every record in a folder, those that failed too.

    Raises:
        ValueError: there is none.
    """
    found = [record for path in sorted(folder.rglob("*.json")) if (record := read(path))]
    if not found:
        raise ValueError(f"{folder} holds no results: 'python -m benchmarks.retention run' first")
    return found


def provenance(records: Iterable[Record]) -> dict[str, str]:
    """Model, machines, commits, torch and arithmetic of records, each once."""
    environments = [record.environment for record in records]
    return {
        key: ", ".join(sorted({str(_dig(each, key)) for each in environments}))
        for key in ("model", "machine.name", "commit", "torch", "bf16")
    }


def write(path: Path, record: Record) -> None:
    """Writes a record, a line for each of its fields."""
    content = record.to_json()
    lines = (f"{json.dumps(key)}: {json.dumps(content[key], allow_nan=False)}" for key in content)
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _dig(content: dict, key: str) -> object:
    for part in key.split("."):
        content = content.get(part, {})
    return content


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


__all__ = [
    "Measure",
    "Probe",
    "Record",
    "Score",
    "measure_from",
    "provenance",
    "read",
    "read_all",
    "write",
]
