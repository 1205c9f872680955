"""What a method does against forgetting beside its adapter: nothing, EWC, ER or I-LoRA's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secura._extras import require
from secura.experiments.grid import Cell
from secura.experiments.material import Material

FISHER = "fisher.safetensors"
LONG_TERM = "long_term.safetensors"


@dataclass
class Context:
    """What a strategy may look at: the cell, its folder and that of the cell before it."""

    cell: Cell
    material: Material
    model: Any
    folder: Path
    parent: Path | None


@dataclass
class Strategy:
    """Additions to a training run. This one adds nothing.

    Args:
        callbacks: for the trainer.
        wrap: makes the collator the trainer is to use out of the plain one.
    """

    callbacks: list[Any] = field(default_factory=list)
    wrap: Callable[[Any], Any] = lambda collator: collator

    def finish(self, folder: Path) -> None:
        """Keeps in `folder` what the next task's run needs, after training."""

    def inferring(self, model: Any) -> AbstractContextManager[Any]:
        """Within it, the model is what the method answers with."""
        return nullcontext()


def none(context: Context) -> Strategy:
    """SEQ: one task after another, nothing more."""
    return Strategy()


def replay(context: Context) -> Strategy:
    """ER: every batch also holds examples of the earlier tasks."""
    continual = require("secura.continual", "experiments")
    settings, cell, material = context.material.settings, context.cell, context.material
    if context.parent is None:
        return Strategy()
    earlier = [material.train_features(task, cell.seed)[0] for task in cell.tasks[:-1]]
    memory = continual.ReplayBuffer(earlier, settings.replay_size, cell.seed)
    share = settings.replay_share
    return Strategy(wrap=lambda plain: continual.ReplayCollator(plain, memory, share, cell.seed))


def ewc(context: Context) -> Strategy:
    """EWC: what mattered to the earlier tasks, by Fisher information, is held in place.

    The Fisher information of the task before is taken here, at the parameters it left, so that the
    first task's run is plain LoRA's.
    """
    continual = require("secura.continual", "experiments")
    settings, cell, material = context.material.settings, context.cell, context.material
    if context.parent is None:
        return Strategy()
    previous = continual.Fisher.load(context.parent / FISHER) if len(cell.tasks) > 2 else None
    features = material.train_features(cell.tasks[-2], cell.seed)[0]
    batches = _one_by_one(features[: settings.ewc_examples])
    fisher = continual.Fisher.estimate(context.model, batches, previous=previous)
    fisher.save(context.folder / FISHER)
    return Strategy(callbacks=[continual.EWCCallback(fisher, settings.ewc_lambda)])


def long_term(context: Context) -> Strategy:
    """I-LoRA: a slow average of the working adapter steadies it, and answers for it."""
    return _LongTerm(context)


class _LongTerm(Strategy):
    def __init__(self, context: Context) -> None:
        continual = require("secura.continual", "experiments")
        settings = context.material.settings
        start = context.parent / LONG_TERM if context.parent else None
        self.memory = continual.LongTermMemory(
            ema=settings.long_term_ema, weight=settings.long_term_weight, start=start
        )
        super().__init__(callbacks=[self.memory])

    def finish(self, folder: Path) -> None:
        self.memory.save(folder / LONG_TERM)

    def inferring(self, model: Any) -> AbstractContextManager[Any]:
        return self.memory.applied(model)


def _one_by_one(features: list[dict[str, list[int]]]) -> Iterator[dict[str, Any]]:
    torch = require("torch", "experiments")
    for feature in features:
        yield {name: torch.tensor([values]) for name, values in feature.items()}


STRATEGIES: dict[str, Callable[[Context], Strategy]] = {
    "none": none,
    "replay": replay,
    "ewc": ewc,
    "long-term": long_term,
}

__all__ = ["STRATEGIES", "Context", "Strategy"]
