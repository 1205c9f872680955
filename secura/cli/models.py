"""Models and adapters by name: packaged, local, or of the hub."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from secura._extras import require
from secura.cli.errors import Parser, UserError, one_line

DTYPES = ("auto", "bfloat16", "float16", "float32")


def add_adapter_flags(parser: Parser, *, dtype: str) -> None:
    """Adds the flags of commands that make something of an adapter on its base.

    Args:
        parser: gains `--adapter_name_or_path`, `--model_name_or_path`, `--output_dir`, `--dtype`.
        dtype: help of `--dtype`.
    """
    parser.add_argument(
        "--adapter_name_or_path",
        "--adapter",
        required=True,
        metavar="DIR",
        help="the adapter's folder or hub name",
    )
    parser.add_argument(
        "--model_name_or_path",
        "--model",
        metavar="MODEL",
        help="the base; the adapter names the one it was trained on",
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--dtype", "--torch_dtype", choices=DTYPES, default="auto", help=dtype)


def add_loading_flags(parser: Parser) -> None:
    """Adds the flags that say how a base and its adapter are loaded."""
    parser.add_argument(
        "--model_revision", metavar="REVISION", help="branch, tag or commit of the base"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the base's own code")
    parser.add_argument(
        "--no_check_base",
        action="store_true",
        help="take a base that is not the one the adapter was trained on, such as the model in "
        "bfloat16 for an adapter trained on it in 4 bits",
    )


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


def load_adapter_config(adapter: str, *, check_base: bool = True) -> Any:
    """The `PeftConfig` of a local or hub adapter, with the SECURA tuner registered.

    Args:
        adapter: the adapter's folder or hub name.
        check_base: whether loading it on another base weight is to be an error.
    """
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
    config = peft.PeftConfig.from_pretrained(str(path) if path.is_dir() else adapter)
    config.check_base = check_base
    return config


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
