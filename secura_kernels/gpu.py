"""Properties of the GPU that the choice of tiles uses: shared memory, multiprocessors and maker."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor


class Limits(NamedTuple):
    """What the choice of a tile depends on.

    Attributes:
        shared_bytes: shared memory that one program may have.
        processors: multiprocessors.
        rocm: whether AMD made it.
    """

    shared_bytes: int
    processors: int
    rocm: bool = False


H100 = Limits(227 * 1024, 132)
LARGE_SHARED = 160 * 1024
"""From here on (an A100, not an RTX 4090) programs take tall tiles, and a folded W's large one."""
LARGEST_SHARED = 224 * 1024
"""From here on (an H100, not an A100) ``activation``'s backward takes wide tiles of y0 as well."""
SMALL_SHARED = 64 * 1024
"""Up to here (an MI300) small tiles of ``activation`` have half as many warps."""

_assumed: ContextVar[Limits | None] = ContextVar("assumed", default=None)


def limits_of(tensor: Tensor) -> Limits:
    """The GPU that a kernel on ``tensor`` runs on.

    For other devices the one that is assumed, an H100 by default (the interpreter's).
    """
    return _device(tensor.device.index) if tensor.is_cuda else assumed() or H100


def assumed() -> Limits | None:
    """The GPU whose tensors those of the ``meta`` device stand for, or None."""
    return _assumed.get()


@contextmanager
def assume(limits: Limits) -> Iterator[None]:
    """Within, ops launch their kernels on tensors of the ``meta`` device, cut for ``limits``.

    For :mod:`secura_kernels.inspection.recorder`, which records the launches.
    """
    token = _assumed.set(limits)
    try:
        yield
    finally:
        _assumed.reset(token)


@functools.cache
def too_old(index: int) -> str | None:
    """Why Triton does not take the NVIDIA GPU of that index, by its compute capability, or None."""
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    least = f"compute capability {major}.{minor}, and Triton's products take 8.0 or more"
    return least if major < 8 else None


@functools.cache
def _device(index: int) -> Limits:
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", SMALL_SHARED)
    return Limits(shared, properties.multi_processor_count, torch.version.hip is not None)


__all__ = [
    "H100",
    "LARGEST_SHARED",
    "LARGE_SHARED",
    "SMALL_SHARED",
    "Limits",
    "assume",
    "assumed",
    "limits_of",
    "too_old",
]
