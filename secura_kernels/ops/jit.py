"""What every kernel shares: the gain, the dot product, rounding and offsets, each once.

Functions that run within a kernel; what its launcher does before is in
:mod:`secura_kernels.ops.operands`. Formulas: :mod:`secura_kernels.norm`.
"""

# Triton's functions have no Python return type and want plain if/else.
# ruff: noqa: ANN201, SIM108, SIM300

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..dispatch import interpreting

INTERPRET = tl.constexpr(interpreting())
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
_LARGEST_POWER = tl.constexpr(64.0)  # 2^64 stands for infinity: (1 + e) / (1 + we) is 1 / w there


@triton.jit
def inverse_gain(base, delta, eps, slope, offset, SIGMOID_WEIGHT: tl.constexpr):
    """``1/M`` from base and Δ, elementwise, fp32.

    ``1/M = (1 + e) / (1 + w e)`` with ``e = exp(−(slope ρ + offset))``, ``ρ = |Δ| / (|base| + ε)``:
    one exp2 and one division besides ρ's. An offset of −inf (nothing moves) gives 1/w.
    """
    rho = relative_change(base, delta, eps)
    power = rho * (slope * _MINUS_LOG2_E) + offset * _MINUS_LOG2_E
    e = tl.exp2(tl.minimum(power, _LARGEST_POWER, propagate_nan=tl.PropagateNan.ALL))
    return divide(1.0 + e, 1.0 + SIGMOID_WEIGHT * e)


@triton.jit
def load_scalars(ptr):
    """ε, slope and offset where a pass before measured them."""
    return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)


@triton.jit
def relative_change(base, delta, eps):
    """``ρ = |Δ| / (|base| + ε)``."""
    return divide(tl.abs(delta), tl.abs(base) + eps)


@triton.jit
def divide(a, b):
    """``a / b`` in fp32 within 2 units in the last place, for ``b`` under 2¹²⁶.

    A plain ``/`` also scales its operands against overflow: over half of all instructions of the
    norm's kernels.
    """
    if INTERPRET:
        quotient = a / b
    else:
        quotient = libdevice.fast_dividef(a, b)
    return quotient


@triton.jit
def combine(base, delta, inverse, AVERAGED: tl.constexpr):
    """``(2 base + Δ) / M`` when averaged, ``base + Δ / M`` when gated."""
    if AVERAGED:
        out = (2.0 * base + delta) * inverse
    else:
        out = base + delta * inverse
    return out


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in fp32; the interpreter multiplies bf16 as bit patterns, so it upcasts."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """fp32 to ``DTYPE``, to nearest even; the interpreter truncates to bf16, so it rounds first."""
    if INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        x = (bits >> 16 << 16).to(tl.float32, bitcast=True)  # of a subnormal it makes another
    return x.to(DTYPE)


@triton.jit
def noise(place, key):
    """16 random bits of an entry's place and the key: :func:`secura_kernels.ops.common.noise`."""
    bits = place.to(tl.uint32) ^ key.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits >> 16


@triton.jit
def round_stochastically(x, place, key):
    """fp32 to a bf16 neighbour, up with the probability of the part that is cut off.

    Values that bf16 holds exactly stay, as do inf and NaN.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + noise(place, key)) >> 16) << 16
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, bits).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def span(block, BLOCK: tl.constexpr):
    """The indices of one block, int64: products with a stride may pass 2³¹."""
    return block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


__all__ = [
    "INTERPRET",
    "cast",
    "combine",
    "dot",
    "inverse_gain",
    "load_scalars",
    "noise",
    "relative_change",
    "round_stochastically",
    "span",
]
