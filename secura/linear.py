"""``SECURALinear``: a frozen linear layer and its adapter in one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import merging, sharding
from .cabr import CABR
from .choosing import choose_loaded
from .config import AdapterConfig


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
        base: the frozen layer. The others are :class:`secura.cabr.CABR`'s: ``A``, ``B``,
            ``bias``, ``rows``, ``cols``, ``core``, ``fingerprint``.

    Raises:
        TypeError: for a base that is no linear layer, or a config of another kind.
        ValueError: for a rank that does not fit the weight, or a weight with NaN or inf.
    """

    is_secura_layer = True
    secura_merged = None  # torch's get_model_state_dict looks up every name of a state_dict

    def __init__(self, base: nn.Module, config: AdapterConfig | None = None) -> None:
        if config is not None and not isinstance(config, AdapterConfig):
            raise TypeError(
                f"config={config!r} is no AdapterConfig: give AdapterConfig(r=...), or "
                "SECURALinear.from_linear(base, r=...)"
            )
        super().__init__(config or AdapterConfig(), base)
        self.base = base.requires_grad_(False)
        self._merged: merging.MergedState | None = None
        self.register_load_state_dict_post_hook(choose_loaded)

    @classmethod
    def from_linear(cls, base: nn.Module, **settings: Any) -> SECURALinear:
        """``SECURALinear(base, AdapterConfig(**settings))``."""
        return cls(base, AdapterConfig(**settings))

    @property
    def adapted(self) -> Any:
        """What the adapter changes: the base."""
        return self.base

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the adapter."""
        return self._merged is not None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the adapted output ``[..., N]`` of ``x [..., K]``, in x's dtype or autocast's.

        Raises:
            TypeError: for integer or complex inputs, or a dtype that is not the weight's.
            ValueError: for another last dimension.
            RuntimeError: when trained while merged.
        """
        if self._merged is not None:
            merging.check_not_training(self)
            return self.base(x)
        base: Any = self._modules["base"]
        return super().forward(base, x)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.renew(destination, prefix, merging.weight_before(self._merged, self.base))
        if self.merged:
            destination[prefix + merging.MERGED] = torch.tensor(True)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        merging.refuse_merged(
            state_dict, prefix, prefix.rstrip(".") or self.name, merged=self.merged
        )
        brings_base = any(name.startswith(f"{prefix}base.") for name in state_dict)
        self.base_loaded = f"{prefix}base.weight" in state_dict
        self.check_loadable(state_dict, prefix, None if brings_base else self.base)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def acting_adapters(self) -> list[CABR]:
        """The adapters that act in this layer: itself."""
        return [self]

    def fold(self) -> None:
        """Move what was learned into ``core`` and start B at 0 again (docs/design.md, "The fold").

        Raises:
            RuntimeError: while merged, or where U_acc was cast to 16 bits.
        """
        self._check_unmerged()
        self.fold_core()

    def delta_weight(self) -> Tensor:
        """Compute ``ΔW = C (U_acc + s · A B) R  [N, K]``, fp32, before any norm.

        Raises:
            RuntimeError: while merged.
        """
        self._check_unmerged()
        return self.delta_of(self.base)

    def effective_weight(self, *, allow_inexact: bool = False) -> Tensor:
        """Compute the plain weight ``[N, K]`` of which a linear layer does the same, in W's dtype.

        Raises:
            ValueError: for ``norm="activation"`` unless ``allow_inexact``.
            RuntimeError: while merged.
        """
        self._check_unmerged()
        return self.effective_of(self.base, allow_inexact=allow_inexact)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, *, allow_inexact: bool = False) -> None:
        """Write the effective weight (and bias) into the base; :meth:`unmerge` undoes it.

        Raises:
            RuntimeError: when merged already.
            ValueError: for ``norm="activation"`` unless ``allow_inexact``, a quantised base unless
                ``merge_dequantized``, or a weight that would hold NaN or inf; the base is left as
                it was.
        """
        self._check_unmerged()
        merging.check_mergeable(self.base, [self])
        weight = self.effective_weight(allow_inexact=allow_inexact)
        bias = None if self.bias is None else sharding.gathered(self.bias).detach()
        merging.check_finite(self.base, weight, bias)
        merged = merging.MergedState(self.base, weight, bias)
        self.base, self._merged = merged.exchange(self.base), merged

    def unmerge(self) -> None:
        """Restore the base weight, bit for bit.

        Raises:
            RuntimeError: when not merged.
        """
        if self._merged is None:
            raise RuntimeError("nothing to undo: the adapter is not merged")
        self.base, self._merged = self._merged.exchange(self.base), None

    def _check_unmerged(self) -> None:
        if self.merged:
            raise RuntimeError("the adapter is merged already: unmerge() first")


__all__ = ["SECURALinear"]
