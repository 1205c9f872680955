"""Which implementation an op takes: decided by device, once, and open to inspection.

``impl="auto"`` takes Triton on ROCm devices and on CUDA devices of compute capability 8.0 and up,
where it is installed and the dtype is one the kernels support, plain torch elsewhere. ``"triton"``
and ``"reference"`` insist; a kernel that cannot run is then an error with the reason. The
environment variable ``SECURA_IMPL`` sets what ``impl=None`` means.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._ops import add_op_namespace_prefix
from .gpu import assumed, too_old

IMPLS = ("auto", "triton", "reference")


class _Settled(str):
    """The ``"triton"`` of a call whose tensors were all found to be such as kernels take."""


SETTLED = _Settled("triton")
FLOATS = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
"""What the ops compute of: numbers of 8 bits have a scale that an op does not see."""
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreting() -> bool:
    """Whether Triton runs its kernels in the interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def exporting_to_onnx() -> bool:
    """Whether ``torch.onnx.export`` is tracing: it knows torch's operators, and none of ours."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


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
    if exporting_to_onnx():
        return "ONNX has no operator for a kernel"
    if tensor.is_cuda and (old := too_old(tensor.get_device())):
        return f"the GPU has {old}"
    if not tensor.is_cuda and not interpreting():
        recording = tensor.is_meta and assumed() is not None
        if not recording:
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
    if impl == "reference":
        return impl
    impl = impl or os.environ.get("SECURA_IMPL", "auto")
    if impl == "reference":
        return impl
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}: choose one of {IMPLS}")
    if impl == "auto" and not tensor.is_cuda:
        return "reference"
    reason = why_not_triton(tensor)
    if reason is None:
        return "triton"
    if impl == "triton":
        raise RuntimeError(f"impl='triton' cannot run: {reason}; use impl='auto' or 'reference'")
    return "reference"


def supported(impl: str | None, first: Tensor, *others: Tensor | None) -> str:
    """:func:`resolve` of several tensors: Triton where it can take all, on one device."""
    found = resolve(impl, first)
    if found == "triton":
        for other in others:
            if other is None or (other.dtype in TRITON_DTYPES and other.device == first.device):
                continue
            if other.device != first.device or resolve(impl, other) != found:
                return "reference"  # of several devices torch's own error
    return found


def kernels(package: str, impl: str | None, *tensors: Tensor) -> ModuleType | None:
    """The kernels of an op's package, its module ``triton``, where they take ``tensors``."""
    if impl is SETTLED:
        return _kernels(package)
    if impl == "reference" or supported(impl, *tensors) != "triton":
        return None
    return _kernels(package)


@functools.cache
def _kernels(package: str) -> ModuleType:
    return importlib.import_module(".triton", package)


def op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """``torch.library.custom_op`` of that name with autocast off and its device current.

    The body stands for every device; it takes the caller's ``impl`` and resolves it itself, where
    the tensors are real and nothing is compiled. The first argument must be a tensor. An op has no
    gradient of its own: :mod:`secura_kernels.autograd` pairs it with its backward op.

    Outside compilers, dispatch modes and tensor subclasses (:func:`is_watched`) the body runs at
    once: an operator's way through the dispatcher takes the host about as long as all the body's
    own launches (benchmarks/LOG.md). Callers that have set device, autocast and autograd call
    ``.body``. Keyword-only parameters (tensors that are written in place) are not part of the
    operator: where one is given, the body is called directly.
    """

    def register(body: Callable[..., Any]) -> Any:
        @functools.wraps(body)
        def run(tensor: Tensor, *args: Any, **own: Any) -> Any:
            with torch.no_grad(), alone(tensor):
                return body(tensor, *args, **own)

        whole = inspect.signature(body)
        shown = [of for of in whole.parameters.values() if of.kind is not of.KEYWORD_ONLY]
        run.__signature__ = whole.replace(parameters=shown)  # type: ignore[attr-defined]
        operator = torch.library.custom_op(add_op_namespace_prefix(name), run, mutates_args=())

        @functools.wraps(body)
        def call(tensor: Tensor, *args: Any, **own: Tensor | None) -> Any:
            if all(given is None for given in own.values()) and is_watched(tensor, *args):
                return operator(tensor, *args)
            return run(tensor, *args, **own)

        call.register_fake = operator.register_fake  # type: ignore[attr-defined]
        call.body = body  # type: ignore[attr-defined]
        return call

    return register


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def is_watched(*args: Any) -> bool:
    """Whether a compiler, a dispatch mode or a tensor subclass must see the operator as one.

    An export to ONNX must see what is inside.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return not exporting_to_onnx()
    for arg in args:
        if type(arg) in _PLAIN:
            continue
        if isinstance(arg, Tensor) or (isinstance(arg, list | tuple) and is_watched(*arg)):
            return True
    return False


_NOTHING: AbstractContextManager = nullcontext()


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which autocast is off; one that does nothing where it is off already."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING


@contextmanager
def _both(first: AbstractContextManager, second: AbstractContextManager) -> Iterator[None]:
    with first, second:
        yield


def alone(tensor: Tensor) -> AbstractContextManager:
    """A context in which ``tensor``'s device is the current one and autocast is off.

    A compiler sees to the device itself, and cannot trace a change of it (torch 2.11).
    """
    quiet = without_autocast(tensor.device.type)
    if not tensor.is_cuda or torch.compiler.is_compiling():
        return quiet
    current = torch.cuda.device_of(tensor)
    return current if quiet is _NOTHING else _both(current, quiet)


def is_alone(tensor: Tensor) -> bool:
    """Whether :func:`alone` has nothing to do: one call where entering and leaving it are five."""
    device = tensor.device.type
    return device == "cpu" and not torch.is_autocast_enabled(device)


def absent(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The empty tensor that stands for "not asked for" among an op's outputs."""
    return like.new_empty(0, dtype=dtype)


Maybe = TypeVar("Maybe", Tensor, Tensor | None)


def as_dtype(tensor: Maybe, dtype: torch.dtype) -> Maybe:
    """``tensor`` in ``dtype``, or None; torch takes 3 µs to find out that nothing is to do."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or ``dtype`` where that is wider: what sums and small gradients are kept in."""
    return dtype if dtype == torch.float64 else torch.float32


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products run in: autocast's where it is on, ``x``'s own otherwise."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


__all__ = [
    "FLOATS",
    "SETTLED",
    "absent",
    "alone",
    "as_dtype",
    "compute_dtype",
    "exporting_to_onnx",
    "interpreting",
    "is_alone",
    "is_watched",
    "kernels",
    "op",
    "resolve",
    "supported",
    "triton_missing",
    "why_not_triton",
    "wide",
    "without_autocast",
]
