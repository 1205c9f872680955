"""What the spaces share: a call as the door hands it on, the terms of base and Δ, wide products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import absent, wide
from ..gpu import assumed
from ..layer import Layer

Saved = Sequence[Tensor | None]
"""What a space keeps for its backward pass."""


class Call(NamedTuple):
    """How one adapted layer is run, forward and backward.

    Attributes:
        layer: what is not trained.
        norm: the layer's norm, of :func:`secura_kernels.norm.pack`.
        important: ``[N]`` bool, the channels that the layer's restraint acts on, or None.
        given: whether x is the base's output y0, bias included, rather than its input.
        watched: whether ops go through torch's dispatcher, for a compiler or a mode to see.
        impl: of :func:`secura_kernels.dispatch.resolve`.
    """

    layer: Layer
    norm: str
    important: Tensor | None
    given: bool
    watched: bool
    impl: str | None


class Step(NamedTuple):
    """The tensors of one forward pass.

    Attributes:
        x: ``[T, K]``, or y0 ``[T, N]``, in the compute dtype.
        u: ``U [m, m]`` of the change.
        u_base: ``U [m, m]`` of what was folded into the norm's base, or None.
        delta_bias: trainable bias ``[N]`` or None.
        z_scale: ``[T, m]`` (dropout) or None.
        keeps: whether ∂P will be asked for.
    """

    x: Tensor
    u: Tensor
    u_base: Tensor | None
    delta_bias: Tensor | None
    z_scale: Tensor | None
    keeps: bool


class Gradients(NamedTuple):
    """What a space's backward pass ends with; those not asked for may be empty.

    Attributes:
        x: ``∂x [T, K]`` or ``∂y0 [T, N]``.
        p: ``∂P [N, m]``, fp32 or wider, but for ``row_scale``.
        delta_bias: ``∂δb [N]``.
        row_scale: ``[N]``, what ∂P's rows are yet to be multiplied by, or None.
    """

    x: Tensor
    p: Tensor
    delta_bias: Tensor
    row_scale: Tensor | None = None


class Terms(NamedTuple):
    """The thin operands of base and Δ, as ``Tensor?[]`` in a schema; ``Terms(*list)`` names them.

    Attributes:
        p: ``P [N, m]``.
        p_base: ``P_base [N, m]``, what was folded into the base, or None.
        delta_bias: ``δb [N]`` or None.
        z_scale: ``[T, m]`` or None.
    """

    p: Tensor
    p_base: Tensor | None = None
    delta_bias: Tensor | None = None
    z_scale: Tensor | None = None


class Measured(NamedTuple):
    """What a forward pass found over whole tensors, as ``Tensor[]`` in a schema.

    Attributes:
        scalars: ``[ε, slope, offset]``, fp32 or wider; empty where the options alone decide them.
        factor: ``f [N]`` fp32 of the restraint; empty without one.
    """

    scalars: Tensor
    factor: Tensor


def measured(like: Tensor, scalars: Tensor | None, factor: Tensor | None) -> Measured:
    """:class:`Measured`, with empty tensors for None."""
    return Measured(
        absent(like, wide(like.dtype)) if scalars is None else scalars,
        absent(like, torch.float32) if factor is None else factor,
    )


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``tensor`` in ``dtype``, or None."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def frozen(call: Call, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """``(W [N, K], b [N])`` of a layer in ``dtype``, W None where y0 is given, b where none is."""
    weight, bias = None if call.given else call.layer.weight, call.layer.bias
    if weight is not None and weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    return weight, bias


def product_wide(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` in fp32 or wider: on CUDA the fp32 sums of a 16-bit product are never rounded.

    ``out``, if given, is written over; of fp32 or wider, with rows without gaps.
    """
    dtype = wide(a.dtype)
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    on_gpu = a.is_cuda or (a.is_meta and assumed() is not None)
    if on_gpu and a.numel() and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    product = (a @ b).to(dtype)
    return product if out is None else out.copy_(product)


def gather(y0: Tensor, bias: Tensor | None, rows: Tensor, z_scale: Tensor | None = None) -> Tensor:
    """``z [T, m] = (y0[:, rows] − b[rows]) · z_scale``, which is ``x Rᵀ`` scaled."""
    z = y0.index_select(1, rows)
    if bias is not None:
        z.sub_(bias[rows])
    return z if z_scale is None else z.mul_(z_scale)


def gradients_fake(
    g: Tensor, weight: Tensor | None, p: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """``(∂x [T, K] or without weight ∂y0 [T, N], ∂P [N, m], ∂δb [N])`` of a backward op."""
    dtype = wide(g.dtype)
    first = g.shape if weight is None else (g.shape[0], weight.shape[1])
    return (
        g.new_empty(first) if needs[0] else absent(g),
        g.new_empty(p.shape, dtype=dtype) if needs[1] else absent(g, dtype),
        g.new_empty(g.shape[1], dtype=dtype) if needs[2] else absent(g, dtype),
    )


__all__ = [
    "Call",
    "Gradients",
    "Measured",
    "Saved",
    "Step",
    "Terms",
    "cast",
    "frozen",
    "gather",
    "gradients_fake",
    "measured",
    "product_wide",
]
