"""How the kernels of the space ``activation`` are cut, by chip, dtype and width of the core.

What each was chosen against: benchmarks/LOG.md. None spills on the chips that ``secura doctor
--kernels`` compiles for.
"""

from __future__ import annotations

import functools

import torch

from ...gpu import LARGE_SHARED, LARGEST_SHARED, SMALL_SHARED, Limits
from ..operands import Tile, block_of, cdiv

LARGEST_M_IN_REGISTERS = 128
_CHUNK = 64


def in_registers(m: int) -> bool:
    """Whether a program holds all of m of its tokens at once; else it reads m in chunks."""
    return m <= LARGEST_M_IN_REGISTERS


@functools.cache
def forward_tile(
    limits: Limits, dtype: torch.dtype, m: int, has_base: bool, is_aligned: bool
) -> Tile:
    """Tall tiles, for P is read once a block of tokens; fp32 has no matrix instructions.

    Rows that do not start aligned are read an element at a time, each at an address of its own:
    smaller tiles then, whose addresses fit in registers.
    """
    if dtype == torch.float32:
        return _tile(m, 32, 32, 4, 2)
    if not is_aligned:
        return _tile(m, 64, 32, 8, 2)
    if limits.shared_bytes < LARGE_SHARED:
        return _tile(m, 64, 64, 8 if limits.shared_bytes > SMALL_SHARED else 4, 2)
    if has_base and not in_registers(m):
        return _tile(m, 64, 64, 8, 3)
    return _tile(m, 128, 64, 8, 2)  # without a base two programs a multiprocessor


@functools.cache
def backward_tile(
    limits: Limits, dtype: torch.dtype, m: int, has_base: bool, keeps: bool, is_aligned: bool
) -> Tile:
    """A program has h of its tokens in registers."""
    large = limits.shared_bytes >= LARGE_SHARED
    if dtype == torch.float32:
        return _tile(m, 32, 32 if large else 16, 4, 2)
    if not is_aligned:
        return _tile(m, 32, 32, 8 if limits.shared_bytes > SMALL_SHARED else 4, 2)
    if not in_registers(m):
        return _tile(m, 64, 64, 8, 3 if large else 2)
    if has_base and not large and not keeps:
        return _tile(m, 32, 32, 4, 2)
    if has_base:
        return _tile(m, 64, 32, 8, 2)
    # h's product chains on dΔ, so all warps share 64 rows: more than 4 would repeat the work.
    if limits.shared_bytes >= LARGEST_SHARED or keeps:
        return _tile(m, 64, 64, 4, 3)
    return _tile(m, 64, 32, 4, 3 if large else 2)


def _tile(m: int, block_t: int, block_n: int, warps: int, stages: int) -> Tile:
    """Tokens, columns, and m whole or in chunks; ``STAGES`` is of the loop a kernel pipelines."""
    block_m = block_of(m, 16, LARGEST_M_IN_REGISTERS) if in_registers(m) else _CHUNK
    chunks = 1 if in_registers(m) else cdiv(m, _CHUNK)
    cut = {"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_M": block_m, "CHUNKS": chunks}
    return cut | {"STAGES": stages, "num_warps": warps, "num_stages": stages}


__all__ = ["LARGEST_M_IN_REGISTERS", "backward_tile", "forward_tile", "in_registers"]
