"""What both kernels of the space ``activation`` read and multiply: tiles of z, P, y0 and Δ."""

# Triton's functions have no Python return type.
# ruff: noqa: ANN201

from __future__ import annotations

import triton
import triton.language as tl

from ..jit import dot


@triton.jit
def load_rows(ptr, offs, offs_m, size, m):
    """A tile of z [T, m] or P [N, m], both contiguous, m a multiple of 16."""
    mask = (offs[:, None] < size) & (offs_m[None, :] < m)
    return tl.load(ptr + offs[:, None] * m + offs_m[None, :], mask=mask, other=0.0)


@triton.jit
def load_chunk(ptr, offs, size, m, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr):
    """The rows of z or P where m is one chunk and ``ptr`` is not None; else nothing to be read."""
    tile = 0.0
    if CHUNKS == 1 and ptr is not None:
        tile = load_rows(ptr, offs, tl.arange(0, BLOCK_M), size, m)
    return tile


@triton.jit
def add_product(
    acc, z, p, z_ptr, p_ptr, offs_t, offs_n, t, n, m,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``acc + z Pᵀ`` of one tile, from the tiles ``z``, ``p`` where m is one chunk, else memory."""
    offs_m = tl.arange(0, BLOCK_M)
    if CHUNKS == 1:
        acc = dot(z, tl.trans(p), acc, PRECISION)
    else:
        for chunk in tl.range(0, CHUNKS, num_stages=STAGES):
            z_part = load_rows(z_ptr, offs_t, chunk * BLOCK_M + offs_m, t, m)
            p_part = load_rows(p_ptr, offs_n, chunk * BLOCK_M + offs_m, n, m)
            acc = dot(z_part, tl.trans(p_part), acc, PRECISION)
    return acc


@triton.jit
def load_z(z_ptr, zd_ptr, offs_t, t, m, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr):
    """This block's z and zd where m is one chunk; ``z_ptr`` is None where nothing reads z alone."""
    zd = load_chunk(zd_ptr, offs_t, t, m, BLOCK_M, CHUNKS)
    z = zd
    if z_ptr is not None:
        z = load_chunk(z_ptr, offs_t, t, m, BLOCK_M, CHUNKS)
    return z, zd


@triton.jit
def base_and_delta(
    z, zd, p, p_base, y0_ptr, z_ptr, zd_ptr, p_ptr, p_base_ptr, delta_bias_ptr, offs_t, offs_n,
    t, n, m, stride_y0, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of the base's output and of its change, fp32: y0 (+ z P_baseᵀ), and zd Pᵀ (+ δb)."""
    mask = (offs_t[:, None] < t) & (offs_n[None, :] < n)
    base = tl.load(y0_ptr + offs_t[:, None] * stride_y0 + offs_n[None, :], mask=mask, other=0.0)
    base = base.to(tl.float32)
    if p_base_ptr is not None:
        base = add_product(
            base, z, p_base, z_ptr, p_base_ptr, offs_t, offs_n, t, n, m, PRECISION, BLOCK_M,
            CHUNKS, STAGES,
        )  # fmt: skip
    delta = tl.zeros_like(base)
    delta = add_product(
        delta, zd, p, zd_ptr, p_ptr, offs_t, offs_n, t, n, m, PRECISION, BLOCK_M, CHUNKS, STAGES
    )
    if delta_bias_ptr is not None:
        delta += tl.load(delta_bias_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[None]
    return base, delta


__all__ = ["add_product", "base_and_delta", "load_chunk", "load_rows", "load_z"]
