"""Refuse layers that an adapter would do nothing for: passed over in silence, or never called."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from secura import bases, quantised

from .config import SecuraConfig


def refuse_overlooked(model: nn.Module, config: SecuraConfig) -> None:
    """Raise where a target of ``config`` would be left without an adapter.

    ``"all-linear"`` is ``nn.Linear`` and ``Conv1D`` alone, so it leaves out quantised layers of
    other classes; a name in ``target_parameters`` is looked for among parameters, and experts that
    were quantised may have something else by that name.

    Raises:
        TypeError: for such a layer, where nothing here knows its kind.
        ValueError: for any other, or for experts.
    """
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        for name, layer in _outside_adapters(model):
            if quantised.is_packed(layer) and _is_meant(model, config, name, layer):
                _refuse_layer(name, layer)
    for name, owner in model.named_modules() if config.target_parameters else ():
        for target in config.target_parameters or ():
            _refuse_no_parameter(name.replace(".base_layer", ""), owner, target)


_MAMBA_2 = ("Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "NemotronHMamba2Mixer")
_READ: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer"), ("x_proj", "dt_proj", "out_proj")),
    **dict.fromkeys((*_MAMBA_2, "Zamba2MambaMixer", "GraniteMoeHybridMambaLayer"), ("out_proj",)),
    "JambaMambaMixer": ("dt_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MobileBertLMPredictionHead": ("dense",),
    "MultiheadAttention": ("out_proj",),
    "TransformerEncoderLayer": ("linear1", "linear2"),
}
"""Layers that torch's or transformers' module of such a class hands on as weights, always or in its
fast path."""


def refuse_read(parent: nn.Module, child: str) -> None:
    """Raise ``ValueError`` where ``parent`` reads the weight of its layer ``child``, uncalled."""
    for kind in type(parent).__mro__:
        theirs = kind.__module__.startswith(("torch.", "transformers."))
        if theirs and child in _READ.get(kind.__name__, ()):
            raise ValueError(
                f"{kind.__name__} reads this layer's weight, always or in its fast path, and does "
                f"not call it, so an adapter would not act: exclude_modules=['{child}'] leaves it "
                "out"
            )


def _outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that is neither an adapted layer nor in one."""
    within = {
        one
        for part in model.modules()
        if isinstance(part, BaseTunerLayer)
        for one in part.modules()
    }
    return ((name, part) for name, part in model.named_modules() if part not in within)


def _is_meant(model: nn.Module, config: SecuraConfig, name: str, layer: nn.Module) -> bool:
    """Whether the config would have ``layer`` adapted, were it an ``nn.Linear``."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    alone = copy.copy(config)
    alone.target_modules = [name]
    return layer is not head and bool(check_target_module_exists(alone, name))


def _refuse_layer(name: str, layer: nn.Module) -> None:
    try:
        bases.check_linear(layer)
        bases.weight(layer)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    raise ValueError(
        f"{name}: target_modules='all-linear' passes over {type(layer).__name__}, which is no "
        "torch.nn.Linear: name the layers in target_modules, or leave this one out with "
        "exclude_modules"
    )


def _refuse_no_parameter(name: str, owner: nn.Module, target: str) -> None:
    own = target.rpartition(".")[2]
    if isinstance(owner, BaseTunerLayer) or hasattr(owner, "parametrizations"):
        return
    if not f".{name}.{own}".endswith(f".{target}"):
        return
    if own in owner._parameters or getattr(owner, own, None) is None:
        return
    try:
        bases.Stack(owner, own)
    except ValueError as error:
        raise ValueError(f"{name}.{own}: {error}") from error


__all__ = ["refuse_overlooked", "refuse_read"]
