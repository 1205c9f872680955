"""The jit functions of the space ``weight``: formulas, dtypes and bytes stand in :mod:`.weight`."""

# Jit functions have no Python return type; Triton wants plain if/else.
# ruff: noqa: ANN201

from __future__ import annotations

import triton
import triton.language as tl

from .common import cast, combine, dot, inverse_gain, relative_change, span
from .launch import Kernel


@triton.jit
def _base_and_delta(
    w_ptr, r_ptr, rows_ptr, p_ptr, p_base_ptr,
    N, K, M, stride_wn, stride_wk, stride_rm, stride_rk, stride_low,
    offs_n, offs_k,
    HAS_BASE: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One tile of base and of Δ ``[BLOCK_N, BLOCK_K]``, fp32, 0 outside W.

    ρ divides by base, which is small where W and P_base R cancel, so P_base is multiplied as two
    16-bit parts; Δ's own rounding is a relative one.
    """
    mask_n, mask_k = offs_n < N, offs_k < K
    delta = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    base = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, M, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        if GATHER:
            row = tl.load(rows_ptr + offs_m, mask_m, other=0).to(tl.int64)
        else:
            row = offs_m.to(tl.int64)
        r = tl.load(
            r_ptr + row[:, None] * stride_rm + offs_k[None, :] * stride_rk,
            mask_m[:, None] & mask_k[None, :], other=0.0,
        ).to(p_ptr.dtype.element_ty)  # fmt: skip
        offs_p = offs_n[:, None] * M + offs_m[None, :]
        mask_p = mask_n[:, None] & mask_m[None, :]
        delta = dot(tl.load(p_ptr + offs_p, mask_p, other=0.0), r, delta, PRECISION)
        if HAS_BASE:
            base = dot(tl.load(p_base_ptr + offs_p, mask_p, other=0.0), r, base, PRECISION)
            if p_ptr.dtype.element_ty != tl.float32:
                low = tl.load(p_base_ptr + stride_low + offs_p, mask_p, other=0.0)
                base = dot(low, r, base, PRECISION)
    w = tl.load(
        w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk,
        mask_n[:, None] & mask_k[None, :], other=0.0,
    )  # fmt: skip
    return base + w.to(tl.float32), delta


@Kernel
@triton.jit
def weight_stat_kernel(
    w_ptr, r_ptr, rows_ptr, p_ptr, p_base_ptr, scalars_ptr, out_ptr,
    edge, N, K, M, stride_wn, stride_wk, stride_rm, stride_rk, stride_low,
    STAT: tl.constexpr, SIGMOID_WEIGHT: tl.constexpr,
    HAS_BASE: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One number a tile: the largest ρ, the sum of base², or how many M ≤ ``edge``."""
    offs_n, offs_k = span(tl.program_id(1), BLOCK_N), span(tl.program_id(0), BLOCK_K)
    base, delta = _base_and_delta(
        w_ptr, r_ptr, rows_ptr, p_ptr, p_base_ptr,
        N, K, M, stride_wn, stride_wk, stride_rm, stride_rk, stride_low, offs_n, offs_k,
        HAS_BASE, GATHER, PRECISION, BLOCK_N, BLOCK_K, BLOCK_M,
    )  # fmt: skip
    if STAT == "peak":  # beyond W's edge both are 0, and so is ρ
        value = tl.max(relative_change(base, delta, tl.load(scalars_ptr)))
    elif STAT == "square":
        value = tl.sum(base * base)
    else:
        inverse = inverse_gain(
            base, delta, tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2),
            SIGMOID_WEIGHT,
        )  # fmt: skip
        mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
        small = (inverse * edge >= 1.0) & mask
        value = tl.sum(small.to(tl.float32))
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0), value)


