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

from ...dispatch import absent, as_dtype, op, supported, wide
from ...norm import (
    Norm,
    base_share,
    coefficients,
    combined,
    effective_eps,
    gain,
    relative_change,
    restrain_factor,
    unpack,
)
from ..common import Call, Gradients, Measured, Saved, Step, Terms, cast, gradients_fake, measured
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
        chunks = _Chunks(w, rows, named)
        scalars, factor = _measure(chunks, important, how)
        fused = _fused(chunks, (scalars, factor), how, x.dtype)
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
    dx, dp, exact = None, None, wide(g.dtype)
    x = x if needs[1] else None
    if supported(impl, g, w) != "triton":
        if needs[0] or x is not None:
            dx, dp = _backward(g, x, _Chunks(w, rows, named), parts, how, needs[0])
    else:
        kernels = _kernels()
        if needs[0]:
            tiles = kernels.Tiles.whole(w, rows, named.p, named.p_base, g.dtype)
            dx = g @ kernels.fused_weight(tiles, *parts, how, g.dtype)
        if x is not None:
            dp = kernels.grad_p(g, x, w, rows, named, parts, how)
    return (
        absent(g) if dx is None else dx,
        absent(g, exact) if dp is None else dp,
        g.sum(0, dtype=exact) if needs[2] else absent(g, exact),
    )


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
    chunks = _Chunks(w, rows, terms)
    return _fused(chunks, _measure(chunks, important, how), how, dtype, seed)


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


class _Chunks:
    """Yields ``(rows of W as a slice, base, Δ)``, in fp32 or wider, to be read alone.

    Once a pass over W, unless all of W is one chunk, which is kept for the next.
    """

    def __init__(self, w: Tensor, rows: Tensor, terms: Terms) -> None:
        self.w, self.p, self.p_base = w, terms.p, terms.p_base
        self.dtype = wide(torch.promote_types(w.dtype, terms.p.dtype))
        self.r = as_dtype(w.index_select(0, rows), self.dtype)
        self.step = rows_at_once(w, self.dtype)
        self.whole = self._chunk(slice(None)) if w.shape[0] <= self.step else None

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        if self.whole is not None:
            yield self.whole
            return
        for start in range(0, self.w.shape[0], self.step):
            yield self._chunk(slice(start, start + self.step))

    def _chunk(self, part: slice) -> tuple[slice, Tensor, Tensor]:
        base = as_dtype(self.w[part], self.dtype)
        if self.p_base is not None:
            base = torch.addmm(base, as_dtype(self.p_base[part], self.dtype), self.r)
        return part, base, as_dtype(self.p[part], self.dtype) @ self.r


def rows_at_once(w: Tensor, dtype: torch.dtype) -> int:
    """How many rows of W plain torch takes at a time in ``dtype``."""
    return max(1, WORKSPACE_MIB * 2**20 // max(1, w.shape[1] * dtype.itemsize))


def _measure(chunks: _Chunks, important: Tensor | None, norm: Norm) -> Found:
    """The global part of the norm in plain torch."""
    w = chunks.w
    small, slope, offset = _coefficients(chunks, norm)
    scalars = torch.stack([as_dtype(small, slope.dtype), slope, offset])
    parts = chunks if w.numel() else ()
    gains = (_gain(base, delta, scalars, norm) for _, base, delta in parts)
    return scalars, restrain_factor(gains, w.numel(), important, norm)


def _coefficients(chunks: _Chunks, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """``(ε, slope, offset)``, 0-dim."""
    w = chunks.w
    if chunks.p_base is not None and norm.eps_relative and w.numel():
        square = w.new_zeros((), dtype=chunks.dtype)
        for _, base, _ in chunks:
            square += base.square().sum()
        small = norm.eps * (square / w.numel()).sqrt()
    else:
        small = effective_eps(w, norm)
    peak = None
    if norm.needs_peak:
        parts = chunks if w.numel() else ()
        peaks = [relative_change(base, delta, small).max() for _, base, delta in parts]
        peak = small.new_zeros(()) if not peaks else peaks[0]
        if len(peaks) > 1:
            peak = torch.stack(peaks).max()
    return small, *coefficients(norm, peak, w)


def _gain(base: Tensor, delta: Tensor, scalars: Tensor, norm: Norm) -> Tensor:
    eps, slope, offset = scalars.unbind()
    return gain(relative_change(base, delta, eps), slope, offset, norm)


def _normed(
    base: Tensor, delta: Tensor, m: Tensor, factor: Tensor | None, part: slice, norm: Norm
) -> Tensor:
    """W' of one chunk."""
    out = combined(base, delta, m, base_share(m, norm))
    return out if factor is None else out.mul_(factor[part, None])


def _fused(
    chunks: _Chunks, found: Found, norm: Norm, dtype: torch.dtype, seed: int | None = None
) -> Tensor:
    """W' ``[N, K]`` in ``dtype`` and W's layout, in plain torch."""
    (scalars, factor), draw = found, generator(chunks.w, seed)
    fused = torch.empty_like(chunks.w, dtype=dtype)
    for part, base, delta in chunks:
        out = _normed(base, delta, _gain(base, delta, scalars, norm), factor, part, norm)
        fused[part] = round_stochastically(out, draw) if draw else out
    return fused


def _backward(
    g: Tensor, x: Tensor | None, chunks: _Chunks, found: Found, norm: Norm, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``(∂x, ∂P)`` in plain torch, with one look at the gain for both; ∂P where x is given."""
    scalars, factor = found
    fused = torch.empty_like(chunks.w, dtype=g.dtype) if needs_x else None
    dp = None if x is None else g.new_empty(chunks.p.shape, dtype=wide(g.dtype))
    for part, base, delta in chunks:
        m = _gain(base, delta, scalars, norm)
        if fused is not None:
            fused[part] = _normed(base, delta, m, factor, part, norm)
        if dp is not None and x is not None:
            dp[part] = as_dtype(g[:, part].t() @ x, base.dtype).div_(m) @ chunks.r.t()
    if dp is not None and factor is not None:
        dp.mul_(factor[:, None])
    return None if fused is None else g @ fused, dp


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


def backward(call: Call, g: Tensor, saved: Saved, needs: list[bool]) -> Gradients:
    """``(∂x, ∂P, ∂δb)``."""
    x, w, rows, p, p_base, *found = saved
    run = weight_backward if call.watched else weight_backward.body
    return Gradients(
        *run(g, x, w, rows, [p, p_base, None, None], found, call.norm, needs, call.impl)
    )


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
