"""S-MagNorm's gain: how far an entry may move, from how far it wants to move.

    ρ = |Δ| / (|base| + ε)                  "divide loss"
    M = w − (w − 1) σ(slope · ρ + offset)   in [1, 2], a constant in the backward pass
    averaged:  out = (2 base + Δ) / M       (SECURA, as released)
    gated:     out = base + Δ / M           (the default: it leaves the base alone)

Averaged, `paper` has M = 2 − σ(−k/2) = 1.953 where ρ ≪ ρmax: any change at all, however small,
multiplies every such entry of the base by 2/M = 1.0243 (k = 6), and `released` by 1.333. Channels'
ρ lie close together, so in `channel` most M are 1.1 to 1.3 at m = 64, and 2/M about 1.6.

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

import ast
import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import wide

NORMS = ("none", "weight", "activation", "channel")
FORMS = ("paper", "released", "calibrated")
COMBINES = ("averaged", "gated")
REFERENCES = ("folded", "pretrained")
SAVES = ("recompute", "8bit")

NO_WEIGHT = (
    "norm='activation' is not linear in x, so no plain weight computes it: call the layer, or "
    "choose a norm that has one, 'none', 'channel' or 'weight'"
)
SMALLEST_PEAK = 1e-30
"""What a smaller ρmax counts as, so that `paper` divides by none that is 0."""
_SMALLEST_EPS = torch.finfo(torch.float32).tiny


class NormOptions(NamedTuple):
    """Choose how S-MagNorm is computed.

    Attributes:
        norm: the space: ``"none"``, ``"channel"``, ``"activation"`` or ``"weight"`` (the default of
            :class:`secura.AdapterConfig`).
        form: ``"paper"``, ``"released"`` or ``"calibrated"``; None is ``"paper"`` in ``weight``,
            else ``"calibrated"``.
        combine: ``"averaged"``, the paper's, or ``"gated"``, which None is too.
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

    @property
    def replaces_product(self) -> bool:
        """Whether the layer multiplies by another weight than W, so that W itself is needed."""
        return self.norm == "weight"


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


class Norm(NamedTuple):
    """A norm with every choice made: what an op takes, packed by :func:`pack` into one string.

    Attributes:
        space, form, combine, scale, eps, eps_relative: of :class:`NormOptions`, none of them None.
        restrained: whether there is a :class:`Restrain`, whose ``important`` an op takes beside.
        percent, edge, decay: of :class:`Restrain`.
    """

    space: str
    form: str
    combine: str
    scale: float
    eps: float
    eps_relative: bool
    restrained: bool
    percent: float
    edge: float
    decay: float

    @property
    def averaged(self) -> bool:
        """Whether base and change are averaged, rather than the change gated."""
        return self.combine == "averaged"

    @property
    def needs_peak(self) -> bool:
        """Whether the form depends on the largest ρ of the whole tensor (a pass of its own)."""
        return self.form != "calibrated"

    @property
    def sigmoid_weight(self) -> float:
        """w of ``M = w − (w − 1) σ``: 3 for ``calibrated``, 2 for the sigmoid forms."""
        return 3.0 if self.form == "calibrated" else 2.0

    @property
    def known(self) -> tuple[float, float, float] | None:
        """``(ε, slope, offset)`` where the options alone decide them; None where tensors do."""
        return None if self.needs_peak or self.eps_relative else (self.eps, self.scale, 0.0)


def resolve_norm(norm: str, form: str | None = None, combine: str | None = None) -> tuple[str, str]:
    """Fill in a norm space's default form, and the default combination.

    Returns:
        ``(form, combine)``; where not given ``"paper"`` for ``weight`` and ``"calibrated"`` for the
        others, and ``"gated"``.

    Raises:
        ValueError: for an unknown space, form or combination.
    """
    choices = (
        ("norm", norm, NORMS),
        ("norm_form", form, (None, *FORMS)),
        ("norm_combine", combine, (None, *COMBINES)),
    )
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose one of {known}")
    return form or ("paper" if norm == "weight" else "calibrated"), combine or "gated"


def pack(options: NormOptions, restrain: Restrain | None = None, *, traced: bool = False) -> str:
    """Pack a norm into one string, as an op's schema takes it: fields of :class:`Norm` by name.

    ``traced``: under torch.compile, which knows no cache.

    Raises:
        ValueError: for an unknown space, form or combination, or a number out of range.
    """
    limits = (0.0, 0.0, 0.0) if restrain is None else restrain[1:]
    return (_packed if traced else _packed_once)(options, restrain is not None, *limits)


def _packed(
    options: NormOptions, restrained: bool, percent: float, edge: float, decay: float
) -> str:
    form, combine = resolve_norm(options.norm, options.form, options.combine)
    norm = Norm(
        space=options.norm,
        form=form,
        combine=combine,
        scale=float(options.scale),
        eps=float(options.eps),
        eps_relative=options.eps_relative,
        restrained=restrained,
        percent=float(percent),
        edge=float(edge),
        decay=float(decay),
    )
    if not isinstance(norm.eps_relative, bool):  # "no" would count as True
        raise ValueError(f"eps_relative={norm.eps_relative!r} of a norm must be True or False")
    for name, value in norm._asdict().items():
        if isinstance(value, float) and not abs(value) < math.inf:  # NaN too
            raise ValueError(f"{name}={value} of a norm or its restraint must be finite")
    if not norm.scale > 0:
        raise ValueError(f"scale={norm.scale} of a norm must be above 0: 6, say")
    for name, least, most in (("percent", 0, 1), ("edge", 1, 2), ("decay", 0, 1)):
        if restrained and not least <= (value := getattr(norm, name)) <= most:
            raise ValueError(f"{name}={value} of a Restrain must lie in [{least}, {most}]")
    if restrained and norm.space == "none":
        raise ValueError("the space 'none' has no gain for a Restrain to count: leave it out")
    if norm.eps < _SMALLEST_EPS:
        raise ValueError(
            f"eps={norm.eps} must be at least {_SMALLEST_EPS:.2e}, fp32's smallest normal number: "
            "less is 0 there, and 0 / 0 where base and change are 0"
        )
    fields = [f"{name!r}: {value!r}" for name, value in zip(Norm._fields, norm, strict=True)]
    return "{" + ", ".join(fields) + "}"


