"""Forward of the space ``activation``: one pass over ``y0``; the tiles of both directions.

    base = y0 + z P_baseᵀ    Δ = zd Pᵀ + δb    zd = z · z_scale    1/M = inverse_gain(base, Δ)
    out  = (2 base + Δ) f / M            or  (base + Δ / M) f

| tensor                    | shape    | dtype: in / accumulate / out        |
|---------------------------|----------|-------------------------------------|
| y0, g, out, dΔ, ∂y0       | [T, N]   | bf16, fp16, fp32 / fp32 / the same  |
| z, zd                     | [T, m]   | as y0 / fp32 / as y0                |
| h                         | [T, m]   | fp32                                |
| P, P_base                 | [N, m]   | as y0; ∂P in fp32                   |
| kept (``save="8bit"``)    | [T, N]   | uint8: 255 (2/M − 1), to nearest    |
| [ε, slope, offset]        | [3]      | fp32, or numbers where known before |
| factor f, δb              | [N]      | fp32, any                           |

Bytes, in units of one [T, N] tensor of the compute dtype (64 MiB at T=8192, N=4096, bf16); the
thin tensors add m/N of a unit each, and reading z's scattered columns up to 32 m / (N itemsize):

| step                                     | floor | these kernels                           |
|------------------------------------------|-------|-----------------------------------------|
| forward                                  | 2     | 2 (+ ½ with 8bit in 16-bit dtypes)      |
| `paper`, `released`; `restrain`; rel. ε  | 1     | + 1 read each, before the forward       |
| backward                                 |       | see :mod:`.activation_backward`         |

P is read once a block of tokens, from L2: T N m / BLOCK_T elements, hence tall tiles. Every sum
runs in a fixed order: equal inputs give equal bits on one kind of GPU.

Source: DESIGN sections 3, 4 and 6; SECURA (arXiv 2502.18168).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..gain import (
    NormOptions,
    Restrain,
    coefficients,
    known_scalars,
    needs_peak,
    restrained,
    sigmoid_weight,
)
from ..machine import LARGE_SHARED, LARGEST_SHARED, SMALL_SHARED, Machine, machine_of
from .activation_jit import activation_fwd_kernel
from .common import aligned, block_of, cdiv, dot_precision, padded, unit_stride

LARGEST_M_IN_REGISTERS = 128
_CHUNK = 64
_TILES_A_PROGRAM = 8


class Tile(NamedTuple):
    """How a kernel is cut: tokens and columns of a tile, warps of a program, pipeline depth."""

    block_t: int
    block_n: int
    num_warps: int
    num_stages: int


def forward_tile(
    machine: Machine, dtype: torch.dtype, m: int, has_base: bool, is_aligned: bool
) -> Tile:
    """Tall tiles, for P is read once a block of tokens; fp32 has no matrix instructions.

    Rows that do not start aligned are read an element at a time, each at an address of its own:
    smaller tiles then, whose addresses fit in registers.
    """
    if dtype == torch.float32:
        return Tile(32, 32, 4, 2)
    if not is_aligned:
        return Tile(64, 32, 8, 2)
    if machine.shared_bytes < LARGE_SHARED:
        return Tile(64, 64, 8 if machine.shared_bytes > SMALL_SHARED else 4, 2)
    if not has_base:
        return Tile(128, 64, 8, 2)  # two programs a multiprocessor
    return Tile(128, 64, 8, 2) if m <= LARGEST_M_IN_REGISTERS else Tile(64, 64, 8, 3)


def backward_tile(
    machine: Machine, dtype: torch.dtype, m: int, has_base: bool, keeps: bool, is_aligned: bool
) -> Tile:
    """A program has h of its tokens in registers."""
    large = machine.shared_bytes >= LARGE_SHARED
    if dtype == torch.float32:
        return Tile(32, 32 if large else 16, 4, 2)
    if not is_aligned:
        return Tile(32, 32, 8 if machine.shared_bytes > SMALL_SHARED else 4, 2)
    if m > LARGEST_M_IN_REGISTERS:
        return Tile(64, 64, 8, 3 if large else 2)
    if has_base and not large and not keeps:
        return Tile(32, 32, 4, 2)
    if has_base:
        return Tile(64, 32, 8, 2)
    # h's product chains on dΔ, so all warps share 64 rows: more than 4 would repeat the work.
    if machine.shared_bytes >= LARGEST_SHARED or keeps:
        return Tile(64, 64, 4, 3)
    return Tile(64, 32, 4, 3 if large else 2)


def _blocks_m(m: int) -> tuple[int, int]:
    """``(BLOCK_M, CHUNKS)``."""
    if m <= LARGEST_M_IN_REGISTERS:
        return block_of(m, 16, LARGEST_M_IN_REGISTERS), 1
    return _CHUNK, cdiv(m, _CHUNK)


class Operands:
    """The padded thin operands of both kernels."""

    def __init__(self, z, p, p_base, z_scale) -> None:
        self.zd = scaled(z, z_scale)
        self.m_rows = z.shape[1]
        self.block_m, self.chunks = _blocks_m(self.m_rows)
        same = p_base is None or (z_scale is None and self.chunks == 1)
        self.padded = (
            None if same else padded(z), padded(self.zd), padded(p),
            None if p_base is None else padded(p_base),
        )  # fmt: skip
        self.m = self.m_rows + -self.m_rows % 16


def scaled(z: Tensor, z_scale: Tensor | None) -> Tensor:
    """``zd = z · z_scale`` in z's dtype."""
    return z if z_scale is None else (z * z_scale).to(z.dtype)


