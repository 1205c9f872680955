"""Space ``weight``: S-MagNorm on the weight itself, elementwise (the paper's figure).

    base = W + P_base R      Δ = P R      W' = (2 base + Δ) / M · f   or   (base + Δ / M) · f
    y = x W'ᵀ + b + δb

    ∂x = ḡ W'        ∂P = ((f · ḡᵀ x) / M) Rᵀ        (M and the factors f are constants)

| tensor    | shape    | dtype                          |
|-----------|----------|--------------------------------|
| x, y      | [..., K] [..., N] | compute dtype         |
| W, W'     | [N, K]   | its own, compute dtype         |
| P, P_base | [N, m]   | fp32; ∂P in fp32               |
| rows      | [m]      | int64                          |

Saved for backward: x and small tensors (ε, slope and offset of the gain, the factors); W' is
rebuilt. ``paper`` and ``released`` take a first pass for the largest ρ. Neither ∂W nor ΔW is ever
whole in memory: Triton forms W' in one pass over W and ∂P in chunks of W's rows
(:mod:`secura_kernels.kernels.weight` counts the bytes), plain torch runs everything elementwise
over chunks of rows of at most ``WORKSPACE_MIB``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_input, check_operands, check_space
from .dispatch import absent, compute_dtype, op, supported, wide
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
    impl: str | None = None,
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
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; None takes ``SECURA_IMPL``'s.

    Returns:
        ``[..., N]`` in the compute dtype. Gradients reach x, p and delta_bias, once differentiable.

    Raises:
        TypeError: for an x of integers or complex numbers.
        ValueError: where shapes do not fit, for options of another space, or for an unknown form
            or ``impl``.
        RuntimeError: for ``impl="triton"`` where no kernel can take ``x`` or ``weight``.
    """
    check_input(x, weight)
    check_space(options, "weight")
    check_operands(
        x.shape[:-1], weight.shape[0], rows, p=p, bias=bias, p_base=p_base, delta_bias=delta_bias,
        restrain=restrain,
    )  # fmt: skip
    dtype = compute_dtype(x)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    out = _WeightNormLinear.apply(
        flat, weight, bias, rows, p, p_base, delta_bias, *primitives(options, restrain), impl
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
    seed: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """``W' [N, K]`` of the space ``weight``, in ``dtype`` or W's own. No gradient.

    It multiplies in fp32 and rounds once: to nearest, or stochastically from ``seed`` (bf16).
    Args and errors else as in :func:`weight_norm_linear`.
    """
    check_space(options, "weight")
    check_operands((), weight.shape[0], rows, p=p, p_base=p_base, restrain=restrain)
    norm, dtype = primitives(options, restrain), dtype or weight.dtype
    with torch.no_grad():
        return _normed_weight(weight, rows, p, p_base, *norm, dtype, seed, impl)


def primitives(
    options: NormOptions, restrain: Restrain | None
) -> tuple[Tensor | None, str, str, float, float, bool, list[float]]:
    """The norm as an operator's schema takes it: ``important`` to ``limits`` below."""
    form, combine = resolve_norm(options.norm, options.form, options.combine)
    important, *limits = restrain or (None,)
    return (
        important, form, combine, float(options.scale), float(options.eps), options.eps_relative,
        [float(limit) for limit in limits],
    )  # fmt: skip


class _Norm:
    """The global part of the norm in plain torch: three scalars and the channels' factors."""

    def __init__(self, form: str, combine: str, scalars: Tensor, factor: Tensor | None) -> None:
        self.form, self.combine = form, combine
        self.scalars, self.factor = scalars, factor

    @classmethod
    def measure(
        cls, weight, rows, p, p_base, important, form, combine, scale, eps, eps_relative, limits
    ) -> _Norm:
        folded = p_base is not None and eps_relative
        chunks = (lambda: _chunks(weight, rows, p, p_base)) if weight.numel() else tuple
        if folded and weight.numel():
            square = sum(base.square().sum() for _, base, _ in chunks())
            small = eps * (square / weight.numel()).sqrt()
        else:
            small = effective_eps(weight, eps, eps_relative)
        peak = None
        if needs_peak(form):
            peaks = [relative_change(base, delta, small).amax() for _, base, delta in chunks()]
            peak = torch.stack(peaks).amax() if peaks else small.new_zeros(())
        slope, offset = coefficients(form, scale, peak, weight)
        norm = cls(form, combine, torch.stack([small.to(slope.dtype), slope, offset]), None)
        norm.factor = restrain_rows(
            (norm.gain(base, delta) for _, base, delta in chunks()),
            weight.numel(),
            None if important is None else Restrain(important, *limits),
        )
        return norm

    def gain(self, base: Tensor, delta: Tensor) -> Tensor:
        eps, slope, offset = self.scalars.unbind()
        return gain(relative_change(base, delta, eps), slope, offset, self.form)

    def apply(self, weight, rows, p, p_base, dtype, seed: int | None = None) -> Tensor:
        fused = torch.empty_like(weight, dtype=dtype)
        draw = generator(weight, seed)
        for part, base, delta in _chunks(weight, rows, p, p_base):
            m = self.gain(base, delta)
            share = base_share(m, self.combine)
            delta.div_(m)
            out = delta.add_(base) if share is None else delta.addcmul_(base, share)
            if self.factor is not None:
                out.mul_(self.factor[part, None])
            fused[part] = round_stochastically(out, draw) if draw else out
        return fused


def generator(like: Tensor, seed: int | None) -> torch.Generator | None:
    """A generator on ``like``'s device, or None to round to nearest."""
    return None if seed is None else torch.Generator(like.device).manual_seed(seed)


def round_stochastically(x: Tensor, draw: torch.Generator) -> Tensor:
    """fp32 ``x`` to a bf16 neighbour, up with the probability of the part cut off."""
    bits = x.float().view(torch.int32)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=draw)
    rounded = ((bits + noise) >> 16 << 16).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x.float()).to(torch.bfloat16)


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


