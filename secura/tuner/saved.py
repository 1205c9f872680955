"""Match an adapter file's tensors to a model's, and warn of what a file leaves out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from secura import bases
from secura.cabr import CABR
from secura.integrity import file_checksum, version, was_cast
from secura.layers import embeddings, layers_with, secura_layers
from secura.names import INNER, PREFIX, bare, is_own, without_wrappers
from secura.sharding import is_dtensor

from .layer import SecuraLayer


def named_labels(model: Any) -> dict[int, str] | None:
    """What a classifier calls its labels, or None where they have transformers' numbers alone."""
    found = getattr(getattr(model, "config", None), "id2label", None) or {}
    plain = all(name == f"LABEL_{label}" for label, name in found.items())
    return None if plain else dict(found)


def gaining_bias(model: nn.Module) -> list[str]:
    """Names of the adapted layers whose adapter trains a bias where the base has none."""
    return [
        name
        for name, layer in secura_layers(model).items()
        if bases.bias(layer.adapted) is None
        and any(adapter.bias is not None for adapter in layer.secura_adapter.values())
    ]


def warn_of_added_biases(model: nn.Module, names: list[str]) -> None:
    """Warn where a merge gave layers a bias, of those of ``names``, that a file would lose."""
    added = [name for name in names if bases.bias(model.get_submodule(name)) is not None]
    if added:
        warnings.warn(
            f"{len(added)} merged layers, such as {added[0]}, have a trained bias where the base "
            "has none: the model computes with it, but transformers leaves it out when it loads "
            "what save_pretrained writes. Save the adapter instead, or train with "
            "train_bias=False",
            stacklevel=4,
        )


def warn_of_unsaved(
    model: Any,
    config: Any,
    adapter: str,
    layers: Mapping[str, SecuraLayer],
    state_dict: Mapping[str, Tensor],
) -> None:
    """Warn of what an adapter does, or was to do, that is not in its file.

    Args:
        model: what is saved.
        config: the adapter's.
        adapter: its name.
        layers: those it is on.
        state_dict: what is saved; the model's own parameters may be sharded, and this process alone
            in looking.
    """
    adapters = [cast(CABR, layer.secura_adapter[adapter]) for layer in layers.values()]
    scales, written = {one.scaling for one in adapters}, float(config.scaling)
    if scales - {written}:
        scaling = min(scales - {written})
        again = f"{scaling / written!r}" if len(scales) == 1 and written else "the scale of each"
        warnings.warn(
            f"adapter {adapter!r} acts with scaling={scaling:g} here, and its config, which is "
            f"saved, says {written:g}, with which it acts once it is loaded again: call "
            f"set_scale({adapter!r}, {again}) on its layers then, or where something was folded, "
            "secura.fold(model) before saving, which leaves nothing to scale",
            stacklevel=4,
        )
    trained_here = any(
        one.trained.requires_grad and version(one.trained) != one.loaded_version for one in adapters
    )
    waits = config.fold_every and trained_here and not any(one.folds for one in adapters)
    acts = {
        bare(name).rpartition(INNER)[0]: bool(tensor.any())
        or bool(state_dict.get(f"{name[:-1]}core", tensor).any())
        for name, tensor in state_dict.items()
        if name.endswith((".B", ".U")) and is_own(name) and not is_dtensor(tensor)
    }
    still = [name for name, moved in acts.items() if not moved]
    if 0 < len(still) < len(acts):
        warnings.warn(
            f"{len(still)} of {len(acts)} layers of adapter {adapter!r}, {still[0]} first, were "
            "never trained: no token reached them, they are frozen, or their module reads their "
            "weight instead of calling them; exclude_modules leaves them out",
            stacklevel=4,
        )
    trained = (tensor for name, tensor in state_dict.items() if name.endswith((".B", ".U")))
    if waits and any(bool(tensor.any()) for tensor in trained):
        warnings.warn(
            f"adapter {adapter!r} was trained with fold_every={config.fold_every} and not folded "
            "since it was made or loaded here: folding takes secura.FoldCallback() among the "
            "trainer's callbacks",
            stacklevel=4,
        )
    if beside := _trained_beside(model):
        warnings.warn(
            f"{len(beside)} parameter(s) beside the adapter are trained here, {beside[0]} first, "
            "and are not in its file, where PEFT puts resized embeddings alone: name their "
            "modules in modules_to_save, or save the model's own state_dict() too",
            stacklevel=4,
        )


