"""The coordinates of an anchor: roots of both sums over old text, and the scale of each layer.

    L = (Γ + λ tr Γ/m)^−½     S = (Σ + λ tr Σ/m)^−½     U = κ L Ũ S

of Γ and Σ ``[m, m]``, see :mod:`secura.anchoring`. κ is 1 / √price of a layer, price being what a
unit of Ũ costs there in the mean over directions if κ is 1, times one number for all layers: with
it the geometric mean of ``‖C κL‖ ‖S R‖ / (‖C‖ ‖R‖)`` over the layers is 1.
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
    """

    sigma: Tensor
    gamma: Tensor
    price: float

    @property
    def sets(self) -> float:
        """How many sets of texts were added up."""
        return float(self.sigma.diagonal().mean())


class Roots(NamedTuple):
    """Both roots of one layer, fp64 ``[m, m]``, and what its κ follows from.

    Attributes:
        left: L; the identity where no old text reached the layer.
        right: S, likewise.
        sets: of texts that were added up; 0 where none reached the layer, whose κ is 1.
        price: of the new texts; 0 with no sets.
        before: the price of those that were anchored by before, None without.
        stretch: ``‖C L‖ ‖S R‖ / (‖C‖ ‖R‖)``.
    """

    left: Tensor
    right: Tensor
    sets: float = 0.0
    price: float = 0.0
    before: float | None = None
    stretch: float = 0.0


def roots_of(new: Statistics, damping: float, before: Sums | None) -> Roots:
    """Make the roots of new sums and those of ``before``, which count as they were added up."""
    if not new.seen:
        return Roots(_identity(new.gamma.double()), _identity(new.sigma.double()))
    sigma, gamma = (one / one.diagonal().mean() for one in (new.sigma.double(), new.gamma.double()))
    if before is not None:
        sigma, gamma = sigma + before.sigma, gamma + before.gamma
    left, right = _root(gamma, damping), _root(sigma, damping)
    sets = float(sigma.diagonal().mean())
    cost = _mean_cost(left, new.gamma) * _mean_cost(right, new.sigma) / float(new.tokens)
    return Roots(
        left,
        right,
        sets,
        sets**2 * cost,  # as of roots of the sets' mean
        None if before is None else before.price,
        float(_stretch(new.columns, left) * _stretch(new.rows, right)),
    )


def scales(roots: Mapping[Any, Roots]) -> dict[Any, float]:
    """Compute κ of every layer; 1 where no old text reached it, or nothing is moved by it.

    Prices of new texts and of those before are each divided by their geometric mean over the
    layers that have both, and then averaged by the number of sets.
    """
    moving = {key: one for key, one in roots.items() if one.sets and one.price and one.stretch}
    if not moving:
        return dict.fromkeys(roots, 1.0)
    both = [one for one in moving.values() if one.before] or list(moving.values())
    new, old = _mean_log(one.price for one in both), _mean_log(one.before or 1.0 for one in both)
    found = {}
    for key, one in moving.items():
        price = one.price / math.exp(new)
        if one.before:
            price = (price + (one.sets - 1) * one.before / math.exp(old)) / one.sets
        found[key] = one.sets / math.sqrt(price)
    level = math.exp(_mean_log(found[key] * one.stretch for key, one in moving.items()))
    return {key: found[key] / level if key in found else 1.0 for key in roots}


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
    return Sums(sigma, gamma, price)


def _mean_log(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return sum(logs) / len(logs)


def _mean_cost(root: Tensor, matrix: Tensor) -> float:
    """``tr(root matrix root) / m``."""
    return float((root @ matrix.double() @ root).diagonal().mean())


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
