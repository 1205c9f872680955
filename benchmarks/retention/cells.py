"""What a figure depends on: a stage's settings, and a cell's method, place, rate and tasks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.shapes import ALL, MLP, QV

TARGETS: dict[str, tuple[str, ...]] = {"qv": QV, "mlp": MLP, "all": ALL}
"""Layers that are adapted, by their place's name."""


@dataclass(frozen=True)
class Settings:
    """What every cell of a stage shares.

    Args:
        model: a packaged model or a local folder.
        tasks: measured in every cell; a cell is trained on one of them, or on several in turn.
        texts: kinds of old text.
        probes: basic knowledge that is asked at the end.
        batch_size: examples a step.
        max_tokens: examples of more tokens, prompt and completion together, are left out.
        held_out: held-out examples of each task that are scored.
        text_count: texts of each kind that are scored.
        text_tokens: of each text at most.
        part: share of the held-out examples and texts that is scored at the quarters.
        probe_questions: asked of each probe; 0 for none.
        answers: held-out GSM8K examples that are answered by generation at the end; 0 for none.
        samples: texts the model writes itself, for whatever works with them.
        sample_tokens: of each at most.
        save_every: steps between checkpoints.

    Raises:
        ValueError: a setting out of range.
    """

    model: str = "smollm2-135m"
    tasks: tuple[str, ...] = ("gsm8k",)
    texts: tuple[str, ...] = ("news", "exam", "help", "code")
    probes: tuple[str, ...] = ("arc-easy", "hellaswag")
    batch_size: int = 4
    max_tokens: int = 128
    held_out: int = 64
    text_count: int = 16
    text_tokens: int = 64
    part: float = 0.25
    probe_questions: int = 50
    answers: int = 0
    samples: int = 48
    sample_tokens: int = 96
    save_every: int = 32

    def __post_init__(self) -> None:
        sizes = ("batch_size", "max_tokens", "held_out", "text_count", "text_tokens")
        for name in (*sizes, "samples", "sample_tokens", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.part <= 1:
            raise ValueError(f"part={self.part} must be above 0 and at most 1")
        if not self.tasks:
            raise ValueError("a stage needs at least one task")


@dataclass(frozen=True, order=True)
class Cell:
    """One training run, on the last of its tasks from where the cell with one task less ended.

    Args:
        method: a method with its variations, such as ``anchored-self@damping=0.1``.
        targets: a key of :data:`TARGETS`.
        rate: the peak learning rate.
        seed: of the training examples, their order and whatever the adapter draws.
        tasks: trained on, in order.
        steps: optimizer steps a task.
    """

    method: str
    targets: str
    rate: float
    seed: int
    tasks: tuple[str, ...]
    steps: int

    @property
    def parent(self) -> Cell | None:
        """The cell this one starts from; None where that is the untouched model."""
        return replace(self, tasks=self.tasks[:-1]) if len(self.tasks) > 1 else None

    @property
    def path(self) -> Path:
        """Its record within a stage's folder; what it keeps while it runs lies beside it."""
        name = f"{self.targets}-{'+'.join(self.tasks)}-{self.steps}.json"
        return Path(self.method, f"lr{self.rate:g}", f"seed{self.seed}", name)

    @property
    def title(self) -> str:
        """One line for people."""
        tasks = " → ".join(self.tasks)
        return (
            f"{self.method} on {self.targets}, {tasks}, {self.steps} steps, "
            f"lr {self.rate:g}, seed {self.seed}"
        )


__all__ = ["TARGETS", "Cell", "Settings"]
