"""Settings that name nothing of a model, each of which PEFT passes over."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from secura.bases import is_conv1d
from secura.layers import layers_with
from secura.names import without_wrappers
from secura.wording import did_you_mean

from .config import SecuraConfig

_ADDED = {"classifier", "score", "qa_outputs"}  # by PEFT, whichever of them a model has


class UnmatchedWarning(UserWarning):
    """A setting names nothing of the model, so it has no effect."""


def warn_unmatched(found: list[str]) -> None:
    """Warn of what :func:`unmatched_names` or :func:`unmatched_layers` found."""
    for message in found:
        warnings.warn(message, UnmatchedWarning, stacklevel=3)


def unmatched_names(model: nn.Module, config: SecuraConfig) -> list[str]:
    """Return a message for each name of a layer or parameter in a config that the model lacks.

    Args:
        model: the model before the config's adapter is put on it.
        config: the adapter's settings.
    """
    modules = [_without_adapters(name) for name, _ in model.named_modules()]
    parameters = [_without_adapters(name) for name, _ in model.named_parameters()]
    saved = set(config.modules_to_save or ()) - _ADDED
    found: list[str] = []
    for field, names, among in (
        ("target_modules", config.target_modules, modules),
        ("target_parameters", config.target_parameters, parameters),
        ("exclude_modules", config.exclude_modules, modules),
        ("modules_to_save", saved, modules),
    ):
        if isinstance(names, str):
            found += _told_of_pattern(field, names, model, modules)
        else:
            ends = _ends(among)
            found += _told(field, [name for name in names or () if name not in ends], among)
    return found


def unmatched_layers(model: nn.Module, config: SecuraConfig, adapter: str) -> list[str]:
    """Say of each setting for one layer alone that no adapted layer is meant.

    Args:
        model: the model with the adapter on it, without PEFT's wrapper.
        config: the adapter's settings as they were given.
        adapter: its name.
    """
    layers = layers_with(model, adapter)
    named = {  # of a parameter the name it is targeted by
        name: ".".join(
            filter(None, (_without_adapters(name), getattr(one, "parameter_name", None)))
        )
        for name, one in layers.items()
    }
    adapted = list(named.values())
    chosen = config.layers_to_transform
    indices = [chosen] if isinstance(chosen, int) else chosen or ()
    numbers = {part for name in adapted for part in name.split(".")}
    unranked = [
        name
        for name in config.rank_pattern
        if not any(re.fullmatch(rf"(.*\.)?({name})", layer) for layer in adapted)
    ]
    whole = set(config.target_parameters or ())  # which leave no doubt
    parameters = [
        named[name]
        for name, one in layers.items()
        if getattr(one, "parameter_name", None) and named[name] not in whole
    ]
    return [
        *_told("layers_to_transform", [i for i in indices if str(i) not in numbers], adapted),
        *_told("rank_pattern", unranked, adapted),
        *_told_of_parameters("exclude_modules", config, parameters, layers_to_transform=None),
        *_told_of_parameters("layers_to_transform", config, parameters, exclude_modules=None),
    ]


def _told_of_parameters(
    field: str, config: SecuraConfig, names: list[str], **without: None
) -> list[str]:
    """A sentence on the first of the parameters that ``field`` leaves out in vain, if one is."""
    alone = copy.copy(config)
    for other, nothing in without.items():
        setattr(alone, other, nothing)
    for name in names:
        module = name.rpartition(".")[0]
        alone.target_modules = [module.rpartition(".")[2]]
        if not check_target_module_exists(alone, module):
            return [
                f"{field} does not reach target_parameters, so {name} is adapted: give "
                "target_parameters whole names of those to adapt"
            ]
    return []


def _without_adapters(name: str) -> str:
    """A name as it is without the adapters that are there already."""
    return without_wrappers(name).replace(".base_layer", "")


def _ends(names: list[str]) -> set[str]:
    """Every name, and what is left of it where it begins at one of its dots."""
    parts = [name.split(".") for name in names]
    return {".".join(one[start:]) for one in parts for start in range(len(one))}


def _told(field: str, unmatched: list[Any], among: list[str]) -> list[str]:
    """A sentence for each name that matches none of ``among``, with the nearest there is."""
    kind = "parameter" if field == "target_parameters" else "layer"
    known = {full.rpartition(".")[2] for full in among}
    return [
        f"{field}: {name!r} matches no {kind}; correct it or leave it out"
        f"{did_you_mean(str(name), known)}"
        for name in sorted(unmatched)
    ]


def _told_of_pattern(field: str, pattern: str, model: nn.Module, modules: list[str]) -> list[str]:
    """The same for one pattern in the place of names."""
    shorthand = pattern.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    if shorthand or any(re.fullmatch(pattern, name) for name in modules):
        return []
    linears = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    }
    return [
        f"{field}: {pattern!r} matches no layer of this model, whose linear layers are "
        f"{', '.join(sorted(linears)) or 'none'}: name those to take in {field}"
    ]


__all__ = ["UnmatchedWarning", "unmatched_layers", "unmatched_names", "warn_unmatched"]
