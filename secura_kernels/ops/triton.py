"""The one kernel that spaces share: a gain's slope and offset, from the largest ρ of each part."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..norm import SMALLEST_PEAK, Norm
from .launch import Kernel

_SMALLEST_PEAK = tl.constexpr(SMALLEST_PEAK)


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
            slope = scale / tl.maximum(peak, _SMALLEST_PEAK)
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


__all__ = ["gain_scalars"]
