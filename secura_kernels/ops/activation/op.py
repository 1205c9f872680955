"""Space ``activation``: S-MagNorm on the layer's output, one fused pass each way.

    y0   = x Wᵀ + b           made here, or given
    base = y0 + z P_baseᵀ     Δ = (z · z_scale) Pᵀ + δb     z = y0[:, rows] − b[rows]
    out  = (2 base + Δ) / M · f   or   (base + Δ / M) · f

    ∂Δ = ḡ f / M,  ∂base = 2 ḡ f / M  or  ḡ f     (M and the factors f are constants)
    ∂P = ∂Δᵀ (z · z_scale)    ∂δb = Σ ∂Δ     h = ∂Δ P · z_scale + ∂base P_base  [T, m]
    ∂y0 = ∂base,  ∂y0[:, rows] += h          ∂x = ∂y0 W = ∂base W + h R,  R = W[rows]

| tensor      | shape    | dtype                          |
|-------------|----------|--------------------------------|
| x, y0, out  | [..., K] [..., N] | compute dtype         |
| W           | [N, K]   | compute dtype                  |
| P, P_base   | [N, m]   | compute dtype; ∂P in fp32      |
| rows        | [m]      | int64                          |

Saved for backward, besides z ``[T, m]``, P, scalars and the frozen W itself, never x:

| ``save``        | tensor      | bytes an output element | 1/M in the backward pass            |
|-----------------|-------------|-------------------------|-------------------------------------|
| ``"recompute"`` | y0          | that of its dtype: 2, 4 | as in the forward                   |
| ``"8bit"``      | uint8 1/M   | 1                       | in [½, 1], off by at most 1/1020    |

In 8-bit mode a y0 that is made here is written over by out, and one that is given may be freed.
ρ and M are computed in fp32 or wider. ``paper`` and ``released`` look at the whole batch first
(tokens then influence each other), as do ``restrain`` and a relative ε: one more read of y0 each.

∂x is ∂y0 W or h R + g W, as :func:`secura_kernels.plan.adds_h` counts. h R comes first and g W is
added to it, so that the matrix product reads its addend while it computes, and what is rounded once
more is the small term. With h R neither a ∂y0 nor a dΔ of [T, N] is ever allocated.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import plan
from ...dispatch import absent, as_dtype, kernels, op, wide
from ...held import once
from ...norm import (
    Norm,
    coefficients,
    combined,
    effective_eps,
    gain,
    largest,
    relative_change,
    restrain_factor,
    scale_of_base,
    unpack,
)
from ...shared import added
from ..common import (
    Call,
    Gradients,
    Measured,
    Saved,
    Step,
    Terms,
    frozen,
    gather,
    gradients_fake,
    product_wide,
    times_rows,
)
from ..project.op import projections

_LEVELS = 255


@op("activation")
def activation(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor,
    z: Tensor | None,
    terms: list[Tensor | None],
    important: Tensor | None,
    packed: str,
    keep: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(out [T, N], z [T, m], y0 [T, N], kept [T, N], [ε, slope, offset], factor [N])``.

    Empty are z where it is given, y0 where that is or with ``keep``, ``kept`` (uint8) without
    ``keep``, the scalars where the options alone decide them, and ``factor`` without ``important``.

    Args:
        x: ``[T, K]``, or y0 ``[T, N]`` where there is no ``weight``; never written.
        weight: ``[N, K]``, in x's dtype as the rest, or None.
        bias: ``b [N]``, which y0 includes, or None.
        rows: ``[m]`` int64.
        z: ``x Rᵀ [T, m]`` where it is not to be read off y0, or None.
        terms: :class:`~secura_kernels.ops.common.Terms`, P and P_base in x's dtype.
        important: ``[N]`` bool of the restraint, or None.
        packed: the norm, of :func:`secura_kernels.norm.pack`.
        keep: whether 1/M is kept in 8 bits.
        impl: of :func:`secura_kernels.dispatch.resolve`.
    """
    norm, named = unpack(packed), Terms._make(terms)
    y0 = x if weight is None else F.linear(x, weight, bias)
    given_z = z is not None
    # y0 in 16 bits has lost as many of z's bits as b is larger
    if weight is not None and makes_z(x, weight, bias):
        z = times_rows(x, weight, rows)
    some = y0.numel() and rows.numel()
    if some and (triton := kernels(__package__, impl, y0)):
        z = triton.gather(y0, bias, rows, None) if z is None else z
        in_place = keep and weight is not None
        found = triton.forward(y0, z, named, norm, important, keep, in_place)
    else:
        z = gather(y0, bias, rows) if z is None else z
        found = _forward(y0.contiguous(), z, named, norm, important, keep)
    out, kept, scalars, factor = found
    kept = absent(y0, torch.uint8) if kept is None else kept
    y0_kept = absent(y0) if keep or weight is None else y0
    scalars = absent(y0, wide(y0.dtype)) if scalars is None else scalars
    factor = absent(y0, torch.float32) if factor is None else factor
    return out, absent(z) if given_z else z, y0_kept, kept, scalars, factor


