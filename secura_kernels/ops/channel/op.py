"""Space ``channel``: one gain an output row, from thin products alone.

    ρ_i = ‖ΔW_i‖ / (‖W_base,i‖ + ε),   ‖ΔW_i‖² = P_i (R Rᵀ) P_iᵀ
    W'_i = base_scale_i · (W_i + P_base,i R) + (1/M_i) P_i R      base_scale = 2/M averaged, 1 gated

so the layer is the additive one of :mod:`secura_kernels.ops.lowrank.op` with
Q = base_scale · P_base + P / M. N·m² operations and no pass over W: ``gram = R Rᵀ`` and
``‖W_base,i‖`` are formed once a fold. M is detached, so ∂P = ∂Q / M. Saved for backward beside what
the additive layer saves: 1/M ``[N]`` in fp32 or wider.

Dropout acts on the change alone. Beside something folded Q is then ``[P / M, base_scale · P_base]
[N, 2m]``, of z twice, once with the mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch import absent, as_dtype, kernels, op, wide, without_autocast
from ...held import once
from ...layer import Layer
from ...norm import (
    coefficients,
    effective_eps,
    gain,
    largest,
    relative_change,
    restrain_factor,
    scale_of_base,
    unpack,
)
from ..common import Call, Gradients, Saved, Step, rounding_seed
from ..lowrank import op as lowrank
from ..project.op import project, projections

_CHUNK_ROWS = 1024


@torch.no_grad()
def with_norms(layer: Layer) -> Layer:
    """Fill in ``gram = R Rᵀ [m, m]`` and ``base_norms = ‖W_base,i‖ [N]``, which ``channel`` needs.

    Once, and again after a fold into the base, or a step of a weight that is trained. No gradient.

    Args:
        layer: with its ``weight``.

    Returns:
        The layer with both, in fp32 or wider, on the weight's device.

    Raises:
        ValueError: the layer has no weight.
    """
    weight, core, p_base = layer.weight, layer.core, None
    if weight is None:
        raise ValueError(
            "the layer has no weight, of which norms are taken: call with_norms before it is left "
            "out"
        )
    if core is not None and layer.core_is_base:
        source, cols = (weight, layer.cols) if layer.columns is None else (layer.columns, None)
        u = as_dtype(core, wide(core.dtype))
        p_base = project(source, cols, u, u.dtype, None)
    gram, base_norms = _row_norms(weight, layer.rows, p_base)
    return layer._replace(gram=gram, base_norms=base_norms)


def _row_norms(weight: Tensor, rows: Tensor, p_base: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(R Rᵀ [m, m], ‖W + P_base R‖ [N])`` of ``W [N, K]``, rows ``[m]`` and P_base ``[N, m]``."""
    dtype = wide(weight.dtype)
    with without_autocast(weight.device.type):
        r = weight.index_select(0, rows).to(dtype)
        gram = r @ r.t()
        if p_base is None:
            return gram, torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
        norms = []
        for part, p in zip(weight.split(_CHUNK_ROWS), p_base.split(_CHUNK_ROWS), strict=True):
            folded = torch.addmm(part.to(dtype), p.to(dtype), r)
            norms.append(torch.linalg.vector_norm(folded, dim=1))
        return gram, torch.cat(norms)


def delta_norms(p: Tensor, gram: Tensor) -> Tensor:
    """``‖ΔW_i‖ [..., N]`` of ``P [..., N, m]`` and ``gram [..., m, m]``.

    Each row of P is divided by the sum of its absolute values before it is squared: so no square is
    over gram's largest entry, and none overflows.
    """
    if p.numel() == 0:
        return p.new_zeros(p.shape[:-1])
    scale = p.abs().sum(-1, keepdim=True).clamp_min_(torch.finfo(p.dtype).tiny)
    p = p / scale
    squares = (p @ gram).mul_(p).sum(-1, keepdim=True)
    return squares.clamp_min_(0).sqrt_().mul_(scale).squeeze(-1)


