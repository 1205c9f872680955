"""What every launcher does before a launch: operands in the form kernels take, and tiles' sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Tile = dict[str, int]
"""How a launch is cut: the edges ``BLOCK_*`` of a program's tile, its warps and pipeline stages."""


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a dot: TF32 for fp32 operands only where torch's own setting allows.

    16-bit operands ignore it.
    """
    if dtype != torch.float32:
        return "tf32"
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def cdiv(size: int, block: int) -> int:
    """How many blocks cover ``size``: a plain division, where ``triton.cdiv`` takes 3 µs."""
    return -(-size // block)


def block_of(size: int, smallest: int, largest: int) -> int:
    """The power of two that covers ``size``, within ``[smallest, largest]``."""
    return max(smallest, min(largest, 1 << max(0, size - 1).bit_length()))


def unit_stride(tensor: Tensor) -> Tensor:
    """``tensor`` itself where its last dimension has stride 1, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def padded(thin: Tensor) -> Tensor:
    """``[..., m]`` contiguous with m a multiple of 16, zeros behind: rows then start aligned."""
    short = -thin.shape[-1] % 16
    return F.pad(thin, (0, short)) if short else thin.contiguous()


def padded_rows(rows: Tensor) -> Tensor:
    """``rows [m]`` with the first repeated behind, where it meets the zeros of a padded P or Q."""
    short = -rows.numel() % 16
    return torch.cat((rows, rows[:1].expand(short))) if short else rows.contiguous()


def aligned(*sizes: int) -> bool:
    """Whether rows of these many elements start at multiples of 16 bytes, whatever the dtype."""
    return not any(size % 16 for size in sizes)


__all__ = [
    "Tile",
    "aligned",
    "block_of",
    "cdiv",
    "dot_precision",
    "padded",
    "padded_rows",
    "unit_stride",
]
