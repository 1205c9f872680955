"""The kernels of the space ``weight``: W' in one pass over W, ∂P without ∂W, and their launchers.

    base = W + P_base R      Δ = P R      R = W[rows]      1/M from ρ = |Δ| / (|base| + ε)
    W' = (2 base + Δ)/M · f   or   (base + Δ/M) · f        f: the restraint's factor of a row
    ∂P = D Rᵀ,  D = (f/M) · (gᵀ x)

| tensor    | shape  | dtype                                                       |
|-----------|--------|-------------------------------------------------------------|
| W         | [N, K] | its own, any strides; W' in the compute dtype, W's layout   |
| P, P_base | [N, m] | cast once to the compute dtype, which the dots multiply in  |
| R         | [m, K] | read through ``rows`` from W where K is W's unit stride     |
| x, g      | [T, K] [T, N] | compute dtype                                        |
| D = gᵀx   | [chunk, K]    | compute dtype, at most ``plan.CHUNK_MIB``           |
| ∂P, scalars, factor | [N, m] [3] [N] | fp32                                      |

Accumulators, ρ and M are fp32. Nothing is saved but the three scalars (ε, slope, offset) and the
factors; base, Δ and M are rebuilt. An index that W does not have reads its first or last row (a
mask in its place spilled on sm_80).

Floors, with w bytes an entry of W and of the compute dtype each, and N·m, m·K ≪ N·K:

- W': 2w·N·K bytes (W in, W' out) and 2·N·K·m operations, three times that when folded.
  ``paper`` and ``released`` add a pass of w·N·K bytes and the same operations for the largest ρ,
  the restraint another. Every tile also reads its blocks of P and R from L2:
  w·(m/BLOCK_K + m/BLOCK_N) bytes an entry.
- ∂P, row chunks: gᵀx 2·T·N·K operations by cuBLAS, the gain's 2·N·K·m and the contraction's
  2·N·K·m; bytes of g + x per chunk + 3w·N·K (D written, then D and W read), of which D's stay in L2
  where a chunk fits there, and 4·parts·N·m of sums over parts of D's columns, written and read. A
  program has the ranks of ∂P that fit in registers, 128; for more, W and D are read again.
- gᵀx in the same kernel would save D's 2w·N·K bytes and move its operations from cuBLAS into
  Triton. At T = 8192 and 200 operations a byte D's bytes are a twentieth of gᵀx's time, so it pays
  only where Triton's product comes closer than that to cuBLAS. Not written.

Deterministic: tile maxima, sums and counts are written to their own places; one program turns the
maxima into slope and offset, torch adds the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import plan
from ...gpu import LARGE_SHARED, limits_of
from ...norm import Norm, effective_eps, suppression
from ..common import noise_key
from ..jit import (
    cast,
    combine,
    dot,
    inverse_gain,
    load_scalars,
    relative_change,
    round_stochastically,
    span,
)
from ..launch import Kernel
from ..operands import aligned, cdiv, dot_precision, padded, padded_rows
from ..triton import gain_scalars
from .tiles import product_tile, weight_tile

STAT_STAGES = 3  # with 2, sm_100's largest-ρ pass spills


@triton.jit
def _base_and_delta(
    w_ptr, r_ptr, rows_ptr, p_ptr, p_base_ptr,
    N, K, m, stride_wn, stride_wk, stride_rm, stride_rk, stride_low,
    offs_n, offs_k,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One tile of base and of Δ ``[BLOCK_N, BLOCK_K]``, fp32, 0 outside W.

    ρ divides by base, which is small where W and P_base R cancel, so P_base is multiplied as two
    16-bit parts; Δ's own rounding is a relative one.
    """
    mask_n, mask_k = offs_n < N, offs_k < K
    delta = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    base = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, m, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        if rows_ptr is not None:
            row = tl.load(rows_ptr + offs_m, mask_m, other=0).to(tl.int64)
            row = tl.minimum(tl.maximum(row, 0), N - 1)
        else:
            row = offs_m.to(tl.int64)
        r = tl.load(
            r_ptr + row[:, None] * stride_rm + offs_k[None, :] * stride_rk,
            mask_m[:, None] & mask_k[None, :],
            other=0.0,
        ).to(p_ptr.dtype.element_ty)
        offs_p = offs_n[:, None] * m + offs_m[None, :]
        mask_p = mask_n[:, None] & mask_m[None, :]
        delta = dot(tl.load(p_ptr + offs_p, mask_p, other=0.0), r, delta, PRECISION)
        if p_base_ptr is not None:
            base = dot(tl.load(p_base_ptr + offs_p, mask_p, other=0.0), r, base, PRECISION)
            if p_ptr.dtype.element_ty != tl.float32:
                low = tl.load(p_base_ptr + stride_low + offs_p, mask_p, other=0.0)
                base = dot(low, r, base, PRECISION)
    w = tl.load(
        w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk,
        mask_n[:, None] & mask_k[None, :],
        other=0.0,
    )
    return base + w.to(tl.float32), delta