def for_loading(
    model: Any,
    config: Any,
    adapter: str,
    state_dict: Mapping[str, Tensor],
    remap: Callable[..., dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The tensors of an adapter file by the names they have in ``model``.

    Args:
        model: the model, with the adapter in place.
        config: the adapter's; the checksum it was read with is compared, once.
        adapter: its name.
        state_dict: the file's tensors.
        remap: PEFT's own way from the file's names to the model's.

    Raises:
        ValueError: for tensors that are damaged, too many or too few, or of another model, before
            any is loaded.
    """
    state_dict = {without_wrappers(name): tensor for name, tensor in state_dict.items()}
    found = {name: tensor for name, tensor in state_dict.items() if is_own(name)}
    if not state_dict:
        raise ValueError(
            f"no tensors were given for adapter {adapter!r}: its file is empty, or accelerate, "
            "before 1.15, gave them to the first process of an FSDP2 run alone: update it"
        )
    if not found:
        raise ValueError(
            f"the file of adapter {adapter!r} holds no tensor of SECURA's: it was damaged "
            "or emptied; save or download it again"
        )
    mapped = remap(model=model, config=config, adapter_name=adapter, state_dict=state_dict)
    layers: dict[str, SecuraLayer] = layers_with(model, adapter)
    by_name = {bare(name): name for name in layers}
    mapped = {_full_name(name, by_name, adapter): tensor for name, tensor in mapped.items()}
    _check_names(model, config, adapter, mapped, layers)
    for name, layer in layers.items():
        layer.check_loadable(mapped, f"{name}.", whole=True)
    _check_file_checksum(config, state_dict, found)
    return mapped


def _full_name(name: str, layers: dict[str, str], adapter: str) -> str:
    """Return a tensor's name in the model.

    Of an anchor's tensors too, which the model has only once they are loaded, and of a checksum
    where the model's tensors are elsewhere: PEFT finds no name for those.
    """
    layer, _, tensor = name.removeprefix(PREFIX).rpartition(INNER)
    if layer not in layers or tensor not in ("checksum", *CABR.ANCHOR):
        return name
    return f"{layers[layer]}{INNER}{adapter}.{tensor}"


def _check_names(
    model: Any,
    config: Any,
    adapter: str,
    mapped: Mapping[str, Tensor],
    layers: dict[str, SecuraLayer],
) -> None:
    owners = {name: f"{name}{INNER}{adapter}." for name in layers}
    taken = {own + tensor for own in owners.values() for tensor in CABR.STATE}
    filled = {name.rpartition(".")[0] + "." for name in mapped if name in taken}
    others = saved_in_full(model, adapter) | set(config.base_tensors or ())
    if not config.checksum:  # then the config does not say what PEFT saved beside the adapter
        own_rows = _embeddings(model, adapter)
        resized = own_rows.keys() <= {bare(name) for name in mapped}
        others |= {name for name, own in own_rows.items() if resized or _equal(mapped, name, own)}
    left = [n for n in mapped if n not in taken and bare(n) not in others]
    homeless = [name for name in left if is_own(name)]
    if homeless:
        where = sorted({name.partition(INNER)[0] for name in homeless})
        here = bare(next(iter(layers), "none"))
        raise ValueError(
            f"the file of adapter {adapter!r} holds {len(where)} layer(s) that the model or its "
            f"adapter_config.json has not, such as {where[0].removeprefix(PREFIX)} (adapted here: "
            f"{here}{', …' if len(layers) > 1 else ''}): load it on the model it was trained "
            "on, with the adapter_config.json it was saved with"
        )
    if left:
        raise ValueError(
            f"the file of adapter {adapter!r} holds {len(left)} tensor(s) that are no adapter's, "
            f"such as {left[0].removeprefix(PREFIX)}, and would overwrite the model's: take them "
            "out, or name their modules in modules_to_save of adapter_config.json"
        )
    lacking = [name for name, own in owners.items() if own not in filled]
    if lacking:
        raise ValueError(
            f"{without_wrappers(lacking[0])}: the file has nothing for this layer ({len(lacking)} "
            f"such in all) of adapter {adapter!r}: it was damaged, or its adapter_config.json is "
            "another's"
        )


def saved_in_full(model: Any, adapter: str) -> set[str]:
    """Names of the tensors of ``modules_to_save`` and the like, without PEFT's prefix.

    With those of trained tokens in a tied head, which PEFT writes beside resized embeddings.
    """
    tied = ("trainable_tokens_delta", f"trainable_tokens_delta.{adapter}")
    return {
        bare(f"{name}.{key}")
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in (
            *module.adapter_state_dict_load_map(adapter).values(),
            *(f"token_adapter.{part}" for part in tied if _is_tied(module)),
        )
    }


def _is_tied(module: Any) -> bool:
    """Whether a wrapper's trained tokens are those of another embedding."""
    return getattr(getattr(module, "token_adapter", None), "tied_adapter", None) is not None


def _trained_beside(model: Any) -> list[str]:
    """Names of parameters that are trained and are neither an adapter's nor saved in full."""
    wrappers = (m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper))
    known = {id(value) for wrapper in wrappers for value in wrapper.parameters()}
    return [
        bare(name)
        for name, value in model.named_parameters()
        if value.requires_grad and id(value) not in known and not is_own(name)
        if not name.endswith("_flat_param")  # FSDP1's, of all
    ]


def _embeddings(model: Any, adapter: str) -> dict[str, Tensor]:
    """The input's and output's embeddings, which PEFT saves, both, where they were resized."""
    ends = {id(part) for part in embeddings(model) if part is not None}
    return {
        bare(f"{name}.{key}".replace(f".modules_to_save.{adapter}.", ".modules_to_save.")): tensor
        for name, module in model.named_modules()
        if id(module) in ends
        for key, tensor in module.named_parameters()
        if not is_own(key)
    }


def _equal(mapped: Mapping[str, Tensor], name: str, own: Tensor) -> bool:
    """Whether the file's tensor of that name is the model's already."""
    found = next((mapped[full] for full in (name, PREFIX + name) if full in mapped), None)
    return found is not None and found.shape == own.shape and bool((found.to(own) == own).all())


def _check_file_checksum(config: Any, state_dict: Mapping[str, Tensor], found: Any) -> None:
    expected, config.checksum = config.checksum, None
    if not expected or was_cast(found):
        return
    if file_checksum(state_dict.values()) != expected:
        raise ValueError(
            "the adapter's tensors do not match the checksum in its adapter_config.json: one of "
            "the two was damaged or changed after it was saved; save or download it again"
        )


__all__ = [
    "for_loading",
    "gaining_bias",
    "named_labels",
    "saved_in_full",
    "warn_of_added_biases",
    "warn_of_unsaved",
]
