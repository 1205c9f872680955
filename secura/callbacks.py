"""Trainer callbacks."""

from __future__ import annotations

from typing import Any

from torch import nn

from ._extras import require
from .folding import check_foldable, fold, fold_periods

TrainerCallback = require("transformers", "train").TrainerCallback


class FoldCallback(TrainerCallback):  # type: ignore[misc, valid-type]
    """Fold the model's active SECURA adapters every ``fold_every`` optimizer steps.

    Example:
        >>> Trainer(model, callbacks=[FoldCallback()], ...)

    Args:
        fold_every: steps between folds; None takes what the active adapters say when training
            begins. 0 never folds.

    Raises:
        ValueError: when training begins, for a model with no SECURA layer, or active adapters that
            differ in ``fold_every`` where it is to be theirs.
    """

    def __init__(self, fold_every: int | None = None) -> None:
        if fold_every is not None and fold_every < 0:
            raise ValueError(f"fold_every={fold_every} must be 0 or more optimizer steps")
        self.fold_every = fold_every
        self._period: int | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Settle how often to fold, before the first step is paid for."""
        assert model is not None
        check_foldable(model)
        periods = {self.fold_every} if self.fold_every is not None else fold_periods(model)
        if len(periods) > 1:
            raise ValueError(
                f"the active adapters differ in fold_every ({', '.join(map(str, sorted(periods)))})"
                ": give them one value, or FoldCallback(fold_every=...)"
            )
        self._period = max(periods, default=0)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Fold where the step count asks for it."""
        assert model is not None
        if self._period is None:
            self.on_train_begin(args, state, control, model)
        if self._period and state.global_step % self._period == 0:
            fold(model)


__all__ = ["FoldCallback"]
