"""The kernel of the space ``channel``: from P to Q and base_scale in one launch.

    ‖ΔW_i‖² = P_i (R Rᵀ) P_iᵀ      ρ_i = ‖ΔW_i‖ / (‖W_base,i‖ + ε)      M_i from ρ_i
    Q_i = f P_i / M_i + base_scale_i P_base,i      base_scale = 2 f / M averaged, f gated

| tensor              | shape  | dtype          | in the kernel                        |
|---------------------|--------|----------------|--------------------------------------|
| P, P_base, Q        | [N, m] | bf16 fp16 fp32 | fp32; P again and again, from cache  |
| gram = R Rᵀ         | [m, m] | fp32           | products of TF32 parts, fp32 on ROCm |
| norms, base_scale,  | [N]    | fp32           |                                      |
| f/M                 |        |                |                                      |

N·m² multiplications, (4 + s) N m bytes, s an element's of Q. The forms that look at the largest ρ,
and the restraint, which counts gains, take two launches with [N] sized work between them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dispatch import absent
from ...gpu import limits_of
from ...norm import Norm
from ..jit import cast, dot, inverse_gain, span
from ..launch import Kernel
from ..operands import Tile, block_of, cdiv

PRECISION = "tf32x3"  # on CUDA: right to 1e-7 where "ieee" is to 4e-8, and free of spills
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@Kernel
@triton.jit
def _channel_kernel(
    p_ptr, base_ptr, gram_ptr, base_norms_ptr, delta_norms_ptr, factor_ptr,
    eps, slope, offset, q_ptr, base_scale_ptr, inverse_ptr,
    N, m, stride_pn, stride_bn,
    POINTERS: tl.constexpr, SIGMOID_WEIGHT: tl.constexpr, AVERAGED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """‖ΔW_i‖ where gram is given, else read; Q, base_scale and f/M where Q is."""
    offs_n = span(tl.program_id(0), BLOCK_N)
    mask_n = offs_n < N
    if gram_ptr is not None:
        # Squares are of P over its row's largest entry and of R over its longest row: of P and R as
        # they are they overflow where ‖ΔW_i‖ itself is far from it.
        largest = tl.full((BLOCK_N,), TINY, dtype=tl.float32)
        longest = tl.full((BLOCK_M,), TINY, dtype=tl.float32)
        for start in range(0, m, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            mask_m = offs_m < m
            p_block = p_ptr + offs_n[:, None] * stride_pn + offs_m[None, :]
            p = tl.load(p_block, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(p.to(tl.float32)), axis=1))
            diagonal = tl.load(gram_ptr + offs_m * (m + 1), mask=mask_m, other=0.0)
            longest = tl.maximum(longest, diagonal)
        longest = tl.max(longest, axis=0)
        of_p, of_gram = 1.0 / largest, 1.0 / longest
        squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for start in range(0, m, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            mask_m = offs_m < m
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for inner in range(0, m, BLOCK_M):
                offs_k = inner + tl.arange(0, BLOCK_M)
                mask_k = offs_k < m
                p_block = p_ptr + offs_n[:, None] * stride_pn + offs_k[None, :]
                p = tl.load(p_block, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
                gram_block = gram_ptr + offs_k[:, None] * m + offs_m[None, :]
                gram = tl.load(gram_block, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
                acc = dot(p.to(tl.float32) * of_p[:, None], gram * of_gram, acc, PRECISION)
            p_block = p_ptr + offs_n[:, None] * stride_pn + offs_m[None, :]
            p = tl.load(p_block, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
            squares += tl.sum(acc * (p.to(tl.float32) * of_p[:, None]), axis=1)
        squares = tl.maximum(squares, 0.0, propagate_nan=tl.PropagateNan.ALL)
        delta = tl.sqrt(squares) * largest * tl.sqrt(longest)
        tl.store(delta_norms_ptr + offs_n, delta, mask=mask_n)
    if q_ptr is not None:
        if POINTERS:
            eps = tl.load(eps)
            slope = tl.load(slope)
            offset = tl.load(offset)
        if gram_ptr is None:
            delta = tl.load(delta_norms_ptr + offs_n, mask=mask_n, other=0.0)
        base = tl.load(base_norms_ptr + offs_n, mask=mask_n, other=1.0)
        inverse = inverse_gain(base, delta, eps, slope, offset, SIGMOID_WEIGHT)
        base_scale = tl.full((BLOCK_N,), 1.0, dtype=tl.float32)
        if factor_ptr is not None:
            base_scale = tl.load(factor_ptr + offs_n, mask=mask_n, other=1.0).to(tl.float32)
            inverse *= base_scale
        if AVERAGED:
            base_scale = 2.0 * inverse
        tl.store(inverse_ptr + offs_n, inverse, mask=mask_n)
        if base_scale_ptr is not None:
            tl.store(base_scale_ptr + offs_n, base_scale, mask=mask_n)
        for start in range(0, m, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            mask = mask_n[:, None] & (offs_m < m)[None, :]
            p_block = p_ptr + offs_n[:, None] * stride_pn + offs_m[None, :]
            q = tl.load(p_block, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
            if base_ptr is not None:
                base_block = base_ptr + offs_n[:, None] * stride_bn + offs_m[None, :]
                q += base_scale[:, None] * tl.load(base_block, mask=mask, other=0.0).to(tl.float32)
            q_block = q_ptr + offs_n[:, None] * m + offs_m[None, :]
            tl.store(q_block, cast(q, q_ptr.dtype.element_ty), mask=mask)


def delta_norms(p: Tensor, gram: Tensor) -> Tensor:
    """``‖ΔW_i‖ [N]`` in fp32, from ``P [N, m]`` and ``gram = R Rᵀ [m, m]``."""
    out = p.new_empty(p.shape[0], dtype=torch.float32)
    tensors = (p, None, gram, None, out, None, 0.0, 0.0, 0.0, None, None, None)
    _launch(tensors, SIGMOID_WEIGHT=0.0, AVERAGED=False)
    return out


def channel_product(
    p: Tensor,
    p_base: Tensor | None,
    gram: Tensor | None,
    base_norms: Tensor,
    scalars: tuple[Any, Any, Any],
    norm: Norm,
    dtype: torch.dtype,
    norms: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(Q [N, m], base_scale [N] or empty where it is 1, f/M [N])`` in one launch.

    Args:
        p, p_base: ``[N, m]``.
        gram: ``[m, m]``, or None where ``norms`` are given.
        base_norms: ``‖W_base,i‖ [N]``.
        scalars: ``(ε, slope, offset)``, all numbers or all 0-dim tensors.
        norm: the norm.
        dtype: of Q.
        norms: ``‖ΔW_i‖ [N]`` of :func:`delta_norms`, or None to measure them here.
        factor: ``[N]`` of the restraint, or None.
    """
    q = torch.empty_like(p, dtype=dtype, memory_format=torch.contiguous_format)
    inverse = p.new_empty(p.shape[0], dtype=torch.float32)
    base_scale = torch.empty_like(inverse) if norm.averaged or factor is not None else None
    found = torch.empty_like(inverse) if norms is None else norms
    _launch(
        (p, p_base, gram, base_norms, found, factor, *scalars, q, base_scale, inverse),
        SIGMOID_WEIGHT=norm.sigmoid_weight,
        AVERAGED=norm.averaged,
    )
    return q, absent(inverse) if base_scale is None else base_scale, inverse


def _launch(arguments: tuple[Any, ...], **flags: Any) -> None:
    """The kernel on its arguments from P to f/M, contiguous and fp32 where it reads them so."""
    p, p_base, gram, base_norms, norms, factor, *rest = arguments
    (n, m), eps = p.shape, rest[0]
    if n == 0:
        return
    p = p if p.stride(1) == 1 else p.contiguous()
    p_base = None if p_base is None else p_base.contiguous()
    gram, base_norms = (None if t is None else t.float().contiguous() for t in (gram, base_norms))
    factor = None if factor is None else factor.contiguous()
    flags["POINTERS"] = isinstance(eps, Tensor)
    flags["PRECISION"] = "ieee" if limits_of(p).rocm else PRECISION
    tile: Tile = {"BLOCK_N": 16, "BLOCK_M": block_of(m, 16, 64), "num_warps": 4, "num_stages": 1}
    _channel_kernel[(cdiv(n, tile["BLOCK_N"]),)](
        *(p, p_base, gram, base_norms, norms, factor, *rest),
        *(n, m, p.stride(0), m),
        **flags,
        **tile,
    )


__all__ = ["channel_product", "delta_norms"]
