"""The oracle: the functions of :mod:`secura_kernels.api` in plain torch, as the equations read.

A layer whose own weight or bias is trained is computed by them too.

For any float dtype and device. It trusts none of the shortcuts the kernels take: R is gathered and
multiplied, ΔW is formed whole, norms are taken of the matrices themselves. Everything is
differentiable by autograd; the gain M is detached, as released. Integers are indices, everything
else is computed in fp32 or wider.

    y0 = x Wᵀ + b                                            x [T, K], W [N, K], b [N]
    ΔW = P R,  P = C U [N, m],  R = W[rows] [m, K]
    W_base = W + P_base R                                    what was folded before (M1)

| norm         | out                                                       |
|--------------|-----------------------------------------------------------|
| `none`       | x (W_base + ΔW)ᵀ + b + δb                                 |
| `weight`     | x combine(W_base, ΔW)ᵀ + b + δb                           |
| `channel`    | the same with one M a row, ρ_i = ‖ΔW_i‖ / ‖W_base,i‖      |
| `activation` | combine(x W_baseᵀ + b, x ΔWᵀ + δb)                        |

Source: SECURA (arXiv 2502.18168), and its released code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layer import Layer, update
from .norm import NO_WEIGHT, NormOptions, Restrain, resolve_norm


def relative_change(base: Tensor, delta: Tensor, options: NormOptions) -> Tensor:
    """ρ = |Δ| / (|base| + ε), detached."""
    base, delta = base.detach(), delta.detach()
    eps = options.eps
    if options.eps_relative and base.numel():
        return delta.abs() / (base.abs() + eps * base.square().mean().sqrt())
    return delta.abs() / (base.abs() + eps)


def magnitude_gain(rho: Tensor, form: str, scale: float) -> Tensor:
    """M in [1, 2] from ρ, each form as its own equation."""
    if rho.numel() == 0:
        return torch.ones_like(rho)
    if form == "calibrated":
        return 2 - torch.tanh(scale * rho / 2)
    peak = rho.max()
    shifted = rho / torch.where(peak == 0, 1, peak) - 0.5 if form == "paper" else rho
    return torch.where(peak == 0, 2.0, 2 - torch.sigmoid(scale * shifted))


def combine(base: Tensor, delta: Tensor, gain: Tensor, how: str) -> Tensor:
    """``(base + (base + Δ)) / M`` when averaged, ``base + Δ / M`` when gated."""
    return (base + (base + delta)) / gain if how == "averaged" else base + delta / gain


def restrain_factor(gain: Tensor, restrain: Restrain | None) -> Tensor | float:
    """``[N]`` factors of the output channels, or 1 where the restraint is off."""
    if restrain is None:
        return 1.0
    crowded = (gain <= restrain.edge).to(gain.dtype).mean() > restrain.percent
    factor = torch.ones(restrain.important.shape, dtype=gain.dtype, device=gain.device)
    return torch.where(restrain.important & crowded, restrain.decay, factor)


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
    """Compute what :func:`secura_kernels.secura_linear` does; ``impl`` is ignored."""
    assert layer.weight is not None
    p, p_base = _projections(layer, a, b)
    trained: Any = {"delta_bias": delta_bias, "z_scale": z_scale}
    frozen: Any = {"p_base": p_base, "restrain": layer.restrain}
    w, bias, rows = layer.weight, layer.bias, layer.rows
    return linear(x, w, bias, rows, p, layer.options, **frozen, **trained)


def secura_add(
    y0: Tensor,
    layer: Layer,
    a: Tensor,
    b: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    z_scale: Tensor | None = None,
    z: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute what :func:`secura_kernels.secura_add` does; ``impl`` is ignored.

    z, given or not, has the gradient of what is read from y0, for there is no x. ``channel`` needs
    the layer's weight for its norms.
    """
    p, p_base = _projections(layer, a, b)
    dtype = torch.promote_types(torch.promote_types(y0.dtype, p.dtype), torch.float32)
    y0, p, options = y0.to(dtype), p.to(dtype), layer.options
    bias = p.new_zeros(p.shape[0]) if layer.bias is None else layer.bias.to(dtype)
    delta_bias = torch.zeros_like(bias) if delta_bias is None else delta_bias.to(dtype)
    of_y0 = y0[..., layer.rows] - bias[layer.rows]
    z = of_y0 if z is None else of_y0 + (z - of_y0).detach()
    base = y0 if p_base is None else y0 + z @ p_base.to(dtype).T
    delta = (z if z_scale is None else z * z_scale.to(dtype)) @ p.T
    form, how = resolve_norm(options.norm, options.form, options.combine)
    if options.norm == "none":
        return base + delta + delta_bias
    if options.norm == "activation":
        delta = delta + delta_bias
        gain = magnitude_gain(relative_change(base, delta, options), form, options.scale)
        return combine(base, delta, gain, how) * restrain_factor(gain, layer.restrain)
    assert options.norm == "channel" and layer.weight is not None
    gain = weight_gain(layer.weight, layer.rows, p, options, p_base=p_base)
    out = combine(base - bias, delta, gain, how) * restrain_factor(gain, layer.restrain)
    return out + bias + delta_bias


