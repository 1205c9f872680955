"""Weights that are stored in fewer bits: which there are, and what they are as floating numbers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def dequantizer(base: Any) -> Callable[[], Tensor] | None:
    """What makes the weight ``[N, K]`` of a quantised base; None for any other."""
    stored: Any = getattr(base, "weight", None)
    if is_torchao(stored):
        return stored.dequantize
    if type(base) is nn.Linear or not isinstance(base, nn.Module):
        return None
    if "weight_scale_inv" in base._parameters:
        return None if stored.itemsize > 1 else lambda: _scaled(base, stored)
    dense = isinstance(stored, Tensor) and stored.is_floating_point() and stored.itemsize > 1
    if "peft" not in sys.modules and (dense or importlib.util.find_spec("peft") is None):
        return None
    from peft.utils import resolve_quantization_backend

    backend = resolve_quantization_backend(base)
    return None if backend is None else lambda: backend.get_base_weight(base)


def is_packed(base: Any) -> bool:
    """Whether ``base`` is a linear layer of a class of its own that holds integers or 8-bit floats.

    Such are the layers of GPTQ, AWQ and HQQ.
    """
    sizes = (getattr(base, name, None) for name in ("in_features", "out_features"))
    if isinstance(base, nn.Linear) or not all(isinstance(size, int) for size in sizes):
        return False
    stored = [*base._parameters.values(), *base._buffers.values()]
    return any(
        one is not None
        and one.dim() > 1
        and one.dtype != torch.bool  # a mask
        and (not one.is_floating_point() or one.itemsize < 2)
        for one in stored
    )


def is_torchao(stored: Any) -> bool:
    """Whether ``stored`` is a tensor of torchao's, the weight of a plain ``nn.Linear``."""
    return isinstance(stored, Tensor) and type(stored).dequantize is not Tensor.dequantize


def dequantized(base: Any) -> Tensor:
    """The weight ``[N, K]`` of a quantised base, detached."""
    make, kind = dequantizer(base), type(getattr(base, "weight", base)).__name__
    if make is None:
        raise ValueError(
            f"{type(base).__name__} ({kind}) has no floating weight and no known quantisation, so "
            "its rows and columns cannot be read: load it in full precision"
        )
    unpack(base)
    try:
        return make().detach()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{type(base).__name__} ({kind}) cannot be dequantised ({error}), so its rows and "
            "columns cannot be read: load it in full precision, or quantised otherwise"
        ) from error


def unpack(base: Any) -> None:
    """Put back, for good, the ordinary layout of a base that bitsandbytes packed for a CPU.

    Packed, as it evaluates with AVX512-BF16, dequantising gives another weight, and the product
    passes no gradient on. Its own way back loses a little each time, and leaves the scales of
    weights that were quantised once transposed (0.49).
    """
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    base.state_dict()  # which unpacks it
    state = base.weight.quant_state
    if not state.nested and state.absmax.dim() == 2:
        state.absmax = state.absmax.t().reshape(-1).float()
    base.support_avx512bf16_for_cpu = False


def _scaled(base: Any, weight: Tensor) -> Tensor:
    """The weight ``[N, K]``, fp32, of transformers' ``FP8Linear``: a scale a block, or one."""
    scale = base.weight_scale_inv.float()
    for dim, size in enumerate(base.block_size or ()):
        scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
    return weight.float() * scale


def check_decompressed(base: Any) -> None:
    """Raise ``ValueError`` where compressed-tensors holds another weight than it multiplies by."""
    status = getattr(base.__dict__.get("quantization_status"), "value", "decompressed")
    if status != "decompressed":
        raise ValueError(
            f"the weight is not dense yet (compressed-tensors, {status}): load the model with "
            "CompressedTensorsConfig(dequantize=True), or run it once before it is adapted"
        )


__all__ = ["check_decompressed", "dequantized", "dequantizer", "is_packed", "is_torchao", "unpack"]
