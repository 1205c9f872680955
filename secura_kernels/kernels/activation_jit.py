"""The jit kernels of the space ``activation``; formulas, bytes and launchers: ``activation.py``."""

# Jit functions have no Python return type.
# ruff: noqa: ANN201

from __future__ import annotations

import triton
import triton.language as tl

from .common import cast, combine, dot, inverse_gain, relative_change, span
from .launch import Kernel


@triton.jit
def _load_rows(ptr, offs, offs_m, size, m):
    """A tile of z [T, m] or P [N, m], both contiguous, m a multiple of 16."""
    mask = (offs[:, None] < size) & (offs_m[None, :] < m)
    return tl.load(ptr + offs[:, None] * m + offs_m[None, :], mask=mask, other=0.0)


@triton.jit
def _load_chunk(ptr, offs, size, m, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr):
    """The rows of z or P where m is one chunk and ``ptr`` is not None; else nothing to be read."""
    tile = 0.0
    if CHUNKS == 1 and ptr is not None:
        tile = _load_rows(ptr, offs, tl.arange(0, BLOCK_M), size, m)
    return tile


@triton.jit
def _add_product(
    acc, z, p, z_ptr, p_ptr, offs_t, offs_n, t, n, m,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``acc + z Pᵀ`` of one tile, from the tiles ``z``, ``p`` where m is one chunk, else memory."""
    offs_m = tl.arange(0, BLOCK_M)
    if CHUNKS == 1:
        acc = dot(z, tl.trans(p), acc, PRECISION)
    else:
        for chunk in tl.range(0, CHUNKS, num_stages=STAGES):
            z_part = _load_rows(z_ptr, offs_t, chunk * BLOCK_M + offs_m, t, m)
            p_part = _load_rows(p_ptr, offs_n, chunk * BLOCK_M + offs_m, n, m)
            acc = dot(z_part, tl.trans(p_part), acc, PRECISION)
    return acc


@triton.jit
def _load_z(z_ptr, zd_ptr, offs_t, t, m, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr):
    """This block's z and zd where m is one chunk; ``z_ptr`` is None where nothing reads z alone."""
    zd = _load_chunk(zd_ptr, offs_t, t, m, BLOCK_M, CHUNKS)
    z = zd
    if z_ptr is not None:
        z = _load_chunk(z_ptr, offs_t, t, m, BLOCK_M, CHUNKS)
    return z, zd


@triton.jit
def _base_and_delta(
    z, zd, p, p_base, y0_ptr, z_ptr, zd_ptr, p_ptr, p_base_ptr, delta_bias_ptr, offs_t, offs_n,
    t, n, m, stride_y0, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    mask = (offs_t[:, None] < t) & (offs_n[None, :] < n)
    base = tl.load(y0_ptr + offs_t[:, None] * stride_y0 + offs_n[None, :], mask=mask, other=0.0)
    base = base.to(tl.float32)
    if p_base_ptr is not None:
        base = _add_product(
            base, z, p_base, z_ptr, p_base_ptr, offs_t, offs_n, t, n, m, PRECISION, BLOCK_M,
            CHUNKS, STAGES,
        )  # fmt: skip
    delta = tl.zeros_like(base)
    delta = _add_product(
        delta, zd, p, zd_ptr, p_ptr, offs_t, offs_n, t, n, m, PRECISION, BLOCK_M, CHUNKS, STAGES
    )
    if delta_bias_ptr is not None:
        delta += tl.load(delta_bias_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[None]
    return base, delta


@triton.jit
def _load_scalars(ptr):
    """ε, slope and offset where the forward measured them."""
    return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)


@Kernel
@triton.jit(do_not_specialize=["t", "tiles", "programs_n"])
def activation_fwd_kernel(
    y0_ptr, z_ptr, zd_ptr, p_ptr, p_base_ptr, delta_bias_ptr, factor_ptr,
    scalars_ptr, out_ptr, kept_ptr, partial_ptr,
    t, n, m, tiles, programs_n, stride_y0, edge, eps, slope, offset,
    PASS: tl.constexpr, AVERAGED: tl.constexpr, SIGMOID_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``PASS`` is ``out``, or what is measured before it: ``square``, ``peak`` or ``count``.

    ε, slope and offset are numbers, or at ``scalars_ptr`` where that is given.
    """
    pid = tl.program_id(0)
    offs_t = span(pid // programs_n, BLOCK_T)
    first = (pid % programs_n) * tiles
    if scalars_ptr is not None:
        eps, slope, offset = _load_scalars(scalars_ptr)
    z, zd = _load_z(z_ptr, zd_ptr, offs_t, t, m, BLOCK_M, CHUNKS)
    if PASS != "out":
        partial = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    last = tl.minimum(tiles, tl.cdiv(n, BLOCK_N) - first)
    for tile in tl.range(0, last, num_stages=STAGES if CHUNKS == 1 else 1):
        offs_n = (first + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (offs_t[:, None] < t) & (offs_n[None, :] < n)
        p = _load_chunk(p_ptr, offs_n, n, m, BLOCK_M, CHUNKS)
        p_base = _load_chunk(p_base_ptr, offs_n, n, m, BLOCK_M, CHUNKS)
        base, delta = _base_and_delta(
            z, zd, p, p_base, y0_ptr, z_ptr, zd_ptr, p_ptr, p_base_ptr, delta_bias_ptr, offs_t,
            offs_n, t, n, m, stride_y0, PRECISION, BLOCK_M, CHUNKS, STAGES,
        )  # fmt: skip
        if PASS == "square":
            partial += base * base
        elif PASS == "peak":
            partial = tl.maximum(partial, tl.where(mask, relative_change(base, delta, eps), 0.0))
        else:
            inverse = inverse_gain(base, delta, eps, slope, offset, SIGMOID_WEIGHT)
            if PASS == "count":
                partial += (mask & (inverse * edge >= 1.0)).to(tl.float32)
            else:
                out = combine(base, delta, inverse, AVERAGED)
                if factor_ptr is not None:
                    out *= tl.load(factor_ptr + offs_n, mask=offs_n < n, other=0.0)[None, :]
                place = offs_t[:, None] * n + offs_n[None, :]
                tl.store(out_ptr + place, cast(out, out_ptr.dtype.element_ty), mask=mask)
                if kept_ptr is not None:
                    level = (2.0 * inverse - 1.0) * 255.0 + 0.5
                    tl.store(kept_ptr + place, level.to(tl.int32).to(tl.uint8), mask=mask)
    if PASS == "peak":
        tl.store(partial_ptr + pid, tl.max(partial))
    elif PASS != "out":
        tl.store(partial_ptr + pid, tl.sum(partial))


@Kernel
@triton.jit(do_not_specialize=["t"])
def activation_bwd_kernel(
    g_ptr, y0_ptr, kept_ptr, z_ptr, zd_ptr, z_scale_ptr, p_ptr, p_base_ptr, delta_bias_ptr,
    factor_ptr, scalars_ptr, ddelta_ptr, dbase_ptr, h_ptr, dbias_ptr,
    t, n, m, first, width, stride_g, stride_y0, stride_out, stride_hs, eps, slope, offset,
    AVERAGED: tl.constexpr, SIGMOID_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
    HAS_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dΔ and dbase of ``n`` columns from ``first`` on, each where its pointer is given, and h.

    Every pointer is that of its first token and column in this launch; a program takes ``width``
    of the columns, the part of its second index. dΔ is contiguous, ``stride_out`` is that of
    ``kept`` and dbase.

    ``HAS_H``: the program adds its tokens' share of h [BLOCK_T, m] to what launches for earlier
    columns left for its part at ``h_ptr [parts, t, m]``.
    """
    pid = tl.program_id(0)
    offs_t = span(pid, BLOCK_T)
    mask_t = offs_t[:, None] < t
    offs_m = tl.arange(0, BLOCK_M)
    dtype = g_ptr.dtype.element_ty
    if kept_ptr is None:
        if scalars_ptr is not None:
            eps, slope, offset = _load_scalars(scalars_ptr)
        z, zd = _load_z(z_ptr, zd_ptr, offs_t, t, m, BLOCK_M, CHUNKS)
    h = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
    h_base = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
    begin = tl.program_id(1) * width
    for start in tl.range(
        begin, tl.minimum(begin + width, n), BLOCK_N, num_stages=STAGES if CHUNKS == 1 else 1
    ):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = mask_t & (offs_n[None, :] < n)
        place = offs_t[:, None] * stride_out + offs_n[None, :]
        g = tl.load(g_ptr + offs_t[:, None] * stride_g + offs_n[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        if factor_ptr is not None:
            g *= tl.load(factor_ptr + offs_n, mask=offs_n < n, other=0.0)[None, :]
        p = _load_chunk(p_ptr, offs_n, n, m, BLOCK_M, CHUNKS)
        p_base = _load_chunk(p_base_ptr, offs_n, n, m, BLOCK_M, CHUNKS)
        if kept_ptr is None:
            base, delta = _base_and_delta(
                z, zd, p, p_base, y0_ptr, z_ptr, zd_ptr, p_ptr, p_base_ptr, delta_bias_ptr, offs_t,
                offs_n, t, n, m, stride_y0, PRECISION, BLOCK_M, CHUNKS, STAGES,
            )  # fmt: skip
            inverse = inverse_gain(base, delta, eps, slope, offset, SIGMOID_WEIGHT)
        else:
            level = tl.load(kept_ptr + place, mask=mask, other=0).to(tl.float32)
            inverse = 0.5 + level * (0.5 / 255.0)
        ddelta = g * inverse
        low = cast(ddelta, dtype)
        dbase = cast(2.0 * ddelta if AVERAGED else g, dtype)
        if ddelta_ptr is not None:
            tl.store(ddelta_ptr + offs_t[:, None] * n + offs_n[None, :], low, mask=mask)
        if dbase_ptr is not None:
            tl.store(dbase_ptr + place, dbase, mask=mask)
        if dbias_ptr is not None:
            dbias = tl.sum(ddelta, axis=0)
            tl.store(dbias_ptr + pid.to(tl.int64) * n + offs_n, dbias, mask=offs_n < n)
        if HAS_H:
            h = dot(low, p, h, PRECISION)
            if p_base_ptr is not None:
                if z_scale_ptr is not None:
                    h_base = dot(dbase, p_base, h_base, PRECISION)
                else:
                    h = dot(dbase, p_base, h, PRECISION)
    if HAS_H:
        place_h = offs_t[:, None] * m + offs_m[None, :]
        mask = mask_t & (offs_m[None, :] < m)
        if z_scale_ptr is not None:
            z_scale = tl.load(z_scale_ptr + place_h, mask=mask, other=0.0)
            h = h * z_scale.to(tl.float32) + h_base
        place_h += tl.program_id(1).to(tl.int64) * stride_hs
        h += tl.load(h_ptr + place_h, mask=mask & (first > 0), other=0.0)
        tl.store(h_ptr + place_h, h, mask=mask)


__all__ = ["activation_bwd_kernel", "activation_fwd_kernel"]
