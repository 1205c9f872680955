"""Space ``weight`` on the GPU: W' in one pass over W, and ∂P without ∂W.

    base = W + P_base R      Δ = P R      R = W[rows]      1/M from ρ = |Δ| / (|base| + ε)
    W' = (2 base + Δ)/M · f   or   (base + Δ/M) · f        f: the restraint's factor of a row
    ∂P = D Rᵀ,  D = (f/M) · (gᵀ x)

| tensor    | shape  | dtype                                                       |
|-----------|--------|-------------------------------------------------------------|
| W         | [N, K] | its own, any strides; W' in the compute dtype, W's layout   |
| P, P_base | [N, m] | cast once to the compute dtype, which the dots multiply in  |
| R         | [m, K] | read through ``rows`` from W where K is W's unit stride     |
| x, g      | [T, K] [T, N] | compute dtype                                        |
| D         | [chunk, K]    | compute dtype, at most ``WORKSPACE_MIB``             |
| ∂P, scalars, factor | [N, m] [3] [N] | fp32                                      |

Accumulators, ρ and M are fp32. Nothing is saved but the three scalars (ε, slope, offset) and the
factors; base, Δ and M are rebuilt.

Floors, with w bytes an entry of W and of the compute dtype each, and N·m, m·K ≪ N·K:

- W': 2w·N·K bytes (W in, W' out) and 2·N·K·m operations, three times that when folded.
  ``paper`` and ``released`` add a pass of w·N·K bytes and the same operations for the largest ρ,
  the restraint another. Every tile also reads its blocks of P and R from L2:
  w·(m/BLOCK_K + m/BLOCK_N) bytes an entry.
- ∂P, row chunks (this file): gᵀx 2·T·N·K operations by cuBLAS, the gain's 2·N·K·m and the
  contraction's 2·N·K·m; bytes of g + x per chunk + 5w·N·K, of which 4w·N·K (D written, read and
  rewritten by the division, read by the contraction) stay in L2 where a chunk fits there.
- ∂P in one kernel would save those 4w·N·K bytes, move gᵀx's operations from cuBLAS into Triton and
  need 4·splits·N·m bytes of partial sums to stay deterministic. At T = 8192 and 200 operations a
  byte the bytes are a tenth of gᵀx's time if none of them stays in L2, so it pays only where
  Triton's product comes closer than that to cuBLAS. Not written.

Deterministic: tile maxima, sums and counts are written to their own places; one program of
``weight_scalars_kernel`` turns the maxima into slope and offset, torch adds the rest.
Source: DESIGN sections 4 and 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..additive import product_wide
from ..gain import (
    Restrain,
    effective_eps,
    needs_peak,
    restrained,
    sigmoid_weight,
)
from ..machine import LARGE_SHARED, machine_of
from .common import aligned, block_of, cdiv, dot_precision, padded, padded_rows
from .weight_jit import (
    weight_bwd_kernel,
    weight_fwd_kernel,
    weight_scalars_kernel,
    weight_stat_kernel,
)

WORKSPACE_MIB = 16
_ROWS_OF_A_TILE = 128

STAT_STAGES = 3  # with 2, sm_100's largest-ρ pass spills


def _blocks(dtype: torch.dtype, is_aligned: bool, small: bool) -> dict[str, int]:
    """A tile of W.

    Args:
        dtype: the compute dtype.
        is_aligned: whether rows start aligned; else each element is read at an address of its own.
        small: whether the two accumulators of a folded W are too much for the large tile.
    """
    block_n, block_k = (64, 128) if is_aligned else (32, 64)
    if dtype == torch.float32 or small:
        block_k = 64
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 2}


class Tiles:
    """W, R and P as the kernels take them, and the arguments that every launch shares.

    Args:
        weight: ``W [N, K]`` or a slice of its rows.
        source: where R's rows are read: the whole W with ``rows``, or ``R [m, K]`` with None;
            both of :func:`padded_rows`.
        rows: ``[m]`` int64 or None.
        p: ``P [N, m]`` of the same rows as ``weight``.
        p_base: :func:`parts` of P_base, of the same rows, or None.
        dtype: the compute dtype.
    """

    def __init__(self, weight, source, rows, p, p_base, dtype: torch.dtype) -> None:
        self.weight = weight
        self.p = padded(p.to(dtype))
        self.p_base = p_base
        self.tensors = (weight, source, rows, self.p, self.p_base)
        n, k = weight.shape
        stride_low = 0 if p_base is None else p_base.stride(0)
        self.sizes = (n, k, self.p.shape[1], *weight.stride(), *source.stride(), stride_low)
        small = p_base is not None and machine_of(weight).shared_bytes < LARGE_SHARED
        blocks = _blocks(dtype, aligned(k if weight.stride(1) == 1 else n), small)
        self.grid = (cdiv(k, blocks["BLOCK_K"]), cdiv(n, blocks["BLOCK_N"]))
        self.options = dict(
            HAS_BASE=p_base is not None,
            GATHER=rows is not None,
            PRECISION=dot_precision(dtype),
            BLOCK_M=block_of(p.shape[1], 16, 32 if dtype == torch.float32 else 64),
            **blocks,
        )

    @classmethod
    def whole(cls, weight, rows, p, p_base, dtype: torch.dtype) -> Tiles:
        """All of W. R is gathered in the kernel, unless its rows are scattered in memory."""
        p_base, rows = parts(p_base, dtype), padded_rows(rows)
        if weight.stride(1) == 1:
            return cls(weight, weight, rows, p, p_base, dtype)
        return cls(weight, weight.index_select(0, rows), None, p, p_base, dtype)


def parts(p_base: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``P_base [N, m]`` as padded summands ``[1 or 2, N, m]`` in ``dtype``, two of 16 bits."""
    if p_base is None:
        return None
    high = p_base.to(dtype)
    if dtype == torch.float32:
        return padded(high)[None]
    return padded(torch.stack((high, (p_base - high).to(dtype))))


