"""Layers that an adapter would do nothing for: passed over in silence, never called, rescaled."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

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
    if _is_all_linear(config):
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
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "MultiheadAttention": ("out_proj",),
    "TransformerEncoderLayer": ("linear1", "linear2"),
    "LSHSelfAttention": ("query_key", "value"),
    "TDNNLayer": ("kernel",),
    "Gemma3nTextAltUp": ("correction_coefs",),
    "LongcatFlashTopkRouter": ("classifier",),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "DabDetrMHAttentionMap": ("k_linear",),
    **{f"{of}MHAttentionMap": ("k_proj",) for of in ("Detr", "ConditionalDetr", "MaskFormerDetr")},
    **dict.fromkeys(
        ("LayoutLMv2Encoder", "LayoutLMv3Encoder", "PPDocLayoutV2ReadingOrderEncoder"),
        ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    ),
}
"""By a module's class, its layers whose weight it reads without calling them, always or in its fast
path."""
_RESCALED = {"RwkvSelfAttention": "output", "RwkvFeedForward": "value"}
"""Layers whose weight ``RwkvModel`` multiplies wherever it goes from training to evaluation."""


def refuse_unheeded(parent: Any, child: str, name: str) -> None:
    """Raise ``ValueError`` where an adapter on a layer would not act, or on another weight.

    Args:
        parent: the module the layer is in.
        child: its name there.
        name: its name in the model.
    """
    out = f"exclude_modules=['{name}'] leaves it out"
    for kind in _kinds(parent):
        if child in _READ.get(kind, ()):
            raise ValueError(
                f"{kind} reads this layer's weight, always or in its fast path, and does not call "
                f"it, so an adapter would not act: {out}"
            )
        if _RESCALED.get(kind) == child and 0 < parent.config.rescale_every <= parent.layer_id:
            raise ValueError(
                f"the model rescales the weight of this layer of {kind} between training and "
                "evaluation, and C and R are of it: make the model with rescale_every=0 in its "
                f"config, or {out}"
            )


def leave_out_read(model: nn.Module, config: SecuraConfig) -> None:
    """Have ``"all-linear"`` leave out, with a warning, layers that the model reads and never calls.

    They are added to ``config.exclude_modules``, but not if that is a pattern, nor a name that is
    also the end of another layer's name.
    """
    given = config.exclude_modules or ()
    if not _is_all_linear(config) or isinstance(given, str):
        return
    head = _head(model)
    found = {
        f"{name}.{child}".lstrip(".")
        for name, parent in model.named_modules()
        for kind in _kinds(parent)
        for child in _READ.get(kind, ())
        if isinstance(layer := getattr(parent, child, None), nn.Linear) and layer is not head
    }
    found = {n for n in found if not any(f".{n}".endswith(f".{other}") for other in given)}
    names = [name for name, _ in model.named_modules()]
    found = {n for n in found if sum(f".{name}".endswith(f".{n}") for name in names) == 1}
    if found:
        left_out: Any = {*given, *found}  # PEFT's sets, as names are kept in a config
        config.exclude_modules = left_out
        warnings.warn(
            f"target_modules='all-linear' leaves out {len(found)} layer(s), such as {min(found)}, "
            "whose weight the model reads and does not call: an adapter would not act there",
            stacklevel=4,
        )


def warn_of_experts(model: nn.Module, config: SecuraConfig) -> None:
    """Warn where ``"all-linear"`` leaves out fused experts: parameters ``[E, N, K]``, no layers."""
    if not _is_all_linear(config) or config.target_parameters:
        return
    found = {
        f"{name}.{own}": value
        for name, owner in _outside_adapters(model)
        for own, value in owner._parameters.items()
        if value is not None and value.dim() == 3 and value.is_floating_point()
        if "expert" in f"{name} {type(owner).__name__}".lower()
        if _is_meant(model, config, name, owner)
    }
    if found:
        share = sum(value.numel() for value in found.values())
        total = sum(value.numel() for value in model.parameters())
        names = sorted({".".join(name.split(".")[-2:]) for name in found})
        warnings.warn(
            f"target_modules='all-linear' leaves out {len(found)} stacked weights of experts, such "
            f"as {min(found)}, {share / total:.0%} of the parameters: target_parameters={names} "
            "adapts them, modules_to_save trains such a module in full",
            stacklevel=4,
        )


def _kinds(module: nn.Module) -> list[str]:
    """Names of a module's classes that are torch's or transformers' own."""
    theirs = ("torch.", "transformers.")
    return [one.__name__ for one in type(module).__mro__ if one.__module__.startswith(theirs)]


def _is_all_linear(config: SecuraConfig) -> bool:
    targets = config.target_modules
    return isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


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
    alone = copy.copy(config)
    alone.target_modules = [name]
    return layer is not _head(model) and bool(check_target_module_exists(alone, name))


def _head(model: Any) -> nn.Module | None:
    """The layer that gives the model's logits, which ``"all-linear"`` leaves out, or None."""
    return getattr(model, "get_output_embeddings", lambda: None)()


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


__all__ = ["leave_out_read", "refuse_overlooked", "refuse_unheeded", "warn_of_experts"]
