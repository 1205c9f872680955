"""Space ``weight``: S-MagNorm on the weight itself, elementwise (the paper's figure).

    base = W + P_base R      Δ = P R      W' = (2 base + Δ) / M · f   or   (base + Δ / M) · f
    y = x W'ᵀ + b + δb

    ∂x = ḡ W'        ∂P = ((f · ḡᵀ x) / M) Rᵀ        (M and the factors f are constants)

| tensor    | shape             | dtype                              |
|-----------|-------------------|------------------------------------|
| x, y      | [..., K] [..., N] | compute dtype                      |
| W, W'     | [N, K]            | its own, compute dtype             |
| P, P_base | [N, m]            | compute dtype; fp32 both if folded |
| ∂P        | [N, m]            | fp32                               |
| rows      | [m]               | int64                              |

With a seed W' is rounded stochastically in the forward pass, as a merge rounds it; ∂x takes W'
rounded to nearest.

Saved for backward: x and small tensors (ε, slope and offset of the gain, the factors); W' is
rebuilt, or kept (:func:`secura_kernels.plan.keeps_weight`). ``paper`` and ``released`` take a first
pass for the largest ρ. Neither ∂W nor ΔW is ever whole in memory: Triton forms W' in one pass over
W and ∂P in chunks of W's rows (:mod:`.triton` counts the bytes), plain torch runs everything
elementwise over chunks of rows of at most ``WORKSPACE_MIB``, on a CPU of what its cache holds
(``CACHE_MIB``).

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

from ... import plan
from ...dispatch import absent, as_dtype, exporting_to_onnx, op, supported, wide
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
from ..common import (
    Call,
    Gradients,
    Measured,
    Saved,
    Step,
    Terms,
    cast,
    gradients_fake,
    measured,
    round_stochastically,
    rounding_seed,
    summed_bias,
)
from ..project.op import projections

WORKSPACE_MIB = 8
CACHE_MIB = 0.5


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
    keep: bool,
    seed: int | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(out [T, N], W' [N, K], [ε, slope, offset], f [N])``; f is empty without ``important``.

    Args:
        x: ``[T, K]`` in the compute dtype.
        w: ``W [N, K]``, any floating dtype and strides.
        bias: ``b [N]`` or None.
        rows: ``[m]`` int64.
        terms: :class:`~secura_kernels.ops.common.Terms` without z_scale, for there is no z.
        important: ``[N]`` bool of the restraint, or None.
        norm: of :func:`secura_kernels.norm.pack`.
        keep: whether W' is wanted; else it is empty.
        seed: W' is then the one that a merge writes, rounded stochastically; None to nearest.
        impl: of :func:`secura_kernels.dispatch.resolve`.
    """
    how, named = unpack(norm), Terms._make(terms)
    if impl != "reference" and supported(impl, x, w) == "triton":
        kernels = _kernels()
        multiplied = x.dtype if seed is None else torch.float32
        tiles = kernels.Tiles.whole(w, rows, named.p, named.p_base, multiplied)
        scalars, factor = kernels.measure(tiles, important, how)
        fused = kernels.fused_weight(tiles, scalars, factor, how, x.dtype, seed)
    else:
        chunks = _Chunks(w, rows, named)
        scalars, factor = _measure(chunks, important, how)
        fused = _fused(chunks, (scalars, factor), how, x.dtype, seed)
    out = F.linear(x, fused, summed_bias(bias, named.delta_bias, x.dtype))
    return out, fused if keep else absent(x), *measured(x, scalars, factor)


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
    if impl == "reference" or supported(impl, g, w) != "triton":
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
    fused = torch.empty_like(w, dtype=dtype)
    return fused.copy_(out if seed is None else round_stochastically(out, seed))


@merged_weight.register_fake
def _merged_weight_fake(w: Tensor, *rest: Any) -> Tensor:
    *_, dtype, _, _ = rest
    return torch.empty_like(w, dtype=dtype)


Found = tuple[Tensor, Tensor | None]
"""``([ε, slope, offset], f [N] or None)``: the global part of the norm."""


class _Chunks:
    """Yields ``(rows of W as a slice, base, Δ)``, in fp32 or wider, to be read alone.

    Once a pass over W, unless all of W is one chunk, which is kept for the next, its ρ too; its
    slice is None.
    """

    Chunk = tuple[slice | None, Tensor, Tensor]

    def __init__(self, w: Tensor, rows: Tensor, terms: Terms) -> None:
        self.w, self.dtype = w, wide(torch.promote_types(w.dtype, terms.p.dtype))
        self.p, self.p_base = as_dtype(terms.p, self.dtype), cast(terms.p_base, self.dtype)
        self.r = as_dtype(w.index_select(0, rows), self.dtype)
        self.step = rows_at_once(w, self.dtype)
        self.whole = self._chunk(None) if w.shape[0] <= self.step else None
        self.rho: Tensor | None = None

    def __iter__(self) -> Iterator[Chunk]:
        if self.whole is not None:
            yield self.whole
            return
        for start in range(0, self.w.shape[0], self.step):
            yield self._chunk(slice(start, start + self.step))

    def _chunk(self, part: slice | None) -> Chunk:
        base, p, p_base = self.w, self.p, self.p_base
        if part is not None:
            base, p, p_base = base[part], p[part], p_base if p_base is None else p_base[part]
        if base.dtype != self.dtype:
            base = base.to(self.dtype)
        if p_base is not None:
            base = torch.addmm(base, p_base, self.r)
        return part, base, p @ self.r

    def change(self, base: Tensor, delta: Tensor, eps: Tensor) -> Tensor:
        """ρ of a chunk, to be read alone; one ε serves all passes over W."""
        if self.rho is not None:
            return self.rho
        rho = relative_change(base, delta, eps)
        if self.whole is not None:
            self.rho = rho
        return rho


