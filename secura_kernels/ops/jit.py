"""What every kernel shares: the gain, the dot product, rounding and offsets, each once.

``@triton.jit`` helpers stand here, one small kernel, and the few host-side decisions that belong to
them.
Formulas: :mod:`secura_kernels.norm`.
"""

# Triton's functions have no Python return type and want plain if/else.
# ruff: noqa: ANN201, SIM108, SIM300

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..dispatch import interpreting
from ..norm import Norm
from .launch import Kernel

INTERPRET = tl.constexpr(interpreting())
Tile = dict[str, int]
"""How a launch is cut: the edges ``BLOCK_*`` of a program's tile, its warps and pipeline stages."""

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


@Kernel
@triton.jit(do_not_specialize=["count"])
def _gain_scalars_kernel(
    peaks_ptr, scalars_ptr, count, scale, FORM: tl.constexpr, BLOCK: tl.constexpr
):
    slope, offset = scale, 0.0
    if FORM != "calibrated":
        peak = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, count, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            peak = tl.maximum(peak, tl.load(peaks_ptr + offs, offs < count, other=0.0))
        peak = tl.max(peak)
        if FORM == "paper":
            slope = scale / tl.maximum(peak, 1e-30)
            offset = -0.5 * scale
        slope = tl.where(peak == 0.0, 0.0, slope)
        offset = tl.where(peak == 0.0, float("-inf"), offset)
    tl.store(scalars_ptr + 1, slope)
    tl.store(scalars_ptr + 2, offset)


def gain_scalars(peaks: Tensor, scalars: Tensor, norm: Norm) -> None:
    """Write slope and offset (:func:`secura_kernels.norm.coefficients`) after ε, in one launch.

    Args:
        peaks: the largest ρ of each part; not read where the form needs none.
        scalars: ``[ε, slope, offset]``, fp32.
        norm: the norm.
    """
    _gain_scalars_kernel[(1,)](
        peaks, scalars, peaks.numel(), norm.scale, FORM=norm.form, BLOCK=1024
    )


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


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a dot: TF32 for fp32 operands only where torch's own setting allows.

    16-bit operands ignore it.
    """
    if dtype != torch.float32:
        return "tf32"
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def cdiv(size: int, block: int) -> int:
    """How many blocks cover ``size``: a plain division, where ``triton.cdiv`` takes 3 µs."""
    return -(-size // block)


def block_of(size: int, smallest: int, largest: int) -> int:
    """The power of two that covers ``size``, within ``[smallest, largest]``."""
    return max(smallest, min(largest, 1 << max(0, size - 1).bit_length()))


def unit_stride(tensor: Tensor) -> Tensor:
    """``tensor`` itself where its last dimension has stride 1, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def padded(thin: Tensor) -> Tensor:
    """``[..., m]`` contiguous with m a multiple of 16, zeros behind: rows then start aligned."""
    short = -thin.shape[-1] % 16
    return F.pad(thin, (0, short)) if short else thin.contiguous()


def padded_rows(rows: Tensor) -> Tensor:
    """``rows [m]`` with the first repeated behind, where it meets the zeros of a padded P or Q."""
    short = -rows.numel() % 16
    return torch.cat((rows, rows[:1].expand(short))) if short else rows.contiguous()


def aligned(*sizes: int) -> bool:
    """Whether rows of these many elements start at multiples of 16 bytes, whatever the dtype."""
    return not any(size % 16 for size in sizes)


__all__ = [
    "INTERPRET",
    "Tile",
    "aligned",
    "block_of",
    "cast",
    "cdiv",
    "combine",
    "dot",
    "dot_precision",
    "gain_scalars",
    "inverse_gain",
    "load_scalars",
    "noise",
    "padded",
    "padded_rows",
    "relative_change",
    "round_stochastically",
    "span",
    "unit_stride",
]
