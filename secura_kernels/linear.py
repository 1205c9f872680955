"""A whole adapted layer as one op, from the adapter's own parameters to the layer's output.

    U = s · A B      P = C (U + U_acc)   or, with norm_reference "folded", P = C U, P_base = C U_acc
    out = the norm space's layer of x, W, b, P, P_base

    ∂U = Cᵀ ∂P      ∂A = s · ∂U Bᵀ      ∂B = s · Aᵀ ∂U

Without B, A is ``[m, m]`` and U = s · A: a core that is trained itself.

| tensor      | shape             | dtype                                        |
|-------------|-------------------|----------------------------------------------|
| x, out      | [..., K] [..., N] | compute dtype (autocast's)                   |
| W           | [N, K]            | its own; the compute dtype but in ``weight`` |
| A, B        | [m, r] [r, m]     | any; multiplied in fp32 or wider             |
| U_acc       | [m, m]            | fp32                                         |

It is :func:`project`, :func:`channel_product` and the space's own op one after the other, with
their bytes and what they save, and the same bits. As one ``autograd.Function`` it costs the host
less: beside an H100 a function's way through autograd took 11 µs, forward alone. Where a compiler,
a dispatch mode or a tensor subclass looks on, the ops themselves are called.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import activation_dense, additive, channel
from . import weight as weight_space
from .activation import checked
from .checks import check_input, check_operands
from .columns import project, project_backward, projected
from .dispatch import (
    compute_dtype,
    current_device,
    is_watched,
    resolve,
    supported,
    wide,
    without_autocast,
)
from .gain import NormOptions, Restrain, known_scalars, resolve_norm


class Layer(NamedTuple):
    """What of an adapted layer is not trained.

    Attributes:
        weight: ``W [N, K]``, frozen, any strides.
        bias: ``b [N]``, frozen, or None.
        rows: ``[m]`` int64, distinct, R = W[rows].
        cols: ``[m]`` int64, C = W[:, cols].
        options: the norm; its space decides the op.
        scaling: s.
        core: ``U_acc [m, m]``, what was folded, or None.
        core_is_base: whether U_acc belongs to the norm's base, or to its change.
        gram: ``R Rᵀ [m, m]`` of :func:`row_norms`; ``channel`` alone.
        base_norms: ``‖W_base,i‖ [N]`` of :func:`row_norms`; ``channel`` alone.
        restrain: the suppression, or None.
        save: ``activation`` alone: ``"recompute"`` or ``"8bit"``.
    """

    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    cols: Tensor
    options: NormOptions
    scaling: float = 1.0
    core: Tensor | None = None
    core_is_base: bool = False
    gram: Tensor | None = None
    base_norms: Tensor | None = None
    restrain: Restrain | None = None
    save: str = "recompute"


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
    """An adapted layer's output in its norm space.

    Args:
        x: ``[..., K]``.
        layer: the frozen layer and how it is adapted.
        a: ``A [m, r]``, or ``[m, m]`` where there is no ``b``.
        b: ``B [r, m]``, or None.
        delta_bias: trainable bias ``[N]`` or None.
        z_scale: ``[..., m]`` (dropout) or None; not for ``weight``.
        impl: ``"auto"``, ``"triton"``, ``"reference"``, or None for what ``SECURA_IMPL`` says.

    Returns:
        ``[..., N]`` in the compute dtype. Gradients reach x, a, b and delta_bias, once
        differentiable.

    Raises:
        TypeError: for an x of integers or complex numbers.
        ValueError: where shapes do not fit, or for an unknown form, combination, ``save`` or
            ``impl``; for ``channel`` without ``gram`` and ``base_norms``; for ``weight`` with
            ``z_scale``.
        RuntimeError: for ``impl="triton"`` where no kernel can take ``x``.
    """
    norm, weight = layer.options.norm, layer.weight
    if is_watched(x, weight, a, b, delta_bias, z_scale):
        return _composed(x, layer, a, b, delta_bias, z_scale, impl)
    check_input(x, weight)
    _check(x, layer, a, b, delta_bias, z_scale)
    dtype = compute_dtype(x)
    tokens = math.prod(x.shape[:-1])
    flat = _as(x.reshape(tokens, x.shape[-1]), dtype)
    z_scale = None if z_scale is None else z_scale.reshape(tokens, z_scale.shape[-1])
    impl = supported(impl, flat, weight) if norm == "weight" else resolve(impl, flat)
    out = _SecuraLinear.apply(flat, a, b, delta_bias, z_scale, layer, impl)
    return out.view(*x.shape[:-1], weight.shape[0])


def update(a: Tensor, b: Tensor | None, scaling: float) -> Tensor:
    """``U = s · A B [m, m]``, or ``s · A`` without B, in fp32 or wider, autocast or not."""
    with without_autocast(a.device.type):
        return _update(a, b, scaling)


def _update(a: Tensor, b: Tensor | None, scaling: float) -> Tensor:
    dtype = wide(a.dtype)
    product = _as(a, dtype) if b is None else _as(a, dtype) @ _as(b, dtype)
    return product if scaling == 1 else product * scaling


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``; torch takes 3 µs to find out that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _check(x: Tensor, layer: Layer, a: Tensor, b: Tensor | None, delta_bias, z_scale) -> None:
    weight, m = layer.weight, layer.rows.numel()
    check_operands(
        x.shape[:-1], weight.shape[0], layer.rows, bias=layer.bias, delta_bias=delta_bias,
        z_scale=z_scale, restrain=layer.restrain,
    )  # fmt: skip
    inner = m if b is None else b.shape[0]
    if a.shape != (m, inner) or (b is not None and b.shape[1:] != (m,)) or layer.cols.numel() != m:
        raise ValueError(
            f"a {list(a.shape)}, b {None if b is None else list(b.shape)} and cols "
            f"{list(layer.cols.shape)} must be [{m}, r], [r, {m}] and [{m}] beside rows [{m}]; "
            f"without b, a is [{m}, {m}]"
        )
    if layer.core is not None and layer.core.shape != (m, m):
        raise ValueError(f"core {list(layer.core.shape)} must be [{m}, {m}]")
    norm = layer.options.norm
    if norm == "channel" and (layer.gram is None or layer.base_norms is None):
        raise ValueError("the space 'channel' needs gram and base_norms, of row_norms()")
    if norm == "weight" and z_scale is not None:
        raise ValueError("the space 'weight' has no z, so it takes no z_scale")


def _composed(x, layer: Layer, a, b, delta_bias, z_scale, impl) -> Tensor:
    """:func:`secura_linear` as its ops, each of which a compiler sees."""
    weight, rows, options, p_base = layer.weight, layer.rows, layer.options, None
    u = update(a, b, layer.scaling)
    if layer.core is not None and _core_is_base(layer):
        p_base = project(weight, layer.cols, layer.core, impl=impl)
    elif layer.core is not None:
        u = u + layer.core
    p = project(weight, layer.cols, u, impl=impl)
    named: dict[str, Any] = {"delta_bias": delta_bias, "impl": impl}
    if options.norm == "weight":
        return weight_space.weight_norm_linear(
            x, weight, layer.bias, rows, p, options, p_base=p_base, restrain=layer.restrain, **named
        )
    named["z_scale"] = z_scale
    if options.norm == "activation":
        return activation_dense.activation_linear(
            x, weight, layer.bias, rows, p, options, p_base=p_base, restrain=layer.restrain,
            save=layer.save, **named,
        )  # fmt: skip
    if options.norm == "channel":
        assert layer.gram is not None and layer.base_norms is not None
        p, named["share"] = channel.channel_product(
            p, p_base, layer.gram, layer.base_norms, options, layer.restrain, impl=impl
        )
    return additive.lowrank_linear(x, weight, layer.bias, rows, p, **named)


class _SecuraLinear(torch.autograd.Function):
    """Forward and backward of one layer; what each space keeps is listed in its own module."""

    @staticmethod
    def forward(ctx: Any, x, a, b, delta_bias, z_scale, layer: Layer, impl: str) -> Tensor:
        ctx.layer, ctx.impl = layer, impl
        ctx.bias_dtype = None if delta_bias is None else delta_bias.dtype
        with current_device(x), without_autocast(x.device.type):
            u, u_base = _factors(layer, a, b)
            ctx.u_dtype = u.dtype
            step = _FORWARD[layer.options.norm]
            return step(ctx, x, a, b, u, u_base, delta_bias, z_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        layer, impl, needs = ctx.layer, ctx.impl, ctx.needs_input_grad
        with current_device(g), without_autocast(g.device.type):
            a, b, *saved = ctx.saved_tensors
            wanted = [needs[0], needs[1] or needs[2], needs[3]]
            dx, dp, dbias = _BACKWARD[layer.options.norm](ctx, g, saved, wanted)
            da = db = None
            if wanted[1]:
                dtype = ctx.u_dtype
                du = project_backward.body(_as(dp, dtype), layer.weight, layer.cols, impl)
                if layer.scaling != 1:
                    du = du.mul_(layer.scaling)
                if needs[1]:
                    da = _as(du if b is None else du @ _as(b, dtype).t(), a.dtype)
                db = _as(_as(a, dtype).t() @ du, b.dtype) if needs[2] else None
        dx = dx if needs[0] else None
        return dx, da, db, dbias.to(ctx.bias_dtype) if needs[3] else None, None, None, None


def _factors(layer: Layer, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``(U of the change, U of the base or None)``."""
    u = _update(a, b, layer.scaling)
    if layer.core is None:
        return u, None
    core = _as(layer.core, u.dtype)
    return (u, core) if _core_is_base(layer) else (u + core, None)


