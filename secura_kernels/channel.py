"""Space ``channel``: one gain an output row, from thin products alone.

    ρ_i = ‖ΔW_i‖ / (‖W_base,i‖ + ε),   ‖ΔW_i‖² = P_i (R Rᵀ) P_iᵀ
    W'_i = share_i · (W_i + P_base,i R) + (1/M_i) P_i R      share = 2/M averaged, 1 gated

so the layer is the additive one of :mod:`secura_kernels.additive` with Q = share · P_base + P / M.
N·m² operations and no pass over W: ``gram = R Rᵀ`` and ``‖W_base,i‖`` are formed once a fold.
M is detached, so ∂P = ∂Q / M. Saved for backward: 1/M ``[N]`` in fp32 or wider, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_space
from .dispatch import absent, op, resolve, wide
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
    sigmoid_weight,
)


def row_norms(weight: Tensor, rows: Tensor, p_base: Tensor | None) -> tuple[Tensor, Tensor]:
    """What ``channel`` must know of the base: ``(gram [m, m], ‖W + P_base R‖ [N])``, fp32 or wider.

    Args:
        weight: ``W [N, K]``.
        rows: ``[m]`` int64.
        p_base: ``[N, m]``, what was folded, or None.
    """
    dtype = wide(weight.dtype)
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
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(Q [N, m], share [N] or None)`` of the additive layer.

    Args:
        p: ``P [N, m]``, once differentiable.
        p_base: ``[N, m]`` or None; no gradient.
        gram: ``R Rᵀ [m, m]``, of :func:`row_norms`.
        base_norms: ``‖W_base,i‖ [N]``, of :func:`row_norms`.
        options: the norm, ``norm="channel"``.
        restrain: the suppression, or None.
        impl: ``"auto"``, ``"triton"``, ``"reference"``, or None for what ``SECURA_IMPL`` says.

    Returns:
        Q in P's dtype, share in fp32 or wider; share is None where it would be 1 throughout.

    Raises:
        ValueError: where shapes do not fit, for options of another space, or for an unknown form
            or ``impl``.
        RuntimeError: for ``impl="triton"`` where no kernel can take ``p``.
    """
    n, m = p.shape
    if p_base is not None and p_base.shape != p.shape:
        raise ValueError(f"p_base {list(p_base.shape)} must be p's {list(p.shape)}")
    if gram.shape != (m, m) or base_norms.shape != (n,):
        raise ValueError(
            f"gram {list(gram.shape)} and base_norms {list(base_norms.shape)} must be "
            f"[{m}, {m}] and [{n}] beside p {[n, m]}"
        )
    check_space(options, "channel")
    form, combine = resolve_norm(options.norm, options.form, options.combine)
    norm = (form, combine, options.scale, options.eps, options.eps_relative)
    limits = (None, 0.0, 0.0, 0.0) if restrain is None else tuple(restrain)
    q, share = _ChannelProduct.apply(p, p_base, gram, base_norms, norm, limits, impl)
    return q, share if combine == "averaged" or restrain is not None else None


def _delta_norms(p: Tensor, gram: Tensor) -> Tensor:
    """``‖ΔW_i‖ [N]``: squares are of P over its row's largest entry and of R over its longest row.

    Of P and R as they are they overflow where ‖ΔW_i‖ itself is far from it.
    """
    if p.numel() == 0:
        return p.new_zeros(p.shape[0])
    tiny = torch.finfo(p.dtype).tiny
    largest, longest = p.abs().amax(1).clamp_min_(tiny), gram.diagonal().amax().clamp_min(tiny)
    p = p / largest[:, None]
    squares = (p * (p @ (gram / longest))).sum(1)
    return squares.clamp_min_(0).sqrt_().mul_(largest).mul_(longest.sqrt())


@op("channel_product")
def product_forward(
    p: Tensor,
    p_base: Tensor | None,
    gram: Tensor,
    base_norms: Tensor,
    form: str,
    combine: str,
    scale: float,
    eps: float,
    eps_relative: bool,
    important: Tensor | None,
    percent: float,
    edge: float,
    decay: float,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(Q [N, m], share [N] or empty, f/M [N])``."""
    restrain = None if important is None else Restrain(important, percent, edge, decay)
    base_norms = base_norms.to(wide(p.dtype))
    kernels = _kernels() if resolve(impl, p) == "triton" else None
    if kernels is not None and not (needs_peak(form) or eps_relative or restrain):
        q, share, inverse = kernels.channel_product(
            p, p_base, gram, base_norms, (eps, scale, 0.0), sigmoid_weight(form),
            combine == "averaged",
        )  # fmt: skip
        return q, absent(inverse) if share is None else share, inverse
    if kernels is not None:
        norms = kernels.delta_norms(p, gram)
    else:
        norms = _delta_norms(p.to(base_norms.dtype), gram.to(base_norms.dtype))
    epsilon = effective_eps(base_norms, eps, eps_relative)
    rho = relative_change(base_norms, norms, epsilon)
    peak = largest(rho) if needs_peak(form) else None
    slope, offset = coefficients(form, scale, peak, rho)
    factor = None
    if restrain is not None:
        factor = restrain_factor(gain(rho, slope, offset, form), restrain)
    if kernels is not None:
        q, share, inverse = kernels.channel_product(
            p, p_base, None, base_norms, (epsilon, slope, offset), sigmoid_weight(form),
            combine == "averaged", norms=norms, factor=factor,
        )  # fmt: skip
        return q, absent(inverse) if share is None else share, inverse
    m = gain(rho, slope, offset, form)
    share = base_share(m, combine)
    inverse = 1 / m
    if factor is not None:
        inverse = inverse * factor
        share = factor.to(inverse.dtype) if share is None else share * factor
    q = p * inverse[:, None]
    if p_base is not None:
        q = q + (p_base if share is None else share[:, None] * p_base)
    return q.to(p.dtype), absent(inverse) if share is None else share, inverse


@product_forward.register_fake
def _product_forward_fake(
    p, p_base, gram, base_norms, form, combine, scale, eps, eps_relative, important, percent,
    edge, decay, impl,
):  # fmt: skip
    inverse = p.new_empty(p.shape[0], dtype=wide(p.dtype))
    shared = combine == "averaged" or important is not None
    share = torch.empty_like(inverse) if shared else absent(inverse)
    return p.new_empty(p.shape), share, inverse


def _kernels() -> Any:
    from .kernels import channel

    return channel


class _ChannelProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p, p_base, gram, base_norms, norm, limits, impl) -> tuple[Tensor, Tensor]:
        q, share, inverse = product_forward(p, p_base, gram, base_norms, *norm, *limits, impl)
        ctx.save_for_backward(inverse)
        ctx.mark_non_differentiable(share)
        return q, share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, _: Tensor) -> tuple:
        (inverse,) = ctx.saved_tensors
        dp = (dq * inverse[:, None]).to(dq.dtype)
        return dp, None, None, None, None, None, None


__all__ = ["channel_product", "row_norms"]
