"""Types and small torch functions that all spaces use: a call of the api, terms, wide products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import absent, as_dtype, wide
from ..gpu import assumed
from ..layer import Layer
from ..shared import Total

Saved = Sequence[Tensor | None]
"""What a space keeps for its backward pass."""


class Call(NamedTuple):
    """How one adapted layer is run, forward and backward.

    Attributes:
        layer: what is not trained.
        packed: the layer's norm, of :func:`secura_kernels.norm.pack`.
        important: ``[N]`` bool, the channels that the layer's restraint acts on, or None.
        given: whether x is the base's output y0, bias included, rather than its input.
        watched: whether ops go through torch's dispatcher, for a compiler or a mode to see.
        impl: of :func:`secura_kernels.dispatch.resolve`.
        total: where ∂x is added up that other layers have a part in, or None.
        differentiates: whether a backward pass may follow: nothing is saved where none does. What
            the output is made through may not depend on it: re-entrant checkpointing runs a
            forward pass without gradient first, and then again with.
    """

    layer: Layer
    packed: str
    important: Tensor | None
    given: bool
    watched: bool
    impl: str | None
    total: Total | None = None
    differentiates: bool = False


class Step(NamedTuple):
    """The tensors of one forward pass.

    Attributes:
        x: ``[T, K]``, or y0 ``[T, N]``, in the compute dtype.
        u: ``U [m, m]`` of the change.
        u_base: ``U [m, m]`` of what was folded into the norm's base, or None.
        delta_bias: trainable bias ``[N]`` or None.
        z_scale: ``[T, m]`` (dropout) or None.
        z: ``x Rᵀ [T, m]`` where it is not to be read off y0, or None.
        needs_p: whether ∂P will be asked for.
    """

    x: Tensor
    u: Tensor
    u_base: Tensor | None
    delta_bias: Tensor | None
    z_scale: Tensor | None
    z: Tensor | None
    needs_p: bool


def rounding_seed(layer: Layer, dtype: torch.dtype) -> int | None:
    """The seed from which the layer's W' is rounded to ``dtype``, or None to nearest.

    Raises:
        ValueError: for fp16, to which nothing is rounded stochastically.
    """
    if layer.rounding_seed is None or dtype in (torch.float32, torch.float64):
        return None
    if dtype != torch.bfloat16:
        raise ValueError(
            f"stochastic rounding is to torch.bfloat16, not {dtype}: compute in bf16, or leave "
            "rounding_seed (stochastic_rounding of a config) out"
        )
    return layer.rounding_seed


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


def frozen(call: Call, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """``(W [N, K], b [N])`` of a layer in ``dtype``, W None where y0 is given, b where none is."""
    weight = None if call.given else call.layer.weight
    return as_dtype(weight, dtype), as_dtype(call.layer.bias, dtype)


def summed_bias(bias: Tensor | None, delta: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``b + δb`` in ``dtype``, rounded once; None where neither is there."""
    if bias is None and delta is None:
        return None
    if bias is None or delta is None:
        return as_dtype(delta if bias is None else bias, dtype)
    return (bias + delta).to(dtype)


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


def noise_key(seed: int) -> int:
    """The 31 bits by which a seed tells its noise from another's."""
    return seed * 0x9E3779B97F4A7C15 >> 16 & 0x7FFFFFFF


def noise(first: int, shape: torch.Size, key: int, device: torch.device) -> Tensor:
    """16 random bits an entry of ``[n, K]``, int32: a hash of its place and the key, no state.

    The place is ``row · K + column``, rows counted from ``first``. The same numbers as the kernels'
    (:func:`secura_kernels.ops.jit.noise`), for any part of a weight. The hash is "lowbias32"
    (C. Wellons, public domain): every bit of the place turns half of the bits.
    """
    n, k = shape
    rows = (torch.arange(first, first + n, device=device) * k).to(torch.int32)  # modulo 2³²
    bits = rows[:, None] + torch.arange(k, dtype=torch.int32, device=device)
    bits.bitwise_xor_(key)
    bits.bitwise_xor_(bits >> 16 & 0xFFFF).mul_(0x7FEB352D)
    bits.bitwise_xor_(bits >> 15 & 0x1FFFF).mul_(0x846CA68B - 2**32)
    return bits >> 16 & 0xFFFF


def round_stochastically(x: Tensor, seed: int, first: int = 0) -> Tensor:
    """``x [n, K]`` to a bf16 neighbour, up with the probability of the part that is cut off.

    Values that bf16 holds exactly stay, as do inf and NaN. ``first`` is the row of the whole weight
    that x begins with.
    """
    x = as_dtype(x, torch.float32)
    bits = x.view(torch.int32) + noise(first, x.shape, noise_key(seed), x.device)
    rounded = (bits >> 16 << 16).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def gather(y0: Tensor, bias: Tensor | None, rows: Tensor, z_scale: Tensor | None = None) -> Tensor:
    """``z [T, m] = (y0[:, rows] − b[rows]) · z_scale``, which is ``x Rᵀ`` scaled."""
    z = y0.index_select(1, rows)
    if bias is not None:
        z.sub_(bias[rows])
    return z if z_scale is None else z.mul_(z_scale)


def times_rows(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """``z = x Rᵀ [T, m]``, R being rows of ``weight [N, K]``, by a product of its own."""
    return x @ as_dtype(weight.index_select(0, rows), x.dtype).t()


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
    "frozen",
    "gather",
    "gradients_fake",
    "noise",
    "noise_key",
    "product_wide",
    "round_stochastically",
    "rounding_seed",
    "summed_bias",
    "times_rows",
]
