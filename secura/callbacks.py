"""Trainer callbacks."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ._extras import require
from .accumulation import accumulate
from .folding import check_foldable, fold, fold_periods, secura_layers

TrainerCallback = require("transformers", "train").TrainerCallback
ExportableState = require("transformers.trainer_callback", "train").ExportableState


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


class AccumulateCallback(TrainerCallback):  # type: ignore[misc, valid-type]
    """Finish the adapters' gradients once an optimizer step: :func:`secura.accumulate`.

    For ``gradient_accumulation_steps`` above 1.

    Example:
        >>> Trainer(model, callbacks=[AccumulateCallback()], ...)

    Raises:
        ValueError: when training begins, for a model with no SECURA layer.
    """

    def __init__(self) -> None:
        self._within = ExitStack()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Hold gradients from here on, to the backward passes that accelerate calls the last."""
        assert model is not None
        gradients, optimizer = (
            require("accelerate.state", "train").GradientState(),
            kwargs["optimizer"],
        )
        self.close()
        within = accumulate(model, optimizer, lambda: gradients.sync_gradients)
        accumulation = self._within.enter_context(within)
        self._within.callback(accumulation.drop)  # of a step that is not taken

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold none any more."""
        self.close()

    def close(self) -> None:
        """Hold none any more, also where training was interrupted and never ended."""
        self._within.close()


class DivergedError(RuntimeError):
    """Training arrived at NaN or inf, from where no further step comes back."""


class FiniteCallback(TrainerCallback):  # type: ignore[misc, valid-type]
    """Stop training where a trained tensor or the logged loss is NaN or inf, before it is saved.

    Trainers replace such a loss in their log by the mean of those before it, unless given
    ``logging_nan_inf_filter=False``. Put it after ``FoldCallback``, which moves B into the core.

    Example:
        >>> Trainer(model, callbacks=[FoldCallback(), FiniteCallback()], ...)

    Raises:
        DivergedError: after the step in which it happened; names the step and the tensor.
    """

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Look at every trained tensor, with one synchronisation with the device."""
        assert model is not None
        tensors = trained_tensors(model)
        if bool(torch.isfinite(_largest(list(tensors.values())))):
            return
        broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
        raise DivergedError(
            f"training diverged: after step {state.global_step}, {len(broken)} of {len(tensors)} "
            f"trained tensors hold NaN or inf, such as {broken[0]}"
        )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Look at the loss where it is logged anyway."""
        for name in ("loss", "train_loss"):
            loss = (logs or {}).get(name, 0.0)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"training diverged: the loss is {loss} up to step {state.global_step}"
                )


class SettingsCallback(TrainerCallback, ExportableState):  # type: ignore[misc, valid-type]
    """Record a run's settings in the ``trainer_state.json`` of its checkpoints.

    Args:
        settings: what JSON can hold, by name; :func:`recorded_settings` reads it back.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def state(self) -> dict[str, Any]:
        """The settings, as a trainer saves a callback's state."""
        return {"args": self.settings, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let a resumed state be this run's: what is recorded, and how often it logs and saves."""
        state.stateful_callbacks[type(self).__name__] = self.state()
        state.compute_steps(args, state.max_steps)


def recorded_settings(trainer_state: dict[str, Any]) -> dict[str, Any]:
    """What :class:`SettingsCallback` recorded in a ``trainer_state.json``; empty without one."""
    callbacks = trainer_state.get("stateful_callbacks") or {}
    return callbacks.get(SettingsCallback.__name__, {}).get("args", {})


class FinishedError(RuntimeError):
    """The checkpoint to resume from is the end of its run."""


class FinishedCallback(TrainerCallback):  # type: ignore[misc, valid-type]
    """Stop before the first step where none is left: a trainer would take one more all the same.

    The model holds the checkpoint's weights by then.

    Raises:
        FinishedError: when training begins at or past its last step.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the step the run is at with its last one."""
        if 0 < state.max_steps <= state.global_step:
            raise FinishedError(f"step {state.global_step} of {state.max_steps} is done")


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: the parameters that require gradients, and the folded cores."""
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    names = {layer: name for name, layer in model.named_modules()}
    for layer in secura_layers(model):
        for adapter in layer.active_cabr():
            found[f"{names[adapter]}.core"] = adapter.core
    local = {  # of a sharded tensor, this process's part
        name.removeprefix("module.").removeprefix("base_model.model."): getattr(
            value.detach(), "to_local", value.detach
        )()
        for name, value in found.items()
    }
    return {name: value for name, value in local.items() if value.numel()}


def _largest(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude in any of them; NaN where one holds NaN."""
    return torch.nn.utils.get_total_norm(tensors, norm_type=math.inf)


__all__ = [
    "AccumulateCallback",
    "DivergedError",
    "FinishedCallback",
    "FinishedError",
    "FiniteCallback",
    "FoldCallback",
    "SettingsCallback",
    "recorded_settings",
    "trained_tensors",
]