def _core_is_base(layer: Layer) -> bool:
    return layer.core_is_base and layer.options.norm != "none"


def _projections(ctx, u, u_base, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    weight, cols = ctx.layer.weight, ctx.layer.cols
    p = projected(weight, cols, u, dtype, ctx.impl)
    return p, None if u_base is None else projected(weight, cols, u_base, dtype, ctx.impl)


def _additive_forward(ctx, x, a, b, u, u_base, delta_bias, z_scale) -> Tensor:
    layer, dtype = ctx.layer, x.dtype
    share = inverse = None
    if layer.options.norm == "channel":
        q, share, inverse = _channel_product(ctx, *_projections(ctx, u, u_base, u.dtype))
        q = _as(q, dtype)
    else:
        q, _ = _projections(ctx, u, None, dtype)
    weight = _as(layer.weight, dtype)
    bias = None if layer.bias is None else _as(layer.bias, dtype)
    out, z = additive.linear_forward.body(
        x, weight, bias, layer.rows, q, share, delta_bias, z_scale, ctx.impl
    )
    kept = z if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] else None
    ctx.save_for_backward(a, b, kept, weight, layer.rows, q, share, z_scale, inverse)
    return out


def _channel_product(ctx, p, p_base) -> tuple[Tensor, Tensor | None, Tensor]:
    layer, options = ctx.layer, ctx.layer.options
    form, combine = resolve_norm(options.norm, options.form, options.combine)
    limits = (None, 0.0, 0.0, 0.0) if layer.restrain is None else tuple(layer.restrain)
    q, share, inverse = channel.product_forward.body(
        p, p_base, layer.gram, layer.base_norms, form, combine, options.scale, options.eps,
        options.eps_relative, *limits, ctx.impl,
    )  # fmt: skip
    shared = combine == "averaged" or layer.restrain is not None
    return q, share if shared else None, inverse