def _kernels() -> Any:
    from .kernels import weight

    return weight


@op("weight_norm_linear")
def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    delta_bias: Tensor | None,
    important: Tensor | None,
    form: str,
    combine: str,
    scale: float,
    eps: float,
    eps_relative: bool,
    limits: list[float],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out [T, N], [ε, slope, offset], f [N])`` of flat x; f is empty without ``important``."""
    norm = (form, combine, scale, eps, eps_relative, limits)
    if supported(impl, x, weight) == "triton":
        kernels = _kernels()
        tiles = kernels.Tiles.whole(weight, rows, p, p_base, x.dtype)
        scalars, factor = kernels.measure(tiles, important, *norm)
        fused = kernels.fused_weight(tiles, scalars, factor, form, combine, x.dtype)
    else:
        measured = _Norm.measure(weight, rows, p, p_base, important, *norm)
        scalars, factor = measured.scalars, measured.factor
        fused = measured.apply(weight, rows, p, p_base, x.dtype)
    out = F.linear(x, fused, bias)
    if delta_bias is not None:
        out.add_(delta_bias)
    return out, scalars, absent(x, torch.float32) if factor is None else factor


@linear_forward.register_fake
def _linear_forward_fake(x, weight, bias, rows, p, p_base, delta_bias, important, *norm):
    n = weight.shape[0]
    return (
        x.new_empty(x.shape[0], n),
        x.new_empty(3, dtype=wide(weight.dtype)),
        x.new_empty(0 if important is None else n, dtype=torch.float32),
    )


@op("weight_norm_linear_backward")
def linear_backward(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    rows: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    scalars: Tensor,
    factor: Tensor | None,
    form: str,
    combine: str,
    needs: list[bool],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(∂x, ∂P, ∂δb)``, those not needed empty; ∂P and ∂δb in fp32 or wider."""
    dx, dp, dbias = absent(g), absent(g, wide(g.dtype)), absent(g, wide(g.dtype))
    kernels = _kernels() if supported(impl, g, weight) == "triton" else None
    norm = _Norm(form, combine, scalars, factor)
    if needs[0]:
        if kernels is not None:
            tiles = kernels.Tiles.whole(weight, rows, p, p_base, g.dtype)
            fused = kernels.fused_weight(tiles, scalars, factor, form, combine, g.dtype)
        else:
            fused = norm.apply(weight, rows, p, p_base, g.dtype)
        dx = g @ fused
        del fused
    if needs[1] and x is not None:
        if kernels is not None:
            dp = kernels.grad_p(g, x, weight, rows, p, p_base, scalars, factor, form)
        else:
            dp = _grad_p(norm, g, x, weight, rows, p, p_base)
    if needs[2]:
        dbias = g.sum(0, dtype=wide(g.dtype))
    return dx, dp, dbias


