"""Space ``channel``: one gain an output row, from thin products alone.

    ρ_i = ‖ΔW_i‖ / (‖W_base,i‖ + ε),   ‖ΔW_i‖² = P_i (R Rᵀ) P_iᵀ
    W'_i = share_i · (W_i + P_base,i R) + (1/M_i) P_i R      share = 2/M averaged, 1 gated

so the layer is the additive one of :mod:`secura_kernels.additive` with Q = share · P_base + P / M.
N·m² operations and no pass over W: ``gram = R Rᵀ`` and ``‖W_base,i‖`` are formed once a fold.
Everything is plain torch on ``[N, m]`` and ``[N]`` tensors; M is detached, so ∂P = ∂Q / M.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def row_norms(weight: Tensor, rows: Tensor, p_base: Tensor | None) -> tuple[Tensor, Tensor]:
    """What ``channel`` must know of the base: ``(gram [m, m], ‖W + P_base R‖ [N])``, fp32 or wider.

    Args:
        weight: ``W [N, K]``.
        rows: ``[m]`` int64.
        p_base: ``[N, m]``, what was folded, or None.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    r = weight.index_select(0, rows).to(dtype)
    gram = r @ r.t()
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
    if p_base is not None:
        p_base = p_base.to(dtype)
        cross = (weight @ r.t().to(weight.dtype)).to(dtype)
        squares = squares + 2 * (p_base * cross).sum(1) + (p_base * (p_base @ gram)).sum(1)
    return gram, squares.clamp_min(0).sqrt()


def channel_product(
    p: Tensor,
    p_base: Tensor | None,
    gram: Tensor,
    base_norms: Tensor,
    options: NormOptions,
    restrain: Restrain | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(Q [N, m], share [N] or None)`` of the additive layer.

    Args:
        p: ``P [N, m]``, differentiable.
        p_base: ``[N, m]`` or None.
        gram: ``R Rᵀ [m, m]``.
        base_norms: ``‖W_base,i‖ [N]``.
        options: the norm, ``norm="channel"``.
        restrain: the suppression, or None.
    """
    form, combine = resolve_norm(options.norm, options.form, options.combine)
    with torch.no_grad(), torch.autocast(p.device.type, enabled=False):
        delta_norms = (p * (p @ gram.to(p.dtype))).sum(1).clamp_min(0).sqrt()
        eps = effective_eps(base_norms, options.eps, options.eps_relative)
        rho = relative_change(base_norms.to(p.dtype), delta_norms, eps)
        peak = largest(rho) if needs_peak(form) else None
        slope, offset = coefficients(form, options.scale, peak, rho)
        m = gain(rho, slope, offset, form)
        factor = restrain_factor(m, restrain)
        share = base_share(m, combine)
        if factor is not None:
            share = factor if share is None else share * factor
            m = m / factor
    q = p / m[:, None]
    if p_base is not None:
        q = q + (p_base if share is None else share[:, None] * p_base)
    return q, share


__all__ = ["channel_product", "row_norms"]
