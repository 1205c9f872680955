"""Run an adapted layer as one op, from the adapter's own parameters to the output.

    U = s · A B      P = C (U + U_acc)   or, with the norm's reference "folded",
                     P = C U, P_base = C U_acc
    out = the norm space's layer of x (or y0), W, b, P, P_base

    ∂U = Cᵀ ∂P      ∂A = s · ∂U Bᵀ      ∂B = s · Aᵀ ∂U

| norm         | out                                                  | folder           |
|--------------|------------------------------------------------------|------------------|
| `none`       | x (W + P R)ᵀ + b + δb                                | `ops/lowrank`    |
| `channel`    | the same with one gain an output row                 | `ops/channel`    |
| `activation` | S-MagNorm of y0 and its change                       | `ops/activation` |
| `weight`     | x W'ᵀ + b + δb, W' = S-MagNorm of W and its change   | `ops/weight`     |

What each saves for the backward pass, and the bytes it moves, stand in its folder's ``op.py``;
:mod:`secura_kernels.naive` has the same functions as plain equations. One ``autograd.Function``
serves them all: a function's way through autograd takes the host 11 µs beside an H100, forward
alone. Under torch.compile, a dispatch mode or with a tensor subclass it calls the ops through
torch's dispatcher, else their bodies.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import naive
from .checks import check_call, check_trained
from .dispatch import (
    alone,
    as_dtype,
    compute_dtype,
    is_alone,
    is_watched,
    supported,
    without_autocast,
)
from .held import once
from .layer import Layer, cores
from .norm import pack
from .ops import flops
from .ops.activation import op as activation
from .ops.channel import op as channel
from .ops.common import Call, Step, rounding_seed
from .ops.lowrank import op as lowrank
from .ops.project import op as project
from .ops.weight import op as weight
from .shared import Total, shared

SPACES: dict[str, ModuleType] = {
    "none": lowrank,
    "channel": channel,
    "activation": activation,
    "weight": weight,
}
"""The ``forward`` and ``backward`` of each norm space, and ``product`` of the additive ones."""

flops.register()


def secura_linear(
    x: Tensor,
    layer: Layer,
    a: Tensor,
    b: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    z_scale: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute an adapted layer's output ``[..., N]`` from its input ``x [..., K]``.

    Args:
        x: ``[..., K]``.
        layer: the frozen layer and how it is adapted.
        a: ``A [m, r]``, or ``[m, m]`` where there is no ``b``; multiplied in fp32 or wider.
        b: ``B [r, m]``, or None.
        delta_bias: trainable bias ``[N]`` or None; ``activation`` counts it to Δ, the others add it
            after the norm.
        z_scale: ``[..., m]``, multiplies ``z = x Rᵀ`` (dropout), or None; not for ``weight``.
        impl: ``"auto"``, ``"triton"``, ``"reference"``, or None for what ``SECURA_IMPL`` says.

    Returns:
        ``[..., N]`` in the compute dtype: autocast's where it is on, x's own otherwise. Gradients
        reach x, a, b and delta_bias, once differentiable.

    Raises:
        TypeError: for an x of integers or complex numbers.
        ValueError: where shapes do not fit, or for an unknown form, combination, ``save`` or
            ``impl``; for ``channel`` without ``gram`` and ``base_norms``; for ``weight`` with
            ``z_scale``; for a layer whose weight, bias or columns require a gradient.
        RuntimeError: for ``impl="triton"`` where no kernel can take the tensors; in the backward
            pass, for a second derivative.
    """
    if layer.weight is None:
        raise ValueError("the layer has no weight: call secura_add with the base's own output")
    if x.dim() == 0 or x.shape[-1] != layer.weight.shape[1]:
        raise ValueError(f"x {list(x.shape)} does not fit the weight {list(layer.weight.shape)}")
    n = layer.weight.shape[0]
    return _run(x, n, compute_dtype(x), layer, a, b, delta_bias, z_scale, impl, given=False)


