"""Exact export of an additive adapter as a LoRA, of which vLLM and others serve many at once.

Without a norm, and with ``norm="channel"`` where the base is not scaled, a layer is W + Q R: a LoRA
whose A is R = W[rows], whose B is Q, and whose scaling is 1. Folded cores are part of Q.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import bases
from ._extras import require
from .config import AdapterConfig
from .folders import complete_folder
from .layers import layers_with
from .merging import check_unmerged
from .names import PREFIX, bare, is_own, without_wrappers

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What a LoRA can be written in."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``--max-lora-rank`` can be."""


def export_lora(
    model: Any,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a SECURA adapter as a PEFT LoRA adapter that computes the same without this package.

    ``lora_A = R [m, K]`` and ``lora_B = Q [N, m]``, rank and alpha m: one rank for all layers, for
    llama.cpp, TGI and LoRAX know one. So layers with fewer rows than others are filled up with
    zeros, with a warning. Modules saved in full (``modules_to_save``), trained tokens and resized
    embeddings are carried over; vLLM takes none of them. A base quantised to few bits is
    dequantised for R, and the LoRA then belongs to that base.

    Example:
        >>> export_lora(PeftModel.from_pretrained(base, "adapter"), "lora")

    Args:
        model: a ``PeftModel`` with a SECURA adapter, which is not merged.
        folder: a new or empty folder; it is complete afterwards, or not there.
        adapter_name: which adapter.
        dtype: of lora_A and lora_B; None is fp32 (or wider, as the adapter).

    Returns:
        The folder, with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        TypeError: ``model`` is no ``PeftModel``.
        ValueError: for an adapter that is no LoRA (see :func:`check_exportable`), is not there,
            holds NaN or inf, or does not fit ``dtype``; for a ``dtype`` not in ``DTYPES``.
        RuntimeError: while an adapter is merged.
        FileExistsError: ``folder`` is no empty folder.
    """
    peft = require("peft", "train")
    if not isinstance(model, peft.PeftModel):
        raise TypeError(
            f"{type(model).__name__} is no PeftModel: load the adapter with "
            "PeftModel.from_pretrained(base, folder)"
        )
    if dtype not in (None, *DTYPES):
        raise ValueError(f"a LoRA in {dtype} is none: choose one of {DTYPES}")
    if adapter_name not in model.peft_config:
        raise ValueError(f"no adapter {adapter_name!r}: the model has {sorted(model.peft_config)}")
    config = model.peft_config[adapter_name]
    check_exportable(config)
    layers = {bare(name): layer for name, layer in layers_with(model, adapter_name).items()}
    check_unmerged(layers.values(), "export it")
    adapters: dict[str, Any] = {
        name: layer.secura_adapter[adapter_name] for name, layer in layers.items()
    }
    ranks = [adapter.rows.numel() for adapter in adapters.values()]
    rank = max(ranks)
    tensors = {}
    for name, layer in layers.items():
        a, b = _factors(name, layer.base_layer, adapters[name], dtype)
        lacking = rank - a.shape[0]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, lacking))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(b, (0, lacking))
    tensors |= _saved_in_full(model, adapter_name)
    modules = [without_wrappers(name) for name, _ in model.get_base_model().named_modules()]
    lora = _lora_config(config, rank, set(layers), modules)
    lora.fan_in_fan_out = any(bases.is_conv1d(layer.base_layer) for layer in layers.values())
    with complete_folder(Path(folder)) as made:
        save_file(tensors, made / peft.utils.SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        lora.save_pretrained(str(made))
    if config.id2label:
        warnings.warn(
            f"a LoRA has no place for the labels' names {config.id2label}: give them as id2label "
            "where its base is loaded",
            stacklevel=2,
        )
    if fewer := sum(r < rank for r in ranks):
        warnings.warn(
            f"{fewer} of {len(ranks)} layers have fewer rows than {rank}: filled up with zeros to "
            "this one rank, for llama.cpp, TGI and LoRAX know one; the LoRA computes the same",
            stacklevel=2,
        )
    return Path(folder)


def vllm_rank(r: int) -> int | None:
    """The smallest ``--max-lora-rank`` with which vLLM takes a LoRA of rank r, or None."""
    return next((known for known in VLLM_RANKS if known >= r), None)


def check_exportable(config: Any) -> None:
    """Raise ``ValueError`` unless layers with this adapter's config are a LoRA."""
    if not isinstance(config, AdapterConfig):
        raise ValueError("the adapter is none of SECURA's: only those are exported as a LoRA")
    options = config.norm_options
    reason = None
    if options.norm == "activation":
        reason = "norm='activation' is not linear in its input"
    elif options.norm == "weight":
        reason = "norm='weight' gives each weight a gain of its own, which has no low rank"
    elif options.norm == "channel" and options.combine == "averaged":
        reason = "norm_combine='averaged' scales the base weight too"
    elif config.stochastic_rounding:
        reason = "stochastic_rounding multiplies by a rounded W', whose mean alone is a LoRA"
    elif config.restrain:
        reason = "restrain scales the base weight too"
    elif getattr(config, "target_parameters", None):
        reason = "target_parameters adapts experts, for whose LoRA servers have no common layout"
    elif config.train_bias:
        reason = "train_bias=True adds a bias, for which LoRA has no place"
    if reason is not None:
        raise ValueError(
            f"{reason}, so no LoRA computes the same: export an adapter with norm='none', or "
            "norm='channel' and norm_combine='gated', without restrain and train_bias; or merge "
            "this one"
        )


@torch.no_grad()
def _factors(
    name: str, base: Any, adapter: Any, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """``(R [m, K], Q [N, m])`` of one layer in ``dtype``, contiguous, on the CPU."""
    try:
        b, _ = adapter.additive_product(base)
        a = bases.weight(base).index_select(0, adapter.rows).to(b.dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not bool(torch.isfinite(b).all()):
        raise ValueError(
            f"{name}: the adapter holds NaN or inf, so nothing was exported: training diverged, or "
            "its file is damaged"
        )
    a, b = (part.to(dtype or b.dtype).contiguous().cpu() for part in (a, b))
    if not all(bool(torch.isfinite(part).all()) for part in (a, b)):
        raise ValueError(f"{name}: it does not fit {dtype}: export it in torch.float32")
    return a, b


def _saved_in_full(model: Any, adapter_name: str) -> dict[str, Tensor]:
    """What PEFT would save beside the adapter: modules, trained tokens, resized embeddings."""
    peft = require("peft", "train")
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {
        name: tensor.detach().clone().contiguous().cpu()
        for name, tensor in state.items()
        if not is_own(name)
    }


def _lora_config(config: Any, r: int, layers: set[str], modules: list[str]) -> Any:
    """A ``LoraConfig`` of rank r for ``layers``, by full name, and no other of ``modules``."""
    namesakes = [name for name in modules if name not in layers and _ends_like(name, layers)]
    exactly = "|".join(map(re.escape, namesakes))  # a list would name layers that end alike too
    return require("peft", "train").LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted(layers),
        exclude_modules=exactly or None,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _ends_like(name: str, targets: set[str]) -> bool:
    """Whether PEFT, which matches the ends of names, would take ``name`` for one of ``targets``."""
    return any(name[dot.end() :] in targets for dot in re.finditer(r"\.", name))


__all__ = ["VLLM_RANKS", "check_exportable", "export_lora", "vllm_rank"]
