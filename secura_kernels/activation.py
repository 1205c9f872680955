"""Space ``activation``: S-MagNorm on the layer's output, one fused pass each way.

    base = y0 + z P_baseᵀ     Δ = (z · z_scale) Pᵀ + δb     z = y0[:, rows] − b[rows]
    out  = (2 base + Δ) / M · f   or   (base + Δ / M) · f

    ∂Δ = ḡ f / M,  ∂base = 2 ḡ f / M  or  ḡ f     (M and the factors f are constants)
    ∂P = ∂Δᵀ (z · z_scale)    ∂δb = Σ ∂Δ
    ∂y0 = ∂base,  ∂y0[:, rows] += ∂Δ P · z_scale + ∂base P_base

| tensor    | shape    | dtype                          |
|-----------|----------|--------------------------------|
| y0, out   | [..., N] | compute dtype                  |
| P, P_base | [N, m]   | fp32 in, cast once; ∂P in fp32 |
| rows      | [m]      | int64, distinct                |

Saved for backward, besides z ``[T, m]``, P and scalars:

| ``save``        | tensor      | bytes an output element | 1/M in the backward pass            |
|-----------------|-------------|-------------------------|-------------------------------------|
| ``"recompute"`` | y0          | that of its dtype: 2, 4 | as in the forward                   |
| ``"8bit"``      | uint8 1/M   | 1                       | in [½, 1], off by at most 1/1020    |

y0 is an input that its producer need not keep: in 8-bit mode it may be freed after the forward.
A dense frozen layer takes :mod:`secura_kernels.activation_dense`, which makes y0 itself.
ρ and M are computed in fp32 or wider. ``paper`` and ``released`` look at the whole batch first
(tokens then influence each other), as do ``restrain`` and a relative ε: one more read of y0 each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .additive import gather, product_wide
from .checks import check_floating, check_operands, check_space
from .dispatch import absent, op, resolve, wide
from .gain import (
    NormOptions,
    Restrain,
    base_share,
    coefficients,
    effective_eps,
    gain,
    known_scalars,
    largest,
    needs_peak,
    relative_change,
    resolve_norm,
    restrain_factor,
)

SAVES = ("recompute", "8bit")
_LEVELS = 255


def activation_norm(
    y0: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    p: Tensor,
    options: NormOptions,
    *,
    p_base: Tensor | None = None,
    delta_bias: Tensor | None = None,
    z_scale: Tensor | None = None,
    restrain: Restrain | None = None,
    save: str = "recompute",
    impl: str | None = None,
) -> Tensor:
    """S-MagNorm between a base layer's output and the adapter's change of it.

    Args:
        y0: ``[..., N]``, the base layer's output, its bias included; never written.
        bias: the ``b [N]`` that ``y0`` includes, or None.
        rows: ``[m]`` int64, distinct.
        p: ``P [N, m]``.
        options: the norm, ``norm="activation"``.
        p_base: ``[N, m]``, what was folded into the base, or None.
        delta_bias: trainable bias ``[N]``, part of Δ, or None.
        z_scale: ``[..., m]`` (dropout, Δ alone) or None.
        restrain: the suppression, or None.
        save: ``"recompute"`` keeps y0 for the backward pass, ``"8bit"`` one byte of 1/M an element.
        impl: ``"auto"``, ``"triton"``, ``"reference"``, or None for what ``SECURA_IMPL`` says.

    Returns:
        ``[..., N]`` in y0's dtype. Gradients reach y0, p and delta_bias, once differentiable.

    Raises:
        TypeError: for a y0 of integers or complex numbers.
        ValueError: where shapes do not fit, for options of another space, or for an unknown form,
            ``save`` or ``impl``.
        RuntimeError: for ``impl="triton"`` where no kernel can take ``y0``.
    """
    check_floating(y0)
    check_operands(
        y0.shape[:-1], y0.shape[-1], rows, p=p, bias=bias, p_base=p_base, delta_bias=delta_bias,
        z_scale=z_scale, restrain=restrain,
    )  # fmt: skip
    options = checked(options, save)
    flat = y0.reshape(math.prod(y0.shape[:-1]), y0.shape[-1])
    bias = None if bias is None else bias.to(y0.dtype)
    z_scale = None if z_scale is None else z_scale.reshape(flat.shape[0], rows.numel())
    out = _ActivationNorm.apply(
        flat, bias, rows, p, p_base, delta_bias, z_scale, options, restrain, save, impl
    )
    return out.view(y0.shape)


def checked(options: NormOptions, save: str) -> NormOptions:
    """``options`` with form and combination filled in.

    Raises:
        ValueError: for options of another space, or an unknown form, combination or ``save``.
    """
    check_space(options, "activation")
    if save not in SAVES:
        raise ValueError(f"unknown save {save!r}: choose one of {SAVES}")
    form, combine = resolve_norm(options.norm, options.form, options.combine)
    return options._replace(form=form, combine=combine)


def _runs_triton(impl: str | None, tensor: Tensor, rows: Tensor) -> bool:
    """Whether the kernels take this call: where there is nothing to launch, torch does."""
    return resolve(impl, tensor) == "triton" and tensor.numel() > 0 and rows.numel() > 0


@op("activation_norm")
def activation_forward(
    y0: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    important: Tensor | None,
    restrain: list[float],
    form: str,
    combine: str,
    scale: float,
    eps: float,
    eps_relative: bool,
    keep: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(out [T, N], z [T, m], kept [T, N], [ε, slope, offset], factor [N])`` of flat inputs.

    ``kept`` (uint8) is empty without ``keep``, the scalars where the options alone decide them,
    ``factor`` without ``important``; ``restrain`` is ``[percent, edge, decay]``; P and P_base are
    in y0's dtype; form and combine are resolved.
    """
    options = NormOptions("activation", form, combine, scale, eps, eps_relative)
    limits = None if important is None else Restrain(important, *restrain)
    return normed(y0, bias, rows, p, p_base, delta_bias, z_scale, options, limits, keep, impl)


