"""Space ``weight``: S-MagNorm on the weight itself, elementwise (the paper's figure).

    base = W + P_base R      Δ = P R      W' = (2 base + Δ) / M · f   or   (base + Δ / M) · f
    y = x W'ᵀ + b + δb

    ∂x = ḡ W'        ∂P = ((f · ḡᵀ x) / M) Rᵀ        (M and the factors f are constants)

| tensor    | shape    | dtype                          |
|-----------|----------|--------------------------------|
| x, y      | [..., K] [..., N] | compute dtype         |
| W, W'     | [N, K]   | compute dtype                  |
| P, P_base | [N, m]   | fp32; ∂P in fp32               |
| rows      | [m]      | int64                          |

Saved for backward: x and small tensors; W' is rebuilt. Everything elementwise runs over chunks of
rows of at most ``WORKSPACE_MIB``, so neither ∂W nor ΔW is ever whole in memory. ``paper`` and
``released`` take a first pass for the largest ρ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import compute_dtype
from .gain import (
    NormOptions,
    Restrain,
    base_share,
    coefficients,
    effective_eps,
    gain,
    needs_peak,
    relative_change,
    resolve_norm,
    restrain_rows,
)

WORKSPACE_MIB = 8


def weight_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    p: Tensor,
    options: NormOptions,
    *,
    p_base: Tensor | None = None,
    delta_bias: Tensor | None = None,
    restrain: Restrain | None = None,
) -> Tensor:
    """A linear layer whose frozen weight is combined with ΔW under S-MagNorm.

    Args:
        x: ``[..., K]``.
        weight: ``W [N, K]``, frozen, any strides.
        bias: ``b [N]``, frozen, or None.
        rows: ``[m]`` int64.
        p: ``P [N, m]``.
        options: the norm, ``norm="weight"``.
        p_base: ``[N, m]``, what was folded into the base, or None.
        delta_bias: trainable bias ``[N]``, added after the norm, or None.
        restrain: the suppression, or None.

    Returns:
        ``[..., N]`` in the compute dtype. Gradients reach x, p and delta_bias, once differentiable.

    Raises:
        ValueError: where shapes do not fit, or for an unknown form.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x [..., {x.shape[-1]}] does not fit the weight {list(weight.shape)}")
    dtype = compute_dtype(x)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    out = _WeightNormLinear.apply(
        flat, weight, bias, rows, p, p_base, delta_bias, options, restrain
    )
    return out.view(*x.shape[:-1], weight.shape[0])


def normed_weight(
    weight: Tensor,
    rows: Tensor,
    p: Tensor,
    options: NormOptions,
    *,
    p_base: Tensor | None = None,
    restrain: Restrain | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``W' [N, K]`` of the space ``weight``, in ``dtype`` or W's own. No gradient.

    Args and errors as in :func:`weight_norm_linear`.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        norm = _Norm.measure(weight, rows, p, p_base, options, restrain)
        return norm.apply(weight, rows, p, p_base, dtype or weight.dtype)


class _Norm:
    """The global part of the norm: three scalars and the channels' factors."""

    def __init__(self, form: str, combine: str, eps, slope, offset, factor) -> None:
        self.form, self.combine = form, combine
        self.eps, self.slope, self.offset, self.factor = eps, slope, offset, factor

    @classmethod
    def measure(cls, weight, rows, p, p_base, options, restrain) -> _Norm:
        form, combine = resolve_norm(options.norm, options.form, options.combine)
        folded = p_base is not None and options.eps_relative
        chunks = (lambda: _chunks(weight, rows, p, p_base)) if weight.numel() else tuple
        if folded:
            square = sum(base.square().sum() for _, base, _ in chunks())
            eps = options.eps * (square / weight.numel()).sqrt()
        else:
            eps = effective_eps(weight, options.eps, options.eps_relative)
        peak = None
        if needs_peak(form):
            peak = torch.stack(
                [relative_change(base, delta, eps).amax() for _, base, delta in chunks()]
            ).amax()
        slope, offset = coefficients(form, options.scale, peak, weight)
        norm = cls(form, combine, eps, slope, offset, None)
        norm.factor = restrain_rows(
            (norm.gain(base, delta) for _, base, delta in chunks()), weight.numel(), restrain
        )
        return norm

    def gain(self, base: Tensor, delta: Tensor) -> Tensor:
        rho = relative_change(base, delta, self.eps)
        return gain(rho, self.slope, self.offset, self.form)

    def apply(self, weight, rows, p, p_base, dtype) -> Tensor:
        fused = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for part, base, delta in _chunks(weight, rows, p, p_base):
            m = self.gain(base, delta)
            share = base_share(m, self.combine)
            delta.div_(m)
            out = delta.add_(base) if share is None else delta.addcmul_(base, share)
            fused[part] = out if self.factor is None else out.mul_(self.factor[part, None])
        return fused


def _chunks(
    weight: Tensor, rows: Tensor, p: Tensor, p_base: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield ``(rows of W as a slice, base, Δ)``, both fresh and in fp32 or wider."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, p.dtype), torch.float32)
    r = weight.index_select(0, rows).to(wide)
    n, k = weight.shape
    step = max(1, WORKSPACE_MIB * 2**20 // max(1, k * r.element_size()))
    for start in range(0, n, step):
        part = slice(start, start + step)
        base = weight[part].to(wide, copy=True)
        if p_base is not None:
            base.addmm_(p_base[part].to(wide), r)
        yield part, base, p[part].to(wide) @ r


class _WeightNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, weight, bias, rows, p, p_base, delta_bias, options, restrain
    ) -> Tensor:
        ctx.bias_dtype = None if delta_bias is None else delta_bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            norm = _Norm.measure(weight, rows, p, p_base, options, restrain)
            fused = norm.apply(weight, rows, p, p_base, x.dtype)
            ctx.form, ctx.combine = norm.form, norm.combine
            ctx.save_for_backward(
                x, weight, rows, p, p_base, norm.eps, norm.slope, norm.offset, norm.factor
            )
            out = F.linear(x, fused, bias)
            return out if delta_bias is None else out.add_(delta_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, weight, rows, p, p_base, *scalars = ctx.saved_tensors
        norm = _Norm(ctx.form, ctx.combine, *scalars)
        with torch.autocast(g.device.type, enabled=False):
            dx = dp = dbias = None
            if ctx.needs_input_grad[0]:
                dx = g @ norm.apply(weight, rows, p, p_base, x.dtype)
            if ctx.needs_input_grad[4]:
                dp = torch.empty_like(p)
                r = weight.index_select(0, rows)
                for part, base, delta in _chunks(weight, rows, p, p_base):
                    ddelta = (g[:, part].t() @ x).to(base.dtype).div_(norm.gain(base, delta))
                    dp[part] = (ddelta @ r.to(base.dtype).t()).to(p.dtype)
                if norm.factor is not None:
                    dp.mul_(norm.factor[:, None])
            if ctx.needs_input_grad[6]:
                dbias = g.sum(0).to(ctx.bias_dtype)
        return dx, None, None, None, dp, None, dbias, None, None


__all__ = ["normed_weight", "weight_norm_linear"]
