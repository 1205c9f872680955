"""One ``autograd.Function`` for every norm space: an adapted layer forward and backward.

A function's way through autograd takes the host 11 µs beside an H100, forward alone, so a layer has
one. What a space saves stands in its folder's ``op.py``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .dispatch import alone, as_dtype, is_alone
from .gpu import assumed
from .held import once
from .layer import cores
from .ops.activation import op as activation
from .ops.channel import op as channel
from .ops.common import Call, Step
from .ops.lowrank import op as lowrank
from .ops.project import op as project
from .ops.weight import op as weight

SPACES: dict[str, ModuleType] = {
    "none": lowrank,
    "channel": channel,
    "activation": activation,
    "weight": weight,
}
"""The ``forward`` and ``backward`` of each norm space, and ``product`` of the additive ones."""


def _flat(tensor: Tensor) -> Tensor:
    """``[T, size]`` of ``[..., size]``."""
    lead = tensor.shape[:-1]
    return tensor if len(lead) == 1 else tensor.reshape(math.prod(lead), tensor.shape[-1])


_version = operator.attrgetter("_version")
"""How often a tensor was written to."""

_unflatten = torch.ops.aten._unsafe_view.default
"""Reshapes without marking the result as a view, since nobody may write into a Function's view."""


class SecuraFunction(torch.autograd.Function):
    """Forward and backward of one layer; its space says what is saved.

    Inputs are made flat within, where autograd has no node to make for it.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        """What :func:`_output` computes of ``given``."""
        if is_alone(given[0]):
            return _output(ctx, *given)
        with alone(given[0]):
            return _output(ctx, *given)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of ``given``; a derivative of theirs is an error."""
        run = _gradients_once if torch.is_grad_enabled() else _gradients
        if is_alone(g):
            return run(ctx, g, ctx.saved_tensors)
        with alone(g):
            return run(ctx, g, ctx.saved_tensors)


class _Once(torch.autograd.Function):
    """Gradients as they are, of which a derivative is refused."""

    @staticmethod
    def forward(ctx: Any, gradients: Any, *operands: Tensor | None) -> Any:
        return gradients

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> Any:
        raise RuntimeError(
            "SECURA's ops are differentiable once: no second derivative (a gradient penalty, say) "
            "goes through them"
        )


def _output(
    ctx: Any,
    x: Tensor,
    a: Tensor,
    b: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    z: Tensor | None,
    call: Call,
) -> Tensor:
    """The output of :class:`SecuraFunction`, autocast off; keeps in ``ctx`` what backward needs."""
    shape, needs = x.shape, ctx.needs_input_grad
    flat = len(shape) == 2
    held = call.layer.held
    u, u_base = once(held, "U", cores, call.layer, a, b)
    scale = None if z_scale is None else _flat(z_scale)
    own_z = None if z is None else _flat(z)
    needs_p = call.differentiates and (needs[1] or needs[2])
    layer = call.layer
    sources: Any = (layer.weight, layer.cols) if layer.columns is None else (layer.columns,)
    if not needs_p or call.watched or sources[0] is None or any(map(Tensor.is_inference, sources)):
        sources = ()
    ctx.sources, ctx.written = sources, tuple(map(_version, sources))
    step = Step(x if flat else _flat(x), u, u_base, delta_bias, scale, own_z, needs_p)
    out, saved = SPACES[call.layer.options.norm].forward(call, step)
    ctx.call, ctx.shape, ctx.u_dtype = call, shape, u.dtype
    ctx.layers, ctx.has_b = None if held is None else held.layers, b is not None
    ctx.save_for_backward(a, b, *saved)
    return out if flat else _unflatten(out, (*shape[:-1], out.shape[-1]))


def _gradients(
    ctx: Any, g: Tensor, kept: Sequence[Any], adds: bool = True
) -> tuple[Tensor | None, ...]:
    """The gradients of :class:`SecuraFunction`'s inputs, which autograd casts to their dtypes.

    Args:
        ctx: of the forward pass.
        g: ``∂out``.
        kept: ``ctx.saved_tensors``, which under checkpointing may be asked for once.
        adds: whether ∂x goes to the call's total, if there is one.
    """
    total = ctx.call.total if adds else None
    call, needs, shape = ctx.call, ctx.needs_input_grad, ctx.shape
    if type(ctx) is not SecuraFunction._backward_cls and torch.compiler.is_compiling():
        call, total = call._replace(watched=True), None  # compiled autograd adds up what it sees
    scaling, space = call.layer.scaling, SPACES[call.layer.options.norm]
    wanted = [needs[0], needs[1] or needs[2], needs[3]]
    a, b, *saved = kept
    flat, da, db = len(shape) == 2, None, None
    so_far = total.so_far() if total is not None else None
    g = g if flat else _flat(g)
    if so_far is not None and call.watched and assumed() is None:
        # operators, which a dispatch mode is to see, write to none of their inputs
        dx, dp, dbias, scale = space.backward(call, g, saved, wanted, None)
        dx = so_far.add_(dx)
    else:
        dx, dp, dbias, scale = space.backward(call, g, saved, wanted, so_far)
    if wanted[1] and ctx.layers is not None and _is_for_grad(ctx):
        dp = call.layer.held.add(dp, ctx.layers)
    if wanted[1] and dp is not None:
        if not call.watched and tuple(map(_version, ctx.sources)) != ctx.written:
            raise RuntimeError(
                "the weight, the indices or the columns that C is of were written to between the "
                "forward pass and its backward pass, which reads them again"
            )
        dtype = ctx.u_dtype
        dp = dp if dp.dtype == dtype else dp.to(dtype)
        du = project.backward(call, dp, scale)
        if scaling != 1:
            du = du.mul_(scaling)
        if a.dtype != dtype or (b is not None and b.dtype != dtype):
            a, b = as_dtype(a, dtype), as_dtype(b, dtype)
        if needs[1]:
            da = du if b is None else du @ b.t()
        if needs[2]:
            db = a.t() @ du
    if total is not None:
        total.keep(dx)
        dx = None
    else:
        dx = None if not needs[0] else dx if flat else dx.view(shape)
    return dx, da, db, dbias if needs[3] else None, None, None, None


def _gradients_once(ctx: Any, g: Tensor, kept: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """:func:`_gradients` where autograd records them: a derivative of theirs is an error."""
    with torch.no_grad():
        found = _gradients(ctx, g, kept, adds=False)
    return found if torch.compiler.is_compiling() else _Once.apply(found, g, *kept[:2])


def _is_for_grad(ctx: Any) -> bool:
    """Return whether this backward pass adds to ``.grad`` of all that A and B are made of.

    If it computes only some of those gradients, or returns them, nothing may be held.
    """
    parameters = ctx.next_functions[1 : 2 + ctx.has_b]  # tensors alone have a place there
    nodes = [node for node, _ in parameters if node is not None]
    leaves, seen = [], set(nodes)
    while nodes:
        node = nodes.pop()
        before = {one for one, _ in node.next_functions if one is not None}
        nodes += before - seen
        seen |= before
        if not before:
            leaves.append(node)
    try:
        return all(map(torch._C._will_engine_execute_node, leaves))
    except RuntimeError:  # in torch.autograd.grad
        return False


__all__ = ["SPACES", "SecuraFunction"]
