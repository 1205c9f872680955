"""Choose rows and columns of W, and what A starts from.

Notation: ``W [N, K]`` is the frozen weight, ``rows [m]`` and ``cols [m]`` index
its least important rows and columns, ``C = W[:, cols] [N, m]``, ``R = W[rows, :] [m, K]``,
``U = s · A B [m, m]`` of ``A [m, r]`` and ``B [r, m]``, and ``ΔW = C U R = P R`` with ``P = C U``.

Sources: SECURA (arXiv 2502.18168) for CABR, CURLoRA (arXiv 2408.14572) for inverse sampling.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import FLOATS, wide

SELECTIONS = ("least_norm", "inverse_sampling")
INITS = ("svd", "kaiming", "orthogonal", "identity")

_CHUNK_ROWS = 256


def select(
    weight: Tensor, m: int, selection: str = "least_norm", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Pick the ``m`` least important rows and columns of a weight ``[N, K]``.

    Args:
        weight: ``[N, K]``, fp16, bf16, fp32 or fp64.
        m: CUR rank, ``1 <= m <= min(N, K)``; the config's ``r``, which errors call it by.
        selection: ``"least_norm"`` takes the smallest L2 norms (the released code) and passes over
            rows and columns of zeros, which could carry nothing. ``"inverse_sampling"`` draws ``m``
            distinct indices with probability ∝ 1/‖·‖² (CURLoRA).
        generator: CPU generator for ``"inverse_sampling"``.

    Returns:
        ``rows [m]`` and ``cols [m]``, int64, ascending, on the weight's device.

    Raises:
        ValueError: for an unknown selection, an ``m`` out of range, a weight that is no matrix of
            floating numbers or has NaN or inf, or too few rows or columns that are not zero.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"unknown selection {selection!r}: choose one of {SELECTIONS}")
    _check_matrix(weight)
    check_fits(m, *weight.shape)
    row_norms, col_norms = squared_norms(weight)
    if not bool(torch.isfinite(row_norms).all()):
        raise ValueError("the weight holds NaN or inf: repair the checkpoint before adapting it")
    return (
        _choose(row_norms, m, selection, "row", generator),
        _choose(col_norms, m, selection, "column", generator),
    )


def _check_matrix(weight: Tensor) -> None:
    if weight.dim() != 2 or weight.dtype not in FLOATS:
        raise ValueError(
            f"the weight is {weight.dtype} {list(weight.shape)}: it must be [N, K], of floating "
            "numbers, in fp16, bf16, fp32 or fp64"
        )


class RankError(ValueError):
    """A weight has no CUR decomposition of the rank that was asked for."""


def check_fits(m: int, n: int, k: int) -> None:
    """Raise :class:`RankError` where a weight ``[n, k]`` has no CUR decomposition of rank ``m``."""
    if isinstance(m, bool) or not isinstance(m, int):
        raise RankError(f"r={m!r} (an op's m) must be an integer")
    if not 1 <= m <= min(n, k):
        raise RankError(
            f"r={m} (an op's m) must lie between 1 and min(N, K)={min(n, k)} of the [{n}, {k}] "
            "weight"
        )


@torch.no_grad()
def squared_norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Squared L2 norms of the rows ``[N]`` and columns ``[K]`` of a weight, fp32 or wider."""
    dtype = wide(weight.dtype)
    rows = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
    cols = torch.zeros(weight.shape[1], dtype=dtype, device=weight.device)
    for part in weight.split(_CHUNK_ROWS):
        cols += part.to(dtype).square().sum(0)
    return rows, cols


def _choose(
    norms: Tensor, m: int, selection: str, what: str, generator: torch.Generator | None
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
        chosen = torch.multinomial(probability, m, generator=generator).to(norms.device)
    else:
        if norms.numel() - count < m:
            raise ValueError(
                f"only {norms.numel() - count} {what}s of the weight are not zero, fewer than "
                f"r={m}: lower r or exclude the layer"
            )
        # stable: the same weight gives the same indices on every device
        order = norms.masked_fill(zeros, math.inf).sort(stable=True).indices
        chosen = order[:m]
    return chosen.sort().values


def init_a(
    weight: Tensor,
    m: int,
    r: int,
    init: str = "svd",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Make the value that ``A [m, r]`` starts from, fp32 (B starts at 0, so ΔW = 0).

    Args:
        weight: ``[N, K]``.
        m: CUR rank.
        r: inner rank, the config's ``inner_r``.
        init: ``"svd"`` is the released code's ``U[:m] Σ V[:r]ᵀ`` of ``W = U Σ Vᵀ``, which is the
            block ``W[:m, :r]``: a slice, no decomposition. ``"kaiming"`` and ``"orthogonal"`` draw
            from ``generator``. With ``"identity"`` and ``r = m``, U = A B starts as B: frozen
            so, B is CURLoRA's U (arXiv 2408.14572).
        generator: CPU generator.

    Returns:
        ``[m, r]`` fp32, on the weight's device, of no graph.

    Raises:
        ValueError: for an unknown init, or a weight that is no matrix of floating numbers.
        RankError: for an m that does not fit the weight, an r below 0, and for ``"svd"`` with
            ``r > K``.
    """
    if init not in INITS:
        raise ValueError(f"unknown init {init!r}: choose one of {INITS}")
    _check_matrix(weight)
    check_fits(m, *weight.shape)
    if r < 0:
        raise RankError(f"inner_r={r} (an op's r) must be 0 or more")
    if init == "svd":
        if r > weight.shape[1]:
            raise RankError(
                f"init='svd' takes A [{m}, {r}] from the weight's first {r} columns, but it has "
                f"{weight.shape[1]}: lower inner_r (2 · r where it is not given) or r, or take "
                "init='kaiming'"
            )
        return weight.detach()[:m, :r].to(torch.float32, copy=True).contiguous()
    if init == "identity":
        return torch.eye(m, r, dtype=torch.float32, device=weight.device)
    a = torch.empty(m, r, dtype=torch.float32, device="cpu")
    if init == "kaiming":
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    else:
        torch.nn.init.orthogonal_(a, generator=generator)
    return a.to(weight.device)


def important_channels(weight: Tensor, m: int) -> Tensor:
    """Find the ``(N − m) // 2`` rows of a weight ``[N, K]`` with the largest L2 norm.

    Args:
        weight: ``[N, K]``, fp16, bf16, fp32 or fp64.
        m: CUR rank.

    Returns:
        ``[N]`` bool, on the weight's device: what :class:`secura_kernels.Restrain` acts on.

    Raises:
        ValueError: for a weight that is no matrix of such numbers.
        RankError: for an m that does not fit the weight.
    """
    _check_matrix(weight)
    check_fits(m, *weight.shape)
    count = (weight.shape[0] - m) // 2
    important = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
    order = squared_norms(weight)[0].sort(descending=True, stable=True).indices
    important[order[:count]] = True
    return important


__all__ = [
    "INITS",
    "SELECTIONS",
    "RankError",
    "check_fits",
    "important_channels",
    "init_a",
    "select",
]
