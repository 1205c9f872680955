"""Space ``activation``: S-MagNorm on the layer's output, one fused pass each way.

    base = y0 + z P_baseᵀ     Δ = (z · z_scale) Pᵀ + δb     z = y0[:, rows] − b[rows]
    out  = (2 base + Δ) / M · f   or   (base + Δ / M) · f

    ∂Δ = ḡ f / M,  ∂base = 2 ḡ f / M  or  ḡ f     (M and the factors f are constants)
    ∂P = ∂Δᵀ (z · z_scale)   ∂δb = Σ ∂Δ
    ∂y0 = ∂base,  ∂y0[:, rows] += ∂Δ P · z_scale + ∂base P_base

| tensor    | shape    | dtype                          |
|-----------|----------|--------------------------------|
| y0, out   | [..., N] | compute dtype                  |
| P, P_base | [N, m]   | fp32 in, cast once; ∂P in fp32 |
| rows      | [m]      | int64                          |

Saved for backward: y0, z, P; Δ, ρ and M are recomputed. ρ and M are computed in fp32 or wider.
``paper`` and ``released`` look at the whole batch first, so that tokens influence each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .additive import gather
from .gain import (
    NormOptions,
    Restrain,
    base_share,
    coefficients,
    effective_eps,
    gain,
    largest,
    needs_peak,
    relative_change,
    resolve_norm,
    restrain_factor,
)


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
) -> Tensor:
    """S-MagNorm between a base layer's output and the adapter's change of it.

    Args:
        y0: ``[..., N]``, the base layer's output, its bias included; never written.
        bias: the ``b [N]`` that ``y0`` includes, or None.
        rows: ``[m]`` int64.
        p: ``P [N, m]``.
        options: the norm, ``norm="activation"``.
        p_base: ``[N, m]``, what was folded into the base, or None.
        delta_bias: trainable bias ``[N]``, part of Δ, or None.
        z_scale: ``[..., m]`` (dropout, Δ alone) or None.
        restrain: the suppression, or None.

    Returns:
        ``[..., N]`` in y0's dtype. Gradients reach y0, p and delta_bias, once differentiable.

    Raises:
        ValueError: where shapes do not fit, or for an unknown form.
    """
    if p.shape != (y0.shape[-1], rows.numel()):
        raise ValueError(f"p {list(p.shape)} must be [N, m] = [{y0.shape[-1]}, {rows.numel()}]")
    form, combine = resolve_norm(options.norm, options.form, options.combine)
    options = options._replace(form=form, combine=combine)
    flat = y0.reshape(-1, y0.shape[-1])
    bias = None if bias is None else bias.to(y0.dtype)
    z_scale = None if z_scale is None else z_scale.reshape(-1, z_scale.shape[-1])
    out = _ActivationNorm.apply(flat, bias, rows, p, p_base, delta_bias, z_scale, options, restrain)
    return out.view(y0.shape)


def _base_and_delta(
    y0: Tensor,
    z: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(y0.dtype, torch.float32)
    z = z.to(wide)
    base = y0.to(wide)
    if p_base is not None:
        base = torch.addmm(base, z, p_base.to(wide).t())
    delta = (z if z_scale is None else z * z_scale) @ p.to(wide).t()
    if delta_bias is not None:
        delta += delta_bias
    return base, delta


class _ActivationNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y0, bias, rows, p, p_base, delta_bias, z_scale, options, restrain
    ) -> Tensor:
        ctx.p_dtype, ctx.bias_dtype = p.dtype, None if delta_bias is None else delta_bias.dtype
        ctx.options = options
        with torch.autocast(y0.device.type, enabled=False):
            p = p.to(y0.dtype)
            p_base = None if p_base is None else p_base.to(y0.dtype)
            z = gather(y0, bias, rows)
            base, delta = _base_and_delta(y0, z, p, p_base, delta_bias, z_scale)
            eps = effective_eps(base, options.eps, options.eps_relative)
            rho = relative_change(base, delta, eps)
            peak = largest(rho) if needs_peak(options.form) else None
            slope, offset = coefficients(options.form, options.scale, peak, rho)
            m = gain(rho, slope, offset, options.form)
            factor = restrain_factor(m, restrain)
            ctx.save_for_backward(
                y0, z, rows, p, p_base, delta_bias, z_scale, eps, slope, offset, factor
            )
            share = base_share(m, options.combine)
            delta.div_(m)
            out = delta.add_(base) if share is None else delta.addcmul_(base, share)
            return (out if factor is None else out.mul_(factor)).to(y0.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        y0, z, rows, p, p_base, delta_bias, z_scale, eps, slope, offset, factor = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            base, delta = _base_and_delta(y0, z, p, p_base, delta_bias, z_scale)
            m = gain(relative_change(base, delta, eps), slope, offset, ctx.options.form)
            g = g.to(m.dtype) if factor is None else g.to(m.dtype) * factor
            dbase = g if ctx.options.combine == "gated" else 2 * g / m
            ddelta = (g / m).to(y0.dtype)
            dbase = dbase.to(y0.dtype)
            dy0 = dp = dbias = None
            if ctx.needs_input_grad[0]:
                h = ddelta @ p
                if z_scale is not None:
                    h.mul_(z_scale)
                if p_base is not None:
                    h.addmm_(dbase, p_base)
                dy0 = dbase.index_add(1, rows, h)
            if ctx.needs_input_grad[3]:
                dp = (ddelta.t() @ (z if z_scale is None else z * z_scale)).to(ctx.p_dtype)
            if ctx.needs_input_grad[5]:
                dbias = ddelta.sum(0).to(ctx.bias_dtype)
        return dy0, None, None, dp, None, dbias, None, None, None


__all__ = ["activation_norm"]