def makes_z(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether z takes a product of its own, beside y0 with b in it."""
    return weight is not None and bias is not None and x.dtype.itemsize < 4


@activation.register_fake
def _activation_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor,
    z: Tensor | None,
    terms: list[Tensor | None],
    important: Tensor | None,
    packed: str,
    keep: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    t, n = x.shape[0], x.shape[1] if weight is None else weight.shape[0]
    kept = x.new_empty(t, n, dtype=torch.uint8) if keep else absent(x, torch.uint8)
    y0 = absent(x) if keep or weight is None else x.new_empty(t, n)
    scalars = x.new_empty(0 if unpack(packed).known else 3, dtype=wide(x.dtype))
    factor = x.new_empty(0 if important is None else n, dtype=torch.float32)
    own_z = x.new_empty(t, rows.shape[0]) if z is None else absent(x)
    return x.new_empty(t, n), own_z, y0, kept, scalars, factor


@op("activation_backward")
def activation_backward(
    g: Tensor,
    saved: Tensor,
    z: Tensor,
    weight: Tensor | None,
    rows: Tensor,
    terms: list[Tensor | None],
    found: list[Tensor],
    packed: str,
    needs: list[bool],
    impl: str | None,
    *,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(∂x, ∂P, ∂δb)``, those not needed empty; ∂P and ∂δb in fp32 or wider.

    Args:
        g: ``[T, N]``.
        saved: y0 ``[T, N]``, or 1/M in uint8, which says where 1/M comes from.
        z: ``[T, m]``.
        weight: ``[N, K]``, or None where y0 was given: ∂y0 then stands in ∂x's place.
        rows: ``[m]`` int64.
        terms: :class:`~secura_kernels.ops.common.Terms` of the forward pass.
        found: :class:`~secura_kernels.ops.common.Measured` of the forward pass.
        packed: the norm, of :func:`secura_kernels.norm.pack`.
        needs: which of the three are needed.
        impl: of :func:`secura_kernels.dispatch.resolve`.
        total: ``[T, K]``, where ∂x is added to in place, or None.
    """
    norm = unpack(packed)
    h_alone = needs[0] and weight is not None and _adds_h(g, weight, rows, norm)
    some = g.numel() and rows.numel()
    triton = kernels(__package__, impl, g) if some else None
    run = _backward if triton is None else triton.backward
    first, dp, dbias = run(
        g, saved, z, rows, Terms._make(terms), Measured._make(found), norm, needs, h_alone
    )
    if first is None:
        dx = absent(g)
    elif weight is None:
        dx = first
    elif h_alone:
        dx = added(total, first, weight.index_select(0, rows)).addmm_(g, weight)
    else:
        dx = added(total, first, weight)
    dtype = wide(g.dtype)
    return dx, absent(g, dtype) if dp is None else dp, absent(g, dtype) if dbias is None else dbias


def _adds_h(g: Tensor, weight: Tensor, rows: Tensor, norm: Norm) -> bool:
    n, k = weight.shape
    shape = plan.Shape(g.shape[0], n, k, rows.shape[0], g.element_size())
    return plan.adds_h(shape, norm, plan.ceilings_of(g))


@activation_backward.register_fake
def _activation_backward_fake(
    g: Tensor, saved: Tensor, z: Tensor, weight: Tensor | None, rows: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    terms, _, _, needs, _ = rest
    return gradients_fake(g, weight, Terms._make(terms).p, needs)


def _base_and_delta(y0: Tensor, z: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    p, p_base, delta_bias, z_scale = terms
    dtype, base = wide(y0.dtype), y0
    if y0.dtype != dtype:
        base, z, p, p_base = y0.to(dtype), z.to(dtype), p.to(dtype), as_dtype(p_base, dtype)
    if p_base is not None:
        base = torch.addmm(base, z, p_base.t())
    delta = (z if z_scale is None else z * z_scale) @ p.t()
    if delta_bias is not None:
        delta += delta_bias
    return base, delta


def _forward(
    y0: Tensor, z: Tensor, terms: Terms, norm: Norm, important: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(out, kept, [ε, slope, offset], factor)`` in plain torch."""
    base, delta = _base_and_delta(y0, z, terms)
    scalars = None
    slope: Tensor | float
    offset: Tensor | float
    if known := norm.known:
        eps, slope, offset = known
        rho = relative_change(base, delta, eps)
    else:
        own_eps = effective_eps(base, norm)
        rho = relative_change(base, delta, own_eps)
        peak = largest(rho) if norm.needs_peak else None
        slope, offset = coefficients(norm, peak, rho)
        scalars = torch.stack((own_eps, slope, offset))
    gains = gain(rho, slope, offset, norm)
    factor = restrain_factor((gains,), gains.numel(), important, norm)
    out = combined(base, delta, gains, scale_of_base(gains, norm))
    out = out if factor is None else out.mul_(factor)
    kept = (2 / gains).sub_(1).mul_(_LEVELS).round_().to(torch.uint8) if keep else None
    return as_dtype(out, y0.dtype), kept, scalars, factor


def _backward(
    g: Tensor,
    saved: Tensor,
    z: Tensor,
    rows: Tensor,
    terms: Terms,
    found: Measured,
    norm: Norm,
    needs: list[bool],
    h_alone: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(∂y0, ∂P, ∂δb)`` in plain torch; with ``h_alone`` h ``[T, m]`` in ∂y0's place."""
    dtype, z_scale = wide(g.dtype), terms.z_scale
    wide_g = as_dtype(g, dtype)
    if norm.restrained:
        wide_g = wide_g * found.factor
    if saved.dtype == torch.uint8:
        ddelta = wide_g * saved.to(dtype).mul_(0.5 / _LEVELS).add_(0.5)
    else:
        base, delta = _base_and_delta(saved, z, terms)
        eps, slope, offset = norm.known or found.scalars.unbind()
        ddelta = wide_g / gain(relative_change(base, delta, eps), slope, offset, norm)
    dbase = as_dtype(2 * ddelta if norm.averaged else wide_g, g.dtype)
    dbias = ddelta.sum(0) if needs[2] else None
    ddelta = as_dtype(ddelta, g.dtype)
    first = dp = None
    if needs[0]:
        h = ddelta @ terms.p
        if z_scale is not None:
            h.mul_(z_scale)
        if terms.p_base is not None:
            h.addmm_(dbase, terms.p_base)
        first = h if h_alone else dbase.contiguous().index_add(1, rows, h)
    if needs[1]:
        dp = product_wide(ddelta.t(), z if z_scale is None else (z * z_scale).to(g.dtype))
    return first, dp, dbias


def forward(call: Call, step: Step) -> tuple[Tensor, Saved]:
    """``(out [T, N], what is saved)``."""
    layer, dtype = call.layer, step.x.dtype
    weight, bias = frozen(call, dtype)
    thin = (call, step.u, step.u_base, dtype)
    p, p_base = once(layer.held, ("P", dtype), projections, *thin)
    terms = Terms(p, p_base, step.delta_bias, step.z_scale)
    keep = layer.save == "8bit" and call.differentiates
    settings = (terms, call.important, call.packed, keep, call.impl)
    run = activation if call.watched else activation.body
    out, z, y0, kept, *found = run(step.x, weight, bias, layer.rows, step.z, *settings)
    z = z if step.z is None else step.z
    if keep:
        terms = terms._replace(delta_bias=None)
    saved = kept if keep else step.x if call.given else y0
    return out, (saved, z, weight, layer.rows, *terms, *found)


def backward(
    call: Call, g: Tensor, saved: Saved, needs: list[bool], total: Tensor | None
) -> Gradients:
    """``(∂x or ∂y0, ∂P, ∂δb)``; ``total``, where one is given, is added to and is ∂x."""
    of_gain, z, weight, rows, *terms_and_found = saved
    terms, found = terms_and_found[:4], terms_and_found[4:]
    run = activation_backward if call.watched else activation_backward.body
    return Gradients(
        *run(g, of_gain, z, weight, rows, terms, found, call.packed, needs, call.impl, total=total)
    )


__all__ = ["activation", "activation_backward", "backward", "forward", "makes_z"]