@op("channel")
def channel(
    p: Tensor,
    p_base: Tensor | None,
    gram: Tensor,
    base_norms: Tensor,
    important: Tensor | None,
    packed: str,
    dtype: torch.dtype,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(Q [N, m], base_scale [N], f/M [N])``; base_scale is empty where it would be 1 throughout.

    Args:
        p: ``P [N, m]``.
        p_base: ``[N, m]`` or None.
        gram: ``R Rᵀ [m, m]``, of :func:`with_norms`.
        base_norms: ``‖W_base,i‖ [N]``, of :func:`with_norms`.
        important: ``[N]`` bool of the restraint, or None.
        packed: the norm, of :func:`secura_kernels.norm.pack`.
        dtype: of Q, rounded to once.
        impl: of :func:`secura_kernels.dispatch.resolve`.
    """
    norm = unpack(packed)
    base_norms = as_dtype(base_norms, wide(p.dtype))
    triton = kernels(__package__, impl, p)
    if triton is not None and important is None and (known := norm.known):
        return triton.channel_product(p, p_base, gram, base_norms, known, norm, dtype)
    if triton is not None:
        norms = triton.delta_norms(p, gram)
    else:
        norms = delta_norms(as_dtype(p, base_norms.dtype), as_dtype(gram, base_norms.dtype))
    epsilon: Tensor | float
    slope: Tensor | float
    offset: Tensor | float
    if known := norm.known:
        epsilon, slope, offset = known
        rho = norms / (base_norms + epsilon)
    else:
        epsilon = effective_eps(base_norms, norm)
        rho = relative_change(base_norms, norms, epsilon)
        slope, offset = coefficients(norm, largest(rho) if norm.needs_peak else None, rho)
    factor = None
    if triton is None or important is not None:
        gains = gain(rho, slope, offset, norm)
        factor = restrain_factor((gains,), gains.numel(), important, norm)
    if triton is not None:
        scalars = (epsilon, slope, offset)
        of_rows = (norms, factor)
        return triton.channel_product(p, p_base, None, base_norms, scalars, norm, dtype, *of_rows)
    base_scale = scale_of_base(gains, norm)
    inverse = gains.reciprocal()
    if factor is not None:
        inverse = inverse * factor
        base_scale = factor.to(inverse.dtype) if base_scale is None else base_scale * factor
    q = p * inverse.unsqueeze(1)
    if p_base is not None:
        q = q + (p_base if base_scale is None else base_scale.unsqueeze(1) * p_base)
    return as_dtype(q, dtype), absent(inverse) if base_scale is None else base_scale, inverse


@channel.register_fake
def _channel_fake(p: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    inverse = p.new_empty(p.shape[0], dtype=wide(p.dtype))
    *_, important, packed, dtype, _ = rest
    shared = unpack(packed).averaged or important is not None
    q = p.new_empty(p.shape, dtype=dtype)
    return q, torch.empty_like(inverse) if shared else absent(inverse), inverse


def product(
    call: Call, p: Tensor, p_base: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(Q [N, m] in dtype, base_scale [N] or None, f/M [N])`` of a layer."""
    layer = call.layer
    run = channel if call.watched else channel.body
    norms = (layer.gram, layer.base_norms)
    q, base_scale, inverse = run(p, p_base, *norms, call.important, call.packed, dtype, call.impl)
    shared = layer.options.combine == "averaged" or call.important is not None
    return q, base_scale if shared else None, inverse


def forward(call: Call, step: Step) -> tuple[Tensor, Saved]:
    """``(out [T, N], what is saved)``."""
    seed = rounding_seed(call.layer, step.x.dtype)
    wanted = step.x.dtype if seed is None else step.u.dtype
    name, make = "Q", _product
    if step.z_scale is not None and step.u_base is not None:
        rows = call.layer.rows
        call = call._replace(layer=call.layer._replace(rows=torch.cat((rows, rows))))
        whole = torch.ones_like(step.z_scale)
        z = None if step.z is None else torch.cat((step.z, step.z), 1)
        step = step._replace(z_scale=torch.cat((step.z_scale, whole), 1), z=z)
        name, make = "Q of z twice", _products_apart
    q, base_scale, inverse = once(call.layer.held, (name, wanted), make, call, step, wanted)
    out, saved = lowrank.add(call, step, q, base_scale, seed)
    return out, (*saved, inverse)


def _product(call: Call, step: Step, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    p, p_base = projections(call, step.u, step.u_base, step.u.dtype)
    return product(call, p, p_base, dtype)


def _products_apart(
    call: Call, step: Step, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As :func:`product`, but Q ``[N, 2m]``: first of what is trained, then of what was folded."""
    p, p_base = projections(call, step.u, step.u_base, step.u.dtype)
    assert p_base is not None
    q, base_scale, inverse = product(call, p, None, dtype)
    folded = p_base if base_scale is None else base_scale.unsqueeze(1) * p_base
    return torch.cat((q, as_dtype(folded, dtype)), 1), base_scale, inverse


def backward(
    call: Call, g: Tensor, saved: Saved, needs: list[bool], total: Tensor | None
) -> Gradients:
    """Those of ``(x or y0, P, δb)``; ∂P is ∂Q with its rows yet to be multiplied by f/M."""
    *saved_by_add, inverse = saved
    x, p, delta_bias, _ = lowrank.backward(call, g, saved_by_add, needs, total)
    if (m := call.layer.rows.shape[0]) < p.shape[-1]:  # of z twice
        p = p[:, :m].contiguous()
    return Gradients(x, p, delta_bias, inverse)


__all__ = [
    "backward",
    "channel",
    "delta_norms",
    "forward",
    "product",
    "with_norms",
]