def normed(
    y0: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    options: NormOptions,
    restrain: Restrain | None,
    keep: bool,
    impl: str | None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`activation_forward` returns; ``in_place`` lets the kernels write over y0."""
    if _runs_triton(impl, y0, rows):
        from .kernels import activation as kernels
        from .kernels import additive as thin

        z = thin.gather(y0, bias, rows, None)
        out, kept, scalars, factor = kernels.forward(
            y0, z, p, p_base, delta_bias, z_scale, options, restrain, keep, in_place
        )
    else:
        z = gather(y0, bias, rows)
        out, kept, scalars, factor = _forward(
            y0, z, p, p_base, delta_bias, z_scale, options, restrain, keep
        )
    kept = absent(y0, torch.uint8) if kept is None else kept
    scalars = absent(y0, wide(y0.dtype)) if scalars is None else scalars
    factor = absent(y0, torch.float32) if factor is None else factor
    return out, z, kept, scalars, factor


@activation_forward.register_fake
def _activation_forward_fake(
    y0, bias, rows, p, p_base, delta_bias, z_scale, important, restrain, form, combine, scale, eps,
    eps_relative, keep, impl,
):  # fmt: skip
    options = NormOptions("activation", form, combine, scale, eps, eps_relative)
    return normed_fake(y0, rows, options, important, keep)


def normed_fake(
    y0: Tensor, rows: Tensor, options: NormOptions, important: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The shapes and dtypes of :func:`normed`."""
    kept = y0.new_empty(y0.shape, dtype=torch.uint8) if keep else absent(y0, torch.uint8)
    scalars = y0.new_empty(0 if known_scalars(options) else 3, dtype=wide(y0.dtype))
    factor = y0.new_empty(0 if important is None else y0.shape[1], dtype=torch.float32)
    return y0.new_empty(y0.shape), y0.new_empty(y0.shape[0], rows.shape[0]), kept, scalars, factor


@op("activation_norm_backward")
def activation_backward(
    g: Tensor,
    y0: Tensor | None,
    kept: Tensor | None,
    z: Tensor,
    rows: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    scalars: Tensor | None,
    factor: Tensor | None,
    known: list[float],
    form: str,
    combine: str,
    needs: list[bool],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(∂y0, ∂P, ∂δb)``, those not needed empty; ∂P and ∂δb in fp32 or wider.

    One of ``y0`` and ``kept`` is given, and says where 1/M comes from; with y0, ``[ε, slope,
    offset]`` are ``known``, or measured in the forward: ``scalars``.
    """
    return gradients(
        g, y0, kept, z, rows, p, p_base, delta_bias, z_scale, scalars, factor, known, form, combine,
        needs, impl=impl,
    )  # fmt: skip


def gradients(
    g, y0, kept, z, rows, p, p_base, delta_bias, z_scale, scalars, factor, known, form, combine,
    needs, *, impl: str | None, thin: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What :func:`activation_backward` returns.

    With ``thin`` (gated without f: ∂base is g) ``h [T, m]``, what the columns ``rows`` of ∂y0 have
    beyond g, stands in the place of ∂y0.
    """
    run: Callable[..., tuple] = _backward
    if _runs_triton(impl, g, rows):
        from .kernels.activation_backward import backward

        run = backward
    change, dp, dbias = run(
        g, y0, kept, z, rows, p, p_base, delta_bias, z_scale, scalars, factor, known, form, combine,
        needs, thin,
    )  # fmt: skip
    return (
        absent(g) if change is None else change,
        absent(g, wide(g.dtype)) if dp is None else dp,
        absent(g, wide(g.dtype)) if dbias is None else dbias,
    )


@activation_backward.register_fake
def _activation_backward_fake(
    g, y0, kept, z, rows, p, p_base, delta_bias, z_scale, scalars, factor, known, form, combine,
    needs, impl,
):  # fmt: skip
    dtype = wide(g.dtype)
    return (
        g.new_empty(g.shape) if needs[0] else absent(g),
        g.new_empty(p.shape, dtype=dtype) if needs[1] else absent(g, dtype),
        g.new_empty(g.shape[1], dtype=dtype) if needs[2] else absent(g, dtype),
    )


def _base_and_delta(
    y0: Tensor,
    z: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = wide(y0.dtype)
    z = z.to(dtype)
    base = y0.to(dtype)
    if p_base is not None:
        base = torch.addmm(base, z, p_base.to(dtype).t())
    delta = (z if z_scale is None else z * z_scale) @ p.to(dtype).t()
    if delta_bias is not None:
        delta += delta_bias
    return base, delta


def _forward(y0, z, p, p_base, delta_bias, z_scale, options, restrain, keep) -> tuple:
    base, delta = _base_and_delta(y0, z, p, p_base, delta_bias, z_scale)
    scalars = None
    slope: Tensor | float
    offset: Tensor | float
    if known := known_scalars(options):
        eps, slope, offset = known
        rho = relative_change(base, delta, eps)
    else:
        small = effective_eps(base, options.eps, options.eps_relative)
        rho = relative_change(base, delta, small)
        peak = largest(rho) if needs_peak(options.form) else None
        slope, offset = coefficients(options.form, options.scale, peak, rho)
        scalars = torch.stack((small, slope, offset))
    m = gain(rho, slope, offset, options.form)
    factor = restrain_factor(m, restrain)
    share = base_share(m, options.combine)
    delta.div_(m)
    out = delta.add_(base) if share is None else delta.addcmul_(base, share)
    out = out if factor is None else out.mul_(factor)
    kept = (2 / m).sub_(1).mul_(_LEVELS).round_().to(torch.uint8) if keep else None
    return out.to(y0.dtype), kept, scalars, factor


def _backward(
    g, y0, kept, z, rows, p, p_base, delta_bias, z_scale, scalars, factor, known, form, combine,
    needs, thin,
) -> tuple:  # fmt: skip
    dtype = wide(g.dtype)
    if kept is None:
        base, delta = _base_and_delta(y0, z, p, p_base, delta_bias, z_scale)
        eps, slope, offset = known or scalars.unbind()
        inverse = gain(relative_change(base, delta, eps), slope, offset, form).reciprocal_()
    else:
        inverse = kept.to(dtype).mul_(0.5 / _LEVELS).add_(0.5)
    wide_g = g.to(dtype) if factor is None else g.to(dtype) * factor
    ddelta = wide_g * inverse
    dbase = (wide_g if combine == "gated" else 2 * ddelta).to(g.dtype)
    dbias = ddelta.sum(0) if needs[2] else None
    ddelta = ddelta.to(g.dtype)
    change = dp = None
    if needs[0]:
        h = ddelta @ p
        if z_scale is not None:
            h.mul_(z_scale)
        if p_base is not None:
            h.addmm_(dbase, p_base)
        change = h if thin else dbase.index_add(1, rows, h)
    if needs[1]:
        dp = product_wide(ddelta.t(), z if z_scale is None else (z * z_scale).to(g.dtype))
    return change, dp, dbias


class _ActivationNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y0, bias, rows, p, p_base, delta_bias, z_scale, options, restrain, save, impl
    ) -> Tensor:
        ctx.p_dtype, ctx.bias_dtype = p.dtype, None if delta_bias is None else delta_bias.dtype
        ctx.how = list(known_scalars(options) or ()), options.form, options.combine
        ctx.impl = impl
        p = p.to(y0.dtype)
        p_base = None if p_base is None else p_base.to(y0.dtype)
        important, *limits = (None,) if restrain is None else restrain
        keep = save == "8bit"
        out, z, kept, scalars, factor = activation_forward(
            y0, bias, rows, p, p_base, delta_bias, z_scale, important, [float(x) for x in limits],
            options.form, options.combine, options.scale, options.eps, options.eps_relative, keep,
            impl,
        )  # fmt: skip
        y0, kept, delta_bias = (None, kept, None) if keep else (y0, None, delta_bias)
        factor = None if restrain is None else factor
        scalars = None if ctx.how[0] else scalars
        ctx.save_for_backward(y0, kept, z, rows, p, p_base, delta_bias, z_scale, scalars, factor)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        needs = [ctx.needs_input_grad[index] for index in (0, 3, 5)]
        dy0, dp, dbias = activation_backward(g, *ctx.saved_tensors, *ctx.how, needs, ctx.impl)
        return (
            dy0 if needs[0] else None, None, None,
            dp.to(ctx.p_dtype) if needs[1] else None, None,
            dbias.to(ctx.bias_dtype) if needs[2] else None, *[None] * 5,
        )  # fmt: skip


__all__ = ["SAVES", "activation_norm"]
