"""The YAML file of `secura train --config`: flags by name, in their own words."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from secura._extras import require
from secura.cli.errors import UserError, one_line
from secura.wording import did_you_mean

_NULL = "tag:yaml.org,2002:null"
"""The tag of `null`, `~` and nothing at all, where they are not in quotes: no value."""


def as_written(node: Any, action: Any, hint: Any) -> Any:
    """A YAML value as the flag's own words, so that one parser judges both.

    A scalar is what is written: YAML would read `007` as 7, and `off` as False. Where no value is
    written the flag has none, if it can. A mapping is for flags of JSON, and is read as YAML.

    Args:
        node: the value's, as `yaml.compose` made it.
        action: the flag's, of `argparse`.
        hint: the type of the field that the flag sets.

    Raises:
        ValueError: a list, a mapping or no value for a flag that takes none.
        yaml.YAMLError: a value in a list or a mapping that YAML cannot read.
    """
    options = (hint,) if get_origin(hint) is list else get_args(hint) or (hint,)
    kinds = {get_origin(kind) or kind for kind in options}
    if _is_word(node):
        if action.choices and node.value not in map(str, action.choices):
            raise ValueError(f"{node.value!r} is none of {', '.join(map(str, action.choices))}")
        return [node.value] if list in kinds and str not in kinds else node.value
    value = require("yaml.constructor", "train").SafeConstructor().construct_document(node)
    if value is None and (type(None) in kinds or action.default is None):
        return None
    if isinstance(value, dict) and kinds & {dict, str}:
        return value if dict in kinds else json.dumps(value)
    if value and isinstance(value, list) and list in kinds and all(map(_is_word, node.value)):
        with suppress(ValueError):
            return [(action.type or str)(entry.value) for entry in node.value]
    wanted = getattr(hint, "__name__", hint)
    raise ValueError(f"{value!r} is no {wanted}, which the flag takes")


def _is_word(node: Any) -> bool:
    """Whether a node is a scalar with a value."""
    return bool(node.id == "scalar" and node.tag != _NULL)


def take_config_flag(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments without `--config FILE` or `--config=FILE`, and the file."""
    rest, config = [], None
    words = iter(argv)
    for word in words:
        if word == "--config":
            config = next(words, None)
            if config is None:
                raise UserError("--config needs a YAML file")
        elif word.startswith("--config="):
            config = word.partition("=")[2]
        else:
            rest.append(word)
    return rest, config


def read_config(name: str) -> dict[str, Any]:
    """The nodes of a YAML mapping of flags. Its `env`, as TRL's, is set in the environment.

    Raises:
        UserError: no such file, no YAML, no mapping, a key that is there twice.
    """
    yaml = require("yaml", "train")
    try:
        root = yaml.compose(Path(name).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {name}: {one_line(error)}") from error
    config = _entries(root, name, "wanted a mapping of flags to values")
    environment = config.pop("env", None)
    if environment is not None and environment.tag != _NULL:
        wanted = "'env' must be a mapping of variables to values"
        found = _entries(environment, name, wanted)
        if not all(map(_is_word, found.values())):
            raise UserError(f"--config {name}: {wanted}")
        os.environ.update({key: node.value for key, node in found.items()})
    return config


def _entries(node: Any, name: str, wanted: str) -> dict[str, Any]:
    """The nodes of a mapping by key; ``wanted`` is what to say where it is none."""
    if getattr(node, "id", None) != "mapping" or not all(_is_word(key) for key, _ in node.value):
        raise UserError(f"--config {name}: {wanted}")
    found: dict[str, Any] = {}
    for key, value in node.value:
        if key.value in found:
            raise UserError(f"--config {name}: {key.value!r} is there twice: leave one out")
        found[key.value] = value
    return found


def as_defaults(config: dict[str, Any], name: str, parser: Any) -> dict[str, Any]:
    """A file's values as the defaults of a parser of dataclasses.

    Args:
        config: what :func:`read_config` gave.
        name: the file's, for messages.
        parser: transformers' `HfArgumentParser`.

    Raises:
        UserError: an unknown key, or a value of another kind than the flag takes.
    """
    yaml = require("yaml", "train")
    known = {action.dest: action for action in parser._actions if action.dest != "help"}
    hints = {k: v for group in parser.dataclass_types for k, v in get_type_hints(group).items()}
    found = {}
    for key, node in config.items():
        if key not in known:
            raise UserError(f"{name}: unknown key {key!r}{did_you_mean(key, known)}")
        try:
            found[key] = as_written(node, known[key], hints[key])
        except (TypeError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{name}: {key}: {one_line(error)}") from error
    return found


__all__ = ["as_defaults", "read_config", "take_config_flag"]
