"""Models and adapters by name: packaged, local, or of the hub."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from secura._extras import require
from secura.cli.errors import UserError, one_line

DTYPES = ("auto", "bfloat16", "float16", "float32")


def resolve_model(name: str) -> str:
    """What to give to `from_pretrained`: a packaged model's folder, else `name` itself.

    Raises:
        UserError: `name` is a path where there is no folder.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file() or name.startswith((".", "/", "~")):
        raise UserError(f"model {name!r}: no such folder; give a checkpoint folder or a hub name")
    from secura.assets import ASSETS, model_dir

    if name in ASSETS and ASSETS[name].kind == "model":
        return str(model_dir(name))
    return name


def load_tokenizer(name: str, **kwargs: Any) -> Any:
    """A model's tokenizer. `kwargs` go to `AutoTokenizer.from_pretrained`."""
    transformers = require("transformers", "train")
    try:
        return transformers.AutoTokenizer.from_pretrained(resolve_model(name), **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"model {name!r}: {one_line(error)}") from error


def load_model(name: str, **kwargs: Any) -> Any:
    """A causal language model. `kwargs` go to `AutoModelForCausalLM.from_pretrained`."""
    transformers = require("transformers", "train")
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(resolve_model(name), **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"model {name!r}: {one_line(error)}") from error


def load_adapter_config(adapter: str) -> Any:
    """The `PeftConfig` of a local or hub adapter, with the SECURA tuner registered."""
    peft = require("peft", "train")
    require("secura.tuner", "train")
    path = Path(adapter).expanduser()
    if not path.is_dir() and (path.exists() or adapter.startswith((".", "/", "~"))):
        raise UserError(f"adapter {adapter!r}: no such folder")
    if path.is_dir() and not (path / "adapter_config.json").is_file():
        raise UserError(
            f"adapter {adapter!r}: the folder has no adapter_config.json; give the --output_dir of "
            "a finished training run, or one of its checkpoint folders"
        )
    return peft.PeftConfig.from_pretrained(str(path) if path.is_dir() else adapter)


def base_of(config: Any, adapter: str, model: str | None, revision: str | None) -> tuple[str, str]:
    """The base's name and revision: the flags' where given, else those the adapter records."""
    name = model or config.base_model_name_or_path
    if not name:
        raise UserError(f"adapter {adapter!r} does not name its base; give --model_name_or_path")
    recorded = None if model else config.revision
    return name, revision or recorded or "main"


def load_adapted(adapter: str, config: Any, base: str, **kwargs: Any) -> Any:
    """A base model with an adapter on it, as a `PeftModel` in eval mode.

    Args:
        adapter: the adapter's folder or hub name.
        config: the adapter's config, from `load_adapter_config`.
        base: the base's name.
        kwargs: given to `from_pretrained` of the base.
    """
    peft = require("peft", "train")
    path = Path(adapter).expanduser()
    return peft.PeftModel.from_pretrained(
        load_model(base, **kwargs), str(path) if path.is_dir() else adapter, config=config
    ).eval()


def set_seed(seed: int) -> None:
    """Seeds Python's and torch's generators."""
    torch = require("torch", "train")
    random.seed(seed)
    torch.manual_seed(seed)
