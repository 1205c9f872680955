"""Loading an adapter without a thought for what PEFT has to know first."""

from __future__ import annotations

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
        model: the base model, changed in place.
        folder: the adapter's folder, or its name on the hub.
        **kwargs: as of ``PeftModel.from_pretrained`` (``adapter_name``, ``is_trainable``, …) and
            ``check_base``.

    Raises:
        ValueError: for a file that was cut short or damaged, or belongs to another model; the
            message names the file or the layer.
    """
    path = Path(folder, kwargs.get("subfolder") or "")
    check_file(path / SAFETENSORS_WEIGHTS_NAME)
    if (path / CONFIG_NAME).is_file():
        try:
            PeftConfig.from_json_file(str(path / CONFIG_NAME))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{path / CONFIG_NAME} is no JSON ({error}): save it again") from error
    return PeftModel.from_pretrained(model, str(folder), **kwargs)


__all__ = ["from_pretrained"]