def _projections(layer: Layer, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``(P, P_base or None)``, ``[N, m]``."""
    u = update(a, b, layer.scaling)
    columns = layer.columns
    if columns is None:
        assert layer.weight is not None
        columns = layer.weight[:, layer.cols]
    columns = columns.to(torch.promote_types(columns.dtype, u.dtype))
    if layer.core is None:
        return columns @ u.to(columns.dtype), None
    p, folded = (columns @ core.to(columns.dtype) for core in (u, layer.core))
    if layer.core_is_base and layer.options.norm != "none":
        return p, folded
    return p + folded, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    p: Tensor,
    options: NormOptions,
    *,
    p_base: Tensor | None = None,
    delta_bias: Tensor | None = None,
    z_scale: Tensor | None = None,
    restrain: Restrain | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """Compute one adapted linear layer ``[..., N]`` from P.

    Args:
        x: ``[..., K]``.
        weight: ``W [N, K]``.
        bias: ``b [N]`` or None.
        rows: ``[m]`` int64.
        p: ``P [N, m]``, scaling included.
        options: the norm.
        p_base: ``[N, m]``, the part of the base that was folded, or None.
        delta_bias: trainable bias ``[N]`` or None.
        z_scale: ``[..., m]``, multiplies ``z = x Rᵀ`` of Δ (dropout), or None. ``channel`` takes M
            of ΔW itself; ``weight`` has no z and ignores it.
        restrain: the suppression, or None.
        gain: use this M instead of computing it (``gradcheck`` needs it constant).

    Returns:
        ``[..., N]`` in the promoted dtype, fp32 or wider.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, p.dtype), torch.float32)
    x, weight, p = x.to(dtype), weight.to(dtype), p.to(dtype)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.to(dtype)
    delta_bias = torch.zeros_like(bias) if delta_bias is None else delta_bias.to(dtype)
    r = weight[rows]
    base_weight = weight if p_base is None else weight + p_base.to(dtype) @ r
    z = x @ r.T
    delta = (z if z_scale is None else z * z_scale.to(dtype)) @ p.T
    form, how = resolve_norm(options.norm, options.form, options.combine)
    if options.norm == "none":
        return x @ base_weight.T + delta + bias + delta_bias
    if options.norm == "activation":
        base, delta = x @ base_weight.T + bias, delta + delta_bias
        if gain is None:
            gain = magnitude_gain(relative_change(base, delta, options), form, options.scale)
        return combine(base, delta, gain, how) * restrain_factor(gain, restrain)
    if gain is None:
        gain = weight_gain(weight, rows, p, options, p_base=p_base)
    if options.norm == "weight":
        fused = combine(base_weight, p @ r, gain, how) * _column(restrain_factor(gain, restrain))
        return x @ fused.T + bias + delta_bias
    out = combine(x @ base_weight.T, delta, gain, how) * restrain_factor(gain, restrain)
    return out + bias + delta_bias


def weight_gain(
    weight: Tensor, rows: Tensor, p: Tensor, options: NormOptions, *, p_base: Tensor | None = None
) -> Tensor:
    """M of the spaces ``weight`` ``[N, K]`` and ``channel`` ``[N]``."""
    form, _ = resolve_norm(options.norm, options.form, options.combine)
    dtype = torch.promote_types(torch.promote_types(weight.dtype, p.dtype), torch.float32)
    weight, p = weight.to(dtype), p.to(dtype)
    r = weight[rows]
    base, delta = (weight if p_base is None else weight + p_base.to(dtype) @ r), p @ r
    if options.norm == "channel":
        base, delta = base.norm(dim=1), delta.norm(dim=1)
    return magnitude_gain(relative_change(base, delta, options), form, options.scale)


def effective_weight(
    layer: Layer, a: Tensor, b: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """Compute the plain weight ``[N, K]`` that makes the same layer, fp32 or wider.

    Raises:
        ValueError: for ``activation``, which is not linear in x and has no such weight.
    """
    if layer.options.norm == "activation":
        raise ValueError(NO_WEIGHT)
    assert layer.weight is not None
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    identity = torch.eye(layer.weight.shape[1], dtype=dtype, device=layer.weight.device)
    return secura_linear(identity, layer._replace(bias=None), a, b).T


def _column(factor: Tensor | float) -> Tensor | float:
    return factor[:, None] if isinstance(factor, Tensor) else factor


__all__ = [
    "combine",
    "effective_weight",
    "linear",
    "magnitude_gain",
    "relative_change",
    "secura_add",
    "secura_linear",
    "weight_gain",
]