@Kernel
@triton.jit
def weight_stat_kernel(
    w_ptr, r_ptr, rows_ptr, p_ptr, p_base_ptr, scalars_ptr, out_ptr,
    edge, N, K, m, stride_wn, stride_wk, stride_rm, stride_rk, stride_low,
    STAT: tl.constexpr, SIGMOID_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One number a tile: the largest ρ, the sum of base², or how many M ≤ ``edge``."""
    offs_n, offs_k = span(tl.program_id(1), BLOCK_N), span(tl.program_id(0), BLOCK_K)
    base, delta = _base_and_delta(
        w_ptr, r_ptr, rows_ptr, p_ptr, p_base_ptr,
        N, K, m, stride_wn, stride_wk, stride_rm, stride_rk, stride_low, offs_n, offs_k,
        PRECISION, BLOCK_N, BLOCK_K, BLOCK_M,
    )  # fmt: skip
    if STAT == "peak":  # beyond W's edge both are 0, and so is ρ
        value = tl.max(relative_change(base, delta, tl.load(scalars_ptr)))
    elif STAT == "square":
        value = tl.sum(base * base)
    else:
        eps, slope, offset = load_scalars(scalars_ptr)
        inverse = inverse_gain(base, delta, eps, slope, offset, SIGMOID_WEIGHT)
        small = (inverse * edge >= 1.0).to(tl.float32)
        # one mask a sum: both at once spilled on sm_80
        of_rows = tl.sum(tl.where((offs_k < K)[None, :], small, 0.0), 1)
        value = tl.sum(tl.where(offs_n < N, of_rows, 0.0))
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0), value)


@Kernel
@triton.jit(do_not_specialize=["key"])
def weight_fwd_kernel(
    w_ptr, r_ptr, rows_ptr, p_ptr, p_base_ptr, scalars_ptr, factor_ptr, out_ptr,
    key, N, K, m, stride_wn, stride_wk, stride_rm, stride_rk, stride_low, stride_on, stride_ok,
    SIGMOID_WEIGHT: tl.constexpr, AVERAGED: tl.constexpr, STOCHASTIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One tile of W'. Without scalars: ``factor · base + Δ``, what the additive spaces merge to."""
    offs_n, offs_k = span(tl.program_id(1), BLOCK_N), span(tl.program_id(0), BLOCK_K)
    base, delta = _base_and_delta(
        w_ptr, r_ptr, rows_ptr, p_ptr, p_base_ptr,
        N, K, m, stride_wn, stride_wk, stride_rm, stride_rk, stride_low, offs_n, offs_k,
        PRECISION, BLOCK_N, BLOCK_K, BLOCK_M,
    )  # fmt: skip
    mask_n = offs_n < N
    if factor_ptr is not None:
        factor = tl.load(factor_ptr + offs_n, mask_n, other=0.0)[:, None]
    if scalars_ptr is not None:
        eps, slope, offset = load_scalars(scalars_ptr)
        inverse = inverse_gain(base, delta, eps, slope, offset, SIGMOID_WEIGHT)
        out = combine(base, delta, inverse, AVERAGED)
        if factor_ptr is not None:
            out = out * factor
    else:
        if factor_ptr is not None:
            base = base * factor
        out = base + delta
    if STOCHASTIC:
        out = round_stochastically(out, offs_n[:, None] * K + offs_k[None, :], key)
    else:
        out = cast(out, out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + offs_n[:, None] * stride_on + offs_k[None, :] * stride_ok,
        out,
        mask_n[:, None] & (offs_k < K)[None, :],
    )


@Kernel
@triton.jit
def weight_bwd_kernel(
    d_ptr, w_ptr, r_ptr, rows_ptr, p_ptr, p_base_ptr, scalars_ptr, factor_ptr, dp_ptr,
    N, K, m, stride_wn, stride_wk, stride_rm, stride_rk, stride_low, columns, ranks, stride_part,
    SIGMOID_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """``(D · f / M) Rᵀ`` over ``columns`` of D ``[N, K]``: the part of ∂P of the first index.

    ``ranks`` of R's m rows are not padding. Products of D and R run in D's dtype.
    """
    part = tl.program_id(0)
    offs_n, offs_j = span(tl.program_id(1), BLOCK_N), span(tl.program_id(2), BLOCK_J)
    mask_n, mask_j = offs_n < N, offs_j < ranks
    eps, slope, offset = load_scalars(scalars_ptr)
    acc = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    for start in range(0, columns, BLOCK_K):
        offs_k = part.to(tl.int64) * columns + start + tl.arange(0, BLOCK_K)
        base, delta = _base_and_delta(
            w_ptr, r_ptr, rows_ptr, p_ptr, p_base_ptr,
            N, K, m, stride_wn, stride_wk, stride_rm, stride_rk, stride_low, offs_n, offs_k,
            PRECISION, BLOCK_N, BLOCK_K, BLOCK_M,
        )  # fmt: skip
        inverse = inverse_gain(base, delta, eps, slope, offset, SIGMOID_WEIGHT)
        mask_k = offs_k < K
        mask = mask_n[:, None] & mask_k[None, :]
        d = tl.load(d_ptr + offs_n[:, None] * K + offs_k[None, :], mask, other=0.0)
        d = cast(tl.where(mask, d.to(tl.float32) * inverse, 0.0), d_ptr.dtype.element_ty)
        r = tl.load(
            r_ptr + offs_j[:, None] * stride_rm + offs_k[None, :] * stride_rk,
            mask_j[:, None] & mask_k[None, :],
            other=0.0,
        )
        acc = dot(d, tl.trans(r), acc, PRECISION)
    if factor_ptr is not None:
        acc *= tl.load(factor_ptr + offs_n, mask_n, other=0.0)[:, None]
    place = part.to(tl.int64) * stride_part + offs_n[:, None] * ranks + offs_j[None, :]
    tl.store(dp_ptr + place, acc, mask_n[:, None] & mask_j[None, :])


class Tiles:
    """W, R and P as the kernels take them, and the arguments that every launch shares.

    Args:
        weight: ``W [N, K]`` or a slice of its rows.
        source: where R's rows are read: the whole W with ``rows``, or ``R [m, K]`` with None;
            both of :func:`padded_rows`.
        rows: ``[m]`` int64 or None.
        p: ``P [N, m]`` of the same rows as ``weight``.
        p_base: :func:`summands` of P_base, of the same rows, or None.
        dtype: the compute dtype.
    """

    def __init__(
        self,
        weight: Tensor,
        source: Tensor,
        rows: Tensor | None,
        p: Tensor,
        p_base: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.weight = weight
        self.p = padded(p.to(dtype))
        self.p_base = p_base
        self.tensors = (weight, source, rows, self.p, self.p_base)
        n, k = weight.shape
        stride_low = 0 if p_base is None else p_base.stride(0)
        self.sizes = (n, k, self.p.shape[1], *weight.stride(), *source.stride(), stride_low)
        small = p_base is not None and limits_of(weight).shared_bytes < LARGE_SHARED
        tile = weight_tile(dtype, p.shape[1], aligned(k if weight.stride(1) == 1 else n), small)
        self.grid = (cdiv(k, tile["BLOCK_K"]), cdiv(n, tile["BLOCK_N"]))
        self.options = {"PRECISION": dot_precision(dtype), **tile}

    @classmethod
    def whole(
        cls, weight: Tensor, rows: Tensor, p: Tensor, p_base: Tensor | None, dtype: torch.dtype
    ) -> Tiles:
        """All of W. R is gathered in the kernel, unless its rows are scattered in memory."""
        p_base, rows = summands(p_base, dtype), padded_rows(rows)
        if weight.stride(1) == 1:
            return cls(weight, weight, rows, p, p_base, dtype)
        return cls(weight, weight.index_select(0, rows), None, p, p_base, dtype)


def summands(p_base: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``P_base [N, m]`` as padded summands ``[1 or 2, N, m]`` in ``dtype``, two of 16 bits."""
    if p_base is None:
        return None
    high = p_base.to(dtype)
    if dtype == torch.float32:
        return padded(high)[None]
    return padded(torch.stack((high, (p_base - high).to(dtype))))


def measure(tiles: Tiles, important: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor | None]:
    """The global part of the norm, on the device: ``([ε, slope, offset], f [N] or None)``."""
    weight = tiles.weight
    scalars = torch.full((3,), norm.eps, dtype=torch.float32, device=weight.device)
    if norm.eps_relative and weight.numel():
        if tiles.p_base is None:
            scalars[0] = effective_eps(weight, norm)
        else:
            square = _stat("square", tiles, scalars, norm).sum() / weight.numel()
            scalars[0] = norm.eps * square.sqrt()
    gain_scalars(_stat("peak", tiles, scalars, norm) if norm.needs_peak else scalars, scalars, norm)
    if important is None:
        return scalars, None
    count = _stat("count", tiles, scalars, norm, norm.edge).sum(dtype=torch.float64)
    return scalars, suppression(count, weight.numel(), important, norm)


def _stat(what: str, tiles: Tiles, scalars: Tensor, norm: Norm, edge: float = 0.0) -> Tensor:
    out = scalars.new_empty(tiles.grid[0] * tiles.grid[1])
    if out.numel() == 0:
        return out
    flags = {"STAT": what, "SIGMOID_WEIGHT": norm.sigmoid_weight}
    options = tiles.options | {"num_stages": STAT_STAGES}
    weight_stat_kernel[tiles.grid](
        *tiles.tensors, scalars, out, edge, *tiles.sizes, **flags, **options
    )
    return out


def fused_weight(
    tiles: Tiles,
    scalars: Tensor | None,
    factor: Tensor | None,
    norm: Norm | None,
    dtype: torch.dtype,
    seed: int | None = None,
) -> Tensor:
    """W' ``[N, K]`` in ``dtype`` and W's layout; ``factor · base + Δ`` where ``norm`` is None.

    Rounded stochastically from ``seed``, or to nearest.
    """
    out = torch.empty_like(tiles.weight, dtype=dtype)
    if out.numel() == 0:
        return out
    flags = {
        "SIGMOID_WEIGHT": 2.0 if norm is None else norm.sigmoid_weight,
        "AVERAGED": norm is not None and norm.averaged,
        "STOCHASTIC": seed is not None,
    }
    sizes = (*tiles.sizes, *out.stride())
    key = 0 if seed is None else noise_key(seed)
    weight_fwd_kernel[tiles.grid](
        *tiles.tensors, scalars, factor, out, key, *sizes, **flags, **tiles.options
    )
    return out


def grad_p(
    g: Tensor,
    x: Tensor,
    tiles: Tiles,
    rows: Tensor,
    found: tuple[Tensor, Tensor | None],
    norm: Norm,
) -> Tensor:
    """``∂P = ((f · gᵀx) / M) Rᵀ [N, m]``, fp32, in chunks of W's rows.

    ``tiles`` are those of all of W; ``found`` is ``([ε, slope, offset], f [N] or None)`` of
    :func:`measure`.
    """
    weight, p, p_base = tiles.weight, tiles.p, tiles.p_base
    (n, k), (scalars, factor), ranks = weight.shape, found, rows.numel()
    if weight.numel() == 0 or ranks == 0:
        return torch.zeros(n, ranks, dtype=torch.float32, device=g.device)
    r, g = weight.index_select(0, padded_rows(rows)).to(x.dtype), g.contiguous()
    step = plan.rows_of_chunk(n, k, x.element_size())
    wide = len(r)  # of rows that are written in whole vectors
    tile = product_tile(x.dtype, aligned(k), wide, p_base is not None)
    programs = cdiv(step, tile["BLOCK_N"]) * cdiv(wide, tile["BLOCK_J"])
    blocks_k = cdiv(k, tile["BLOCK_K"])
    parts = plan.splits(programs, blocks_k, limits_of(g).processors)
    columns = cdiv(blocks_k, parts) * tile["BLOCK_K"]
    dp = torch.empty(parts, n, wide, dtype=torch.float32, device=g.device)
    workspace = x.new_empty(step, k)
    for start in range(0, n, step):
        part = slice(start, min(n, start + step))
        d = workspace[: part.stop - start]
        torch.mm(g[:, part].t(), x, out=d)
        base_part = None if p_base is None else p_base[:, part]
        chunk = Tiles(weight[part], r, None, p[part], base_part, x.dtype)
        of_rows = None if factor is None else factor[part]
        grid = (parts, cdiv(len(d), tile["BLOCK_N"]), cdiv(wide, tile["BLOCK_J"]))
        sizes = (*chunk.sizes, columns, wide, n * wide)
        weight_bwd_kernel[grid](
            *(d, *chunk.tensors, scalars, of_rows, dp[:, part], *sizes),
            SIGMOID_WEIGHT=norm.sigmoid_weight,
            **chunk.options | tile,
        )
    whole = dp[0] if parts == 1 else dp.sum(0)
    return whole if wide == ranks else whole[:, :ranks].contiguous()


__all__ = ["Tiles", "fused_weight", "grad_p", "measure"]
