"""Models by name: local, or of the hub."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from secura._extras import require
from secura.cli.errors import UserError, one_line
from secura.cli.parser import Parser

DTYPES = ("auto", "bfloat16", "float16", "float32")


def add_adapter_flags(parser: Parser, *, dtype: str) -> None:
    """Add the flags of commands that make something of an adapter on its base.

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
    """Add the flags that say how a base and its adapter are loaded."""
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
    """What to give to `from_pretrained`: a folder's absolute path, else `name` itself.

    An adapter records it, so that it is found from any working folder and never taken for a
    repository of the hub.

    Raises:
        UserError: `name` is a path where there is no folder.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return os.path.abspath(path)
    if path.is_file() or name.startswith((".", "/", "~")):
        raise UserError(f"model {name!r}: no such folder; give a checkpoint folder or a hub name")
    return name


def refuse_adapter(name: str, revision: str | None = None) -> None:
    """Raise `UserError` where an adapter stands in a model's place.

    transformers would load its base in silence, and training would drop the adapter.
    """
    hub = require("transformers.utils", "train")
    if hub.find_adapter_config_file(resolve_model(name), revision=revision) is not None:
        raise UserError(
            f"model {name!r} is an adapter, not a model: to use it, give it as "
            "--adapter_name_or_path; to train on top of it, first merge it ('secura merge') and "
            "give the merged folder as --model_name_or_path; to go on with its training, give its "
            "run's flags and --resume_from_checkpoint"
        )


def load_tokenizer(name: str, **kwargs: Any) -> Any:
    """A model's tokenizer. `kwargs` go to `AutoTokenizer.from_pretrained`."""
    transformers = require("transformers", "train")
    try:
        return transformers.AutoTokenizer.from_pretrained(resolve_model(name), **kwargs)
    except Exception as error:  # the tokenizers library raises no narrower one
        raise UserError(f"model {name!r}: {one_line(error)}") from error


def causal_class(name: str, **kwargs: Any) -> str:
    """transformers' class of a causal language model, or of one that reads images as well.

    Args:
        name: a folder, or a model of the hub.
        kwargs: `revision` and `trust_remote_code`.

    Raises:
        UserError: there is no such model.
    """
    transformers = require("transformers", "train")
    refuse_adapter(name, kwargs.get("revision"))
    try:
        config = transformers.AutoConfig.from_pretrained(resolve_model(name), **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"model {name!r}: {one_line(error)}") from error
    plain, images = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    own_code = plain.__name__ in (getattr(config, "auto_map", None) or {})
    known = type(config) in plain._model_mapping or type(config) not in images._model_mapping
    return (plain if known or own_code else images).__name__


def load_model(
    name: str,
    kind: str = "AutoModelForCausalLM",
    brought: Iterable[str] = (),
    **kwargs: Any,
) -> Any:
    """A model, a causal language model unless `kind` names another class of transformers.

    Args:
        name: a folder, or a model of the hub.
        kind: the class.
        brought: names of tensors that come from elsewhere, such as a classifier's head; a model
            without a head (`AutoModel`) may lack its pooler.
        kwargs: given to its `from_pretrained`.

    Raises:
        UserError: there is no such model, or a weight is not in it, its output layer's say.
    """
    transformers = require("transformers", "train")
    refuse_adapter(name, kwargs.get("revision"))
    try:
        model, found = getattr(transformers, kind).from_pretrained(
            resolve_model(name), output_loading_info=True, **kwargs
        )
    except (OSError, ValueError) as error:
        said, listed, _ = one_line(error).partition(" Model type should be one of")
        advice = " Train it in Python, with PEFT and a Trainer." if listed else ""
        raise UserError(f"model {name!r}: {said}{advice}") from error
    ends = tuple(brought)
    lacking = sorted(
        key for key in found["missing_keys"] if not any(end.endswith(key) for end in ends)
    )
    if lacking and kind != "AutoModel":
        kinds = getattr(model.config, "architectures", None) or ["another model"]
        causal = kind == "AutoModelForCausalLM"
        raise UserError(
            f"model {name!r} is no {'language model' if causal else kind} ({kinds[0]}): it lacks "
            f"{lacking[0]}, which would be random; give one that was saved whole"
            + (" as a causal language model" if causal else "")
        )
    return model


__all__ = [
    "DTYPES",
    "add_adapter_flags",
    "add_loading_flags",
    "causal_class",
    "load_model",
    "load_tokenizer",
    "refuse_adapter",
    "resolve_model",
]
