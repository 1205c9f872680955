"""A frozen dense layer and S-MagNorm on its output, in one op: no ∂y0 where that is the dearer way.

    y0 = x Wᵀ + b,   out = S-MagNorm(y0)          ∂x = ∂y0 W = ∂base W + h R,   R = W[rows]

with everything else as in :mod:`secura_kernels.activation`: M, Δ, ∂P, ∂δb, and h ``[T, m]``, what
the columns ``rows`` of ∂y0 have beyond ∂base.

| tensor    | shape             | dtype                          |
|-----------|-------------------|--------------------------------|
| x, y0, out| [..., K] [..., N] | compute dtype (autocast's)     |
| W         | [N, K]            | compute dtype                  |
| P, P_base | [N, m]            | fp32 in, cast once; ∂P in fp32 |

Saved for backward: y0, or 1/M in 8 bits, as ``save`` says; z ``[T, m]``, P, scalars and the frozen
W itself; never x. In 8-bit mode ``out`` is written over y0.

Bytes of the backward pass, in units of T·N elements, κ = K / N, beside the frozen layer's product:

| ∂x                                  | moves  | 8bit, 16-bit dtypes | :func:`adds_thin` takes   |
|-------------------------------------|--------|---------------------|---------------------------|
| ∂y0 W: g, y0 in, ∂y0 out            | 3      | 2½                  | κ > 1, averaged, restrain |
| h R + g W: g, y0 in, h R out and in | 2 + 2κ | 1½ + 2κ             | κ ≤ 1 and gated           |

h R comes first and g W is added to it, so that the matrix product reads its addend while it
computes, and what is rounded once more is the small term. dΔ = g/M, for ∂P, stays in the L2 cache
(:mod:`secura_kernels.kernels.activation_backward`). With h R neither a ∂y0 nor a dΔ of [T, N] is
ever allocated.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import checked, gradients, normed, normed_fake
from .checks import check_input, check_operands
from .dispatch import absent, compute_dtype, op, wide
from .gain import NormOptions, Restrain, known_scalars


def activation_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    p: Tensor,
    options: NormOptions,
    *,
    p_base: Tensor | None = None,
    delta_bias: Tensor | None = None,
    z_scale: Tensor | None = None,
    restrain: Restrain | None = None,
    save: str = "recompute",
    impl: str | None = None,
) -> Tensor:
    """A frozen linear layer, and S-MagNorm between its output and the adapter's change of it.

    Args:
        x: ``[..., K]``.
        weight: ``W [N, K]``, frozen, any strides.
        bias: ``b [N]``, frozen, or None.
        rows: ``[m]`` int64, distinct, the rows of W that are R.
        p: ``P [N, m]``.
        options: the norm, ``norm="activation"``.
        p_base: ``[N, m]``, what was folded into the base, or None.
        delta_bias: trainable bias ``[N]``, part of Δ, or None.
        z_scale: ``[..., m]`` (dropout, Δ alone) or None.
        restrain: the suppression, or None.
        save: ``"recompute"`` keeps y0 for the backward pass, ``"8bit"`` one byte of 1/M an element.
        impl: ``"auto"``, ``"triton"``, ``"reference"``, or None for what ``SECURA_IMPL`` says.

    Returns:
        ``[..., N]`` in the compute dtype. Gradients reach x, p and delta_bias, once differentiable.

    Raises:
        TypeError: for an x of integers or complex numbers.
        ValueError: where shapes do not fit, for options of another space, or for an unknown form,
            ``save`` or ``impl``.
        RuntimeError: for ``impl="triton"`` where no kernel can take ``x``.
    """
    n, k = weight.shape
    check_input(x, weight)
    check_operands(
        x.shape[:-1], n, rows, p=p, bias=bias, p_base=p_base, delta_bias=delta_bias,
        z_scale=z_scale, restrain=restrain,
    )  # fmt: skip
    options = checked(options, save)
    dtype = compute_dtype(x)
    flat = x.reshape(math.prod(x.shape[:-1]), k).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    z_scale = None if z_scale is None else z_scale.reshape(flat.shape[0], rows.numel())
    out = _ActivationLinear.apply(
        flat, weight.to(dtype), bias, rows, p, p_base, delta_bias, z_scale, options, restrain, save,
        impl,
    )  # fmt: skip
    return out.view(*x.shape[:-1], n)


def adds_thin(n: int, k: int, combine: str, factor: Tensor | None) -> bool:
    """Whether ∂x is h R + g W rather than ∂y0 W.

    Only where ∂base is g itself: gated, without the restraint's ``factor``. By elements the one
    moves 2 T K and the other T N, but ∂y0 also has m scattered columns to be added in: at K = N an
    H100 took 520 µs the one way and 560 the other, both with the product of 343.
    """
    return combine == "gated" and factor is None and k <= n


@op("activation_linear")
def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    important: Tensor | None,
    restrain: list[float],
    form: str,
    combine: str,
    scale: float,
    eps: float,
    eps_relative: bool,
    keep: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(y0 [T, N], out, z, kept, [ε, slope, offset], factor)`` of flat inputs in one dtype.

    y0 is empty with ``keep``; the rest is what ``activation.activation_forward`` says.
    """
    options = NormOptions("activation", form, combine, scale, eps, eps_relative)
    limits = None if important is None else Restrain(important, *restrain)
    y0 = F.linear(x, weight, bias)
    parts = normed(
        y0, bias, rows, p, p_base, delta_bias, z_scale, options, limits, keep, impl, in_place=keep
    )
    return absent(x) if keep else y0, *parts


