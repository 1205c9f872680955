"""S-MagNorm's gain: how far an entry may move, from how far it wants to move.

    ρ = |Δ| / (|base| + ε)                  "divide loss"
    M = w − (w − 1) σ(slope · ρ + offset)   in [1, 2], a constant in the backward pass
    averaged:  out = (2 base + Δ) / M       (SECURA, as released)
    gated:     out = base + Δ / M           (the default: it leaves the base alone)

Averaged, `paper` has M = 2 − σ(−k/2) = 1.953 where ρ ≪ ρmax: any change at all, however small,
multiplies every such entry of the base by 2/M = 1.0243 (k = 6), and `released` by 1.333.

One formula serves the three forms, because 2 − tanh(kρ/2) = 3 − 2σ(kρ):

| form         | w | slope    | offset | M where nothing moves at all |
|--------------|---|----------|--------|------------------------------|
| `paper`      | 2 | k / ρmax | −k/2   | 2 (slope 0, offset −inf)     |
| `released`   | 2 | k        | 0      | 2 (slope 0, offset −inf)     |
| `calibrated` | 3 | k        | 0      | 2                            |

ε is added to |base| and not to base, so that ρ stays finite whatever the sign of base; with the
released ε = 1e-10 the two differ only where |base| is itself about 1e-10.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

NORMS = ("none", "weight", "activation", "channel")
FORMS = ("paper", "released", "calibrated")
COMBINES = ("averaged", "gated")
REFERENCES = ("folded", "pretrained")

_SMALLEST_PEAK = 1e-30


class NormOptions(NamedTuple):
    """How S-MagNorm is computed.

    Attributes:
        norm: the space, one of ``NORMS``.
        form: one of ``FORMS``, or None for the space's default.
        combine: one of ``COMBINES``, or None for the space's default.
        scale: k.
        eps: ε.
        eps_relative: whether ε is a multiple of the root mean square of the base.
    """

    norm: str = "none"
    form: str | None = None
    combine: str | None = None
    scale: float = 6.0
    eps: float = 1e-10
    eps_relative: bool = False


class Restrain(NamedTuple):
    """The released code's suppression of the most important output channels.

    Attributes:
        important: ``[N]`` bool, the channels to multiply by ``decay``.
        percent: share of entries with a small gain above which it acts.
        edge: what counts as a small gain.
        decay: the factor.
    """

    important: Tensor
    percent: float = 0.9
    edge: float = 1.2
    decay: float = 0.99


def resolve_norm(norm: str, form: str | None = None, combine: str | None = None) -> tuple[str, str]:
    """Fill in a norm space's default form, and the default combination.

    Returns:
        ``(form, combine)``; where not given ``"paper"`` for ``weight`` and ``"calibrated"`` for the
        others, and ``"gated"``.

    Raises:
        ValueError: for an unknown space, form or combination.
    """
    for name, value, known in (("norm", norm, NORMS), ("norm_form", form, (None, *FORMS)),
                               ("norm_combine", combine, (None, *COMBINES))):  # fmt: skip
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose one of {known}")
    return form or ("paper" if norm == "weight" else "calibrated"), combine or "gated"


def needs_peak(form: str) -> bool:
    """Whether a form depends on the largest ρ of the whole tensor (a pass of its own)."""
    return form != "calibrated"


def known_scalars(options: NormOptions) -> tuple[float, float, float] | None:
    """``(ε, slope, offset)`` where the options alone decide them; None where the tensors do."""
    if needs_peak(options.form or "") or options.eps_relative:
        return None
    return options.eps, options.scale, 0.0


def effective_eps(base: Tensor, eps: float, relative: bool) -> Tensor:
    """ε as a 0-dim tensor: ``eps``, or ``eps`` times the root mean square of ``base``."""
    dtype = torch.promote_types(base.dtype, torch.float32)
    if not relative or base.numel() == 0:
        return torch.full((), eps, dtype=dtype, device=base.device)
    norm = torch.linalg.vector_norm(base, dtype=dtype)
    return eps * norm / math.sqrt(base.numel())


def relative_change(base: Tensor, delta: Tensor, eps: Tensor | float) -> Tensor:
    """ρ = |Δ| / (|base| + ε), elementwise, in the inputs' dtype."""
    return delta.abs() / (base.abs() + eps)


def largest(rho: Tensor) -> Tensor:
    """The largest ρ, 0-dim; 0 where there is none."""
    return rho.amax() if rho.numel() else rho.new_zeros(())


def coefficients(
    form: str, scale: float, peak: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """``(slope, offset)`` of the gain's sigmoid, 0-dim, fp32 or wider, decided on the device.

    Args:
        form: one of ``FORMS``.
        scale: k, 6 as released.
        peak: the largest ρ, 0-dim; needed by every form but ``calibrated``.
        like: gives the device and the dtype.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    slope = torch.full((), scale, dtype=dtype, device=like.device)
    offset = torch.zeros_like(slope)
    if form == "calibrated":
        return slope, offset
    assert peak is not None
    if form == "paper":
        slope = slope / peak.to(dtype).clamp(min=_SMALLEST_PEAK)
        offset = offset - scale / 2
    still = peak == 0
    return slope.masked_fill(still, 0.0), offset.masked_fill(still, -math.inf)


def sigmoid_weight(form: str) -> float:
    """w of ``M = w − (w − 1) σ``: 3 for ``calibrated``, 2 for the sigmoid forms."""
    return 3.0 if form == "calibrated" else 2.0


def gain(rho: Tensor, slope: Tensor | float, offset: Tensor | float, form: str) -> Tensor:
    """M from ρ, elementwise, in ρ's dtype."""
    w = sigmoid_weight(form)
    return w - (w - 1) * torch.sigmoid(slope * rho + offset)


def base_share(gain: Tensor, combine: str) -> Tensor | None:
    """∂out/∂base: ``2/M`` when averaged, ``None`` (it is 1) when gated."""
    return 2 / gain if combine == "averaged" else None


def restrain_rows(gains: Iterable[Tensor], numel: int, restrain: Restrain | None) -> Tensor | None:
    """``[N]`` fp32 factors of the output channels, or None where the restraint is off.

    Args:
        gains: M, in parts of any shape.
        numel: how many entries the parts have in all.
        restrain: the suppression.
    """
    if restrain is None:
        return None
    return restrained(sum((part <= restrain.edge).sum() for part in gains), numel, restrain)


def restrained(small: Tensor | int, numel: int, restrain: Restrain) -> Tensor:
    """``[N]`` fp32 factors of the output channels, from how many of ``numel`` gains are small."""
    crowded = small > restrain.percent * numel
    factor = torch.ones_like(restrain.important, dtype=torch.float32)
    return factor.masked_fill(restrain.important & crowded, restrain.decay)


def restrain_factor(gain: Tensor, restrain: Restrain | None) -> Tensor | None:
    """:func:`restrain_rows` of a gain that is whole."""
    return restrain_rows((gain,), gain.numel(), restrain)


__all__ = [
    "COMBINES",
    "FORMS",
    "NORMS",
    "REFERENCES",
    "NormOptions",
    "Restrain",
    "base_share",
    "coefficients",
    "effective_eps",
    "gain",
    "known_scalars",
    "largest",
    "needs_peak",
    "relative_change",
    "resolve_norm",
    "restrain_factor",
    "restrain_rows",
    "restrained",
    "sigmoid_weight",
]