_packed_once = functools.lru_cache(4096)(_packed)  # a scale may have a schedule


@functools.lru_cache(4096)
def unpack(text: str) -> Norm:
    """The norm that :func:`pack` made a string of."""
    return Norm(**ast.literal_eval(text))


def complete(options: NormOptions, restrain: Restrain | None = None) -> Norm:
    """Return the norm with every choice made, checked as in :func:`pack`."""
    return unpack(pack(options, restrain))


def effective_eps(base: Tensor, norm: Norm) -> Tensor:
    """ε as a 0-dim tensor: ``eps``, or ``eps`` times the root mean square of ``base``."""
    dtype = wide(base.dtype)
    if not norm.eps_relative or base.numel() == 0:
        return torch.full((), norm.eps, dtype=dtype, device=base.device)
    return norm.eps * torch.linalg.vector_norm(base, dtype=dtype) / math.sqrt(base.numel())


def relative_change(base: Tensor, delta: Tensor, eps: Tensor | float) -> Tensor:
    """ρ = |Δ| / (|base| + ε), elementwise, in the inputs' dtype."""
    return delta.abs().div_(base.abs().add_(eps))


def largest(rho: Tensor) -> Tensor:
    """The largest ρ, 0-dim; 0 where there is none."""
    return rho.max() if rho.numel() else rho.new_zeros(())


def coefficients(norm: Norm, peak: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """``(slope, offset)`` of the gain's sigmoid, 0-dim, fp32 or wider, decided on the device.

    Args:
        norm: the norm.
        peak: the largest ρ, 0-dim; needed by every form but ``calibrated``.
        like: gives the device and the dtype.
    """
    dtype = wide(like.dtype)
    slope = torch.full((), norm.scale, dtype=dtype, device=like.device)
    start = -norm.scale / 2 if norm.form == "paper" else 0.0
    offset = torch.full((), start, dtype=dtype, device=like.device)
    if norm.form == "calibrated":
        return slope, offset
    assert peak is not None
    if norm.form == "paper":
        slope = slope / peak.to(dtype).clamp(min=SMALLEST_PEAK)
    still = peak == 0
    return slope.masked_fill(still, 0.0), offset.masked_fill(still, -math.inf)


def gain(rho: Tensor, slope: Tensor | float, offset: Tensor | float, norm: Norm) -> Tensor:
    """M from ρ, elementwise, in ρ's dtype."""
    w = norm.sigmoid_weight
    if isinstance(slope, Tensor) and isinstance(offset, Tensor):
        power = torch.addcmul(offset, slope, rho)
    else:
        power = slope * rho if offset == 0 else slope * rho + offset
    return torch.rsub(power.sigmoid_(), w, alpha=w - 1)


def combined(
    base: Tensor,
    delta: Tensor,
    gain: Tensor,
    base_scale: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """``base + Δ / M``, or with one of :func:`scale_of_base` ``base_scale · base + Δ / M``.

    ``out``, if given, is written over; of the result's shape and dtype.
    """
    return torch.addcdiv(base if base_scale is None else base_scale * base, delta, gain, out=out)


def scale_of_base(gain: Tensor, norm: Norm) -> Tensor | None:
    """∂out/∂base: ``2/M`` when averaged, ``None`` (it is 1) when gated."""
    return 2 / gain if norm.averaged else None


def restrain_factor(
    gains: Iterable[Tensor], numel: int, important: Tensor | None, norm: Norm
) -> Tensor | None:
    """``[N]`` fp32 factors of the output channels, or None where the restraint is off.

    Args:
        gains: M, in parts of any shape.
        numel: how many entries the parts have in all.
        important: ``[N]`` bool, or None.
        norm: the norm.
    """
    if important is None:
        return None
    return suppression(sum((part <= norm.edge).sum() for part in gains), numel, important, norm)


def suppression(small: Tensor | int, numel: int, important: Tensor, norm: Norm) -> Tensor:
    """``[N]`` fp32 factors of the output channels, from how many of ``numel`` gains are small."""
    crowded = small > norm.percent * numel
    factor = torch.ones_like(important, dtype=torch.float32)
    return factor.masked_fill(important & crowded, norm.decay)


__all__ = [
    "COMBINES",
    "FORMS",
    "NORMS",
    "NO_WEIGHT",
    "REFERENCES",
    "SAVES",
    "SMALLEST_PEAK",
    "Norm",
    "NormOptions",
    "Restrain",
    "coefficients",
    "combined",
    "complete",
    "effective_eps",
    "gain",
    "largest",
    "pack",
    "relative_change",
    "resolve_norm",
    "restrain_factor",
    "scale_of_base",
    "suppression",
    "unpack",
]
