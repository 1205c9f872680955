"""The coordinates of an anchor: roots of both sums over old text, and the scale of each layer.

    L = (Γ + λ tr Γ/m)^−½     S = (Σ + λ tr Σ/m)^−½     U = κ L Ũ S

of Γ and Σ ``[m, m]``, see :mod:`secura.anchoring`. A layer's price is what a unit of Ũ costs there
if κ is 1, in the mean over directions and tokens, relative to the layers' mean. κ is
1 / √max(price, λ), times one number for all layers: with it the geometric mean of
``‖C κL‖ ‖S R‖ / (‖C‖ ‖R‖)`` over the layers is 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cabr import CABR
from .curvature import Statistics
from .state import in_digits


class Sums(NamedTuple):
    """What an anchor was made of.

    Attributes:
        sigma: ``Σ [m, m]``, fp64; each set of texts counts 1 in its mean eigenvalue.
        gamma: ``Γ [m, m]``, likewise.
        price: of the layer, up to a number that is the same in all layers.
        damping: λ.
    """

    sigma: Tensor
    gamma: Tensor
    price: float
    damping: float

    @property
    def sets(self) -> float:
        """How many sets of texts were added up."""
        return float(self.sigma.diagonal().mean())


class Roots(NamedTuple):
    """Both roots of one layer, fp64 ``[m, m]``, and what its κ follows from.

    Attributes:
        left: L; the identity where no text ever reached the layer, whose κ is 1.
        right: S, likewise.
        damping: λ.
        sets: of texts that were added up; 0 where none reached the layer.
        price: of the new texts, None where they did not reach the layer.
        before: the price of those that it was anchored by before, None without.
        stretch: ``‖C L‖ ‖S R‖ / (‖C‖ ‖R‖)``; 0 where it is not known, or C or R are 0.
    """

    left: Tensor
    right: Tensor
    damping: float
    sets: float = 0.0
    price: float | None = None
    before: float | None = None
    stretch: float = 0.0


def roots_of(new: Statistics, damping: float, before: Sums | None) -> Roots:
    """Make the roots of new sums and those of ``before``, which count as they were added up."""
    if not new.seen and before is None:
        return Roots(_identity(new.gamma.double()), _identity(new.sigma.double()), damping)
    sigma, gamma = new.sigma.double(), new.gamma.double()
    if new.seen:
        sigma, gamma = (one / one.diagonal().mean() for one in (sigma, gamma))
    if before is not None:
        sigma, gamma = sigma + before.sigma, gamma + before.gamma
    left, right = _root(gamma, damping), _root(sigma, damping)
    sets, price, price_before = float(sigma.diagonal().mean()), None, None
    if new.seen:
        price = sets**2 * _cost(left, right, new.gamma, new.sigma) / float(new.tokens)
    if before is not None:  # measured in the new coordinates
        old = _root(before.gamma, before.damping), _root(before.sigma, before.damping)
        now = sets**2 * _cost(left, right, before.gamma, before.sigma)
        price_before = (
            before.price * now / (before.sets**2 * _cost(*old, before.gamma, before.sigma))
        )
    stretch = float(_stretch(new.columns, left) * _stretch(new.rows, right))
    return Roots(left, right, damping, sets, price, price_before, stretch)


def scales(roots: Mapping[Any, Roots]) -> dict[Any, float]:
    """Compute κ of every layer; 1 where no text ever reached it.

    Prices of the new texts and of those before are relative to their mean over the layers that have
    both, and are averaged by the number of sets: in whatever order sets come, all count the same.
    """
    reached = {key: one for key, one in roots.items() if one.sets}
    prices = dict(zip(reached, _prices(list(reached.values())), strict=True))
    mean = _mean(prices.values())
    found = {
        key: one.sets / math.sqrt(max(prices[key], one.damping * mean))
        for key, one in reached.items()
    }
    moved = [math.log(found[key] * one.stretch) for key, one in reached.items() if one.stretch]
    level = math.exp(sum(moved) / len(moved)) if moved else 1.0
    return {key: found[key] / level if key in found else 1.0 for key in roots}


def _prices(layers: list[Roots]) -> list[float]:
    """What a unit costs in each layer, the mean over all sets of texts that reached it."""
    both = [one for one in layers if one.price is not None and one.before is not None]
    new = _mean(one.price for one in both or layers)
    old = _mean(one.before for one in both or layers)
    found = []
    for one in layers:
        parts = []
        if one.price is not None:
            parts.append((1.0, one.price / new))
        if one.before is not None:
            parts.append((one.sets - len(parts), one.before / old))
        found.append(sum(sets * price for sets, price in parts) / sum(sets for sets, _ in parts))
    return found


def sums_of(adapter: CABR) -> Sums | None:
    """What an adapter's anchor was made of; None where it has none, or one of no text."""
    if adapter.left is None or adapter.right is None or adapter.damping is None:
        return None
    if all(torch.equal(side, _identity(side)) for side in (adapter.left, adapter.right)):
        return None
    damping = in_digits(adapter.damping)
    sigma = _undamped(adapter.right.double(), damping)
    sets = float(sigma.diagonal().mean())
    whole = adapter.left.double()
    # κ⁻² (Γ + λ tr Γ/m), of which Γ's mean eigenvalue is the number of sets
    price = float(torch.linalg.inv(whole @ whole).diagonal().mean()) * sets / (1 + damping)
    gamma = _undamped(whole * (price / sets**2) ** 0.5, damping)
    return Sums(sigma, gamma, price, damping)


def _mean(values: Iterable[float | None]) -> float:
    """The mean of those that are there; 1 without any, or of zeros."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) or 1.0 if there else 1.0


def _cost(left: Tensor, right: Tensor, gamma: Tensor, sigma: Tensor) -> float:
    """``tr(L Γ L) tr(S Σ S) / m²``: what a unit of Ũ costs in the mean over directions."""
    costs = (
        float((root @ matrix.double() @ root).diagonal().mean())
        for root, matrix in ((left, gamma), (right, sigma))
    )
    return math.prod(costs)


def _stretch(gram: Tensor, root: Tensor) -> Tensor:
    """``‖X root‖ / ‖X‖`` from the gram matrix XᵀX; 0 where that is 0."""
    wide = gram.double()
    return ((root @ wide @ root).trace() / wide.trace().clamp_min(1e-300)).clamp_min(0).sqrt()


def _root(matrix: Tensor, damping: float) -> Tensor:
    """``(matrix + λ tr/m)^−½`` of a symmetric ``[m, m]``, fp64."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0) + damping * matrix.diagonal().mean()
    return (vectors * values.rsqrt()) @ vectors.t()


def _undamped(root: Tensor, damping: float) -> Tensor:
    """The matrix of which :func:`_root` made ``root``, fp64."""
    inverse = torch.linalg.inv(root @ root)
    share = inverse.diagonal().mean() * damping / (1 + damping)
    return inverse - share * _identity(root)


def _identity(like: Tensor) -> Tensor:
    """The identity of a square matrix's size, dtype and device."""
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


__all__ = ["Roots", "Sums", "roots_of", "scales", "sums_of"]
