"""Which implementation an op takes: decided by device, once, and open to inspection.

``impl="auto"`` takes Triton on CUDA and ROCm devices where it is installed and the dtype is one the
kernels support, plain torch elsewhere. ``"triton"`` and ``"reference"`` insist; a kernel that
cannot run is then an error with the reason. The environment variable ``SECURA_IMPL`` sets what
``impl=None`` means.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "reference")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreting() -> bool:
    """Whether Triton runs its kernels in the interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be imported here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def why_not_triton(tensor: Tensor) -> str | None:
    """Why no kernel can take ``tensor``, or None where one can."""
    if reason := triton_missing():
        return reason
    if tensor.device.type != "cuda" and not interpreting():
        return f"the tensor is on {tensor.device.type}, kernels run on cuda"
    if tensor.dtype not in TRITON_DTYPES:
        taken, *names = (
            str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *TRITON_DTYPES)
        )
        return f"no kernel takes {taken}, only {', '.join(names)}"
    return None


def resolve(impl: str | None, tensor: Tensor) -> str:
    """``"triton"`` or ``"reference"`` for an op on ``tensor``.

    Raises:
        ValueError: for an unknown ``impl``.
        RuntimeError: for ``impl="triton"`` where no kernel can take the tensor.
    """
    impl = impl or os.environ.get("SECURA_IMPL", "auto")
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}: choose one of {IMPLS}")
    if impl == "reference":
        return impl
    reason = why_not_triton(tensor)
    if reason is None and (impl == "triton" or tensor.device.type == "cuda"):
        return "triton"
    if impl == "triton":
        raise RuntimeError(f"impl='triton' cannot run: {reason}; use impl='auto' or 'reference'")
    return "reference"


def op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """``torch.library.custom_op("secura::<name>")`` with autocast off and its device current.

    The body stands for every device; it takes the caller's ``impl`` and resolves it itself, where
    the tensors are real and no compiler looks on. The first argument must be a tensor.
    """

    def register(body: Callable[..., Any]) -> Any:
        @functools.wraps(body)
        def without_autocast(tensor: Tensor, *args: Any) -> Any:
            device = tensor.device
            with torch.cuda.device_of(tensor), torch.autocast(device.type, enabled=False):
                return body(tensor, *args)

        return torch.library.custom_op(f"secura::{name}", without_autocast, mutates_args=())

    return register


def absent(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The empty tensor that stands for "not asked for" among an op's outputs."""
    return like.new_empty(0, dtype=dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or ``dtype`` where that is wider: what sums and small gradients are kept in."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products run in: autocast's where it is on, ``x``'s own otherwise."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


__all__ = [
    "IMPLS",
    "absent",
    "compute_dtype",
    "interpreting",
    "op",
    "resolve",
    "triton_missing",
    "why_not_triton",
    "wide",
]
