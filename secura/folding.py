"""Folding every adapted layer of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from .sharding import reshard


def fold(model: nn.Module) -> int:
    """Move what the model's active SECURA adapters learned into their cores (B starts at 0 again).

    Sharded with FSDP2, every process has to call this: it gathers A and B.

    Args:
        model: anything that holds :class:`secura.SECURALinear` or PEFT-wrapped SECURA layers.

    Returns:
        How many layers had an active adapter to fold.

    Raises:
        RuntimeError: where an adapter is merged; nothing is folded then.
        ValueError: where the model has no SECURA layer, or a layer several active adapters of which
            one has a norm; nothing is folded then.
    """
    layers = check_foldable(model)
    if any(layer.merged for layer in layers):
        raise RuntimeError("an adapter is merged into the base weight: unmerge it to fold")
    active = [layer for layer in layers if layer.active_cabr()]
    reshard(model)
    for layer in active:
        layer.fold()
    return len(active)


def secura_layers(model: nn.Module) -> list[Any]:
    """The model's :class:`secura.SECURALinear` and PEFT-wrapped SECURA layers."""
    return [module for module in model.modules() if getattr(module, "is_secura_layer", False)]


def check_foldable(model: nn.Module) -> list[Any]:
    """The model's SECURA layers.

    Raises:
        ValueError: there is none.
    """
    layers = secura_layers(model)
    if not layers:
        raise ValueError("the model has no SECURA layer to fold: add an adapter first")
    return layers


def active_adapters(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The model's active SECURA adapters and the layers they are on, by the adapters' names."""
    names = {module: name for name, module in model.named_modules()}
    return {
        names[adapter]: (adapter, layer)
        for layer in secura_layers(model)
        for adapter in layer.active_cabr()
    }


def fold_periods(model: nn.Module) -> set[int]:
    """What the model's active SECURA adapters say of ``fold_every``."""
    return {adapter.config.fold_every for adapter, _ in active_adapters(model).values()}


__all__ = ["active_adapters", "check_foldable", "fold", "fold_periods", "secura_layers"]
