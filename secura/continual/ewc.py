"""Elastic weight consolidation (Kirkpatrick et al., arXiv 1612.00796).

The penalty is ``λ/2 Σ F (θ − θ*)²`` over the trainable parameters, with ``F`` the diagonal of the
empirical Fisher information at the end of the earlier tasks and ``θ*`` the values there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secura._extras import require
from secura.layers import evaluating, secura_layers

from .state import (
    Unfolded,
    check_alike,
    check_run,
    coordinates,
    known,
    placed,
    read,
    trainable,
    write,
)

TrainerCallback = require("transformers", "train").TrainerCallback

_PARTS = ("importance", "center")


@dataclass(frozen=True)
class Fisher:
    """How much each trainable parameter mattered, and where it was.

    Args:
        importance: fp32, by parameter name: the diagonal ``F``, 0 or more.
        center: fp32, of the same names and shapes: ``θ*``.
        made_in: :func:`secura.continual.state.coordinates` of the model; empty if not known.
    """

    importance: dict[str, Tensor]
    center: dict[str, Tensor]
    made_in: str = ""

    @classmethod
    def estimate(
        cls,
        model: nn.Module,
        batches: Iterable[Mapping[str, Tensor]],
        *,
        previous: Fisher | None = None,
    ) -> Fisher:
        """The mean over ``batches`` of the loss's squared gradient, in fp32.

        The gradient is that of the labels in the data (the empirical Fisher) and of the model's own
        loss: a mean over scored tokens, where the likelihood has a sum, so that long examples do
        not outweigh short ones; λ takes up the scale. It is squared per batch: exact for batches
        of one example; larger ones are faster and come out smaller, because the examples' gradients
        cancel before they are squared. The model runs without dropout; its ``.grad``, mode and
        random state stay as they were.

        Args:
            model: at the end of the task; its forward must return an object with a ``loss``.
            batches: keyword arguments of the forward, with labels; moved to the model's device.
            previous: of the tasks before. Importances add up, and the center is where the model is
                now: online EWC without decay, one penalty however many tasks there were.

        Raises:
            ValueError: no batch, no trainable parameter, a merged adapter, a loss that is missing
                or not finite, or a ``previous`` of other parameters, or from before a fold or
                another anchor.
        """
        parameters = trainable(model)
        if any(layer.merged for layer in secura_layers(model).values()):
            raise ValueError("an adapter is merged, so its loss has no gradient: unmerge it first")
        if previous is not None:
            previous = previous.on(model)
        total = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
        count = 0
        with evaluating(model):
            for batch in batches:
                gradients = _gradients(model, batch, list(parameters.values()))
                for squares, gradient in zip(total.values(), gradients, strict=True):
                    squares += gradient.float().square()
                count += 1
        if not count:
            raise ValueError("the Fisher information needs at least one batch")
        importance = {name: squares / count for name, squares in total.items()}
        if previous is not None:
            importance = {name: importance[name] + previous.importance[name] for name in importance}
        center = {n: p.detach().float().clone() for n, p in parameters.items()}
        return cls(importance, center, coordinates(model))

    def on(self, model: nn.Module) -> Fisher:
        """The same on the model's devices.

        Raises:
            ValueError: names or shapes are not those of the model's trainable parameters, or these
                were folded or anchored anew since.
        """
        return Fisher(
            placed(self.importance, model, "the Fisher information", self.made_in),
            placed(self.center, model, "the Fisher information's center", self.made_in),
            self.made_in,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        parts = zip(_PARTS, (self.importance, self.center), strict=True)
        tensors = {f"{part}.{name}": t for part, own in parts for name, t in own.items()}
        write(tensors, path, self.made_in)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fisher:
        """Read what :meth:`save` wrote, onto the CPU; the model is compared at the first use.

        Raises:
            ValueError: the file is missing, damaged, or no Fisher information.
        """
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        tensors, made_in = read(path)
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = tensor
        importance, center = (parts[part] for part in _PARTS)
        if (
            len(parts) > len(_PARTS)
            or not importance
            or importance.keys() != center.keys()
            or any(importance[name].shape != center[name].shape for name in center)
            or any(bool((tensor < 0).any()) for tensor in importance.values())
        ):
            raise ValueError(f"{path} is damaged or holds no Fisher information: estimate it again")
        return cls(importance, center, made_in)


class EWCCallback(TrainerCallback):  # type: ignore[misc, valid-type]
    """Add the gradient of ``λ/2 Σ F (θ − θ*)²`` to every optimizer step.

    It is added once a step, after accumulation and after clipping: ``max_grad_norm`` bounds the
    task's gradient alone, and the logged loss and norm are the task's.

    Args:
        fisher: of the earlier tasks.
        ewc_lambda: λ, 0 or more.

    Raises:
        ValueError: for a λ below 0 or not finite. When training begins: for another model's
            ``fisher``, or a run that cannot be served (see :mod:`secura.continual`). At a step:
            where a gradient scaler has not been undone, which clipping does in fp16, and where
            other parameters are trained than when training began.
    """

    def __init__(self, fisher: Fisher, ewc_lambda: float) -> None:
        if not (ewc_lambda >= 0 and math.isfinite(ewc_lambda)):
            raise ValueError(f"ewc_lambda={ewc_lambda} must be a finite number, 0 or more")
        self.fisher = fisher
        self.ewc_lambda = ewc_lambda
        self._unfolded: Unfolded | None = None

    def penalty(self, model: nn.Module) -> Tensor:
        """``λ/2 Σ F (θ − θ*)²`` of the model as it is, a differentiable fp32 scalar.

        Raises:
            ValueError: ``fisher`` is another model's.
        """
        fisher = self.fisher.on(model)
        terms = [
            (fisher.importance[name] * (value.float() - fisher.center[name]).square()).sum()
            for name, value in trainable(model).items()
        ]
        return self.ewc_lambda / 2 * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Check the run, and bring the Fisher information to the model's devices."""
        assert model is not None
        self._unfolded = check_run(model)
        self.fisher = self.fisher.on(model)
        for part in (self.fisher.importance, self.fisher.center):
            check_alike(part, "the Fisher information")

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Add the penalty's gradient."""
        assert model is not None
        if self._unfolded is not None:
            self._unfolded.check(model)
        if getattr(kwargs.get("optimizer"), "scaler", None) is not None and not args.max_grad_norm:
            raise ValueError(
                "fp16 scales gradients, and it is clipping that undoes it before EWC's gradient is "
                "added: set max_grad_norm above 0, or train in bf16"
            )
        trained = known(self.fisher.center, model, "the Fisher information")
        for name, value in trained.items():
            pull = value.float() - self.fisher.center[name]
            pull = (pull * self.fisher.importance[name] * self.ewc_lambda).to(value.dtype)
            value.grad = pull if value.grad is None else value.grad.add_(pull)


def _gradients(
    model: nn.Module, batch: Mapping[str, Tensor], parameters: list[nn.Parameter]
) -> list[Tensor]:
    """The loss's gradient of each parameter, zeros where it takes no part."""
    device = parameters[0].device
    with torch.enable_grad():
        loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
        if loss is None or not bool(torch.isfinite(loss)):
            raise ValueError(
                "the model's loss is "
                + ("missing: give the batches labels" if loss is None else f"{loss.item()}")
            )
        return list(
            torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        )


__all__ = ["EWCCallback", "Fisher"]
