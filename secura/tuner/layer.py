"""``SecuraLayer``: a linear layer with any number of named SECURA adapters, as PEFT wants it."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from secura import bases
from secura.adapter import CABR
from secura.linear import MergedState, check_finite, check_not_training
from secura_kernels import lowrank_add

from .config import SecuraConfig


class SecuraLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer and its adapters, :class:`secura.adapter.CABR` by adapter name.

    Several adapters may be active at once where the layer is additive (``norm="none"``).
    """

    base_layer: nn.Module
    active_adapters: list[str]
    merged: bool
    disable_adapters: bool
    set_adapter: Any
    get_base_layer: Any

    adapter_layer_names: tuple[str, ...] = ("secura_adapter",)
    other_param_names: tuple[str, ...] = ()
    is_secura_layer = True

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SecuraConfig,
        r: int,
        *,
        name: str = "layer",
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.secura_adapter = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self._merged: MergedState | None = None
        self.update_layer(adapter_name, config, r, name=name)
        first = self.secura_adapter[adapter_name]
        self.in_features, self.out_features = first.in_features, first.out_features

    def update_layer(
        self, adapter_name: str, config: SecuraConfig, r: int, *, name: str = "layer"
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            config: its settings.
            r: its CUR rank on this layer.
            name: the layer's, for messages.

        Raises:
            RuntimeError: while an adapter is merged.
            ValueError: for a rank that does not fit, or a weight that cannot be decomposed.
        """
        if self.merged:
            raise RuntimeError(
                "an adapter is merged into the base weight: unmerge it to add another"
            )
        base = self.get_base_layer()
        dense = bases.dense_weight(base)
        dtype = torch.float32 if dense is None else dense.dtype
        adapter = CABR(config, base, r=r, dtype=dtype)
        adapter.name = name
        self.secura_adapter[adapter_name] = adapter
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the active adapters, or of the base where they are disabled or merged.

        Raises:
            TypeError: for integer or complex inputs, or a dtype that is not the weight's.
            ValueError: for another last dimension, several active adapters with a norm, or see
                :meth:`secura.adapter.CABR.forward`.
            RuntimeError: when trained while merged.
        """
        base = self.base_layer
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return base(x, *args, **kwargs)
        if self.merged:
            check_not_training(self)
            return base(x, *args, **kwargs)
        active = self.active_cabr()
        if not active:
            return base(x, *args, **kwargs)
        if "_hf_hook" in base.__dict__:
            bases.check_at_hand(base)
        if len(active) == 1:
            return active[0](base, x)
        return self._sum(active, x)

    def active_cabr(self) -> list[CABR]:
        """The adapters that act in this layer.

        Raises:
            ValueError: for several of which one has a norm.
        """
        adapters = self._named(self.active_adapters)
        if len(adapters) > 1 and any(adapter.config.norm != "none" for adapter in adapters):
            raise ValueError(
                f"adapters {self.active_adapters} are active together, but only norm='none' adds "
                "up: activate one with set_adapter()"
            )
        return adapters

    def _named(self, names: list[str]) -> list[CABR]:
        return [
            cast(CABR, self.secura_adapter[name]) for name in names if name in self.secura_adapter
        ]

    def _sum(self, adapters: list[CABR], x: Tensor) -> Tensor:
        masks = [adapter.dropout_mask(x) for adapter in adapters]
        if any(mask is not None for mask in masks):
            shapes = [(*x.shape[:-1], adapter.rows.numel()) for adapter in adapters]
            pairs = zip(masks, shapes, strict=True)
            masks = [x.new_ones(shape) if mask is None else mask for mask, shape in pairs]
        return lowrank_add(
            self.base_layer(x),
            bases.bias(self.base_layer),
            torch.cat([adapter.rows for adapter in adapters]),
            torch.cat([adapter.product(self.base_layer)[0] for adapter in adapters], dim=1),
            delta_bias=_sum_biases(adapters),
            z_scale=None if masks[0] is None else torch.cat(cast(list[Tensor], masks), dim=-1),
        )

    def fold(self) -> None:
        """Fold the active adapters (see :func:`secura.fold`).

        Raises:
            RuntimeError: while merged.
        """
        if self.merged:
            raise RuntimeError("the adapter is merged into the base weight: unmerge it to fold")
        for adapter in self.active_cabr():
            adapter.fold_core()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``ΔW [N, K]`` of one adapter before any norm, in fp32 (``[K, N]`` for a Conv1D)."""
        delta = self._named([adapter])[0].delta_of(self.base_layer)
        return delta.t() if bases.is_conv1d(self.base_layer) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weight into the base; :meth:`unmerge` restores it bit for bit.

        Args:
            safe_merge: ignored: a merge that would write NaN or inf is always refused.
            adapter_names: default: the active ones.

        Raises:
            RuntimeError: when merged already.
            ValueError: for ``norm="activation"`` without ``allow_inexact_merge``, several adapters
                with a norm, a quantised base, or a weight that would hold NaN or inf.
        """
        del safe_merge
        weight, bias, names = self.merged_weight(adapter_names)
        if names:
            check_finite(weight)
            self._merged = MergedState(self.base_layer, weight, bias)
            self.merged_adapters = names

    def merged_weight(
        self, adapter_names: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, list[str]]:
        """What :meth:`merge` would write: weight ``[N, K]``, bias ``[N]`` or None, adapters."""
        if self.merged:
            raise RuntimeError(f"adapters {self.merged_adapters} are merged already: unmerge first")
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.secura_adapter]
        adapters = self._named(names)
        base = self.base_layer
        if bases.dense_weight(base) is None:
            raise ValueError("a quantised weight takes no merge: load the model in full precision")
        if len(adapters) == 1:
            weight = adapters[0].effective_of(base)
        else:
            if any(adapter.config.norm != "none" for adapter in adapters):
                raise ValueError(f"adapters {names} have a norm and do not add up: merge one alone")
            dense = bases.weight(base)
            deltas = (adapter.delta_of(base) for adapter in adapters)
            wide = dense.to(torch.promote_types(dense.dtype, torch.float32))
            weight = sum(deltas, start=wide).to(dense.dtype)
        bias = _sum_biases(adapters)
        return weight, None if bias is None else bias.detach(), names

    def unmerge(self) -> None:
        """Restore the base weight.

        Raises:
            RuntimeError: when not merged.
        """
        if self._merged is None:
            raise RuntimeError("nothing to undo: no adapter is merged")
        self._merged.undo(self.base_layer)
        self._merged, self.merged_adapters = None, []

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        (adapter,) = self._named([adapter_name])
        device = self.get_base_layer().weight.device if device is None else device
        if not any(parameter.is_meta for parameter in adapter.parameters()):
            adapter.to(device)

    def __repr__(self) -> str:
        return "secura." + super().__repr__()


def _sum_biases(adapters: list[CABR]) -> Tensor | None:
    biases: list[Tensor] = [adapter.bias for adapter in adapters if adapter.bias is not None]
    return torch.stack(biases).sum(0) if biases else None


__all__ = ["SecuraLayer"]
