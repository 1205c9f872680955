"""Load a saved adapter, with SECURA registered, or leave the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from secura.integrity import check_file


def from_pretrained(model: Any, folder: str | Path, **kwargs: Any) -> PeftModel:
    """Put a saved adapter on ``model``: ``PeftModel.from_pretrained``, with SECURA registered.

    Example:
        >>> model = secura.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "adapter")

    Args:
        model: the base model, changed in place; a ``PeftModel`` gets one more adapter,
            and the one that is active stays so.
        folder: the adapter's folder, or its name on the hub.
        **kwargs: as of ``PeftModel.from_pretrained``: ``adapter_name``, ``is_trainable`` (without
            it the adapter is frozen), …; and ``check_base``.

    Returns:
        The ``PeftModel``, with the adapter on it.

    Raises:
        ValueError: for a folder without an adapter's config, a file that was cut short or damaged,
            or belongs to another model, and a name that an adapter of the model has; the message
            names the file or the layer, and the model is as it was.
    """
    path = Path(folder, kwargs.get("subfolder") or "")
    check_file(path / SAFETENSORS_WEIGHTS_NAME)
    if (path / CONFIG_NAME).is_file():
        try:
            settings = PeftConfig.from_json_file(str(path / CONFIG_NAME))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{path / CONFIG_NAME} is no JSON ({error}): save it again") from error
        named = isinstance(settings, dict) and "peft_type" in settings
        if not named and kwargs.get("config") is None:
            raise ValueError(f"{path / CONFIG_NAME} names no peft_type: it is no adapter's config")
    with _as_it_was(model):
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, str(folder), **kwargs)
        name = kwargs.pop("adapter_name", "default")
        if name in model.peft_config:
            raise ValueError(
                f"the model has an adapter {name!r} already: give another adapter_name, or the "
                "base model"
            )
        model.load_adapter(str(folder), name, **kwargs)
        return model


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Take what was put into a model out of it again, where that fails."""
    names, adapters = set(vars(model)), dict(getattr(model, "peft_config", {}))
    modules = [(module, dict(module._modules), module.training) for module in model.modules()]
    trained = [(value, value.requires_grad) for value in model.parameters()]
    try:
        yield
    except BaseException:
        for module, children, training in modules:
            module._modules.clear()
            module._modules.update(children)
            module.training = training
        for value, was_trained in trained:
            value.requires_grad = was_trained
        for name in set(vars(model)) - names:
            delattr(model, name)
        if hasattr(model, "peft_config"):
            model.peft_config = adapters
        raise


__all__ = ["from_pretrained"]
