"""Folding every adapted layer of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from .layers import active_adapters, secura_layers
from .merging import check_unmerged
from .sharding import reshard, unit_by_unit


def fold(model: nn.Module) -> int:
    """Move what active adapters learned into U_acc ``[m, m]``; B, or U, starts at 0 again.

    Sharded with FSDP, every process has to call this: it gathers A and B. An optimizer that keeps
    a second copy of its parameters (schedule-free ones do) goes on from that copy, so that what was
    folded counts twice: do not fold beside one. Nor may weights be averaged (EMA, SWA) over a fold:
    A, B and U before and after it are parts of different functions.

    Args:
        model: anything that holds :class:`secura.SECURALinear` or PEFT-wrapped SECURA layers.

    Returns:
        How many layers had an active adapter to fold.

    Raises:
        RuntimeError: where an adapter is merged, or B (U) is made of other tensors; nothing is
            folded then. Where a U_acc was cast to 16 bits.
        ValueError: where the model has no SECURA layer, or a layer several active adapters of which
            one has a norm; nothing is folded then.
    """
    layers = check_foldable(model)
    check_unmerged(layers, "fold")
    active = [layer for layer in layers if layer.acting_adapters()]
    for layer in active:
        for adapter in layer.acting_adapters():
            adapter.check_written()
    reshard(model)
    for group in unit_by_unit(model, active):
        for layer in group:
            layer.fold()
    return len(active)


def check_foldable(model: nn.Module) -> list[Any]:
    """The model's SECURA layers.

    Raises:
        ValueError: there is none.
    """
    layers = list(secura_layers(model).values())
    if not layers:
        raise ValueError("the model has no SECURA layer to fold: add an adapter first")
    return layers


def check_sole_copy(optimizer: Any, what: str) -> None:
    """Raise ``ValueError`` for an optimizer that keeps a second copy of what it trains.

    Those are told by their own ``train()`` and ``eval()``, as transformers tells them.
    """
    inner = optimizer
    while hasattr(inner, "optimizer"):  # accelerate's holds it
        inner = inner.optimizer
    if callable(getattr(inner, "train", None)) and callable(getattr(inner, "eval", None)):
        raise ValueError(
            f"{what} does not reach the second copy that a {type(inner).__name__} keeps of the "
            "parameters: take another optimizer, or leave it out"
        )


def fold_periods(model: nn.Module) -> set[int]:
    """What the model's active SECURA adapters say of ``fold_every``."""
    return {adapter.config.fold_every for adapter, _ in active_adapters(model).values()}


__all__ = ["check_foldable", "check_sole_copy", "fold", "fold_periods"]