@linear_backward.register_fake
def _linear_backward_fake(g, x, weight, rows, p, p_base, scalars, factor, form, combine, needs, _):
    dtype, (n, k) = wide(g.dtype), weight.shape
    return (
        g.new_empty(g.shape[0], k) if needs[0] else absent(g),
        g.new_empty(n, rows.shape[0], dtype=dtype) if needs[1] else absent(g, dtype),
        g.new_empty(n, dtype=dtype) if needs[2] else absent(g, dtype),
    )


def _grad_p(norm: _Norm, g, x, weight, rows, p, p_base) -> Tensor:
    dp = torch.empty(p.shape, dtype=wide(g.dtype), device=g.device)
    r = weight.index_select(0, rows)
    for part, base, delta in _chunks(weight, rows, p, p_base):
        ddelta = (g[:, part].t() @ x).to(base.dtype).div_(norm.gain(base, delta))
        dp[part] = ddelta @ r.to(base.dtype).t()
    return dp if norm.factor is None else dp.mul_(norm.factor[:, None])


@op("normed_weight")
def _normed_weight(
    weight: Tensor,
    rows: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    important: Tensor | None,
    form: str,
    combine: str,
    scale: float,
    eps: float,
    eps_relative: bool,
    limits: list[float],
    dtype: torch.dtype,
    seed: int | None,
    impl: str | None,
) -> Tensor:
    norm = (form, combine, scale, eps, eps_relative, limits)
    if supported(impl, weight, absent(weight, dtype)) == "triton":
        kernels = _kernels()
        tiles = kernels.Tiles.whole(weight, rows, p, p_base, torch.float32)
        scalars, factor = kernels.measure(tiles, important, *norm)
        return kernels.fused_weight(tiles, scalars, factor, form, combine, dtype, seed)
    measured = _Norm.measure(weight, rows, p, p_base, important, *norm)
    return measured.apply(weight, rows, p, p_base, dtype, seed)


@_normed_weight.register_fake
def _normed_weight_fake(weight, rows, p, p_base, important, *norm_dtype_seed_impl):
    return torch.empty_like(weight, dtype=norm_dtype_seed_impl[-3])


class _WeightNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, weight, bias, rows, p, p_base, delta_bias, important, *norm_and_impl
    ) -> Tensor:
        ctx.form, ctx.combine, *_, ctx.impl = norm_and_impl
        ctx.p_dtype, ctx.bias_dtype = p.dtype, None if delta_bias is None else delta_bias.dtype
        out, scalars, factor = linear_forward(
            x, weight, bias, rows, p, p_base, delta_bias, important, *norm_and_impl
        )
        kept = x if ctx.needs_input_grad[4] else None
        factor = None if important is None else factor
        ctx.save_for_backward(kept, weight, rows, p, p_base, scalars, factor)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        needs = [ctx.needs_input_grad[index] for index in (0, 4, 6)]
        dx, dp, dbias = linear_backward(
            g, *ctx.saved_tensors, ctx.form, ctx.combine, needs, ctx.impl
        )
        gradients: list = [None] * 15
        for index, needed, gradient, dtype in (
            (0, needs[0], dx, dx.dtype), (4, needs[1], dp, ctx.p_dtype),
            (6, needs[2], dbias, ctx.bias_dtype),
        ):  # fmt: skip
            if needed:
                gradients[index] = gradient.to(dtype)
        return tuple(gradients)


__all__ = ["normed_weight", "weight_norm_linear"]
