"""An input that several layers are given: cast once, and its gradient added up in place.

    ∂x = Σ_i g_i W'_i        of the layers i that are given the same x: q, k and v; gate and up

Autograd has each layer write a ∂x of its own and adds them up, at three passes over a tensor
``[T, K]`` an addition. Here the layers write to one: the second's product reads the first's as its
addend (BLAS's beta), one pass. Under autocast x is also cast once, and its gradient back once, and
what the layers save of x is one tensor.

The first layer that is given x puts an autograd node after it, stored by x; the other layers look
it up. A layer that never runs backward adds nothing. With ``create_graph`` autograd adds the parts
itself.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.weak import WeakIdKeyDictionary

from .dispatch import as_dtype
from .kept_weight import checkpointing


class Total:
    """``∂x [T, K]`` of a shared input, as far as each backward pass at work has added it up."""

    __slots__ = ("_sums",)

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # by autograd's number of the pass

    def so_far(self) -> Tensor | None:
        """The sum, to be added to in place; None before the first part of a backward pass."""
        return self._sums.get(torch._C._current_graph_task_id())

    def keep(self, dx: Tensor) -> None:
        """Take ``dx`` for the sum so far."""
        task = torch._C._current_graph_task_id()
        if task not in self._sums:  # a pass that does not ask for ∂x never takes it
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._sums.pop(task, None))
        self._sums[task] = dx

    def take(self) -> Tensor | None:
        """The sum, which is then forgotten."""
        return self._sums.pop(torch._C._current_graph_task_id(), None)


class _Entrance(torch.autograd.Function):
    """Give x in the layers' dtype; its gradient is the total, which autograd does not add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, total: Total) -> Tensor:
        ctx.total, ctx.shape, ctx.entered = total, x.shape, weakref.ref(x)
        ctx.set_materialize_grads(False)
        # x itself as no view of it: a view would keep its base alive
        return x.detach() if x.dtype == dtype else x.to(dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None, None]:
        dx = None if torch.compiler.is_compiling() else ctx.total.take()
        if dx is not None:
            dx = dx.view(ctx.shape)
            g = dx if g is None else g + dx
        x = ctx.entered()
        if x is not None:  # whose own graph may keep it alive, were it to be kept here
            _ENTERED.pop(x, None)
        return g, None, None


class _Shared(NamedTuple):
    key: tuple[Any, ...]
    x: Tensor
    total: Total


_ENTERED: MutableMapping[Tensor, _Shared] = WeakIdKeyDictionary()
"""By x itself, until its backward pass, or as long as it lives."""


def shared(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Total | None]:
    """``(x in dtype, total)``, the same for each layer that is given the same ``x [..., K]``.

    The total is None, and x cast for this layer alone, where there is no gradient to add up, where
    x is a leaf of autograd's, under torch.compile, which fuses the additions itself, and in
    selective checkpointing, whose passes have to run the same operators. An x that was written to,
    or that another stream works on, is another x.
    """
    leaf = x.is_leaf  # it and its node would keep each other alive
    if leaf or not torch.is_grad_enabled() or torch.compiler.is_compiling() or _selects():
        return as_dtype(x, dtype), None
    key = (dtype, x._version, x.untyped_storage()._cdata, stream_of(x))
    found = _ENTERED.get(x)
    if found is None or found.key != key:
        total = Total()
        found = _Shared(key, _Entrance.apply(x, dtype, total), total)
        _ENTERED[x] = found
    return found.x, found.total


def stream_of(tensor: Tensor) -> int:
    """The stream that is current on a tensor's device, or 0."""
    return torch._C._cuda_getCurrentRawStream(tensor.device.index) if tensor.is_cuda else 0


def _selects() -> bool:
    """Whether checkpointing is at work, and a dispatch mode says what it keeps."""
    return is_in_torch_dispatch_mode() and bool(checkpointing())


def added(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total + a @ b``, written to ``total``; a new tensor where there is none."""
    return a @ b if total is None else torch.addmm(total, a, b, out=total)


__all__ = ["Total", "added", "shared", "stream_of"]
