"""An input that several layers are given: cast once, and its gradient added up in place.

    ∂x = Σ_i g_i W'_i        of the layers i that are given the same x: q, k and v; gate and up

Autograd has each layer write a ∂x of its own and adds them up, at three passes over a tensor
``[T, K]`` an addition. Here the layers write to one: the second's product reads the first's as its
addend (BLAS's beta), one pass. Under autocast x is also cast once, and its gradient back once, and
what the layers save of x is one tensor.

The layers see it by x itself: the first that is given x puts a node of autograd between x and
itself, and leaves it with x for the others. A layer that never runs backward adds nothing. With
``create_graph`` autograd adds the parts itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Total:
    """``∂x [T, K]`` of a shared input, as far as this backward pass has added it up."""

    __slots__ = ("_sum", "_task")

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._task = -1

    def so_far(self) -> Tensor | None:
        """The sum, to be added to in place; None before the first part of a backward pass."""
        if self._task != torch._C._current_graph_task_id():
            self._sum = None  # of a pass that did not ask for ∂x itself
        return self._sum

    def keep(self, dx: Tensor) -> None:
        """Take ``dx`` for the sum so far."""
        self._sum, self._task = dx, torch._C._current_graph_task_id()

    def take(self) -> Tensor | None:
        """The sum, which is then forgotten."""
        found, self._sum = self.so_far(), None
        return found


class _Entrance(torch.autograd.Function):
    """x in the layers' dtype; its gradient is the total, of whose parts autograd sees none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, total: Total) -> Tensor:
        ctx.total, ctx.shape = total, x.shape
        ctx.set_materialize_grads(False)
        # x itself as no view of it: a view would keep its base alive
        return x.detach() if x.dtype == dtype else x.to(dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None, None]:
        dx = ctx.total.take()
        if dx is not None:
            dx = dx.view(ctx.shape)
            g = dx if g is None else g + dx
        return g, None, None


class _Shared(NamedTuple):
    key: tuple[torch.dtype, int, int]
    x: Tensor
    total: Total


_ATTRIBUTE = "_secura_shared"


def shared(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Total | None]:
    """``(x in dtype, total)``, the same for each layer that is given the same ``x [..., K]``.

    The total is None, and x cast for this layer alone, where there is no gradient to add up, where
    x is a leaf of autograd's and where a compiler looks on, which fuses the additions itself. An x
    that was written to, or that another stream works on, is another x.
    """
    leaf = x.is_leaf  # which its own graph would keep alive, were it to keep the entrance
    if leaf or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return (x if x.dtype == dtype else x.to(dtype)), None
    stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0
    key = (dtype, x._version, stream)
    found: _Shared | None = getattr(x, _ATTRIBUTE, None)
    if found is None or found.key != key:
        total = Total()
        found = _Shared(key, _Entrance.apply(x, dtype, total), total)
        setattr(x, _ATTRIBUTE, found)
    return found.x, found.total


def added(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total + a @ b``, written to ``total``; a new tensor where there is none."""
    return a @ b if total is None else total.addmm_(a, b)


__all__ = ["Total", "added", "shared"]
