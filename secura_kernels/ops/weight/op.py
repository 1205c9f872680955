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
whole in memory: Triton forms W' in one pass over W and ∂P in chunks of W's rows (:mod:`.triton`
counts the bytes), plain torch runs everything elementwise over chunks of rows of at most
``WORKSPACE_MIB``.

:func:`normed_weight` and :func:`merged_weight` are what a merge writes, of this space and of the
additive ones. One pass over W: products in fp32, one rounding to W's dtype at the end. bf16 keeps
8 bits, so where |ΔW| is under 1/512 of |W| rounding to nearest drops it; stochastic rounding keeps
it in the mean. For W in 16 bits triton multiplies in TF32 on sm_100 even so: an error of 2⁻¹¹ of
ΔW.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch import absent, op, supported, wide
from ...norm import (
    Norm,
    base_share,
    coefficients,
    effective_eps,
    gain,
    relative_change,
    restrain_factor,
    unpack,
)
from ..common import Call, Measured, Saved, Step, Terms, cast, gradients_fake, measured
from ..project.op import projections

WORKSPACE_MIB = 8


def _kernels() -> Any:
    from . import triton

    return triton


@op("weight")
def weight(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    terms: list[Tensor | None],
    important: Tensor | None,
    norm: str,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out [T, N], [ε, slope, offset], f [N])``; f is empty without ``important``.

    Args:
        x: ``[T, K]`` in the compute dtype.
        w: ``W [N, K]``, any floating dtype and strides.
        bias: ``b [N]`` or None.
        rows: ``[m]`` int64.
        terms: :class:`~secura_kernels.ops.common.Terms` without z_scale, for there is no z.
        important: ``[N]`` bool of the restraint, or None.
        norm: of :func:`secura_kernels.norm.pack`.
        impl: of :func:`secura_kernels.dispatch.resolve`.
    """
    how, named = unpack(norm), Terms._make(terms)
    if supported(impl, x, w) == "triton":
        kernels = _kernels()
        tiles = kernels.Tiles.whole(w, rows, named.p, named.p_base, x.dtype)
        scalars, factor = kernels.measure(tiles, important, how)
        fused = kernels.fused_weight(tiles, scalars, factor, how, x.dtype)
    else:
        scalars, factor = _measure(w, rows, named, important, how)
        fused = _fused(w, rows, named, (scalars, factor), how, x.dtype)
    out = F.linear(x, fused, bias)
    if named.delta_bias is not None:
        out.add_(named.delta_bias)
    return out, *measured(x, scalars, factor)


@weight.register_fake
def _weight_fake(x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, important, _, _ = rest
    n = w.shape[0]
    scalars = x.new_empty(3, dtype=wide(w.dtype))
    return (
        x.new_empty(x.shape[0], n),
        scalars,
        x.new_empty(0 if important is None else n, dtype=torch.float32),
    )


@op("weight_backward")
def weight_backward(
    g: Tensor,
    x: Tensor | None,
    w: Tensor,
    rows: Tensor,
    terms: list[Tensor | None],
    found: list[Tensor],
    norm: str,
    needs: list[bool],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(∂x, ∂P, ∂δb)``, those not needed empty; ∂P and ∂δb in fp32 or wider.

    x may be None where ∂P is not needed; ``found`` is
    :class:`~secura_kernels.ops.common.Measured` of the forward pass.
    """
    how, named, (scalars, factor) = unpack(norm), Terms._make(terms), Measured._make(found)
    parts = (scalars, factor if how.restrained else None)
    dx, dp, dbias = absent(g), absent(g, wide(g.dtype)), absent(g, wide(g.dtype))
    kernels = _kernels() if supported(impl, g, w) == "triton" else None
    if needs[0]:
        if kernels is not None:
            tiles = kernels.Tiles.whole(w, rows, named.p, named.p_base, g.dtype)
            fused = kernels.fused_weight(tiles, *parts, how, g.dtype)
        else:
            fused = _fused(w, rows, named, parts, how, g.dtype)
        dx = g @ fused
        del fused
    if needs[1] and x is not None:
        run = _grad_p if kernels is None else kernels.grad_p
        dp = run(g, x, w, rows, named, parts, how)
    if needs[2]:
        dbias = g.sum(0, dtype=wide(g.dtype))
    return dx, dp, dbias


