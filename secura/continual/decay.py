"""Decay of an anchored core towards its anchor, at every optimizer step.

See :func:`secura.anchor`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from secura._extras import require
from secura.anchoring import u_adapters
from secura.folding import check_sole_copy
from secura.sharding import is_dtensor
from secura_kernels.ops.common import round_stochastically

from .state import Unfolded

TrainerCallback = require("transformers", "train").TrainerCallback


class AnchorDecayCallback(TrainerCallback):  # type: ignore[misc, valid-type]
    """Before every optimizer step, ``U ← (1 − learning rate · anchor_decay) U``.

    On an anchored core that is a K-FAC penalty against leaving old knowledge, of one strength for
    all layers, decoupled as AdamW's decay is, whatever the optimizer; other parameters and cores
    that are frozen are left alone, and a ``weight_decay`` comes on top. Without an anchor it is
    plain weight decay on U. A U in bf16, which TRL makes of every adapter on a quantised base, is
    rounded stochastically, so that it decays in the mean.

    Args:
        anchor_decay: 0 or more; over 300 steps at a rate of 1e-3, 1 takes a quarter off a U that
            nothing else moves. None takes what divides such a U by e over the whole run (by 2 over
            one step), whatever its length: 1 over the sum of its rates (the highest counted twice),
            30 for the 128 steps at 5e-4 that were measured.

    Attributes:
        decay: what acts: ``anchor_decay``, or once training began what was taken for None.

    Raises:
        ValueError: for a value below 0 or not finite. When training begins: for a model with no
            ``core="u"``, one that is frozen or in fp16, one that folds while training, since the
            decay does not reach what was folded, or an optimizer that keeps a second copy of the
            cores (schedule-free); with None, for a schedule that does not tell its rates
            beforehand, or whose highest is 0. At a step: where it was folded, for an optimizer
            that holds copies of the cores (ZeRO), and where the rate times ``anchor_decay`` is 1
            or more, which turns U's sign instead of making it smaller.
    """

    def __init__(self, anchor_decay: float | None = None) -> None:
        if anchor_decay is not None and not (anchor_decay >= 0 and math.isfinite(anchor_decay)):
            raise ValueError(f"anchor_decay={anchor_decay} must be a finite number, 0 or more")
        self.anchor_decay = self.decay = anchor_decay
        self._unfolded: Unfolded | None = None
        self._step = 0  # where no Trainer counts

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Refuse a model with no such core, or one that folds, before a step is paid for."""
        assert model is not None
        cores = _trained_cores(model)
        if self.anchor_decay != 0:
            _check_trained(cores)
            check_sole_copy(optimizer, "anchor_decay")
        if self.anchor_decay is None:
            self.decay = _decay_of_run(optimizer, lr_scheduler, state.max_steps, cores)
        self._unfolded = Unfolded(model) if self.decay else None

    @torch.no_grad()
    def on_pre_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Decay every core that the optimizer trains, at the rate of its group."""
        assert model is not None
        if self.decay is None:
            raise ValueError("anchor_decay=None is read off a Trainer's run: give it a number")
        if self._unfolded is not None:
            self._unfolded.check(model)
        cores = _trained_cores(model)
        pairs = [(group["lr"], one) for group in optimizer.param_groups for one in group["params"]]
        found = [(rate, one) for rate, one in pairs if id(one) in cores]
        if not found:
            raise ValueError(
                "the optimizer trains none of the model's cores U themselves (they are frozen, or "
                "it holds copies, as ZeRO's does), so anchor_decay would do nothing: leave it out"
            )
        check_decay(self.decay, max(float(rate) for rate, _ in found))
        self._step = self._step + 1 if state is None else state.global_step
        for place, (rate, core) in enumerate(found):
            _shrink(core, 1 - rate * self.decay, self._step * len(found) + place)


def _trained_cores(model: nn.Module) -> dict[int, Tensor]:
    """The cores U that are trained themselves, now, by their ``id``."""
    cores: list[Any] = [adapter.U for adapter, _ in u_adapters(model).values()]
    return {id(core): core for core in cores if core.requires_grad}


def _check_trained(cores: Mapping[int, Tensor]) -> None:
    """Raise ``ValueError`` where no core is trained, or a decay would be lost in its dtype."""
    if not cores:
        raise ValueError(
            "no core U of the model is trained: load the adapter with is_trainable=True"
        )
    if any(core.dtype == torch.float16 for core in cores.values()):
        raise ValueError(
            "a core U is in float16, in which a decay is rounded away: keep adapters in fp32, as "
            "autocast_adapter_dtype=True does"
        )


def _decay_of_run(optimizer: Any, scheduler: Any, steps: int, cores: Container[int]) -> float:
    """The decay that divides U by e over ``steps`` steps: of the group with the highest rates.

    The highest rate is counted twice, so that a run of few steps keeps some of U too.
    """
    schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate's holds torch's
    if not isinstance(schedule, LambdaLR):
        raise ValueError(
            f"a {type(schedule).__name__} does not tell its learning rates beforehand, by which "
            "anchor_decay would be set: give it a number"
        )
    found = [
        [base * factor(step) for step in range(steps)]
        for group, base, factor in zip(
            optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        )
        if any(id(one) in cores for one in group["params"])
    ]
    totals = [float(sum(rates) + max(rates)) for rates in found if rates]
    if totals and max(schedule.base_lrs) <= 0:
        raise ValueError(
            "the schedule's learning rates are all 0 (Adafactor makes its own, say), so none tells "
            "anchor_decay: give it a number"
        )
    total = max(totals, default=0.0)  # 0 in a run that does not end its warm-up
    return 1 / total if total > 0 else 0.0


def check_decay(anchor_decay: float, rate: float) -> None:
    """Raise ``ValueError`` where a step at ``rate`` would turn U's sign, or let it grow."""
    if rate * anchor_decay >= 1:
        raise ValueError(
            f"anchor_decay={anchor_decay:g} at a learning rate of {rate:g} would multiply U by "
            f"{1 - rate * anchor_decay:g} a step: their product has to be below 1, and is 0.015 in "
            "the recipe that was measured (30 at 5e-4, AdamW)"
        )


def _shrink(core: Tensor, factor: float, seed: int) -> None:
    """``core ← factor · core``, in place; in bf16 rounded stochastically, from ``seed``.

    To nearest nothing would move: half a unit of bf16's last place is 0.002 to 0.004 of a number.
    """
    if core.dtype != torch.bfloat16:
        core.mul_(factor)
        return
    own: Any = core
    here: Tensor = own.to_local() if is_dtensor(core) else own
    wide = (here.float() * factor).reshape(1, -1)  # of experts, or a part of FSDP1's
    here.copy_(round_stochastically(wide, seed).view_as(here))


__all__ = ["AnchorDecayCallback", "check_decay"]
