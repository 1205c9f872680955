"""Find layers of a model (adapted ones, adapters, embeddings), and put it in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn


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


def embeddings(model: Any) -> tuple[Any, Any]:
    """The layers that embed a model's tokens and that give its logits; None for one it has not.

    An embedding of image or sound patches has no row for each token, and counts as None.
    """
    found: list[Any] = [None, None]
    for place, name in enumerate(("get_input_embeddings", "get_output_embeddings")):
        with suppress(NotImplementedError, AttributeError):
            found[place] = getattr(model, name)()
    has_weight = [isinstance(getattr(one, "weight", None), Tensor) for one in found]
    first, last = (one if has else None for one, has in zip(found, has_weight, strict=True))
    return first, last


def active_adapters(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The model's active SECURA adapters and the layers they are on, by the adapters' names."""
    names = {module: name for name, module in model.named_modules()}
    return {
        names[adapter]: (adapter, layer)
        for layer in secura_layers(model).values()
        for adapter in layer.acting_adapters()
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and each back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


__all__ = ["active_adapters", "embeddings", "evaluating", "layers_with", "secura_layers"]