def _additive_backward(ctx, g, saved, needs) -> tuple:
    *kept, inverse = saved
    dx, dq, dbias = additive.linear_backward.body(g, *kept, needs, ctx.impl)
    if inverse is not None and needs[1]:
        dq = dq.mul_(inverse[:, None])
    return dx, dq, dbias


def _activation_forward(ctx, x, a, b, u, u_base, delta_bias, z_scale) -> Tensor:
    layer, dtype = ctx.layer, x.dtype
    options = checked(layer.options, layer.save)
    p, p_base = _projections(ctx, u, u_base, dtype)
    weight = _as(layer.weight, dtype)
    bias = None if layer.bias is None else _as(layer.bias, dtype)
    important, *limits = (None,) if layer.restrain is None else layer.restrain
    keep = layer.save == "8bit"
    y0, out, z, kept, scalars, factor = activation_dense.linear_forward.body(
        x, weight, bias, layer.rows, p, p_base, delta_bias, z_scale, important,
        [float(limit) for limit in limits], options.form, options.combine, options.scale,
        options.eps, options.eps_relative, keep, ctx.impl,
    )  # fmt: skip
    ctx.how = list(known_scalars(options) or ()), options.form, options.combine
    y0, kept, delta_bias = (None, kept, None) if keep else (y0, None, delta_bias)
    factor = None if layer.restrain is None else factor
    scalars = None if ctx.how[0] else scalars
    ctx.save_for_backward(
        a, b, y0, kept, z, weight, layer.rows, p, p_base, delta_bias, z_scale, scalars, factor
    )
    return out


def _activation_backward(ctx, g, saved, needs) -> tuple:
    return activation_dense.linear_backward.body(g, *saved, *ctx.how, needs, ctx.impl)


def _weight_forward(ctx, x, a, b, u, u_base, delta_bias, z_scale) -> Tensor:
    layer = ctx.layer
    p, p_base = _projections(ctx, u, u_base, u.dtype)
    bias = None if layer.bias is None else _as(layer.bias, x.dtype)
    norm = weight_space.primitives(layer.options, layer.restrain)
    ctx.how = norm[1:3]
    out, scalars, factor = weight_space.linear_forward.body(
        x, layer.weight, bias, layer.rows, p, p_base, delta_bias, *norm, ctx.impl
    )
    kept = x if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] else None
    factor = None if layer.restrain is None else factor
    ctx.save_for_backward(a, b, kept, layer.weight, layer.rows, p, p_base, scalars, factor)
    return out


def _weight_backward(ctx, g, saved, needs) -> tuple:
    return weight_space.linear_backward.body(g, *saved, *ctx.how, needs, ctx.impl)


_FORWARD = {
    "none": _additive_forward,
    "channel": _additive_forward,
    "activation": _activation_forward,
    "weight": _weight_forward,
}
_BACKWARD = {
    "none": _additive_backward,
    "channel": _additive_backward,
    "activation": _activation_backward,
    "weight": _weight_backward,
}

__all__ = ["Layer", "secura_linear", "update"]
