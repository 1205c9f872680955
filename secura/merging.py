"""What a merge into a base layer writes, how it is undone, and where it is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import bases, products, sharding

if TYPE_CHECKING:
    from .cabr import CABR

MERGED = "secura_merged"
"""Name of the mark in a ``state_dict`` that was taken while an adapter was merged."""


class MergedState:
    """The numbers that a merge swaps with the base's; swapped again, those are back bit for bit.

    Args:
        base: the linear layer, or experts.
        weight: ``[N, K]``, to be put in the base, each process its part where it is sharded; in the
            place of a quantised base comes a plain layer.
        delta_bias: ``[N]``, to be added to the bias, or None.

    Attributes:
        other: of a quantised and a plain layer the one that is not in use; None for a dense base.
        held: the numbers that a dense base does not have now, by name.
    """

    def __init__(self, base: Any, weight: Tensor, delta_bias: Tensor | None) -> None:
        self.other: nn.Module | None = None
        self.held: dict[str, Tensor] = {}
        self.added_bias: nn.Parameter | None = None
        if bases.dense_weight(base) is None:
            self.other = bases.plain_linear(base, weight, delta_bias)
            return
        stored = weight.mT if bases.is_transposed(base) else weight
        dtype, bias = base.weight.dtype, bases.bias(base)
        values = {"weight": stored.to(dtype).reshape(base.weight.shape).contiguous()}
        if bias is not None and delta_bias is not None:
            values["bias"] = (bias + delta_bias).to(dtype)
        elif delta_bias is not None:
            self.added_bias = nn.Parameter(delta_bias.to(dtype), requires_grad=False)
        self.held = {n: sharding.part_of(v, getattr(base, n)) for n, v in values.items()}

    def exchange(self, base: Any) -> Any:
        """Exchange what the base has and what is held here; returns the layer to use from now on.

        Numbers come back in the base's present dtype and device.

        Raises:
            ValueError: for a base whose weight cannot be written; it is left as it was.
        """
        if self.other is not None:
            put, self.other = self.other.to(base.weight.device).train(base.training), base
            return put
        bases.make_writable(base)
        for name, value in self.held.items():
            self.held[name] = sharding.exchange(getattr(base, name), value)
        if self.added_bias is not None:
            base.bias = self.added_bias if base.bias is None else None
        return base


def weight_before(merged: MergedState | None, base: Any) -> Tensor | None:
    """The base weight ``[N, K]`` without what was merged into it, or None where it is not here."""
    if merged is not None and merged.other is not None:
        return bases.weight_here(merged.other)
    here = bases.weight_here(base)
    return here if merged is None or here is None else bases.oriented(base, merged.held["weight"])


def check_mergeable(base: Any, adapters: list[CABR]) -> None:
    """Raise ``ValueError`` where a merge would be lost, inexact, or may not dequantise ``base``."""
    if bases.dense_weight(base) is not None:
        allowed = all(adapter.config.allow_inexact_merge for adapter in adapters)
        if isinstance(base, nn.Module) and not allowed and products.is_another_function(base):
            raise ValueError(
                f"{type(base).__name__} computes something else than x Wᵀ + b, and the adapter is "
                "added to its output: merged into the weight it would go through that too, unless "
                "allow_inexact_merge=True in the config"
            )
        bases.make_writable(base)
        stored = getattr(base, "_parameters", {})
        if isinstance(base, nn.Module) and ("weight" not in stored or "bias" not in stored):
            raise ValueError(
                "the base's weight or bias is computed anew in each forward (pruned, normed or "
                "parametrised), so a merge into it would be lost: make it plain first "
                "(torch.nn.utils.prune.remove, parametrize.remove_parametrizations)"
            )
        return
    if not all(adapter.config.merge_dequantized for adapter in adapters):
        raise ValueError(
            "a quantised weight takes no merge: load the model in full precision, or set "
            "merge_dequantized=True in the config, which puts a plain layer in its place"
        )


def check_finite(base: Any, weight: Tensor, delta_bias: Tensor | None) -> None:
    """Raise ``ValueError`` where a merge into ``base`` would write NaN or inf.

    ``weight [N, K]`` and ``delta_bias [N]`` are those of :class:`MergedState`.
    """
    finite = torch.isfinite(weight).all()
    if delta_bias is not None:
        own = bases.bias(base)
        bias = delta_bias if own is None else own + delta_bias
        finite &= torch.isfinite(bias.to(weight.dtype)).all()
    if not bool(finite):
        raise ValueError(
            "the merged weight or bias would hold NaN or inf, so nothing was merged: training "
            "diverged, or the adapter file is damaged"
        )


def check_not_training(module: nn.Module) -> None:
    """Raise ``RuntimeError`` where a merged adapter would be trained in vain."""
    if module.training and torch.is_grad_enabled():
        raise RuntimeError(
            "the adapter is merged into the base weight, so training would not reach it: unmerge() "
            "first, or call eval()"
        )


def check_unmerged(layers: Iterable[Any], purpose: str) -> None:
    """Raise ``RuntimeError`` where one of the layers is merged: "unmerge it to ``purpose``"."""
    if any(layer.merged for layer in layers):
        raise RuntimeError(f"an adapter is merged into the base weight: unmerge it to {purpose}")


def refuse_merged(state_dict: Any, prefix: str, layer: str, *, merged: bool) -> None:
    """Raise ``ValueError`` where a merged layer's state is loaded, or one into a merged layer."""
    if prefix + MERGED in state_dict:
        raise ValueError(
            f"{layer}: this state was taken while the adapter was merged into the base weight, "
            "and would act twice: unmerge before state_dict()"
        )
    if merged and any(name.startswith(prefix) for name in state_dict):
        raise ValueError(
            f"{layer}: the adapter is merged into the base weight, so what is loaded would not "
            "act: unmerge it to load"
        )


__all__ = [
    "MERGED",
    "MergedState",
    "check_finite",
    "check_mergeable",
    "check_not_training",
    "check_unmerged",
    "refuse_merged",
    "weight_before",
]
