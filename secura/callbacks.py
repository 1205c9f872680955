"""Trainer callbacks."""

from __future__ import annotations

from typing import Any

from torch import nn

from ._extras import require
from .folding import fold

TrainerCallback = require("transformers", "train").TrainerCallback


class FoldCallback(TrainerCallback):  # type: ignore[misc, valid-type]
    """Fold the model's SECURA adapters every ``fold_every`` optimizer steps.

    Example:
        >>> Trainer(model, callbacks=[FoldCallback()], ...)

    Args:
        fold_every: steps between folds; None takes the active adapter's ``fold_every``. 0 never
            folds.

    Raises:
        ValueError: at the first step, for a model with no SECURA layer.
    """

    def __init__(self, fold_every: int | None = None) -> None:
        if fold_every is not None and fold_every < 0:
            raise ValueError(f"fold_every={fold_every} must be 0 or more optimizer steps")
        self.fold_every = fold_every

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Fold where the step count asks for it."""
        assert model is not None
        every = self.fold_every
        if every is None:
            config = getattr(model, "active_peft_config", None)
            every = getattr(config, "fold_every", 0)
        if every and state.global_step % every == 0:
            fold(model)


__all__ = ["FoldCallback"]
