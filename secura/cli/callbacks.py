"""Trainer callbacks of `secura train`: NaN and the end of a run stop it, settings are recorded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secura._extras import require
from secura.layers import active_adapters
from secura.names import PREFIX

TrainerCallback = require("transformers", "train").TrainerCallback
ExportableState = require("transformers.trainer_callback", "train").ExportableState


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
        """Let a resumed state be this run's: what is recorded, and how often it logs and saves.

        The best checkpoint's path is put right too, where the folder was moved.
        """
        self.settings["learning_rate"] = args.learning_rate  # which the weights may have said
        state.stateful_callbacks[type(self).__name__] = self.state()
        state.compute_steps(args, state.max_steps)
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        recorded = state.best_model_checkpoint
        if recorded is None or not Path(recorded).is_dir():  # transformers 5.8 keeps such a path
            state.best_model_checkpoint = str(best) if best.is_dir() else None


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
    for name, (adapter, _) in active_adapters(model).items():
        found[f"{name}.core"] = adapter.core
    local = {  # of a sharded tensor, this process's part
        name.removeprefix("module.").removeprefix(PREFIX): getattr(
            value.detach(), "to_local", value.detach
        )()
        for name, value in found.items()
    }
    return {name: value for name, value in local.items() if value.numel()}


def _largest(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude in any of them; NaN where one holds NaN."""
    return torch.nn.utils.get_total_norm(tensors, norm_type=math.inf)


__all__ = [
    "DivergedError",
    "FinishedCallback",
    "FinishedError",
    "FiniteCallback",
    "SettingsCallback",
    "recorded_settings",
    "trained_tensors",
]
