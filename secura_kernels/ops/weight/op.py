"""Space ``weight``: S-MagNorm on the weight itself, elementwise (the paper's figure).

    base = W + P_base R      Δ = P R      W' = (2 base + Δ) / M · f   or   (base + Δ / M) · f
    y = x W'ᵀ + b + δb

    ∂x = ḡ W'        ∂P = ((f · ḡᵀ x) / M) Rᵀ        (M and the factors f are constants)

| tensor    | shape             | dtype                                             |
|-----------|-------------------|---------------------------------------------------|
| x, y      | [..., K] [..., N] | compute dtype                                     |
| W, W'     | [N, K]            | its own, compute dtype                            |
| P, P_base | [N, m]            | compute dtype; fp32 both if folded or with a seed |
| ∂P        | [N, m]            | fp32                                              |
| rows      | [m]               | int64                                             |

With a seed W' is rounded stochastically in the forward pass, as a merge rounds it; ∂x takes W'
rounded to nearest.

Saved for backward: x and small tensors (ε, slope and offset of the gain, the factors); W' is
rebuilt, or kept (:mod:`secura_kernels.kept_weight`). ``paper`` and ``released`` take a first pass
for the largest ρ. Neither ∂W nor ΔW is ever whole in memory: Triton forms W' in one pass over
W and ∂P in chunks of W's rows (:mod:`.triton` counts the bytes), plain torch runs everything
elementwise over chunks of rows of at most ``WORKSPACE_MIB``, on a CPU of what its cache holds
(``CACHE_MIB``).

:func:`normed_weight` and :func:`merged_weight` are what a merge writes, of this space and of the
additive ones, whose layers go through the second too. One pass over W: a merge's products in fp32
(in TF32 where torch is told to take that for fp32), one rounding to W's dtype at the end. bf16
keeps 8 bits, so where |ΔW| is under 1/512 of |W| rounding to nearest drops it; stochastic rounding
keeps it in the mean. For W in 16 bits triton
multiplies in TF32 on sm_100 even so: an error of 2⁻¹¹ of ΔW.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import kept_weight
from ...dispatch import absent, as_dtype, kernels, op, wide
from ...held import once
from ...norm import Norm, unpack
from ...shared import added
from ..common import (
    Call,
    Gradients,
    Saved,
    Step,
    Terms,
    gradients_fake,
    round_stochastically,
    rounding_seed,
    summed_bias,
)
from ..project.op import projections
from . import plain


@op("weight")
def weight(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    terms: list[Tensor | None],
    important: Tensor | None,
    packed: str,
    keep: bool,
    seed: int | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(out [T, N], W' [N, K], [ε, slope, offset], f [N])``; f is empty without ``important``.

    Args:
        x: ``[T, K]`` in the compute dtype.
        w: ``W [N, K]``, fp16 to fp64, any strides.
        bias: ``b [N]`` or None.
        rows: ``[m]`` int64.
        terms: :class:`~secura_kernels.ops.common.Terms` without z_scale, for there is no z.
        important: ``[N]`` bool of the restraint, or None.
        packed: the norm, of :func:`secura_kernels.norm.pack`.
        keep: whether W' is wanted; else it is empty.
        seed: W' is then the one that a merge writes, rounded stochastically; None to nearest.
        impl: of :func:`secura_kernels.dispatch.resolve`.
    """
    norm, (p, p_base, delta_bias, _) = unpack(packed), terms
    assert p is not None
    triton = kernels(__package__, impl, x, w)
    multiplied = x.dtype if seed is None else torch.float32
    fused, scalars, factor = _normed(
        triton, w, rows, p, p_base, important, norm, x.dtype, multiplied, seed
    )
    out = F.linear(x, fused, summed_bias(bias, delta_bias, x.dtype))
    factor = absent(x, torch.float32) if factor is None else factor
    return out, fused if keep else absent(x), scalars, factor


