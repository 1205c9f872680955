"""The adapter's flags of `secura train`, and the `SecuraConfig` that is made of them.

They are the fields of `AdapterConfig`, with the text of its docstring, so they are written down
once; and those of `SecuraConfig` that say where the adapter goes.
"""

from __future__ import annotations

import json
import re
from dataclasses import field, fields, make_dataclass
from functools import cache
from typing import Any, get_type_hints

from secura.cli.docstrings import docstring_entries
from secura.cli.errors import UserError


def _targeting() -> list[tuple[str, Any, Any]]:
    def optional(kind: Any, text: str) -> tuple[Any, Any]:
        return kind | None, field(default=None, metadata={"help": text})

    everything = field(
        default_factory=lambda: ["all-linear"],
        metadata={
            "help": "Names of the layers to adapt, one regular expression, or all-linear. "
            "[all-linear]"
        },
    )
    return [
        ("target_modules", list[str], everything),
        ("target_parameters", *optional(list[str], "Names of experts' weights to adapt besides.")),
        ("exclude_modules", *optional(list[str], "Names of layers to leave out.")),
        (
            "layers_to_transform",
            *optional(list[int], "Decoder layers to adapt, with names in --target_modules."),
        ),
        ("layers_pattern", *optional(list[str], "Name of the list of decoder layers.")),
        ("modules_to_save", *optional(list[str], "Modules to train in full and to save.")),
        ("rank_pattern", *optional(str, 'r by layer name, in JSON: {"down_proj": 128}.')),
    ]


@cache
def adapter_arguments() -> type:
    """A dataclass of the adapter's flags. `seed` is not among them: the trainer's serves both."""
    from secura.config import AdapterConfig

    types = get_type_hints(AdapterConfig)
    texts = docstring_entries(AdapterConfig.__doc__ or "")
    own = [
        (entry.name, types[entry.name], _described(entry, texts[entry.name]))
        for entry in fields(AdapterConfig)
        if entry.name not in ("seed", "anchored")
    ]
    return make_dataclass("AdapterArguments", [*own, *_targeting()])


def _described(entry: Any, text: str) -> Any:
    """The entry's default with its help; `--rank` for `--r`, which torchrun takes for its own."""
    metadata: dict[str, Any] = {"help": text.replace("%", "%%")}
    if entry.name == "r":
        metadata["aliases"] = ["--rank"]
    return field(default=entry.default, metadata=metadata)


def to_secura_config(arguments: Any, seed: int) -> Any:
    """The `SecuraConfig` of the adapter's flags; its errors say what is allowed."""
    values = vars(arguments).copy()
    for name in ("target_modules", "exclude_modules"):
        values[name] = _module_names(values[name])
    pattern = values.pop("rank_pattern") or {}
    if isinstance(pattern, str):
        try:
            pattern = json.loads(pattern)
        except ValueError as error:
            raise UserError(f"--rank_pattern {pattern!r} is not JSON: {error}") from error
    if not isinstance(pattern, dict):
        raise UserError(f'--rank_pattern {pattern!r}: wanted r by layer, such as {{"v_proj": 8}}')
    for name in pattern:
        _check_pattern(name)
    from secura.tuner import SecuraConfig

    return SecuraConfig(**values, rank_pattern=pattern, seed=seed, task_type="CAUSAL_LM")


def _module_names(names: list[str] | str | None) -> list[str] | str | None:
    """PEFT reads a list as names and a string as `all-linear` or a regular expression."""
    if names is None:
        return None
    names = [names] if isinstance(names, str) else names
    for name in names:
        if re.fullmatch(r"[\w.]*(,\s*[\w.]*)+", name):
            several = " ".join(part.strip() for part in name.split(","))
            raise UserError(f"{name!r} is no layer's name; separate names by spaces: {several}")
    if len(names) == 1 and (names[0] == "all-linear" or re.search(r"[^\w.]", names[0])):
        _check_pattern(names[0])
        return names[0]
    return names


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"{pattern!r} is no layer's name, and as a regular expression it has an error: {error}"
        ) from error


__all__ = ["adapter_arguments", "to_secura_config"]
