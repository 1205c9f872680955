"""The space ``weight`` in plain torch: W' and ∂P in chunks of W's rows.

Nothing but W' is ever whole. A chunk is at most ``WORKSPACE_MIB``, on a CPU ``CACHE_MIB``: what its
cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...dispatch import as_dtype, exporting_to_onnx, wide
from ...norm import (
    Norm,
    coefficients,
    combined,
    effective_eps,
    gain,
    relative_change,
    restrain_factor,
    scale_of_base,
)
from ..common import round_stochastically

WORKSPACE_MIB = 8
CACHE_MIB = 0.5

Found = tuple[Tensor, Tensor | None]
"""``([ε, slope, offset], f [N] or None)``: the global part of the norm."""


class Chunks:
    """Yields ``(rows of W as a slice, base, Δ)``, in fp32 or wider, to be read alone.

    Chunks are made anew for each pass over W. If W is a single chunk, it and its ρ are kept for the
    next pass, and its slice is None.
    """

    Chunk = tuple[slice | None, Tensor, Tensor]

    def __init__(self, w: Tensor, rows: Tensor, p: Tensor, p_base: Tensor | None) -> None:
        self.w, self.dtype = w, wide(torch.promote_types(w.dtype, p.dtype))
        self.p, self.p_base = as_dtype(p, self.dtype), as_dtype(p_base, self.dtype)
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


def measure(chunks: Chunks, important: Tensor | None, norm: Norm) -> Found:
    """The global part of the norm in plain torch."""
    w = chunks.w
    eps, slope, offset = _coefficients(chunks, norm)
    scalars = torch.stack([as_dtype(eps, slope.dtype), slope, offset])
    parts = chunks if w.numel() else ()
    gains = (_gain(chunks, base, delta, scalars, norm) for _, base, delta in parts)
    return scalars, restrain_factor(gains, w.numel(), important, norm)


def _coefficients(chunks: Chunks, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """``(ε, slope, offset)``, 0-dim."""
    w = chunks.w
    if chunks.p_base is not None and norm.eps_relative and w.numel():
        square = w.new_zeros((), dtype=chunks.dtype)
        for _, base, _ in chunks:
            square += base.square().sum()
        eps = norm.eps * (square / w.numel()).sqrt()
    else:
        eps = effective_eps(w, norm)
    peak = None
    if norm.needs_peak:
        parts = chunks if w.numel() else ()
        peaks = [chunks.change(base, delta, eps).max() for _, base, delta in parts]
        peak = eps.new_zeros(()) if not peaks else peaks[0]
        if len(peaks) > 1:
            peak = torch.stack(peaks).max()
    return eps, *coefficients(norm, peak, w)


def _gain(chunks: Chunks, base: Tensor, delta: Tensor, scalars: Tensor, norm: Norm) -> Tensor:
    eps, slope, offset = scalars.unbind()
    return gain(chunks.change(base, delta, eps), slope, offset, norm)


def _write_normed(
    fused: Tensor,
    chunk: Chunks.Chunk,
    gains: Tensor,
    factor: Tensor | None,
    norm: Norm,
    seed: int | None = None,
    in_place: bool = True,
) -> None:
    """Write W' of one chunk over its rows of ``fused``, formed there where ``in_place`` allows."""
    part, base, delta = chunk
    out = fused if part is None else fused[part]
    exact = in_place and out.dtype == base.dtype and seed is None
    normed = combined(base, delta, gains, scale_of_base(gains, norm), out=out if exact else None)
    if factor is not None:
        normed.mul_((factor if part is None else factor[part])[:, None])
    if not exact:
        first = 0 if part is None else part.start or 0
        out.copy_(normed if seed is None else round_stochastically(normed, seed, first))


def fused(
    chunks: Chunks, found: Found, norm: Norm, dtype: torch.dtype, seed: int | None = None
) -> Tensor:
    """W' ``[N, K]`` in ``dtype`` and W's layout, in plain torch."""
    scalars, factor = found
    fused = torch.empty_like(chunks.w, dtype=dtype)
    in_place = not exporting_to_onnx()  # an export runs under autograd, which takes no out=
    for chunk in chunks:
        gains = _gain(chunks, *chunk[1:], scalars, norm)
        _write_normed(fused, chunk, gains, factor, norm, seed, in_place)
    return fused


def backward(
    g: Tensor, x: Tensor | None, chunks: Chunks, found: Found, norm: Norm, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``(W', of which ∂x is made, ∂P)`` in plain torch, with one look at the gain for both.

    W' where ∂x is needed, ∂P where x is given.
    """
    scalars, factor = found
    fused = torch.empty_like(chunks.w, dtype=g.dtype) if needs_x else None
    dps = []
    for chunk in chunks:
        part, base, delta = chunk
        gains = _gain(chunks, base, delta, scalars, norm)
        if fused is not None:
            _write_normed(fused, chunk, gains, factor, norm)
        if x is not None:
            gx = (g if part is None else g[:, part]).t() @ x
            dps.append(as_dtype(gx, base.dtype).div_(gains) @ chunks.r.t())
    if not dps:
        return fused, None
    dp = dps[0] if len(dps) == 1 else torch.cat(dps)
    return fused, dp if factor is None else dp.mul_(factor[:, None])


__all__ = ["Chunks", "Found", "backward", "fused", "measure", "rows_at_once"]