def forward(
    y0: Tensor,
    z: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    options: NormOptions,
    restrain: Restrain | None,
    keep: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(out, kept, [ε, slope, offset], factor)``; thin tensors in y0's dtype, nothing empty.

    Every measuring pass the options ask for reads y0 once; the last one writes, over a contiguous
    y0 if ``in_place``: a tile is read and written by one program.
    """
    y0 = unit_stride(y0)
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    t, n = y0.shape
    thin = Operands(z, p, p_base, z_scale)
    machine = machine_of(y0)
    tile = forward_tile(
        machine, y0.dtype, thin.m_rows, p_base is not None, aligned(n, y0.stride(0))
    )
    blocks_t, blocks_n = cdiv(t, tile.block_t), cdiv(n, tile.block_n)
    tiles = max(1, blocks_t * blocks_n // (2 * machine.processors))
    tiles = min(_TILES_A_PROGRAM, 2 ** (tiles.bit_length() - 1))
    programs_n = cdiv(blocks_n, tiles)
    form, known, factor = options.form or "calibrated", known_scalars(options), None
    scalars = (
        None if known else torch.full((3,), options.eps, dtype=torch.float32, device=y0.device)
    )

    def launch(which, out=None, kept=None, partial=None, edge=0.0) -> None:
        activation_fwd_kernel[(blocks_t * programs_n,)](
            y0, *thin.padded, delta_bias, factor, scalars, out, kept, partial,
            t, n, thin.m, tiles, programs_n, y0.stride(0), edge, *(known or (0.0, 0.0, 0.0)),
            PASS=which, AVERAGED=options.combine == "averaged",
            SIGMOID_WEIGHT=sigmoid_weight(form), PRECISION=dot_precision(y0.dtype),
            BLOCK_T=tile.block_t, BLOCK_N=tile.block_n, BLOCK_M=thin.block_m, CHUNKS=thin.chunks,
            STAGES=tile.num_stages, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    def measure(which, edge=0.0) -> Tensor:
        partial = torch.empty(blocks_t * programs_n, dtype=torch.float32, device=y0.device)
        launch(which, partial=partial, edge=edge)
        return partial

    if scalars is not None:
        if options.eps_relative:
            scalars[0] = options.eps * (measure("square").sum() / y0.numel()).sqrt()
        peak = measure("peak").amax() if needs_peak(form) else None
        scalars[1], scalars[2] = coefficients(form, options.scale, peak, scalars)
    if restrain is not None:
        small = measure("count", edge=restrain.edge).sum(dtype=torch.float64)
        factor = restrained(small, y0.numel(), restrain)
    out = y0 if in_place else torch.empty_like(y0, memory_format=torch.contiguous_format)
    kept = torch.empty_like(out, dtype=torch.uint8) if keep else None
    launch("out", out, kept)
    return out, kept, scalars, factor


__all__ = ["Operands", "backward_tile", "forward", "forward_tile"]