@weight_backward.register_fake
def _weight_backward_fake(
    g: Tensor, x: Tensor | None, w: Tensor, rows: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    terms, _, _, needs, _ = rest
    return gradients_fake(g, w, Terms._make(terms).p, needs)


@op("normed_weight")
def normed_weight(
    w: Tensor,
    rows: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    important: Tensor | None,
    norm: str,
    dtype: torch.dtype,
    seed: int | None,
    impl: str | None,
) -> Tensor:
    """``W' [N, K]`` of this space in ``dtype``: products in fp32, rounded once.

    To nearest, or stochastically from ``seed`` (bf16).
    """
    how, terms = unpack(norm), Terms(p, p_base)
    if supported(impl, w, absent(w, dtype)) == "triton":
        kernels = _kernels()
        tiles = kernels.Tiles.whole(w, rows, p, p_base, torch.float32)
        found = kernels.measure(tiles, important, how)
        return kernels.fused_weight(tiles, *found, how, dtype, seed)
    return _fused(w, rows, terms, _measure(w, rows, terms, important, how), how, dtype, seed)


@normed_weight.register_fake
def _normed_weight_fake(w: Tensor, *rest: Any) -> Tensor:
    *_, dtype, _, _ = rest
    return torch.empty_like(w, dtype=dtype)


@op("merged_weight")
def merged_weight(
    w: Tensor,
    rows: Tensor,
    q: Tensor,
    share: Tensor | None,
    dtype: torch.dtype,
    seed: int | None,
    impl: str | None,
) -> Tensor:
    """``share · W + Q R`` in ``dtype`` and W's layout, rounded from ``seed`` or to nearest."""
    if supported(impl, w, absent(w, dtype)) == "triton":
        kernels = _kernels()
        tiles = kernels.Tiles.whole(w, rows, q, None, torch.float32)
        return kernels.fused_weight(tiles, None, share, None, dtype, seed)
    compute = torch.promote_types(wide(w.dtype), q.dtype)
    base = w.to(compute) if share is None else w.to(compute) * share[:, None]
    out = torch.addmm(base, q.to(compute), w.index_select(0, rows).to(compute))
    draw = generator(w, seed)
    fused = torch.empty_like(w, dtype=dtype)
    return fused.copy_(round_stochastically(out, draw) if draw else out)


@merged_weight.register_fake
def _merged_weight_fake(w: Tensor, *rest: Any) -> Tensor:
    *_, dtype, _, _ = rest
    return torch.empty_like(w, dtype=dtype)


Found = tuple[Tensor, Tensor | None]
"""``([ε, slope, offset], f [N] or None)``: the global part of the norm."""


def _measure(w: Tensor, rows: Tensor, terms: Terms, important: Tensor | None, norm: Norm) -> Found:
    """The global part of the norm in plain torch."""
    small, slope, offset = _coefficients(w, rows, terms, norm)
    scalars = torch.stack([small.to(slope.dtype), slope, offset])
    chunks = _chunks(w, rows, terms) if w.numel() else ()
    gains = (_gain(base, delta, scalars, norm) for _, base, delta in chunks)
    return scalars, restrain_factor(gains, w.numel(), important, norm)


def _coefficients(
    w: Tensor, rows: Tensor, terms: Terms, norm: Norm
) -> tuple[Tensor, Tensor, Tensor]:
    """``(ε, slope, offset)``, 0-dim."""
    if terms.p_base is not None and norm.eps_relative and w.numel():
        square = w.new_zeros((), dtype=wide(torch.promote_types(w.dtype, terms.p.dtype)))
        for _, base, _ in _chunks(w, rows, terms):
            square += base.square().sum()
        small = norm.eps * (square / w.numel()).sqrt()
    else:
        small = effective_eps(w, norm)
    peak = None
    if norm.needs_peak:
        chunks = _chunks(w, rows, terms) if w.numel() else ()
        peaks = [relative_change(base, delta, small).amax() for _, base, delta in chunks]
        peak = torch.stack(peaks).amax() if peaks else small.new_zeros(())
    return small, *coefficients(norm, peak, w)


def _gain(base: Tensor, delta: Tensor, scalars: Tensor, norm: Norm) -> Tensor:
    eps, slope, offset = scalars.unbind()
    return gain(relative_change(base, delta, eps), slope, offset, norm)


def _fused(
    w: Tensor,
    rows: Tensor,
    terms: Terms,
    found: Found,
    norm: Norm,
    dtype: torch.dtype,
    seed: int | None = None,
) -> Tensor:
    """W' ``[N, K]`` in ``dtype`` and W's layout, in plain torch."""
    (scalars, factor), draw = found, generator(w, seed)
    fused = torch.empty_like(w, dtype=dtype)
    for part, base, delta in _chunks(w, rows, terms):
        m = _gain(base, delta, scalars, norm)
        share = base_share(m, norm)
        delta.div_(m)
        out = delta.add_(base) if share is None else delta.addcmul_(base, share)
        if factor is not None:
            out.mul_(factor[part, None])
        fused[part] = round_stochastically(out, draw) if draw else out
    return fused


def _grad_p(
    g: Tensor, x: Tensor, w: Tensor, rows: Tensor, terms: Terms, found: Found, norm: Norm
) -> Tensor:
    scalars, factor = found
    dp = torch.empty(terms.p.shape, dtype=wide(g.dtype), device=g.device)
    r = w.index_select(0, rows)
    for part, base, delta in _chunks(w, rows, terms):
        ddelta = (g[:, part].t() @ x).to(base.dtype).div_(_gain(base, delta, scalars, norm))
        dp[part] = ddelta @ r.to(base.dtype).t()
    return dp if factor is None else dp.mul_(factor[:, None])


def _chunks(w: Tensor, rows: Tensor, terms: Terms) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield ``(rows of W as a slice, base, Δ)``, both fresh and in fp32 or wider."""
    p, p_base, *_ = terms
    dtype = wide(torch.promote_types(w.dtype, p.dtype))
    r = w.index_select(0, rows).to(dtype)
    n, k = w.shape
    step = max(1, WORKSPACE_MIB * 2**20 // max(1, k * r.element_size()))
    for start in range(0, n, step):
        part = slice(start, start + step)
        base = w[part].to(dtype, copy=True)
        if p_base is not None:
            base.addmm_(p_base[part].to(dtype), r)
        yield part, base, p[part].to(dtype) @ r


def generator(like: Tensor, seed: int | None) -> torch.Generator | None:
    """A generator on ``like``'s device, or None to round to nearest."""
    return None if seed is None else torch.Generator(like.device).manual_seed(seed)


def round_stochastically(x: Tensor, draw: torch.Generator) -> Tensor:
    """fp32 ``x`` to a bf16 neighbour, up with the probability of the part cut off."""
    bits = x.float().view(torch.int32)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=draw)
    rounded = ((bits + noise) >> 16 << 16).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x.float()).to(torch.bfloat16)


def forward(call: Call, step: Step) -> tuple[Tensor, Saved]:
    """``(out [T, N], what is saved)``."""
    layer, x = call.layer, step.x
    terms = Terms(*projections(call, step, step.u.dtype), step.delta_bias)
    frozen = (layer.weight, cast(layer.bias, x.dtype), layer.rows)
    run = weight if call.watched else weight.body
    out, *found = run(x, *frozen, terms, call.important, call.norm, call.impl)
    return out, (x if step.keeps else None, layer.weight, layer.rows, *terms[:2], *found)


def backward(call: Call, g: Tensor, saved: Saved, needs: list[bool]) -> tuple[Tensor, ...]:
    """``(∂x, ∂P, ∂δb)``."""
    x, w, rows, p, p_base, *found = saved
    run = weight_backward if call.watched else weight_backward.body
    return run(g, x, w, rows, [p, p_base, None, None], found, call.norm, needs, call.impl)


__all__ = [
    "backward",
    "forward",
    "generator",
    "merged_weight",
    "normed_weight",
    "round_stochastically",
    "weight",
    "weight_backward",
]