@weight.register_fake
def _weight_fake(x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, important, _, keep, _, _ = rest
    n = w.shape[0]
    scalars = x.new_empty(3, dtype=wide(w.dtype))
    return (
        x.new_empty(x.shape[0], n),
        torch.empty_like(w, dtype=x.dtype) if keep else absent(x),
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
    packed: str,
    needs: list[bool],
    impl: str | None,
    *,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(∂x, ∂P, ∂δb)``, those not needed empty; ∂P and ∂δb in fp32 or wider.

    x may be None where ∂P is not needed; ``found`` is
    :class:`~secura_kernels.ops.common.Measured` of the forward pass. With ``total`` ∂x is that,
    added to in place.
    """
    norm, (p, p_base, *_), (scalars, factor) = unpack(packed), terms, found
    assert p is not None
    parts = (scalars, factor if norm.restrained else None)
    dx, dp, exact = None, None, wide(g.dtype)
    x = x if needs[1] else None
    triton = kernels(__package__, impl, g, w)
    if triton is None:
        if needs[0] or x is not None:
            chunks = plain.Chunks(w, rows, p, p_base)
            fused, dp = plain.backward(g, x, chunks, parts, norm, needs[0])
            dx = None if fused is None else added(total, g, fused)
    elif needs[0] or x is not None:
        tiles = triton.Tiles.whole(w, rows, p, p_base, g.dtype)
        if needs[0]:
            dx = added(total, g, triton.fused_weight(tiles, *parts, norm, g.dtype))
        if x is not None:
            dp = triton.grad_p(g, x, tiles, rows, parts, norm)
    return (
        absent(g) if dx is None else dx,
        absent(g, exact) if dp is None else as_dtype(dp, exact),
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
    packed: str,
    dtype: torch.dtype,
    seed: int | None,
    impl: str | None,
) -> Tensor:
    """``W' [N, K]`` of this space in ``dtype``: products in fp32 or TF32, rounded once.

    To nearest, or stochastically from ``seed`` (bf16).
    """
    triton = kernels(__package__, impl, w, absent(w, dtype))
    settings = (important, unpack(packed), dtype, torch.float32, seed)
    return _normed(triton, w, rows, p, p_base, *settings)[0]


def _normed(
    triton: ModuleType | None,
    w: Tensor,
    rows: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    important: Tensor | None,
    norm: Norm,
    dtype: torch.dtype,
    multiplied: torch.dtype,
    seed: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(W' [N, K] in dtype, scalars, factor)``; kernels multiply P by R in ``multiplied``."""
    if triton is not None:
        tiles = triton.Tiles.whole(w, rows, p, p_base, multiplied)
        found = triton.measure(tiles, important, norm)
        return triton.fused_weight(tiles, *found, norm, dtype, seed), *found
    chunks = plain.Chunks(w, rows, p, p_base)
    found = plain.measure(chunks, important, norm)
    return plain.fused(chunks, found, norm, dtype, seed), *found


@normed_weight.register_fake
def _normed_weight_fake(w: Tensor, *rest: Any) -> Tensor:
    *_, dtype, _, _ = rest
    return torch.empty_like(w, dtype=dtype)


@op("merged_weight")
def merged_weight(
    w: Tensor,
    rows: Tensor,
    q: Tensor,
    base_scale: Tensor | None,
    dtype: torch.dtype,
    seed: int | None,
    impl: str | None,
) -> Tensor:
    """``base_scale · W + Q R`` in ``dtype`` and W's layout, rounded from ``seed`` or to nearest.

    Q and R are multiplied in Q's dtype, in plain torch in W's where that is wider.
    """
    if triton := kernels(__package__, impl, w, absent(w, dtype)):
        multiplied = torch.float32 if q.dtype == torch.float64 else q.dtype
        tiles = triton.Tiles.whole(w, rows, q, None, multiplied)
        return triton.fused_weight(tiles, None, base_scale, None, dtype, seed)
    compute = torch.promote_types(w.dtype, q.dtype)
    base, r = w, w.index_select(0, rows)
    if w.dtype != compute:
        base, r = base.to(compute), r.to(compute)
    if base_scale is not None:
        base = as_dtype(base * base_scale[:, None], compute)
    out = torch.addmm(base, as_dtype(q, compute), r)
    fused = torch.empty_like(w, dtype=dtype)
    if seed is None and out.dtype == dtype and out.stride() == fused.stride():
        return out
    return fused.copy_(out if seed is None else round_stochastically(out, seed))


@merged_weight.register_fake
def _merged_weight_fake(w: Tensor, *rest: Any) -> Tensor:
    *_, dtype, _, _ = rest
    return torch.empty_like(w, dtype=dtype)


def forward(call: Call, step: Step) -> tuple[Tensor, Saved]:
    """``(out [T, N], what is saved)``."""
    layer, x = call.layer, step.x
    seed = rounding_seed(layer, x.dtype)
    # ρ divides by the base, which may cancel: a P that is folded into it is not rounded. Nor is the
    # P of a W' that is to be rounded once, stochastically.
    dtype = x.dtype if step.u_base is None and seed is None else step.u.dtype
    thin = (call, step.u, step.u_base, dtype)
    p, p_base = once(layer.held, ("P", dtype), projections, *thin)
    terms = Terms(p, p_base, step.delta_bias)
    frozen = (layer.weight, as_dtype(layer.bias, x.dtype), layer.rows)
    keep = seed is None and kept_weight.keeps_weight(call.watched)
    held = layer.held if keep and kept_weight.holds_weight() else None
    known = None if held is None else held.get(("W'", x.dtype))
    if known is not None:
        fused, *found = known
        out = F.linear(x, fused, summed_bias(frozen[1], step.delta_bias, x.dtype))
    else:
        run = weight if call.watched else weight.body
        settings = (call.important, call.packed, keep, seed, call.impl)
        out, fused, *found = run(x, *frozen, terms, *settings)
        if held is not None:
            held.put(("W'", x.dtype), (fused, *found))
    kept = fused if keep else None
    return out, (kept, x if step.needs_p else None, layer.weight, layer.rows, *terms[:2], *found)


def backward(
    call: Call, g: Tensor, saved: Saved, needs: list[bool], total: Tensor | None
) -> Gradients:
    """``(∂x, ∂P, ∂δb)``; ``total``, where one is given, is added to and is ∂x."""
    kept, x, w, rows, p, p_base, *found = saved
    run = weight_backward if call.watched else weight_backward.body
    wanted = needs if kept is None else [False, *needs[1:]]
    dx, *rest = run(
        g, x, w, rows, [p, p_base, None, None], found, call.packed, wanted, call.impl, total=total
    )
    return Gradients(added(total, g, kept) if kept is not None and needs[0] else dx, *rest)


__all__ = [
    "backward",
    "forward",
    "merged_weight",
    "normed_weight",
    "weight",
    "weight_backward",
]
