"""``SECURALinear``: a frozen linear layer and its adapter in one module."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from . import bases, sharding
from .adapter import CABR, choose_loaded
from .config import AdapterConfig
from .state import MERGED, refuse_merged


class MergedState:
    """What a merge put in the place of: enough to undo it bit for bit.

    Args:
        base: the linear layer; ``weight [N, K]`` and its bias plus ``delta_bias [N]`` are put in
            it, each process its part where they are sharded.

    Raises:
        ValueError: for a base whose weight cannot be written; it is left as it was.
    """

    def __init__(self, base: Any, weight: Tensor, delta_bias: Tensor | None) -> None:
        bases.make_writable(base)
        stored = weight.t() if bases.is_conv1d(base) else weight
        dtype, bias = base.weight.dtype, bases.bias(base)
        values = {"weight": stored.to(dtype).contiguous()}
        self.added_bias: nn.Parameter | None = None
        if bias is not None and delta_bias is not None:
            values["bias"] = (bias + delta_bias).to(dtype)
        elif delta_bias is not None:
            self.added_bias = nn.Parameter(delta_bias.to(dtype), requires_grad=False)
        self.held = {n: sharding.part_of(v, getattr(base, n)) for n, v in values.items()}
        self.exchange(base)

    def exchange(self, base: Any) -> None:
        """Exchange what the base has and what is held here, in the base's present dtype."""
        bases.make_writable(base)
        for name, value in self.held.items():
            self.held[name] = sharding.exchange(getattr(base, name), value)
        if self.added_bias is not None:
            base.bias = self.added_bias if base.bias is None else None


def weight_before(merged: MergedState | None, base: nn.Module) -> Tensor | None:
    """The base weight ``[N, K]`` without what was merged into it, or None where it is not here."""
    here = bases.weight_here(base)
    if merged is None or here is None:
        return here
    before = merged.held["weight"]
    return before.t() if bases.is_conv1d(base) else before


class SECURALinear(CABR):
    """A linear layer fine-tuned with SECURA.

    Example:
        >>> layer = SECURALinear(nn.Linear(64, 32), AdapterConfig(r=8, norm="channel"))
        >>> layer(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 32])

    Args:
        base: ``nn.Linear``, transformers' ``Conv1D``, or a quantised linear layer PEFT knows; it
            is frozen (``requires_grad_(False)``) and otherwise left alone.
        config: the settings; :class:`secura.SecuraConfig` serves too.

    Attributes:
        base: the frozen layer. The others are :class:`secura.adapter.CABR`'s: ``A``, ``B``,
            ``bias``, ``rows``, ``cols``, ``core``, ``fingerprint``.

    Raises:
        TypeError: for a base that is no linear layer.
        ValueError: for a rank that does not fit the weight, or a weight with NaN or inf.
    """

    is_secura_layer = True
    secura_merged = None  # torch's get_model_state_dict looks up every name of a state_dict

    def __init__(self, base: nn.Module, config: AdapterConfig | None = None) -> None:
        super().__init__(config or AdapterConfig(), base)
        self.base = base.requires_grad_(False)
        self._merged: MergedState | None = None
        self.register_load_state_dict_post_hook(choose_loaded)

    @classmethod
    def from_linear(cls, base: nn.Module, **settings: Any) -> SECURALinear:
        """``SECURALinear(base, AdapterConfig(**settings))``."""
        return cls(base, AdapterConfig(**settings))

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the adapter."""
        return self._merged is not None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """The adapted output ``[..., N]`` for ``x [..., K]``, in the base layer's dtype.

        Raises:
            TypeError: for integer or complex inputs, or a dtype that is not the weight's.
            ValueError: for another last dimension.
            RuntimeError: when trained while merged.
        """
        if self._merged is not None:
            check_not_training(self)
            return self.base(x)
        return super().forward(cast(nn.Module, self._modules["base"]), x)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.renew(destination, prefix, weight_before(self._merged, self.base))
        if self.merged:
            destination[prefix + MERGED] = torch.tensor(True)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        refuse_merged(state_dict, prefix, prefix.rstrip(".") or self.name, merged=self.merged)
        brings_base = any(name.startswith(f"{prefix}base.") for name in state_dict)
        self.base_loaded = f"{prefix}base.weight" in state_dict
        self.check_loadable(state_dict, prefix, None if brings_base else self.base)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def active_cabr(self) -> list[CABR]:
        """The adapters that act in this layer: itself."""
        return [self]

    def fold(self) -> None:
        """Move what was learned into ``core`` and start B at 0 again (docs/design.md, "The fold").

        Raises:
            RuntimeError: while merged.
        """
        if self.merged:
            raise RuntimeError("the adapter is merged into the base weight: unmerge() it to fold")
        self.fold_core()

    def delta_weight(self) -> Tensor:
        """``ΔW = C (core + s · A B) R  [N, K]``, fp32, before any norm."""
        self._check_unmerged()
        return self.delta_of(self.base)

    def effective_weight(self, *, allow_inexact: bool = False) -> Tensor:
        """The plain weight ``[N, K]`` that computes this layer, in W's dtype.

        Raises:
            ValueError: for ``norm="activation"`` unless ``allow_inexact``.
        """
        self._check_unmerged()
        return self.effective_of(self.base, allow_inexact=allow_inexact)

    def merge(self, *, allow_inexact: bool = False) -> None:
        """Write the effective weight (and bias) into the base; :meth:`unmerge` undoes it.

        Raises:
            RuntimeError: when merged already.
            ValueError: for ``norm="activation"`` unless ``allow_inexact``, a quantised base, or a
                weight that would hold NaN or inf; the base is left as it was.
        """
        self._check_unmerged()
        bases.make_writable(self.base)
        weight = self.effective_weight(allow_inexact=allow_inexact)
        check_finite(weight)
        bias = None if self.bias is None else sharding.gathered(self.bias).detach()
        self._merged = MergedState(self.base, weight, bias)

    def unmerge(self) -> None:
        """Restore the base weight, bit for bit.

        Raises:
            RuntimeError: when not merged.
        """
        if self._merged is None:
            raise RuntimeError("nothing to undo: the adapter is not merged")
        self._merged.exchange(self.base)
        self._merged = None

    def _check_unmerged(self) -> None:
        if self.merged:
            raise RuntimeError("the adapter is merged already: unmerge() first")


def check_finite(weight: Tensor) -> None:
    """Raise ``ValueError`` for a merged weight with NaN or inf."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            "the merged weight would hold NaN or inf, so nothing was merged: training diverged, or "
            "the adapter file is damaged"
        )


def check_not_training(module: nn.Module) -> None:
    """Raise ``RuntimeError`` where a merged adapter would be trained in vain."""
    if module.training and torch.is_grad_enabled():
        raise RuntimeError(
            "the adapter is merged into the base weight, so training would not reach it: unmerge() "
            "first, or call eval()"
        )


__all__ = ["SECURALinear"]
