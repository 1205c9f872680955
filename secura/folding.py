"""Folding every adapted layer of a model."""

from __future__ import annotations

from typing import Any

from torch import nn


def fold(model: nn.Module) -> int:
    """Move what the model's active SECURA adapters learned into their cores (B starts at 0 again).

    Args:
        model: anything that holds :class:`secura.SECURALinear` or PEFT-wrapped SECURA layers.

    Returns:
        How many layers were folded.

    Raises:
        RuntimeError: where an adapter is merged.
        ValueError: where the model has no SECURA layer.
    """
    layers: list[Any] = [
        module for module in model.modules() if getattr(module, "is_secura_layer", False)
    ]
    if not layers:
        raise ValueError("the model has no SECURA layer to fold: add an adapter first")
    for layer in layers:
        layer.fold()
    return len(layers)


__all__ = ["fold"]
