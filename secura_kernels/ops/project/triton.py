"""Kernels of P = C U and ∂U = Cᵀ ∂P, C gathered from W.

    P [N, m]  = Σ_i W[n, cols[i]] U[i, j]                _project_fwd_kernel
    ∂U [m, m] = Σ_n W[n, cols[i]] scale[n] ∂P[n, j]      _project_bwd_kernel, then a sum over splits

| tensor    | shape          | dtype: in / accumulate / out  |
|-----------|----------------|-------------------------------|
| W         | [N, K]         | bf16, fp16, fp32; any strides |
| U, ∂U, ∂P | [m, m], [N, m] | fp32 / fp32 / fp32            |
| P         | [N, m]         | – / fp32 / any                |
| partial   | [splits, m, m] | fp32                          |

Sums run in a fixed order: W's rows are split among programs, which leave their sums apart. Entries
of 16 bits are TF32 numbers as they stand, so that TF32 products with the parts of U or ∂P lose 2⁻²¹
at most (of a scaled C two parts are taken too); fp32 weights, and ROCm, multiply in fp32, or in
TF32 where torch is told to take that for fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import plan
from ...gpu import limits_of
from ..jit import cast, dot, span
from ..launch import Kernel
from ..operands import Tile, aligned, block_of, cdiv, dot_precision


@triton.jit
def _load_columns(w_ptr, cols_ptr, offs_n, offs_i, N, K, m, stride_wn, stride_wk):
    """A tile of C ``[n, i]``, fp32; columns that W does not have are 0. Without cols W is C."""
    mask_i = offs_i < m
    if cols_ptr is None:
        cols = offs_i
    else:
        cols = tl.load(cols_ptr + offs_i, mask=mask_i, other=0).to(tl.int64)
        mask_i &= (cols >= 0) & (cols < K)
    place = w_ptr + offs_n[:, None] * stride_wn + cols[None, :] * stride_wk
    return tl.load(place, mask=(offs_n < N)[:, None] & mask_i[None, :], other=0.0).to(tl.float32)


@Kernel
@triton.jit
def _project_fwd_kernel(
    w_ptr,
    cols_ptr,
    u_ptr,
    p_ptr,
    N,
    K,
    m,
    stride_wn,
    stride_wk,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    offs_n, offs_j = span(tl.program_id(0), BLOCK_N), span(tl.program_id(1), BLOCK_J)
    mask_j = offs_j < m
    acc = tl.zeros((BLOCK_N, BLOCK_J), dtype=tl.float32)
    for start in range(0, m, BLOCK_I):
        offs_i = start + tl.arange(0, BLOCK_I)
        c = _load_columns(w_ptr, cols_ptr, offs_n, offs_i, N, K, m, stride_wn, stride_wk)
        u = tl.load(
            u_ptr + offs_i[:, None] * m + offs_j[None, :],
            mask=(offs_i < m)[:, None] & mask_j[None, :],
            other=0.0,
        )
        acc = dot(c, u, acc, PRECISION)
    place = p_ptr + offs_n[:, None] * m + offs_j[None, :]
    out = cast(acc, p_ptr.dtype.element_ty)
    tl.store(place, out, mask=(offs_n < N)[:, None] & mask_j[None, :])


@Kernel
@triton.jit
def _project_bwd_kernel(
    dp_ptr, scale_ptr, w_ptr, cols_ptr, partial_ptr, N, K, m, rows, stride_wn, stride_wk,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The sum over ``rows`` rows of W, as many as a split has."""
    split = tl.program_id(2).to(tl.int64)
    offs_i, offs_j = span(tl.program_id(0), BLOCK_I), span(tl.program_id(1), BLOCK_J)
    mask_i, mask_j = offs_i < m, offs_j < m
    acc = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
    for start in range(0, rows, BLOCK_N):
        offs_n = split * rows + start + tl.arange(0, BLOCK_N)
        c = _load_columns(w_ptr, cols_ptr, offs_n, offs_i, N, K, m, stride_wn, stride_wk)
        if scale_ptr is not None:  # of C, whose tile is the smaller
            c *= tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
        dp = tl.load(
            dp_ptr + offs_n[:, None] * m + offs_j[None, :],
            mask=(offs_n < N)[:, None] & mask_j[None, :],
            other=0.0,
        )
        acc = dot(tl.trans(c), dp, acc, PRECISION)
    place = partial_ptr + split * m * m + offs_i[:, None] * m + offs_j[None, :]
    tl.store(place, acc, mask=mask_i[:, None] & mask_j[None, :])


def forward(weight: Tensor, cols: Tensor | None, u: Tensor, dtype: torch.dtype) -> Tensor:
    """``P [N, m]`` in ``dtype`` of ``W [N, K]``, ``cols [m]`` or None and ``U [m, m]``."""
    (n, m), u = (weight.shape[0], u.shape[0]), u.contiguous()
    cols = None if cols is None else cols.contiguous()
    p = u.new_empty(n, m, dtype=dtype)
    tile = _tile(weight, m, 32)
    sizes = (n, weight.shape[1], m, *weight.stride())
    _project_fwd_kernel[(cdiv(n, tile["BLOCK_N"]), cdiv(m, tile["BLOCK_J"]))](
        weight, cols, u, p, *sizes, PRECISION=_precision(weight), **tile
    )
    return p


def backward(dp: Tensor, weight: Tensor, cols: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """``∂U [m, m]`` in fp32 of ``∂P [N, m]`` and ``row_scale [N]`` or None."""
    (n, m), dp = dp.shape, dp.contiguous()
    tile = _tile(weight, m, plan.ROWS_OF_A_SPLIT)
    rows = cdiv(cdiv(n, tile["BLOCK_N"]), plan.MOST_ROW_SPLITS) * tile["BLOCK_N"]
    splits = cdiv(n, rows)
    partial = dp.new_empty(splits, m, m)
    scale = None if row_scale is None else row_scale.contiguous()
    cols = None if cols is None else cols.contiguous()
    if scale is not None and not aligned(m):  # addresses one by one, and the scale: sm_80 spills
        tile["BLOCK_J"] = min(tile["BLOCK_J"], 64)
    sizes = (n, weight.shape[1], m, rows, *weight.stride())
    _project_bwd_kernel[(cdiv(m, tile["BLOCK_I"]), cdiv(m, tile["BLOCK_J"]), splits)](
        *(dp, scale, weight, cols, partial, *sizes), PRECISION=_precision(weight), **tile
    )
    return partial.sum(0)


def _tile(weight: Tensor, m: int, block_n: int) -> Tile:
    """Rows of W, columns of C, and columns of the result."""
    block_j = block_of(m, 16, 64 if weight.dtype == torch.float32 else 128)
    cut = {"BLOCK_N": block_n, "BLOCK_I": 32, "BLOCK_J": block_j}
    return cut | {"num_warps": 4, "num_stages": 2}


def _precision(weight: Tensor) -> str:
    parts = weight.dtype != torch.float32 and not limits_of(weight).rocm
    return "tf32x3" if parts else dot_precision(torch.float32)


__all__ = ["backward", "forward"]
