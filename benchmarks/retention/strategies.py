"""What a method does against forgetting beside its adapter: nothing, EWC, replay or I-LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.retention.cells import Cell
from benchmarks.retention.material import Material
from benchmarks.retention.methods import Method
from benchmarks.retention.rows import Row, batch_loss, pack, text_row
from secura.continual import EWCCallback, Fisher, LongTermMemory, ReplayBuffer, ReplayCollator

_FISHER_EXAMPLES = 32
_MEMORY = 256
_EMA = 0.9  # 0.99 ** 64 would keep half of the start

State = dict[str, dict[str, Tensor]]


@dataclass
class Context:
    """What a strategy is made of: the run, the model with its adapter, and the parent's state."""

    cell: Cell
    method: Method
    material: Material
    model: nn.Module
    before: State


class Strategy:
    """Additions to a training run. This one adds nothing.

    Args:
        context: of the run.
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    def rows(self, rows: list[Row]) -> list[Row]:
        """The rows of a step, given those of the task."""
        return rows

    def loss(self, rows: Sequence[Row]) -> Tensor:
        """The loss of a step's rows, a scalar with gradient."""
        return batch_loss(self.context.model, pack(rows, self.context.material.device))

    def before_step(self) -> None:
        """Acts on the gradients."""

    def after_step(self) -> None:
        """Acts on the parameters."""

    def state(self) -> State:
        """Named tensors to go on from, at a checkpoint or with the next task."""
        return {}

    def resume(self, state: State) -> None:
        """Takes up what :meth:`state` gave at a checkpoint of this run."""

    def inferring(self) -> AbstractContextManager[Any]:
        """Within it, the model is what the method answers with."""
        return nullcontext()


class EWC(Strategy):
    """The penalty on leaving what mattered to the earlier tasks; the first task has none."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.callback: EWCCallback | None = None
        rows, before = self.old_rows(), context.before
        if rows:
            previous = Fisher(before["importance"], before["center"]) if before else None
            batches = (_one(row) for row in rows[:_FISHER_EXAMPLES])
            fisher = Fisher.estimate(context.model, batches, previous=previous)
            self.callback = EWCCallback(fisher, context.method.strength)

    def old_rows(self) -> list[Row]:
        """What was learned last."""
        cell, material = self.context.cell, self.context.material
        if cell.parent is None:
            return []
        batches = material.batches(cell.tasks[-2], cell.seed, cell.steps)
        return [row for batch in batches for row in batch]

    def before_step(self) -> None:
        """Adds the penalty's gradient."""
        if self.callback is not None:
            self.callback.on_pre_optimizer_step(None, None, None, model=self.context.model)

    def state(self) -> State:
        """The Fisher information and where it was taken."""
        if self.callback is None:
            return {}
        fisher = self.callback.fisher
        return {"importance": fisher.importance, "center": fisher.center}

    def resume(self, state: State) -> None:
        """The Fisher information of the run's start."""
        if self.callback is not None:
            fisher = Fisher(state["importance"], state["center"]).on(self.context.model)
            self.callback = EWCCallback(fisher, self.context.method.strength)


class EWCSelf(EWC):
    """EWC of the texts the base model wrote itself, before the first task."""

    def old_rows(self) -> list[Row]:
        """The model's own samples, and later the task before."""
        return super().old_rows() or _samples(self.context)


class Replay(Strategy):
    """Every batch also holds rows of earlier tasks."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        old = self.old_rows()
        self.collator = None
        if any(old):
            features = [[{"input_ids": _ids(row), "row": row} for row in rows] for rows in old]
            memory = ReplayBuffer(features, _MEMORY, context.cell.seed)
            self.collator = ReplayCollator(list, memory, context.method.strength, context.cell.seed)

    def old_rows(self) -> list[list[Row]]:
        """The rows of each earlier task."""
        cell, material = self.context.cell, self.context.material
        return [
            [row for batch in material.batches(task, cell.seed, cell.steps) for row in batch]
            for task in cell.tasks[:-1]
        ]

    def rows(self, rows: list[Row]) -> list[Row]:
        """The task's rows and what is drawn for them."""
        if self.collator is None:
            return rows
        features: list[Any] = [{"input_ids": _ids(row), "row": row} for row in rows]
        return [feature["row"] for feature in self.collator(features)]


class ReplaySelf(Replay):
    """Every batch also holds texts that the base model wrote itself."""

    def old_rows(self) -> list[list[Row]]:
        """The model's own samples, and the rows of each earlier task."""
        return [_samples(self.context), *super().old_rows()]


class ILoRA(Replay):
    """Replay, and a slow average of the adapter that steadies it and answers for it."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.memory = LongTermMemory(ema=_EMA)
        no_trainer = {"torch_compile": False, "n_gpu": 1, "label_smoothing_factor": 0.0}
        args, state = SimpleNamespace(**no_trainer), SimpleNamespace(global_step=0)
        self.memory.on_train_begin(args, state, None, model=context.model)
        if context.before:
            self.resume(context.before)

    def loss(self, rows: Sequence[Row]) -> Tensor:
        """The model's own loss, to which the memory adds."""
        batch = _labelled(rows, self.context.material.device)
        return self.context.model(**batch).loss

    def after_step(self) -> None:
        """Moves the average."""
        self.memory.on_step_end(None, None, None, model=self.context.model)

    def state(self) -> State:
        """The average."""
        return {"values": self.memory.values}

    def resume(self, state: State) -> None:
        """The average as it was."""
        device = self.context.material.device
        self.memory.values = {name: v.to(device).clone() for name, v in state["values"].items()}

    def inferring(self) -> AbstractContextManager[Any]:
        """The average in the parameters' place."""
        return self.memory.applied(self.context.model)


STRATEGIES: dict[str, Callable[[Context], Strategy]] = {
    "": Strategy,
    "ewc": EWC,
    "ewc-self": EWCSelf,
    "er": Replay,
    "replay-self": ReplaySelf,
    "i-lora": ILoRA,
}


def _samples(context: Context) -> list[Row]:
    return [text_row(ids.tolist()) for ids in context.material.samples(context.cell.seed)]


def _ids(row: Row) -> list[int]:
    return [*row.prompt, *row.completions[0]]


def _one(row: Row) -> dict[str, Tensor]:
    return _labelled([row], torch.device("cpu"))


def _labelled(rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
    """Rows as a transformers model takes them, with labels `[B, T]` for their completions."""
    length = max(len(_ids(row)) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        own = torch.tensor(_ids(row))
        ids[index, : len(own)] = own
        labels[index, len(row.prompt) : len(own)] = own[len(row.prompt) :]
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


__all__ = ["STRATEGIES", "Context", "State", "Strategy"]
