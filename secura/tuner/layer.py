"""``SecuraLayer``: a linear layer with any number of named SECURA adapters, as PEFT wants it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from secura import bases, merging, products
from secura.cabr import CABR
from secura.choosing import choose_loaded
from secura.core import Core

from . import several
from .config import SecuraConfig


class SecuraLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer and its adapters, :class:`secura.cabr.CABR` by adapter name.

    Several adapters may be active at once where the layer is additive (``norm="none"``).
    """

    base_layer: Any
    active_adapters: list[str]
    merged: bool
    disable_adapters: bool
    set_adapter: Any
    get_base_layer: Any

    adapter_layer_names: tuple[str, ...] = ("secura_adapter",)
    other_param_names: tuple[str, ...] = ()
    is_secura_layer = True
    cast_input_dtype_enabled = True  # of peft.helpers.disable_input_dtype_casting: nothing is cast
    secura_merged = None  # torch's get_model_state_dict looks up every name of a state_dict
    adapter_class: type[Core] = CABR
    parameter_name: str | None = None
    model_dtype: torch.dtype | None = None
    """Of the plain layer that a merge puts in the place of a quantised one; None: its own."""

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
        self._merged: merging.MergedState | None = None
        self.update_layer(adapter_name, config, r, name=name)
        first = self.secura_adapter[adapter_name]
        self.in_features, self.out_features = first.in_features, first.out_features
        self.register_load_state_dict_post_hook(choose_loaded)

    @property
    def _weight_key(self) -> str:
        """The base weight's name in this layer's state."""
        return "base_layer.weight"

    @property
    def adapted(self) -> Any:
        """What the adapters change, as :mod:`secura.bases` reads and writes it."""
        return self.base_layer

    def _put_base(self, base: Any) -> None:
        self.base_layer = base

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
        merging.check_unmerged([self], "add another")
        base = self.adapted
        dense = bases.dense_weight(base)
        comes = config.checksum is not None  # from a file, whose A and B transformers would round
        dtype = torch.float32 if dense is None or comes else dense.dtype
        adapter = self.adapter_class(config, base, r=r, dtype=dtype).train(self.training)
        adapter.name = name
        if config.anchored and config.checksum is not None:  # of a file, whose tensors come next
            adapter.expect_anchor()
        if config.checksum is not None and (config.inference_mode or config.anchored):
            adapter.await_file()
        self.secura_adapter[adapter_name] = adapter
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the active adapters, or of the base where they are disabled or merged.

        ``adapter_names``, which the model's own forward takes and hands down, gives every row of
        the batch its own adapter instead.

        What else a layer is called with goes to the base, whose output the adapter then adds to.

        Raises:
            TypeError: for integer or complex inputs, a dtype that is not the weight's, or more than
                x to a layer whose adapters make the product themselves or are several.
            ValueError: for another last dimension, several active adapters with a norm, rows of
                several adapters while one is merged, or see :meth:`secura.cabr.CABR.forward`.
            RuntimeError: when trained while merged.
        """
        base = self.base_layer
        names = kwargs.pop("adapter_names", None)
        if names is not None and self.merged:
            raise ValueError(
                "an adapter is merged, and would act in every row of adapter_names: unmerge it"
            )
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return base(x, *args, **kwargs)
        if self.merged:
            merging.check_not_training(self)
            return base(x, *args, **kwargs)
        if names is None:
            active = self.acting_adapters()
        else:
            active = self.adapters_named(list(dict.fromkeys(names)))
        if not active:
            return base(x, *args, **kwargs)
        if "_hf_hook" in base.__dict__:
            bases.check_at_hand(base)
        if args or kwargs:
            if names is not None or len(active) > 1 or active[0].config.replaces_product:
                raise TypeError(
                    f"{active[0].name} is called with more than its input, which norm='weight', "
                    "stochastic_rounding and several adapters at once do not hand on to the base"
                )
            y0 = products.base_output(base, x, active[0].name, *args, **kwargs)
            return active[0].beside(base, x, y0)
        if names is not None:
            return several.by_row(self, x, names)
        if len(active) == 1:
            return active[0](base, x)
        return several.forward_sum(self.base_layer, active, x)

    def train(self, mode: bool = True) -> SecuraLayer:
        """As ``nn.Module.train``, and check what a loader assigned, where the base is here."""
        super().train(mode)
        for name in self.secura_adapter if not self.merged else ():
            adapter = cast(CABR, self.secura_adapter[name])
            waits = adapter.assigned and not adapter.awaits_file
            if waits and bases.weight_here(self.adapted) is not None:
                adapter.check_assigned(self.adapted)
        return self

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make one adapter act ``scale`` times as strongly as its config says.

        Raises:
            RuntimeError: it is merged, or holds what was folded, which stays as it is.
        """
        for one in self.adapters_named([adapter]):
            self._rescale(one, scale * float(one.config.scaling))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters (see :meth:`set_scale`)."""
        for one in self.adapters_named(self.active_adapters):
            self._rescale(one, one.scaling * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters; None takes their config's again."""
        for one in self.adapters_named(self.active_adapters):
            self._rescale(one, float(one.config.scaling) if scale is None else one.scaling / scale)

    def _rescale(self, adapter: CABR, scaling: float) -> None:
        if scaling == adapter.scaling:
            return
        if self.merged or bool(adapter.core.any()):
            raise RuntimeError(
                f"{adapter.name}: an adapter that is merged or was folded keeps its scaling: "
                "unmerge it, or set the scale before it is folded. In a loop over layers, those "
                "that came before have the new scaling: call their unscale_layer()"
            )
        adapter.scaling = scaling

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + merging.MERGED] = torch.tensor(True)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.check_loadable(state_dict, prefix)
        self.base_loaded = prefix + self._weight_key in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)

    def check_loadable(self, state_dict: Any, prefix: str, *, whole: bool = False) -> None:
        """Raise ``ValueError`` if what ``state_dict`` holds under ``prefix`` must not be loaded.

        ``whole`` says that every tensor of an adapter has to be there, if one is.
        """
        merging.refuse_merged(state_dict, prefix, prefix.rstrip("."), merged=self.merged)
        base = None if prefix + self._weight_key in state_dict else self.adapted
        for name, adapter in self.secura_adapter.items():
            own = f"{prefix}secura_adapter.{name}."
            cast(CABR, adapter).check_loadable(state_dict, own, base, whole=whole)

    def renew_saved(self, state_dict: Any, prefix: str, adapter: str) -> None:
        """Make an adapter's saved state that of one on the base weight as it is now."""
        weight = merging.weight_before(self._merged, self.adapted)
        self.adapters_named([adapter])[0].renew(state_dict, prefix, weight)

    def acting_adapters(self) -> list[CABR]:
        """The adapters that act in this layer.

        Raises:
            ValueError: for several of which one has a norm.
        """
        adapters = self.adapters_named(self.active_adapters)
        if len(adapters) > 1 and not all(map(several.is_additive, adapters)):
            raise ValueError(
                f"adapters {self.active_adapters} are active together, but only norm='none' adds "
                "up, without stochastic_rounding: activate one with set_adapter()"
            )
        return adapters

    def adapters_named(self, names: list[str]) -> list[CABR]:
        """The adapters of this layer that bear one of these names, in the order of ``names``."""
        return [
            cast(CABR, self.secura_adapter[name]) for name in names if name in self.secura_adapter
        ]

    def fold(self) -> None:
        """Fold the active adapters (see :func:`secura.fold`).

        Raises:
            RuntimeError: while merged.
        """
        merging.check_unmerged([self], "fold")
        for adapter in self.acting_adapters():
            adapter.fold_core()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``ΔW [N, K]`` of one adapter before any norm, in fp32 (``[K, N]`` for a Conv1D).

        Of experts ``[E, N, K]``, or as they are stored.

        Raises:
            ValueError: the layer has no adapter of that name.
        """
        if adapter not in self.secura_adapter:
            raise ValueError(
                f"the layer has no adapter {adapter!r}, only {', '.join(self.secura_adapter)}"
            )
        with self._before_merging():
            delta = self.adapters_named([adapter])[0].delta_of(self.adapted)
        return delta.mT if bases.is_transposed(self.adapted) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether :meth:`get_delta_weight` is all of the adapter: ``norm="none"`` without a bias.

        PEFT's ``convert_to_lora`` asks. :func:`secura.export_lora` serves ``channel`` too.
        """
        return any(
            adapter.config.norm == "none" and adapter.bias is None
            for adapter in self.adapters_named([adapter_name])
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weight into the base; :meth:`unmerge` restores it bit for bit.

        Args:
            safe_merge: ignored: a merge that would write NaN or inf is always refused.
            adapter_names: default: the active ones.

        Adapters that are merged already stay so, with a warning, as PEFT's methods do it.

        Raises:
            ValueError: for ``norm="activation"`` without ``allow_inexact_merge``, several adapters
                with a norm, a quantised base without ``merge_dequantized``, or a weight that would
                hold NaN or inf.
        """
        del safe_merge
        names = [
            n for n in check_adapters_to_merge(self, adapter_names) if n in self.secura_adapter
        ]
        if not names:
            return
        names = [*self.merged_adapters, *names]
        with self._before_merging():
            merged = merging.MergedState(self.adapted, *self._sum_weight(names))
        if self._merged is not None:
            self._put_base(self._merged.exchange(self.adapted))
        self._merged = merged
        self._put_base(self._merged.exchange(self.adapted))
        self.merged_adapters = names

    def check_merge(self, adapter_names: list[str] | None = None) -> bool:
        """Return whether :meth:`merge` has anything to write, which is formed once to see.

        Raises:
            ValueError: as :meth:`merge`.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in names if n in self.secura_adapter and n not in self.merged_adapters]
        if names:
            with self._before_merging():
                self._sum_weight([*self.merged_adapters, *names])
        return bool(names)

    @contextmanager
    def _before_merging(self) -> Iterator[None]:
        """The base for a while as it was before anything was merged into it."""
        if self._merged is None:
            yield
            return
        self._put_base(self._merged.exchange(self.adapted))
        try:
            yield
        finally:
            self._put_base(self._merged.exchange(self.adapted))

    def _sum_weight(self, names: list[str]) -> tuple[Tensor, Tensor | None]:
        """The weight ``[N, K]`` and the bias ``[N]`` or None, both finite, that a merge writes."""
        adapters, base = self.adapters_named(names), self.adapted
        merging.check_mergeable(base, adapters)
        if len(adapters) == 1:
            weight = adapters[0].effective_of(base)
        else:
            if not all(map(several.is_additive, adapters)):
                raise ValueError(
                    f"adapters {names} have a norm or stochastic_rounding and do not add up: merge "
                    "one alone"
                )
            dense = bases.weight(base)
            deltas = (adapter.delta_of(base) for adapter in adapters)
            wide = dense.to(torch.promote_types(dense.dtype, torch.float32))
            weight = sum(deltas, start=wide).to(dense.dtype)
        if bases.dense_weight(base) is None:
            weight = weight.to(self.model_dtype or weight.dtype)
        bias = several.sum_biases(adapters)
        bias = None if bias is None else bias.detach()
        merging.check_finite(base, weight, bias)
        return weight, bias

    def unmerge(self) -> None:
        """Restore the base weight; warn where nothing is merged, as PEFT's LoRA does."""
        if self._merged is None:
            warnings.warn("nothing to undo: no adapter is merged", stacklevel=2)
            return
        self._put_base(self._merged.exchange(self.adapted))
        self._merged, self.merged_adapters = None, []

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        if device is None:
            device = next(self.get_base_layer().parameters()).device
        for adapter in self.adapters_named([adapter_name]):
            if device.type != "meta" and not any(value.is_meta for value in adapter.parameters()):
                adapter.to(device)

    def __repr__(self) -> str:
        return "secura." + super().__repr__()


class SecuraLinear(SecuraLayer):
    """:class:`SecuraLayer`, by a name that PEFT's ``all-linear`` takes for a linear layer's."""


__all__ = ["SecuraLayer", "SecuraLinear"]