def measure(
    tiles: Tiles, important: Tensor | None, form: str, combine: str, scale: float, eps: float,
    eps_relative: bool, limits: list[float],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The global part of the norm, on the device: ``([ε, slope, offset], f [N] or None)``."""
    weight = tiles.weight
    scalars = torch.full((3,), eps, dtype=torch.float32, device=weight.device)
    if eps_relative and weight.numel():
        if tiles.p_base is None:
            scalars[0] = effective_eps(weight, eps, True)
        else:
            square = _stat("square", tiles, scalars, form).sum() / weight.numel()
            scalars[0] = eps * square.sqrt()
    peaks = _stat("peak", tiles, scalars, form) if needs_peak(form) else scalars
    with torch.cuda.device_of(weight):
        weight_scalars_kernel[(1,)](peaks, scalars, peaks.numel(), scale, FORM=form, BLOCK=1024)
    if important is None:
        return scalars, None
    restrain = Restrain(important, *limits)
    count = _stat("count", tiles, scalars, form, restrain.edge).sum(dtype=torch.float64)
    return scalars, restrained(count, weight.numel(), restrain)


def _stat(what: str, tiles: Tiles, scalars: Tensor, form: str, edge: float = 0.0) -> Tensor:
    out = scalars.new_empty(tiles.grid[0] * tiles.grid[1])
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(tiles.weight):
        weight_stat_kernel[tiles.grid](
            *tiles.tensors, scalars, out, edge, *tiles.sizes,
            STAT=what, SIGMOID_WEIGHT=sigmoid_weight(form),
            **tiles.options | {"num_stages": STAT_STAGES},
        )  # fmt: skip
    return out


def fused_weight(
    tiles: Tiles,
    scalars: Tensor | None,
    factor: Tensor | None,
    form: str | None,
    combine: str | None,
    dtype: torch.dtype,
    seed: int | None = None,
) -> Tensor:
    """W' ``[N, K]`` in ``dtype`` and W's layout; ``factor · base + Δ`` where ``form`` is None."""
    out = torch.empty_like(tiles.weight, dtype=dtype)
    if out.numel():
        with torch.cuda.device_of(out):
            weight_fwd_kernel[tiles.grid](
                *tiles.tensors, scalars, factor, out, seed or 0, *tiles.sizes, *out.stride(),
                SIGMOID_WEIGHT=sigmoid_weight(form or "paper"), NORMED=form is not None,
                AVERAGED=combine == "averaged", HAS_FACTOR=factor is not None,
                STOCHASTIC=seed is not None, **tiles.options,
            )  # fmt: skip
    return out


def grad_p(
    g: Tensor, x: Tensor, weight: Tensor, rows: Tensor, p: Tensor, p_base: Tensor | None,
    scalars: Tensor, factor: Tensor | None, form: str,
) -> Tensor:  # fmt: skip
    """``∂P = ((f · gᵀx) / M) Rᵀ [N, m]``, fp32, in chunks of W's rows."""
    n, k = weight.shape
    dp = torch.empty(p.shape, dtype=torch.float32, device=p.device)
    if weight.numel() == 0:
        return dp.zero_()
    r, g = weight.index_select(0, padded_rows(rows)).to(x.dtype), g.contiguous()
    p, p_base = p.to(x.dtype), parts(p_base, x.dtype)
    step = chunk_rows(n, k, x.element_size())
    workspace = x.new_empty(step, k)
    for start in range(0, n, step):
        part = slice(start, min(n, start + step))
        d = workspace[: part.stop - start]
        torch.mm(g[:, part].t(), x, out=d)
        base_part = None if p_base is None else p_base[:, part]
        tiles = Tiles(weight[part], r, None, p[part], base_part, x.dtype)
        with torch.cuda.device_of(d):
            weight_bwd_kernel[tiles.grid](
                d, *tiles.tensors, scalars, None if factor is None else factor[part], *tiles.sizes,
                SIGMOID_WEIGHT=sigmoid_weight(form), HAS_FACTOR=factor is not None, **tiles.options,
            )  # fmt: skip
        product_wide(d, r[: p.shape[1]].t(), out=dp[part])
    return dp


def chunk_rows(n: int, k: int, itemsize: int) -> int:
    """Rows of W in a chunk: within ``WORKSPACE_MIB``, whole tiles, at most half of W."""
    most = max(1, WORKSPACE_MIB * 2**20 // max(1, k * itemsize))
    chunks = max(2, cdiv(n, most))
    rows = max(1, cdiv(n, chunks))
    whole_tiles = cdiv(rows, _ROWS_OF_A_TILE) * _ROWS_OF_A_TILE
    return whole_tiles if whole_tiles <= min(most, n - 1) else min(rows, most)


__all__ = ["WORKSPACE_MIB", "Tiles", "chunk_rows", "fused_weight", "grad_p", "measure"]
