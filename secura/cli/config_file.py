"""The YAML file of `secura train --config`: flags by name, in their own words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from secura._extras import require
from secura.cli.errors import UserError, one_line
from secura.wording import did_you_mean


def takes_bool(action: Any) -> bool:
    """Whether a flag of `argparse` is one of transformers' switches."""
    return getattr(action.type, "__name__", "") == "string_to_bool"


def as_written(value: Any, action: Any, hint: Any) -> Any:
    """A YAML value as the flag's own words, so that one parser judges both.

    YAML reads `no` as False: for a flag that is no switch it was a word, as in `save_strategy: no`.

    Args:
        value: the value.
        action: the flag's, of `argparse`.
        hint: the type of the field that the flag sets.

    Raises:
        TypeError: a list, a mapping, null or a date for a flag that takes none.
        ValueError: a list with an entry that the flag does not take.
    """
    options = (hint,) if get_origin(hint) is list else get_args(hint) or (hint,)
    kinds = {get_origin(kind) or kind for kind in options}
    if value is None and (type(None) in kinds or action.default is None):
        return None
    if isinstance(value, dict) and kinds & {dict, str}:
        return value if dict in kinds else json.dumps(value)
    if isinstance(value, list) and value and list in kinds:
        scalars = [as_written(entry, action, str) for entry in value]
        return [(action.type or str)(entry) for entry in scalars]
    if isinstance(value, bool):
        return str(value) if takes_bool(action) else "yes" if value else "no"
    if not isinstance(value, str | int | float):
        raise TypeError
    return str(value)


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
    """A YAML mapping of flags. Its `env`, as TRL's, is set in the environment.

    Raises:
        UserError: no such file, no YAML, no mapping.
    """
    yaml = require("yaml", "train")
    try:
        config = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {name}: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"--config {name}: wanted a mapping of flags to values")
    environment = config.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise UserError(f"--config {name}: 'env' must be a mapping of variables to values")
    os.environ.update({key: str(value) for key, value in environment.items()})
    return {str(key): value for key, value in config.items()}


def as_defaults(config: dict[str, Any], name: str, parser: Any) -> dict[str, Any]:
    """A file's values as the defaults of a parser of dataclasses.

    Args:
        config: what :func:`read_config` gave.
        name: the file's, for messages.
        parser: transformers' `HfArgumentParser`.

    Raises:
        UserError: an unknown key, or a value of another kind than the flag takes.
    """
    known = {action.dest: action for action in parser._actions}
    hints = {k: v for group in parser.dataclass_types for k, v in get_type_hints(group).items()}
    found = {}
    for key, value in config.items():
        if key not in known:
            raise UserError(f"{name}: unknown key {key!r}{did_you_mean(key, known)}")
        try:
            found[key] = as_written(value, known[key], hints[key])
        except (TypeError, ValueError) as error:
            wanted = getattr(hints[key], "__name__", hints[key])
            raise UserError(
                f"{name}: {key}: {value!r} is no {wanted}, which the flag takes"
            ) from error
    return found


__all__ = ["as_defaults", "as_written", "read_config", "take_config_flag", "takes_bool"]
