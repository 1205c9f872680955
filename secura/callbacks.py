"""Trainer callbacks that fold adapters and hold their gradients."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from ._extras import require
from .accumulation import accumulate
from .config import check_period
from .folding import check_foldable, check_sole_copy, fold, fold_periods
from .layers import active_adapters

TrainerCallback = require("transformers", "train").TrainerCallback


class FoldCallback(TrainerCallback):  # type: ignore[misc, valid-type]
    """Fold the model's active SECURA adapters every ``fold_every`` optimizer steps.

    Example:
        >>> Trainer(model, callbacks=[FoldCallback()], ...)

    Args:
        fold_every: steps between folds; None takes what the active adapters say when training
            begins. 0 never folds.

    Raises:
        ValueError: for steps that are no integer of 0 or more; when training begins, for a model
            with no SECURA layer, active adapters that differ in ``fold_every`` where it is to be
            theirs, or an optimizer that keeps a second copy of the parameters (schedule-free).
    """

    def __init__(self, fold_every: int | None = None) -> None:
        if fold_every is not None:
            check_period("fold_every", fold_every)
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
        if self._period:
            check_sole_copy(kwargs.get("optimizer"), "a fold")
        for adapter, _ in active_adapters(model).values():
            adapter.folds = True

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Fold where the step count asks for it."""
        assert model is not None
        if self._period is None:
            self.on_train_begin(args, state, control, model)
        if self._period and state.global_step % self._period == 0:
            fold(model)


class AccumulateCallback(TrainerCallback):  # type: ignore[misc, valid-type]
    """Finish the adapters' gradients once an optimizer step: :func:`secura.accumulate`.

    For ``gradient_accumulation_steps`` above 1.

    Example:
        >>> Trainer(model, callbacks=[AccumulateCallback()], ...)

    Raises:
        ValueError: when training begins, for a model with no SECURA layer.
        TypeError: then too, for an optimizer that :func:`secura.accumulate` refuses.
    """

    def __init__(self) -> None:
        self._within = ExitStack()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Hold gradients from here on, to the backward passes that accelerate calls the last."""
        assert model is not None
        gradients = require("accelerate.state", "train").GradientState()
        self.close()
        within = accumulate(model, kwargs["optimizer"], lambda: gradients.sync_gradients)
        accumulation = self._within.enter_context(within)
        self._within.callback(accumulation.drop)  # of a step that is not taken

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold none any more."""
        self.close()

    def close(self) -> None:
        """Hold none any more, also where training was interrupted and never ended."""
        self._within.close()


__all__ = ["AccumulateCallback", "FoldCallback"]
