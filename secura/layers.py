"""Find the adapted layers of a model, and the adapters that act in them."""

from __future__ import annotations

from typing import Any

from torch import nn


def secura_layers(model: nn.Module) -> dict[str, Any]:
    """The model's :class:`secura.SECURALinear` and PEFT-wrapped SECURA layers, by their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "is_secura_layer", False)
    }


def layers_with(model: nn.Module, adapter: str) -> dict[str, Any]:
    """The PEFT-wrapped layers with an adapter, by the names that a ``state_dict`` gives them."""
    return {
        name.replace("_fsdp_wrapped_module.", ""): layer
        for name, layer in secura_layers(model).items()
        if adapter in getattr(layer, "secura_adapter", ())
    }


def active_adapters(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The model's active SECURA adapters and the layers they are on, by the adapters' names."""
    names = {module: name for name, module in model.named_modules()}
    return {
        names[adapter]: (adapter, layer)
        for layer in secura_layers(model).values()
        for adapter in layer.acting_adapters()
    }


__all__ = ["active_adapters", "layers_with", "secura_layers"]
