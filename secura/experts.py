"""CABR on fused experts: one adapter for all weights ``[E, N, K]`` of a stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secura_kernels.dispatch import without_autocast
from secura_kernels.experts import expert_weights
from secura_kernels.layer import with_folded

from . import bases
from .cabr import CABR
from .config import AdapterConfig
from .core import Core
from .integrity import fingerprint, no_checksum


class Experts(Core):
    """ΔW_e = s · C_e A_e B_e R_e for every expert e of a stack, with S-MagNorm.

    Each expert has the rows, columns and start that a layer with its weight would have. Tensors are
    those of :class:`secura.cabr.CABR` with a leading E: ``A [E, m, r]``, ``B [E, r, m]``,
    ``U``, ``core [E, m, m]``. ``rows [E, m]`` and ``cols [E, m]`` count through the stack, so
    expert e's lie in ``[e N, (e + 1) N)`` and ``[e K, (e + 1) K)``.

    Args:
        config: the settings.
        base: the experts.
        r: CUR rank m; None takes the config's.
        dtype: of A and B.

    Raises:
        ValueError: for a setting that experts do not take, a rank that does not fit, or a weight
            that cannot be decomposed.
    """

    def __init__(
        self,
        config: AdapterConfig,
        base: bases.Stack,
        *,
        r: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_settings(config)
        _check_not_split(base)
        weight = bases.weight(base)
        count, n, k = weight.shape
        parts = [_one(config, number, one, r, dtype) for number, one in enumerate(weight)]
        self.config, self.scaling = config, float(config.scaling)
        self.out_features, self.in_features = count * n, count * k
        for name in ("A", "B", "U", "bias"):
            own = [getattr(part, name) for part in parts]
            made = None if own[0] is None else nn.Parameter(torch.stack([*map(_data, own)]))
            setattr(self, name, made)
        offsets = torch.arange(count, device=weight.device)[:, None]
        for name, size in (("rows", n), ("cols", k)):
            index = torch.stack([getattr(part, name) for part in parts])
            self.register_buffer(name, index + offsets * size)
        self.register_buffer("core", torch.stack([part.core for part in parts]))
        self.register_buffer("fingerprint", fingerprint(weight))
        self.register_buffer("checksum", no_checksum(weight))
        for name in (*self.ANCHOR, "columns", "gram", "base_norms", "important"):
            self.register_buffer(name, None, persistent=False)
        self.folded, self._core_version, self.assigned = False, 0, False

    def weights(self, base: Any) -> Tensor:
        """``W' [E, N, K]`` in W's dtype; gradients reach A and B, or U.

        Raises:
            ValueError: the experts' own weights are trained, which would get none.
        """
        if torch.is_grad_enabled() and base.weight.requires_grad and base.weight.is_leaf:
            raise ValueError(
                f"{self.name}: the experts' weights are trained themselves, and would get no "
                "gradient past their adapter: freeze them, or leave them out of target_parameters"
            )
        _check_not_split(base)
        return self._weights(base, self.update())

    def _weights(self, base: Any, u: Tensor) -> Tensor:
        self.refresh(base)
        u_base, config = None, self.config
        if self.folded:
            u, u_base = with_folded(u, self.core, config.norm_reference == "folded", config.norm)
        weight = bases.weight(base)
        rows, cols = _within(weight, self.rows, self.cols)
        return expert_weights(weight, rows, cols, u, self.config.norm_options, u_base=u_base)

    @torch.no_grad()
    def effective_of(self, base: Any, *, allow_inexact: bool = False) -> Tensor:
        """The weights ``[E, N, K]``, in W's dtype, that the experts multiply by."""
        return self._weights(base, self.whole_update())

    @torch.no_grad()
    def delta_of(self, base: Any) -> Tensor:
        """``ΔW_e = C_e (U_acc + s · A_e B_e) R_e  [E, N, K]``, fp32, before any norm."""
        return self._change(
            bases.weight(base), self.whole_update() + self.core, self.rows, self.cols
        )

    def _change(self, weight: Tensor, u: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        rows, cols = _within(weight, rows, cols)
        r = weight.gather(1, rows[:, :, None].expand(-1, -1, weight.shape[2])).to(u.dtype)
        c = weight.gather(2, cols[:, None, :].expand(-1, weight.shape[1], -1)).to(u.dtype)
        with without_autocast(weight.device.type):
            return c @ u @ r

    def _fingerprint_of_change(
        self, weight: Tensor, u: Tensor, rows: Tensor, cols: Tensor
    ) -> Tensor:
        return fingerprint(self._change(weight, u, rows, cols))

    def derive(self, base: Any) -> None:
        """Nothing follows from the weights that is kept."""
        self.stale = False


def _check_not_split(base: bases.Stack) -> None:
    """Raise ``ValueError`` where a plan shares the experts out over processes."""
    if bases.is_split(base):
        raise ValueError(
            "tensor parallelism shares the experts out over processes, and an adapter would act on "
            "another's: leave target_parameters out, or shard the model with FSDP2"
        )


def check_settings(config: Any) -> None:
    """Raise ``ValueError`` for what experts do not take: most needs an expert's own output."""
    for name, value in (
        ("norm='activation'", config.norm == "activation"),
        ("dropout", config.dropout),
        ("train_bias=True", config.train_bias),
        ("restrain=True", config.restrain),
    ):
        if value:
            raise ValueError(
                f"{name} acts on a layer's output, and fused experts hand out none of one expert: "
                "adapt them with norm='none', 'channel' or 'weight', without dropout, train_bias "
                "and restrain"
            )

    if config.stochastic_rounding:
        raise ValueError(
            "stochastic_rounding is not there for fused experts, whose W' is rounded to nearest: "
            "leave it out"
        )


def _one(
    config: AdapterConfig, number: int, weight: Tensor, r: int | None, dtype: torch.dtype
) -> CABR:
    """The adapter of one expert ``[N, K]`` alone."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    # not by assignment, which PEFT's low_cpu_mem_usage sends to the meta device
    linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        return CABR(config, linear, r=r, dtype=dtype)
    except ValueError as error:
        raise type(error)(f"expert {number}: {error}") from error


def _within(weight: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns within each expert of ``weight [E, N, K]``, ``[E, m]``."""
    return rows % weight.shape[1], cols % weight.shape[2]


def _data(parameter: Tensor) -> Tensor:
    return parameter.detach()


__all__ = ["Experts"]
