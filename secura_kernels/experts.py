"""Fused experts: the weights W' [E, N, K] of a whole stack at once, differentiable in the cores.

    W'_e = S-MagNorm of W_e + P_base,e R_e and its change P_e R_e      P_e = C_e U_e

Each expert is a layer of its own, with rows, columns and largest ρ of its own; every product is one
batched product over all of them. The routed product of a mixture of experts takes weights and gives
no y0 of one expert, so there is no z to gather, and no space ``activation``. Saved for backward:
thin tensors; with ``weight`` M ``[E, N, K]`` too, in fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import as_dtype, wide, without_autocast
from .norm import (
    NO_WEIGHT,
    Norm,
    NormOptions,
    coefficients,
    combined,
    complete,
    gain,
    relative_change,
    scale_of_base,
)
from .ops.channel.op import delta_norms


def expert_weights(
    weight: Tensor,
    rows: Tensor,
    cols: Tensor,
    u: Tensor,
    options: NormOptions,
    *,
    u_base: Tensor | None = None,
) -> Tensor:
    """Compute ``W' [E, N, K]`` of E adapted experts, in W's dtype.

    Args:
        weight: ``W [E, N, K]``, frozen, fp16 to fp64, any strides.
        rows: ``[E, m]`` int64, R_e = W_e[rows_e].
        cols: ``[E, m]`` int64, C_e = W_e[:, cols_e].
        u: ``[E, m, m]``, fp32 or wider, s · A B; gradients reach it.
        options: the norm.
        u_base: ``[E, m, m]``, the core of the norm's base, or None.

    Raises:
        ValueError: for ``norm="activation"``.
    """
    if options.norm == "activation":
        raise ValueError(NO_WEIGHT)
    norm = complete(options)
    _, n, k = weight.shape
    dtype = wide(weight.dtype)
    with without_autocast(weight.device.type):
        r = weight.gather(1, rows[:, :, None].expand(-1, -1, k))
        c = weight.gather(2, cols[:, None, :].expand(-1, n, -1)).to(dtype)
        p, base = c @ u.to(dtype), weight
        if u_base is not None:
            base = _plus(weight, c @ u_base.to(dtype), r)
        if norm.space == "none":
            return _plus(base, p, r)
        if norm.space == "channel":
            with torch.no_grad():
                wide_r = r.to(dtype)
                change = delta_norms(p, wide_r @ wide_r.mT)
                norms = torch.linalg.vector_norm(base, dim=2, dtype=dtype)
                gains = _gain(norms[..., None], change[..., None], norm)
                base_scale = scale_of_base(gains, norm)
            return _plus(
                base if base_scale is None else as_dtype(base_scale * base, base.dtype),
                p / gains,
                r,
            )
        base, delta = base.to(dtype), p @ r.to(dtype)
        with torch.no_grad():
            gains = _gain(base, delta, norm)
        return combined(base, delta, gains, scale_of_base(gains, norm)).to(weight.dtype)


def _plus(base: Tensor, p: Tensor, r: Tensor) -> Tensor:
    """``base + P R``: fp32 within, P and the sum each rounded once to the base's dtype."""
    return torch.baddbmm(base, p.to(base.dtype), r)


def _gain(base: Tensor, delta: Tensor, norm: Norm) -> Tensor:
    """M of each expert's own ρ, as ``base`` and ``delta``, ``[E, N, K]`` or ``[E, N, 1]``."""
    own = (-2, -1)
    eps = torch.full((), norm.eps, dtype=base.dtype, device=base.device)
    if norm.eps_relative:
        count = math.prod(base.shape[1:])
        eps = eps * torch.linalg.vector_norm(base, dim=own, keepdim=True) / math.sqrt(count)
    rho = relative_change(base, delta, eps)
    peak = rho.amax(own, keepdim=True) if norm.needs_peak else None
    return gain(rho, *coefficients(norm, peak, rho), norm)


__all__ = ["expert_weights"]