@Kernel
@triton.jit(do_not_specialize=["count"])
def weight_scalars_kernel(
    peaks_ptr, scalars_ptr, count, scale, FORM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Slope and offset of the gain (see ``gain.coefficients``) after ε; one program."""
    slope, offset = scale, 0.0
    if FORM != "calibrated":
        peak = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, count, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            peak = tl.maximum(peak, tl.load(peaks_ptr + offs, offs < count, other=0.0))
        peak = tl.max(peak)
        if FORM == "paper":
            slope = scale / tl.maximum(peak, 1e-30)
            offset = -0.5 * scale
        slope = tl.where(peak == 0.0, 0.0, slope)
        offset = tl.where(peak == 0.0, float("-inf"), offset)
    tl.store(scalars_ptr + 1, slope)
    tl.store(scalars_ptr + 2, offset)


@Kernel
@triton.jit(do_not_specialize=["seed"])
def weight_fwd_kernel(
    w_ptr, r_ptr, rows_ptr, p_ptr, p_base_ptr, scalars_ptr, factor_ptr, out_ptr,
    seed, N, K, M, stride_wn, stride_wk, stride_rm, stride_rk, stride_low, stride_on, stride_ok,
    SIGMOID_WEIGHT: tl.constexpr, NORMED: tl.constexpr, AVERAGED: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_FACTOR: tl.constexpr, GATHER: tl.constexpr,
    STOCHASTIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One tile of W'. Without NORMED: ``factor · base + Δ``, what the additive spaces merge to."""
    offs_n, offs_k = span(tl.program_id(1), BLOCK_N), span(tl.program_id(0), BLOCK_K)
    base, delta = _base_and_delta(
        w_ptr, r_ptr, rows_ptr, p_ptr, p_base_ptr,
        N, K, M, stride_wn, stride_wk, stride_rm, stride_rk, stride_low, offs_n, offs_k,
        HAS_BASE, GATHER, PRECISION, BLOCK_N, BLOCK_K, BLOCK_M,
    )  # fmt: skip
    mask_n = offs_n < N
    if HAS_FACTOR:
        factor = tl.load(factor_ptr + offs_n, mask_n, other=0.0)[:, None]
    if NORMED:
        inverse = inverse_gain(
            base, delta, tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2),
            SIGMOID_WEIGHT,
        )  # fmt: skip
        out = combine(base, delta, inverse, AVERAGED)
        if HAS_FACTOR:
            out = out * factor
    else:
        if HAS_FACTOR:
            base = base * factor
        out = base + delta
    if STOCHASTIC:
        out = _round_stochastically(out, seed, offs_n[:, None] * K + offs_k[None, :])
    else:
        out = cast(out, out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + offs_n[:, None] * stride_on + offs_k[None, :] * stride_ok,
        out,
        mask_n[:, None] & (offs_k < K)[None, :],
    )


@triton.jit
def _round_stochastically(x, seed, offset):
    """fp32 to a bf16 neighbour, up with the probability of the part cut off.

    The draw depends on the seed and the entry's place alone, not on the tiles; values that bf16
    holds exactly stay, as do inf and NaN.
    """
    bits = x.to(tl.uint32, bitcast=True)
    noise = tl.randint(seed, offset).to(tl.uint32, bitcast=True) >> 16
    rounded = ((bits + noise) >> 16) << 16
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, bits).to(tl.float32, bitcast=True).to(tl.bfloat16)


@Kernel
@triton.jit
def weight_bwd_kernel(
    d_ptr, w_ptr, r_ptr, rows_ptr, p_ptr, p_base_ptr, scalars_ptr, factor_ptr,
    N, K, M, stride_wn, stride_wk, stride_rm, stride_rk, stride_low,
    SIGMOID_WEIGHT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_FACTOR: tl.constexpr,
    GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``D ← D · f / M`` in place, D ``[N, K]`` contiguous: one chunk of gᵀx."""
    offs_n, offs_k = span(tl.program_id(1), BLOCK_N), span(tl.program_id(0), BLOCK_K)
    base, delta = _base_and_delta(
        w_ptr, r_ptr, rows_ptr, p_ptr, p_base_ptr,
        N, K, M, stride_wn, stride_wk, stride_rm, stride_rk, stride_low, offs_n, offs_k,
        HAS_BASE, GATHER, PRECISION, BLOCK_N, BLOCK_K, BLOCK_M,
    )  # fmt: skip
    inverse = inverse_gain(
        base, delta, tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2),
        SIGMOID_WEIGHT,
    )  # fmt: skip
    mask_n = offs_n < N
    if HAS_FACTOR:
        inverse *= tl.load(factor_ptr + offs_n, mask_n, other=0.0)[:, None]
    offs_d = offs_n[:, None] * K + offs_k[None, :]
    mask = mask_n[:, None] & (offs_k < K)[None, :]
    d = tl.load(d_ptr + offs_d, mask, other=0.0).to(tl.float32)
    tl.store(d_ptr + offs_d, cast(d * inverse, d_ptr.dtype.element_ty), mask)
