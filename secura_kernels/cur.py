"""The CUR half of SECURA: which rows and columns of W, and how A starts.

Notation: ``W [N, K]`` is the frozen weight, ``rows [m]`` and ``cols [m]`` index
its least important rows and columns, ``C = W[:, cols] [N, m]``, ``R = W[rows, :] [m, K]``,
``U = A B [m, m]`` and ``ΔW = scaling · C U R = P R`` with ``P = scaling · C U [N, m]``.

Sources: SECURA (arXiv 2502.18168) for CABR, CURLoRA (arXiv 2408.14572) for inverse sampling.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import wide

SELECTIONS = ("least_norm", "inverse_sampling")
INITS = ("svd", "kaiming", "orthogonal", "identity")

_CHUNK_ROWS = 256


def select(
    weight: Tensor, r: int, selection: str = "least_norm", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Pick the ``r`` least important rows and columns of a weight.

    Args:
        weight: ``[N, K]``, any floating dtype.
        r: CUR rank m, ``1 <= r <= min(N, K)``.
        selection: ``"least_norm"`` takes the smallest L2 norms (the released code) and passes over
            rows and columns of zeros, which could carry nothing. ``"inverse_sampling"`` draws ``r``
            distinct indices with probability ∝ 1/‖·‖² (CURLoRA).
        generator: CPU generator for ``"inverse_sampling"``.

    Returns:
        ``rows [r]`` and ``cols [r]``, int64, ascending, on the weight's device.

    Raises:
        ValueError: for an unknown selection, an ``r`` out of range, a weight with NaN or inf, or
            too few rows or columns that are not zero.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"unknown selection {selection!r}: choose one of {SELECTIONS}")
    check_fits(r, *weight.shape)
    row_norms, col_norms = squared_norms(weight)
    if not bool(torch.isfinite(row_norms).all()):
        raise ValueError("the weight holds NaN or inf: repair the checkpoint before adapting it")
    return (
        _choose(row_norms, r, selection, "row", generator),
        _choose(col_norms, r, selection, "column", generator),
    )


class RankError(ValueError):
    """A weight has no CUR decomposition of the rank that was asked for."""


def check_fits(r: int, n: int, k: int) -> None:
    """Raise :class:`RankError` where a weight ``[n, k]`` has no CUR decomposition of rank ``r``."""
    if not 1 <= r <= min(n, k):
        raise RankError(
            f"r={r} must lie between 1 and min(N, K)={min(n, k)} of the [{n}, {k}] weight"
        )


def squared_norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Squared L2 norms of the rows ``[N]`` and columns ``[K]`` of a weight, fp32 or wider."""
    dtype = wide(weight.dtype)
    rows = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
    cols = torch.zeros(weight.shape[1], dtype=dtype, device=weight.device)
    for part in weight.split(_CHUNK_ROWS):
        cols += part.to(dtype).square().sum(0)
    return rows, cols


def _choose(
    norms: Tensor, r: int, selection: str, what: str, generator: torch.Generator | None
) -> Tensor:
    zeros = norms == 0
    count = int(zeros.sum())
    if selection == "inverse_sampling":
        if count:
            raise ValueError(
                f"{count} {what}(s) of the weight are zero, so 1/‖{what}‖² has no value: use "
                "selection='least_norm', which passes over them, or exclude the layer"
            )
        probability = (norms.min() / norms).cpu()
        chosen = torch.multinomial(probability, r, generator=generator).to(norms.device)
    else:
        if norms.numel() - count < r:
            raise ValueError(
                f"only {norms.numel() - count} {what}s of the weight are not zero, fewer than "
                f"r={r}: lower r or exclude the layer"
            )
        # stable: the same weight gives the same indices on every device
        order = norms.masked_fill(zeros, math.inf).sort(stable=True).indices
        chosen = order[:r]
    return chosen.sort().values


def init_a(
    weight: Tensor,
    r: int,
    inner_r: int,
    init: str = "svd",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The starting value of ``A [r, inner_r]`` in fp32 (B starts at 0, so ΔW = 0).

    Args:
        weight: ``[N, K]``.
        r: CUR rank m.
        inner_r: inner rank.
        init: ``"svd"`` is the released code's ``U[:m] Σ V[:r]ᵀ`` of ``W = U Σ Vᵀ``, which is the
            block ``W[:m, :r]``: a slice, no decomposition. ``"kaiming"`` and ``"orthogonal"`` draw
            from ``generator``. With ``"identity"`` and ``inner_r = r``, U = A B starts as B: frozen
            so, B is CURLoRA's U (arXiv 2408.14572).
        generator: CPU generator.

    Raises:
        ValueError: for an unknown init.
        RankError: for ``"svd"`` with ``inner_r > K``.
    """
    if init not in INITS:
        raise ValueError(f"unknown init {init!r}: choose one of {INITS}")
    if init == "svd":
        if inner_r > weight.shape[1]:
            raise RankError(
                f"init='svd' takes A from the weight's first {inner_r} columns, but it has "
                f"{weight.shape[1]}: lower inner_r or use init='kaiming'"
            )
        return weight[:r, :inner_r].to(torch.float32, copy=True).contiguous()
    if init == "identity":
        return torch.eye(r, inner_r, device=weight.device)
    a = torch.empty(r, inner_r)
    if init == "kaiming":
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    else:
        torch.nn.init.orthogonal_(a, generator=generator)
    return a.to(weight.device)


def important_channels(weight: Tensor, r: int) -> Tensor:
    """``[N]`` bool: the ``(N − m) // 2`` rows of ``weight`` with the largest L2 norm."""
    count = (weight.shape[0] - r) // 2
    important = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
    order = squared_norms(weight)[0].sort(descending=True, stable=True).indices
    important[order[:count]] = True
    return important


__all__ = [
    "INITS",
    "SELECTIONS",
    "check_fits",
    "important_channels",
    "init_a",
    "select",
    "squared_norms",
]