def secura_add(
    y0: Tensor,
    layer: Layer,
    a: Tensor,
    b: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    z_scale: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute an adapted layer's output ``[..., N]`` from its base's ``y0 [..., N]``.

    For a base that is more than a frozen dense product (quantised, hooked, itself trained).

    Args:
        y0: ``[..., N]``, the base layer's output, ``layer.bias`` included; never written.
        layer: as for :func:`secura_linear`; ``weight`` may be None where ``columns`` are given.
        a, b, delta_bias, z_scale, impl: as for :func:`secura_linear`.

    Returns:
        ``[..., N]`` in y0's dtype. Gradients reach y0, a, b and delta_bias, once differentiable;
        where they are asked of the layer's weight, bias or columns, these too, by plain equations.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`secura_linear`; ValueError also for
            ``weight`` or a ``rounding_seed``, which multiply by another weight and cannot use y0,
            and for a layer with neither weight nor columns.
    """
    if layer.replaces_product:
        what = "stochastic rounding" if layer.options.norm != "weight" else "the space 'weight'"
        raise ValueError(f"{what} multiplies by W' itself: call secura_linear")
    if layer.weight is None and layer.columns is None:
        raise ValueError("the layer has neither weight nor columns, of which P is made")
    if y0.dim() == 0:
        raise ValueError("y0 [] must be [..., N]")
    n = y0.shape[-1]
    return _run(y0, n, y0.dtype, layer, a, b, delta_bias, z_scale, impl, given=True)


def effective_weight(
    layer: Layer,
    a: Tensor,
    b: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute the plain weight ``W' [N, K]`` that makes the same layer: what a merge writes.

    Args:
        layer: the frozen layer and how it is adapted.
        a, b, impl: as for :func:`secura_linear`.
        dtype: of the result, rounded to once; W's own by default. To bf16 from the layer's
            ``rounding_seed`` if it has one: up with the probability of the part that is cut off,
            each entry as in the forward pass. Entries that bf16 holds exactly never change.

    Returns:
        ``[N, K]`` in W's layout. No gradient; W is not written.

    Raises:
        ValueError: for ``norm="activation"``, stochastic rounding to fp16, a layer without weight,
            shapes that do not fit, or an unknown form or ``impl``.
        RuntimeError: for ``impl="triton"`` where no kernel can take the weight.
    """
    options, w, rows = layer.options, layer.weight, layer.rows
    if options.norm == "activation":
        raise ValueError("norm='activation' is not linear in x: no plain weight computes it")
    if w is None:
        raise ValueError("the layer has no weight to make another of")
    dtype = dtype or w.dtype
    seed = rounding_seed(layer, dtype)
    check_call(w.shape[0], (), layer, a, b, None, None)
    call = _call(layer, False, True, impl)
    with torch.no_grad(), without_autocast(w.device.type):
        p, p_base = _projections(call, a, b)
        if options.norm == "weight":
            return weight.normed_weight(
                w, rows, p, p_base, call.important, call.packed, dtype, seed, impl
            )
        q, base_scale, _ = SPACES[options.norm].product(call, p, p_base, p.dtype)
        return weight.merged_weight(w, rows, q, base_scale, dtype, seed, impl)


@torch.no_grad()
def additive_product(
    layer: Layer, a: Tensor, b: Tensor | None = None, *, impl: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute ``(Q [N, m], base_scale [N] or None)``: the layer is base_scale · W + Q R.

    Of ``none`` and ``channel``. Where base_scale is None, R and Q are the factors of a LoRA that
    computes the same. No gradient.

    Raises:
        ValueError: for another space, or where shapes do not fit.
    """
    if layer.options.norm not in ("none", "channel"):
        raise ValueError(f"norm={layer.options.norm!r} adds no product of low rank")
    source = layer.weight if layer.columns is None else layer.columns
    assert source is not None
    check_call(source.shape[0], (), layer, a, b, None, None)
    call = _call(layer, False, True, impl)
    with without_autocast(a.device.type):
        p, p_base = _projections(call, a, b)
        q, base_scale, _ = SPACES[layer.options.norm].product(call, p, p_base, p.dtype)
    return q, base_scale


def _call(
    layer: Layer,
    given: bool,
    watched: bool,
    impl: str | None,
    total: Total | None = None,
    differentiates: bool = False,
) -> Call:
    restrain = layer.restrain
    packed = pack(layer.options, restrain, traced=watched)
    important = None if restrain is None else restrain.important
    return Call(layer, packed, important, given, watched, impl, total, differentiates)


def _projections(call: Call, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``(P, P_base or None)``, ``[N, m]``, fp32 or wider."""
    u, u_base = cores(call.layer, a, b)
    return project.projections(call, u, u_base, u.dtype)


def _run(
    x: Tensor,
    n: int,
    dtype: torch.dtype,
    layer: Layer,
    a: Tensor,
    b: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    impl: str | None,
    *,
    given: bool,
) -> Tensor:
    """Check, flatten, choose the implementation, and run the layer in ``dtype``."""
    if not x.is_floating_point():
        raise TypeError(f"the input is {x.dtype}: the ops take floating numbers")
    lead = x.shape[:-1]
    check_call(n, lead, layer, a, b, delta_bias, z_scale)
    w, bias, columns = layer.weight, layer.bias, layer.columns
    trained = (w is not None and w.requires_grad) or (bias is not None and bias.requires_grad)
    trained = trained or (columns is not None and columns.requires_grad)
    trained = trained and torch.is_grad_enabled()
    if trained or torch._C._get_tracing_state() is not None:  # torch.jit.trace
        if trained:
            check_trained(layer, given)
        elif w is None and layer.options.norm == "channel":
            raise ValueError(
                "torch.jit.trace needs W itself for 'channel': merge the adapter first"
            )
        function = naive.secura_add if given else naive.secura_linear
        with without_autocast(x.device.type):
            out = function(x, layer, a, b, delta_bias=delta_bias, z_scale=z_scale)
        return out.to(dtype)
    watched = is_watched(x, layer.weight, a, b, delta_bias, z_scale)
    total = None
    if layer.shares_input and not given:
        x, total = shared(x, dtype)
    elif x.dtype != dtype:
        x = x.to(dtype)
    if not watched:
        impl = supported(impl, x, layer.weight, layer.columns, a, b)
    call = _call(layer, given, watched, impl, total, torch.is_grad_enabled())
    return _SecuraLayer.apply(x, a, b, delta_bias, z_scale, call)


def _flat(tensor: Tensor) -> Tensor:
    """``[T, size]`` of ``[..., size]``."""
    lead = tensor.shape[:-1]
    return tensor if len(lead) == 1 else tensor.reshape(math.prod(lead), tensor.shape[-1])


_unflatten = torch.ops.aten._unsafe_view.default
"""A view that autograd does not take for one: into a function's view nobody may write."""


class _SecuraLayer(torch.autograd.Function):
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
        twice = torch.is_grad_enabled()
        run, total = (_gradients_once, None) if twice else (_gradients, ctx.call.total)
        if is_alone(g):
            return run(ctx, g, total)
        with alone(g):
            return run(ctx, g, total)


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
    call: Call,
) -> Tensor:
    """The output of :class:`_SecuraLayer`, autocast off; keeps in ``ctx`` what backward needs."""
    shape, needs = x.shape, ctx.needs_input_grad
    flat = len(shape) == 2
    held = call.layer.held
    u, u_base = once(held, "U", cores, call.layer, a, b)
    scale = None if z_scale is None else _flat(z_scale)
    needs_p = call.differentiates and (needs[1] or needs[2])
    source = call.layer.weight if call.layer.columns is None else call.layer.columns
    if not needs_p or call.watched or source is None or source.is_inference():
        source = None
    ctx.source, ctx.written = source, 0 if source is None else source._version
    step = Step(x if flat else _flat(x), u, u_base, delta_bias, scale, needs_p)
    out, saved = SPACES[call.layer.options.norm].forward(call, step)
    ctx.call, ctx.shape, ctx.u_dtype = call, shape, u.dtype
    ctx.layers, ctx.has_b = None if held is None else held.layers, b is not None
    ctx.save_for_backward(a, b, *saved)
    return out if flat else _unflatten(out, (*shape[:-1], out.shape[-1]))


def _gradients(ctx: Any, g: Tensor, total: Total | None) -> tuple[Tensor | None, ...]:
    """The gradients of :class:`_SecuraLayer`'s inputs, which autograd casts to their dtypes.

    ∂x goes to ``total``, if there is one.
    """
    call, needs, shape = ctx.call, ctx.needs_input_grad, ctx.shape
    if type(ctx) is not _SecuraLayer._backward_cls and torch.compiler.is_compiling():
        call, total = call._replace(watched=True), None  # compiled autograd adds up what it sees
    scaling, space = call.layer.scaling, SPACES[call.layer.options.norm]
    wanted = [needs[0], needs[1] or needs[2], needs[3]]
    a, b, *saved = ctx.saved_tensors
    flat, da, db = len(shape) == 2, None, None
    so_far = total.so_far() if total is not None else None
    dx, dp, dbias, scale = space.backward(call, g if flat else _flat(g), saved, wanted, so_far)
    if wanted[1] and ctx.layers is not None and _is_for_grad(ctx):
        dp = call.layer.held.add(dp, ctx.layers)
    if wanted[1] and dp is not None:
        if ctx.source is not None and not call.watched and ctx.source._version != ctx.written:
            raise RuntimeError(
                "the weight or the columns that C is of were written to between the forward pass "
                "and its backward pass, which reads them again"
            )
        dtype = ctx.u_dtype
        du = project.backward(call, as_dtype(dp, dtype), scale)
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
    return dx, da, db, dbias if needs[3] else None, None, None


def _gradients_once(ctx: Any, g: Tensor, total: Total | None) -> tuple[Tensor | None, ...]:
    """:func:`_gradients` where autograd records them: a derivative of theirs is an error."""
    with torch.no_grad():
        found = _gradients(ctx, g, total)
    if torch.compiler.is_compiling():
        return found
    return _Once.apply(found, g, *ctx.saved_tensors[:2])


def _is_for_grad(ctx: Any) -> bool:
    """Whether the pass at work adds to ``.grad`` of all that A and B are made of.

    In one that was asked for a part of it, or is to return it, nothing may be held.
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


__all__ = ["Layer", "additive_product", "effective_weight", "secura_add", "secura_linear"]
