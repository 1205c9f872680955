"""How the kernels of the space ``weight`` are cut, by dtype and width of the core.

What each was chosen against: benchmarks/LOG.md. None spills in Triton 3.7.1 on the chips that
``secura doctor --kernels`` compiles for.
"""

from __future__ import annotations

import functools

import torch

from ..operands import Tile, block_of


@functools.cache
def weight_tile(dtype: torch.dtype, m: int, is_aligned: bool, small: bool) -> Tile:
    """A tile of W, and how much of m at a time.

    Args:
        dtype: the compute dtype.
        m: rows of R.
        is_aligned: whether rows start aligned; else each element is read at an address of its own.
        small: whether the two accumulators of a folded W are too much for the large tile.
    """
    block_n, block_k = (64, 128) if is_aligned else (32, 64)
    if dtype == torch.float32 or small:
        block_k = 64
    block_m = block_of(m, 16, 32 if dtype == torch.float32 else 64)
    cut = {"BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_M": block_m}
    return cut | {"num_warps": 8, "num_stages": 2}


@functools.cache
def product_tile(dtype: torch.dtype, is_aligned: bool, ranks: int, folded: bool) -> Tile:
    """A program's rows, the columns it takes at a time, and its columns of ∂P.

    The second accumulator of a ``folded`` W takes registers that ∂P's would else have.
    """
    if dtype == torch.float32 or not is_aligned:
        block_n, block_k, most = 16 if folded and dtype == torch.float32 else 32, 32, 64
    else:
        block_n, block_k, most = (64, 32, 64) if folded else (64, 64, 128)
    block_j = block_of(ranks, 16, most)
    cut = {"BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_J": block_j}
    return cut | {"num_warps": 8, "num_stages": 2}


__all__ = ["product_tile", "weight_tile"]