def rows_at_once(w: Tensor, dtype: torch.dtype) -> int:
    """How many rows of W plain torch takes at a time in ``dtype``.

    A CPU takes what stays in its cache from one elementwise call to the next: its calls are cheap.
    """
    most = CACHE_MIB if w.device.type == "cpu" else WORKSPACE_MIB
    return max(1, int(most * 2**20) // max(1, w.shape[1] * dtype.itemsize))


def _measure(chunks: _Chunks, important: Tensor | None, norm: Norm) -> Found:
    """The global part of the norm in plain torch."""
    w = chunks.w
    small, slope, offset = _coefficients(chunks, norm)
    scalars = torch.stack([as_dtype(small, slope.dtype), slope, offset])
    parts = chunks if w.numel() else ()
    gains = (_gain(chunks, base, delta, scalars, norm) for _, base, delta in parts)
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
        peaks = [chunks.change(base, delta, small).max() for _, base, delta in parts]
        peak = small.new_zeros(()) if not peaks else peaks[0]
        if len(peaks) > 1:
            peak = torch.stack(peaks).max()
    return small, *coefficients(norm, peak, w)


def _gain(chunks: _Chunks, base: Tensor, delta: Tensor, scalars: Tensor, norm: Norm) -> Tensor:
    eps, slope, offset = scalars.unbind()
    return gain(chunks.change(base, delta, eps), slope, offset, norm)


def _write_normed(
    fused: Tensor,
    chunk: _Chunks.Chunk,
    m: Tensor,
    factor: Tensor | None,
    norm: Norm,
    seed: int | None = None,
    in_place: bool = True,
) -> None:
    """Write W' of one chunk over its rows of ``fused``, formed there where ``in_place`` allows."""
    part, base, delta = chunk
    out = fused if part is None else fused[part]
    exact = in_place and out.dtype == base.dtype and seed is None
    normed = combined(base, delta, m, base_share(m, norm), out=out if exact else None)
    if factor is not None:
        normed.mul_((factor if part is None else factor[part])[:, None])
    if not exact:
        first = 0 if part is None else part.start or 0
        out.copy_(normed if seed is None else round_stochastically(normed, seed, first))


def _fused(
    chunks: _Chunks, found: Found, norm: Norm, dtype: torch.dtype, seed: int | None = None
) -> Tensor:
    """W' ``[N, K]`` in ``dtype`` and W's layout, in plain torch."""
    scalars, factor = found
    fused = torch.empty_like(chunks.w, dtype=dtype)
    in_place = not exporting_to_onnx()  # what is exported has autograd look on, which takes no out=
    for chunk in chunks:
        m = _gain(chunks, *chunk[1:], scalars, norm)
        _write_normed(fused, chunk, m, factor, norm, seed, in_place)
    return fused


def _backward(
    g: Tensor, x: Tensor | None, chunks: _Chunks, found: Found, norm: Norm, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``(∂x, ∂P)`` in plain torch, with one look at the gain for both; ∂P where x is given."""
    scalars, factor = found
    fused = torch.empty_like(chunks.w, dtype=g.dtype) if needs_x else None
    dps = []
    for chunk in chunks:
        part, base, delta = chunk
        m = _gain(chunks, base, delta, scalars, norm)
        if fused is not None:
            _write_normed(fused, chunk, m, factor, norm)
        if x is not None:
            gx = (g if part is None else g[:, part]).t() @ x
            dps.append(as_dtype(gx, base.dtype).div_(m) @ chunks.r.t())
    dp = None
    if dps:
        dp = as_dtype(dps[0] if len(dps) == 1 else torch.cat(dps), wide(g.dtype))
        if factor is not None:
            dp.mul_(factor[:, None])
    return None if fused is None else g @ fused, dp


def forward(call: Call, step: Step) -> tuple[Tensor, Saved]:
    """``(out [T, N], what is saved)``."""
    layer, x = call.layer, step.x
    seed = rounding_seed(layer, x.dtype)
    # ρ divides by the base, which may cancel: a P that is folded into it is not rounded. Nor is the
    # P of a W' that is to be rounded once, stochastically.
    dtype = x.dtype if step.u_base is None and seed is None else step.u.dtype
    terms = Terms(*projections(call, step, dtype), step.delta_bias)
    frozen = (layer.weight, cast(layer.bias, x.dtype), layer.rows)
    keep = seed is None and plan.keeps_weight(call.watched)
    run = weight if call.watched else weight.body
    out, fused, *found = run(x, *frozen, terms, call.important, call.norm, keep, seed, call.impl)
    kept = fused if keep else None
    return out, (kept, x if step.keeps else None, layer.weight, layer.rows, *terms[:2], *found)


def backward(call: Call, g: Tensor, saved: Saved, needs: list[bool]) -> Gradients:
    """``(∂x, ∂P, ∂δb)``."""
    kept, x, w, rows, p, p_base, *found = saved
    run = weight_backward if call.watched else weight_backward.body
    wanted = needs if kept is None else [False, *needs[1:]]
    dx, *rest = run(g, x, w, rows, [p, p_base, None, None], found, call.norm, wanted, call.impl)
    return Gradients(g @ kept if kept is not None and needs[0] else dx, *rest)


__all__ = [
    "backward",
    "forward",
    "merged_weight",
    "normed_weight",
    "weight",
    "weight_backward",
]