@linear_forward.register_fake
def _linear_forward_fake(
    x, weight, bias, rows, p, p_base, delta_bias, z_scale, important, restrain, form, combine,
    scale, eps, eps_relative, keep, impl,
):  # fmt: skip
    y0 = x.new_empty(x.shape[0], weight.shape[0])
    options = NormOptions("activation", form, combine, scale, eps, eps_relative)
    return absent(x) if keep else y0, *normed_fake(y0, rows, options, important, keep)


@op("activation_linear_backward")
def linear_backward(
    g: Tensor,
    y0: Tensor | None,
    kept: Tensor | None,
    z: Tensor,
    weight: Tensor,
    rows: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    scalars: Tensor | None,
    factor: Tensor | None,
    known: list[float],
    form: str,
    combine: str,
    needs: list[bool],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(∂x, ∂P, ∂δb)``, those not needed empty; ∂P and ∂δb in fp32 or wider.

    The rest is what ``activation.activation_backward`` says.
    """
    n, k = weight.shape
    thin = needs[0] and adds_thin(n, k, combine, factor)
    change, dp, dbias = gradients(
        g, y0, kept, z, rows, p, p_base, delta_bias, z_scale, scalars, factor, known, form, combine,
        needs, impl=impl, thin=thin,
    )  # fmt: skip
    if thin:
        dx = (change @ weight.index_select(0, rows)).addmm_(g, weight)
    else:
        dx = change @ weight if needs[0] else absent(g)
    return dx, dp, dbias


@linear_backward.register_fake
def _linear_backward_fake(
    g, y0, kept, z, weight, rows, p, p_base, delta_bias, z_scale, scalars, factor, known, form,
    combine, needs, impl,
):  # fmt: skip
    dtype = wide(g.dtype)
    return (
        g.new_empty(g.shape[0], weight.shape[1]) if needs[0] else absent(g),
        g.new_empty(p.shape, dtype=dtype) if needs[1] else absent(g, dtype),
        g.new_empty(g.shape[1], dtype=dtype) if needs[2] else absent(g, dtype),
    )


class _ActivationLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, weight, bias, rows, p, p_base, delta_bias, z_scale, options, restrain, save,
        impl,
    ) -> Tensor:  # fmt: skip
        ctx.p_dtype, ctx.bias_dtype = p.dtype, None if delta_bias is None else delta_bias.dtype
        ctx.how = list(known_scalars(options) or ()), options.form, options.combine
        ctx.impl = impl
        p = p.to(x.dtype)
        p_base = None if p_base is None else p_base.to(x.dtype)
        important, *limits = (None,) if restrain is None else restrain
        keep = save == "8bit"
        y0, out, z, kept, scalars, factor = linear_forward(
            x, weight, bias, rows, p, p_base, delta_bias, z_scale, important,
            [float(limit) for limit in limits], options.form, options.combine, options.scale,
            options.eps, options.eps_relative, keep, impl,
        )  # fmt: skip
        y0, kept, delta_bias = (None, kept, None) if keep else (y0, None, delta_bias)
        factor = None if restrain is None else factor
        scalars = None if ctx.how[0] else scalars
        ctx.save_for_backward(
            y0, kept, z, weight, rows, p, p_base, delta_bias, z_scale, scalars, factor
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        needs = [ctx.needs_input_grad[index] for index in (0, 4, 6)]
        dx, dp, dbias = linear_backward(g, *ctx.saved_tensors, *ctx.how, needs, ctx.impl)
        return (
            dx if needs[0] else None, None, None, None,
            dp.to(ctx.p_dtype) if needs[1] else None, None,
            dbias.to(ctx.bias_dtype) if needs[2] else None, *[None] * 5,
        )  # fmt: skip


__all__ = ["activation_linear", "adds_thin"]
