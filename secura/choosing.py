"""When an adapter's rows, columns and start are chosen: once its base weight is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secura_kernels import init_a, select

from . import bases, tensor_parallel
from .integrity import fingerprint, no_checksum, version
from .sharding import from_rank_0, is_fsdp_managed, on_rank_0_alone, put

if TYPE_CHECKING:
    from .core import Core


def choose(adapter: Core, base: nn.Module) -> None:
    """Choose rows and columns and start A, B or U, now that the weight of ``base`` is there.

    Every process has to call this where the weight is sharded, or on the first process alone.

    Raises:
        ValueError: for a weight that cannot be decomposed.
    """
    own = {name: value for name, value in adapter.state_tensors().items() if name in adapter.CHOSEN}
    within = any(value.is_inference() for value in own.values())
    with torch.inference_mode(within and torch.is_inference_mode_enabled()), torch.no_grad():
        for name, value in from_rank_0(lambda: _chosen(adapter, base), own).items():
            put(adapter, name, value)
    adapter.waits, adapter.stale = False, True
    adapter.note_core()
    if bases.is_split(base):
        tensor_parallel.share_start(adapter, base)
    if not on_rank_0_alone():
        adapter.derive(base)


def choose_late(adapter: Core, base: nn.Module) -> None:
    """Choose at the first use, where no ``load_state_dict`` did.

    Raises:
        ValueError: under FSDP2, where what is written in a forward is lost.
    """
    if bases.comes_later(base) or adapter.awaits_file:
        return
    if is_fsdp_managed(adapter):
        raise ValueError(
            f"{adapter.name}: the rows and columns were not chosen yet, and what a forward writes "
            "under FSDP2 is lost: load the weights with load_state_dict() (or torch's "
            "set_model_state_dict) after the adapter was put on the model"
        )
    if _were_written(adapter):
        adapter.waits, adapter.assigned = False, True  # to be checked as a file's are
        return
    choose(adapter, base)


def _were_written(adapter: Core) -> bool:
    """Whether all tensors were copied in place, as torch.distributed.checkpoint loads them."""
    if adapter.rows.is_meta or not all(map(version, adapter.state_tensors().values())):
        return False
    return all(
        0 <= int(index.min()) <= int(index.max()) < limit and _distinct(index)
        for index, limit in (
            (adapter.rows, adapter.out_features),
            (adapter.cols, adapter.in_features),
        )
    )


def _distinct(index: Tensor) -> bool:
    return index.unique().numel() == index.numel()


def choose_loaded(layer: Any, incompatible: Any) -> None:
    """Choose what waits in an adapted layer whose base weight ``load_state_dict`` has just brought.

    A hook of such layers, after their parts have been loaded.
    """
    del incompatible
    base = layer.adapted
    for adapter in [layer, *getattr(layer, "secura_adapter", {}).values()]:
        if layer.base_loaded and getattr(adapter, "waits", False) and not bases.comes_later(base):
            choose(adapter, base)


@torch.no_grad()
def _chosen(adapter: Core, base: nn.Module) -> dict[str, Tensor]:
    """The first value of every tensor of ``Core.CHOSEN`` that the adapter has."""
    config, weight, m = adapter.config, bases.weight(base), adapter.rows.numel()
    generator = torch.Generator().manual_seed(config.seed)
    rows, cols = select(weight, m, config.selection, generator)
    values = {"rows": rows, "cols": cols, "fingerprint": fingerprint(weight)}
    if adapter.A is not None:
        values["A"] = init_a(weight, m, adapter.A.shape[1], config.init, generator)
    start = torch.zeros if config.init_weights else torch.randn
    name, inner = ("U", m) if adapter.B is None else ("B", adapter.B.shape[0])
    drawn = start(inner, m, dtype=torch.float32, device="cpu")
    values[name] = (drawn / inner**0.5).to(weight.device)
    here: Any = {"dtype": torch.float32, "device": weight.device}
    values["core"] = torch.zeros(m, m, **here)
    values["checksum"] = no_checksum(weight)
    if adapter.damping is not None:
        values["damping"] = torch.zeros((), **here)
    if adapter.bias is not None:
        values["bias"] = torch.zeros(adapter.out_features, **here)
    return values


__all__ = ["choose", "choose_late", "choose_loaded"]
