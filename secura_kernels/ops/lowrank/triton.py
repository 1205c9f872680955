"""Kernels of the additive spaces: the gather, the thin product, the gradient of the output.

    z    = (y[:, rows] − b[rows]) · z_scale                            _gather_kernel
    out  = base_scale · (y − b) + b + δb + z Qᵀ  (or without the − b)  _add_product_kernel
    dy   = base_scale · g,  h = (g Q) · z_scale                        _output_gradient_kernel
    dy[:, rows] += h                                                   _add_columns_kernel

| tensor            | shape  | dtype          | | in the kernel                               |
|-------------------|--------|----------------|-|---------------------------------------------|
| y, out            | [T, N] | bf16 fp16 fp32 | | read and written once, any strides          |
| g, dy             | [T, N] | the same       | | the same, rows without gaps: else g copied  |
| z                 | [T, m] | y's            | | operand of the matrix instructions          |
| Q                 | [N, m] | y's            | | the same                                    |
| base_scale, b, δb | [N]    | any            | | fp32                                        |

Sums run in fp32 in a fixed order: no atomics, the same bits each time. T is a number of tokens, for
which nothing is compiled anew. Rows that y does not have read as 0 and are not written. What is
saved and what rebuilt: :mod:`.op`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import plan
from ...gpu import limits_of
from ..jit import cast, dot, span
from ..launch import Kernel
from ..operands import Tile, aligned, block_of, cdiv, dot_precision, padded, unit_stride


# Rows that do not start aligned are read an element at a time, each at an address of its own:
# smaller tiles then, whose addresses fit in registers.
@functools.cache
def _product_tile(dtype: torch.dtype, m: int, is_aligned: bool) -> Tile:
    """Tokens, outputs, and how much of m at a time."""
    if not is_aligned:
        block_t, block_n, most = 64, 32, 32
    elif dtype == torch.float32:
        block_t, block_n, most = 32, 64, 32
    else:
        block_t, block_n, most = 128, 64, 64
    cut = {"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_M": block_of(m, 16, most)}
    return cut | {"num_warps": 8, "num_stages": 2}


@functools.cache
def _gradient_tile(dtype: torch.dtype, m: int, is_aligned: bool) -> Tile:
    """Tokens and outputs at a time, and all of m."""
    block_m = block_of(m, 16, 512)
    block_t, block_n, warps, stages = 16, 32, 8, 2
    if dtype == torch.float32:
        block_t, stages = 32, 1
    elif is_aligned and block_m <= 128:
        block_t, block_n, warps, stages = 64, 64, 4 if block_m <= 64 else 8, 4
    elif is_aligned and block_m == 256:
        block_t, block_n = 32, 64
    cut = {"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_M": block_m}
    return cut | {"num_warps": warps, "num_stages": stages}


@functools.cache
def _columns_tile(m: int) -> Tile:
    """Tokens and rows of R that are gathered, or added to, by one program."""
    return {"BLOCK_T": 16, "BLOCK_M": block_of(m, 16, 64), "num_warps": 8, "num_stages": 1}


@Kernel
@triton.jit(do_not_specialize=["T"])
def _gather_kernel(
    y_ptr, bias_ptr, rows_ptr, scale_ptr, z_ptr,
    T, N, m, stride_yt, stride_yn, stride_st, stride_sm, stride_zt,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(m, BLOCK_M)
    pid = tl.program_id(0)
    offs_t, offs_m = span(pid // blocks_m, BLOCK_T), span(pid % blocks_m, BLOCK_M)
    mask_t, mask_m = offs_t < T, offs_m < m
    mask = mask_t[:, None] & mask_m[None, :]
    rows = tl.load(rows_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    inside = mask_m & (rows >= 0) & (rows < N)
    y = y_ptr + offs_t[:, None] * stride_yt + rows[None, :] * stride_yn
    z = tl.load(y, mask=mask_t[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z -= tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)[None, :]
    if scale_ptr is not None:
        scale = scale_ptr + offs_t[:, None] * stride_st + offs_m[None, :] * stride_sm
        z *= tl.load(scale, mask=mask, other=0.0).to(tl.float32)
    out = z_ptr + offs_t[:, None] * stride_zt + offs_m[None, :]
    tl.store(out, cast(z, z_ptr.dtype.element_ty), mask=mask)


@Kernel
@triton.jit(do_not_specialize=["T"])
def _add_product_kernel(
    y_ptr, z_ptr, q_ptr, base_scale_ptr, bias_ptr, delta_ptr, out_ptr,
    T, N, m, stride_yt, stride_yn, stride_zt, stride_zm, stride_qn, stride_ot, stride_on,
    BIAS_INSIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    offs_t, offs_n = span(pid // blocks_n, BLOCK_T), span(pid % blocks_n, BLOCK_N)
    mask_t, mask_n = offs_t < T, offs_n < N
    mask = mask_t[:, None] & mask_n[None, :]
    y_block = y_ptr + offs_t[:, None] * stride_yt + offs_n[None, :] * stride_yn
    y = tl.load(y_block, mask=mask, other=0.0)
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in range(0, m, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        z_block = z_ptr + offs_t[:, None] * stride_zt + offs_m[None, :] * stride_zm
        z = tl.load(z_block, mask=mask_t[:, None] & mask_m[None, :], other=0.0)
        q_block = q_ptr + offs_n[:, None] * stride_qn + offs_m[None, :]
        q = tl.load(q_block, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
        acc = dot(z, tl.trans(q), acc, PRECISION)
    y = y.to(tl.float32)
    if base_scale_ptr is not None:
        base_scale = tl.load(base_scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        y *= base_scale[None, :]
    acc += y
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if BIAS_INSIDE:
            bias *= 1.0 - base_scale
        acc += bias[None, :]
    if delta_ptr is not None:
        acc += tl.load(delta_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out_block = out_ptr + offs_t[:, None] * stride_ot + offs_n[None, :] * stride_on
    tl.store(out_block, cast(acc, out_ptr.dtype.element_ty), mask=mask)


@Kernel
@triton.jit(do_not_specialize=["T"])
def _output_gradient_kernel(
    g_ptr, q_ptr, base_scale_ptr, scale_ptr, dy_ptr, h_ptr,
    T, N, m, width, stride_gt, stride_dt,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dy of the ``width`` columns of the program's second index, and their part of h."""
    part = tl.program_id(1)
    offs_t = span(tl.program_id(0), BLOCK_T)
    offs_m = tl.arange(0, BLOCK_M)
    mask_t, mask_m = offs_t < T, offs_m < m
    h = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
    for start in range(0, width, BLOCK_N):
        offs_n = part * width + start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        mask = mask_t[:, None] & mask_n[None, :]
        g_block = g_ptr + offs_t[:, None] * stride_gt + offs_n[None, :]
        g = tl.load(g_block, mask=mask, other=0.0)
        q_block = q_ptr + offs_n[:, None] * m + offs_m[None, :]
        q = tl.load(q_block, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
        h = dot(g, q, h, PRECISION)
        dy = g
        if base_scale_ptr is not None:
            base_scale = tl.load(base_scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            dy = cast(g.to(tl.float32) * base_scale[None, :], dy_ptr.dtype.element_ty)
        tl.store(dy_ptr + offs_t[:, None] * stride_dt + offs_n[None, :], dy, mask=mask)
    place_h = offs_t[:, None] * m + offs_m[None, :]
    mask = mask_t[:, None] & mask_m[None, :]
    if scale_ptr is not None:
        h *= tl.load(scale_ptr + place_h, mask=mask, other=0.0).to(tl.float32)
    tl.store(h_ptr + part.to(tl.int64) * T * m + place_h, h, mask=mask)


@Kernel
@triton.jit(do_not_specialize=["T", "parts"])
def _add_columns_kernel(
    base_ptr, base_scale_ptr, h_ptr, rows_ptr, dy_ptr,
    T, N, m, parts, stride_bt, stride_ht, stride_dt,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(m, BLOCK_M)
    pid = tl.program_id(0)
    offs_t, offs_m = span(pid // blocks_m, BLOCK_T), span(pid % blocks_m, BLOCK_M)
    mask_m = offs_m < m
    rows = tl.load(rows_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    mask_m &= (rows >= 0) & (rows < N)
    mask = (offs_t < T)[:, None] & mask_m[None, :]
    base = base_ptr + offs_t[:, None] * stride_bt + rows[None, :]
    base = tl.load(base, mask=mask, other=0.0).to(tl.float32)
    if base_scale_ptr is not None:
        base *= tl.load(base_scale_ptr + rows, mask=mask_m, other=0.0).to(tl.float32)[None, :]
    # A row that is named twice has one column: it takes the sum of both, stored once.
    h = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
    for start in range(0, m, BLOCK_M):
        others = start + tl.arange(0, BLOCK_M)
        mask_o = others < m
        rows_o = tl.load(rows_ptr + others, mask=mask_o, other=-1).to(tl.int64)
        place_h = h_ptr + offs_t[:, None] * stride_ht + others[None, :]
        mask_h = (offs_t < T)[:, None] & mask_o[None, :]
        part_h = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
        for _ in range(0, parts):
            part_h += tl.load(place_h, mask=mask_h, other=0.0)
            place_h += T.to(tl.int64) * stride_ht
        same = (rows_o[:, None] == rows[None, :]).to(tl.float32)
        h = dot(part_h, same, h, "ieee")
    # Where base is dy, what another program stores there must not be read as base: of all that name
    # a row the first alone stores.
    first = offs_m
    for start in range(0, m, BLOCK_M):
        others = start + tl.arange(0, BLOCK_M)
        rows_o = tl.load(rows_ptr + others, mask=others < m, other=-1).to(tl.int64)
        same = rows_o[:, None] == rows[None, :]
        first = tl.minimum(first, tl.min(tl.where(same, others[:, None], m), axis=0))
    mask &= (first == offs_m)[None, :]
    dy = dy_ptr + offs_t[:, None] * stride_dt + rows[None, :]
    tl.store(dy, cast(base + h, dy_ptr.dtype.element_ty), mask=mask)


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def gather(y: Tensor, bias: Tensor | None, rows: Tensor, z_scale: Tensor | None) -> Tensor:
    """``z [T, m]`` of ``y [T, N]``, bias ``[N]``, rows ``[m]`` and z_scale ``[T, m]``."""
    t, m = y.shape[0], rows.numel()
    z = y.new_empty(t, m)
    tile = _columns_tile(m)
    grid = (cdiv(t, tile["BLOCK_T"]) * cdiv(m, tile["BLOCK_M"]),)
    if z.numel():
        tensors = (y, _vector(bias), rows.contiguous(), z_scale, z)
        sizes = (t, y.shape[1], m, *_strides(y), *_strides(z_scale), m)
        _gather_kernel[grid](*tensors, *sizes, **tile)
    return z


def add_product(
    y: Tensor,
    z: Tensor,
    q: Tensor,
    base_scale: Tensor | None = None,
    bias: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    bias_inside: bool = False,
    out: Tensor,
) -> Tensor:
    """``out = base_scale · y + z Qᵀ + b + δb``; with ``b · (1 − base_scale)`` where y has the bias.

    In place with base_scale and biases None it is one cuBLAS ``addmm_``, which moves no byte more
    than the kernel does; into a new tensor cuBLAS would copy y first, so the kernel it is.

    Args:
        y: ``[T, N]``, any strides.
        z: ``[T, m]``, any strides; padded or not.
        q: ``[N, m]``.
        base_scale, bias, delta_bias: ``[N]`` or None.
        bias_inside: whether y includes the bias.
        out: ``[T, N]``, what to write; y itself to work in place.
    """
    if bias_inside and base_scale is None:
        bias = None
    if out.numel() == 0:
        return out
    q = padded(q)
    (t, n), m = y.shape, q.shape[1]
    z = z if z.shape[1] == m else padded(z)
    if out is y and base_scale is None and bias is None and delta_bias is None:
        return y.addmm_(z, q.t())
    tile = _product_tile(y.dtype, m, aligned(n if y.stride(1) == 1 else t))
    tensors = (y, z, q, _vector(base_scale), _vector(bias), _vector(delta_bias), out)
    sizes = (t, n, m, *_strides(y), *_strides(z), m, *_strides(out))
    flags = {"BIAS_INSIDE": bias_inside, "PRECISION": dot_precision(y.dtype)}
    grid = (cdiv(t, tile["BLOCK_T"]) * cdiv(n, tile["BLOCK_N"]),)
    _add_product_kernel[grid](*tensors, *sizes, **flags, **tile)
    return out


def output_gradient(
    g: Tensor, rows: Tensor, q: Tensor, base_scale: Tensor | None, z_scale: Tensor | None
) -> Tensor:
    """``dy [T, N] = base_scale · g``, ``(g Q) · z_scale`` added to columns ``rows``; g is kept."""
    (t, n), m = g.shape, q.shape[1]
    dy = torch.empty_like(g, memory_format=torch.contiguous_format)
    g, q_padded = unit_stride(g), padded(q)
    z_scale = None if z_scale is None else padded(z_scale)
    tile = _gradient_tile(g.dtype, m, aligned(n))
    if dy.numel() == 0:
        return dy
    programs, blocks_n = cdiv(t, tile["BLOCK_T"]), cdiv(n, tile["BLOCK_N"])
    parts = plan.splits(programs, blocks_n, limits_of(g).processors)
    h = g.new_empty(parts, t, q_padded.shape[1], dtype=torch.float32)
    tensors = (g, q_padded, _vector(base_scale), z_scale, dy, h)
    width = cdiv(blocks_n, parts) * tile["BLOCK_N"]
    sizes = (t, n, q_padded.shape[1], width, g.stride(0), n)
    precision = dot_precision(g.dtype)
    _output_gradient_kernel[(programs, parts)](*tensors, *sizes, **tile, PRECISION=precision)
    if m:
        add_columns(g, base_scale, h, rows, dy)
    return dy


def add_columns(
    base: Tensor, base_scale: Tensor | None, h: Tensor, rows: Tensor, dy: Tensor
) -> None:
    """``dy[:, rows] = base_scale[rows] · base[:, rows] + Σ h``, rounded once; base may be dy.

    Args:
        base, dy: ``[T, N]``, their rows without gaps.
        base_scale: ``[N]`` or None for 1.
        h: ``[parts, T, m]`` or wider, contiguous, fp32, to be summed over its parts.
        rows: ``[m]``; one named twice takes the sum of both columns of h.
    """
    (t, n), m = base.shape, rows.numel()
    tile = _columns_tile(m)
    tensors = (base, _vector(base_scale), h, rows.contiguous(), dy)
    sizes = (t, n, m, h.shape[0], base.stride(0), h.stride(1), dy.stride(0))
    grid = (cdiv(t, tile["BLOCK_T"]) * cdiv(m, tile["BLOCK_M"]),)
    _add_columns_kernel[grid](*tensors, *sizes, **tile)


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


__all__ = ["add_columns", "add_product", "gather", "output_gradient"]
