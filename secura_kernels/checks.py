"""Refuse operands that do not fit their layer, and settings that do not go together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import FLOATS
from .layer import Layer
from .norm import SAVES, NormOptions


def check_call(
    x: Tensor | None,
    n: int,
    lead: Sequence[int],
    layer: Layer,
    a: Tensor,
    b: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    z: Tensor | None = None,
) -> None:
    """Raise ``ValueError`` for what does not fit a layer of N outputs and x of ``lead`` tokens.

    ``TypeError`` for operands that are none of :data:`secura_kernels.dispatch.FLOATS` or DTensors,
    for indices that are no int64, and options of another class.
    """
    rows, cols, columns = layer.rows, layer.cols, layer.columns
    if not isinstance(layer.options, NormOptions):
        raise TypeError(f"options={layer.options!r} must be NormOptions, NormOptions('none') say")
    for name, index in (("rows", rows), ("cols", cols)):
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"{name} is {kind}, and must be a tensor [m] of torch.int64")
    if rows.dim() != 1 or rows.shape != cols.shape:
        raise ValueError(f"rows {list(rows.shape)} and cols {list(cols.shape)} must be [m]")
    m = rows.shape[0]
    inner = m if b is None else next(iter(b.shape), 0)
    if a.shape != (m, inner) or (b is not None and b.shape != (inner, m)):
        raise ValueError(
            f"a {list(a.shape)} and b {None if b is None else list(b.shape)} must be [{m}, r] and "
            f"[r, {m}] beside rows [{m}]; without b, a must be [{m}, {m}]"
        )
    important = None if layer.restrain is None else layer.restrain.important
    for name, tensor, shape in (
        ("bias", layer.bias, (n,)),
        ("delta_bias", delta_bias, (n,)),
        ("important", important, (n,)),
        ("core", layer.core, (m, m)),
        ("columns", columns, (n, m)),
        ("z_scale", z_scale, (*lead, m)),
        ("z", z, (*lead, m)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} {list(tensor.shape)} must be {list(shape)}")
    weight = layer.weight
    if weight is not None and (weight.dim() != 2 or weight.shape[0] != n):
        raise ValueError(f"weight {list(weight.shape)} must be [{n}, K] beside {n} outputs")
    for name, tensor in (
        ("the weight", weight),
        ("the input", x),
        ("a", a),
        ("b", b),
        ("bias", layer.bias),
        ("delta_bias", delta_bias),
        ("core", layer.core),
        ("columns", columns),
        ("z_scale", z_scale),
        ("z", z),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} is {tensor.dtype}: the ops take floating numbers, in fp16, bf16, fp32 or "
                "fp64"
            )
        if type(tensor) is not Tensor and hasattr(tensor, "full_tensor"):
            raise TypeError(
                f"{name} is a DTensor, of which the ops would see a part: give its full_tensor(), "
                "or, where each process's part is a layer of its own, its to_local()"
            )
    if important is not None and important.dtype != torch.bool:
        raise ValueError(f"important is {important.dtype}, and must be bool")
    for name, fixed in (
        ("z_scale", z_scale),
        ("z", z),
        ("core", layer.core),
        ("scaling", layer.scaling),
    ):
        if isinstance(fixed, Tensor) and fixed.requires_grad:
            raise ValueError(f"{name} requires a gradient, of which it would get none: detach it")
    norm, draws = layer.options.norm, layer.rounding_seed is not None
    if draws and not isinstance(layer.rounding_seed, int):
        raise ValueError(f"rounding_seed={layer.rounding_seed!r} must be an integer, or None")
    if draws and norm == "activation":
        raise ValueError("the space 'activation' has no W' to round: leave rounding_seed out")
    if draws and z_scale is not None:
        raise ValueError("W' has no z to scale: leave out z_scale, or rounding_seed")
    if norm == "channel":
        gram, norms = layer.gram, layer.base_norms
        if gram is None or norms is None:
            raise ValueError("the space 'channel' needs gram and base_norms, of with_norms()")
        if gram.shape != (m, m) or norms.shape != (n,):
            raise ValueError(
                f"gram {list(gram.shape)} and base_norms {list(norms.shape)} must be {[m, m]} and "
                f"{[n]}"
            )
    elif norm == "weight" and z_scale is not None:
        raise ValueError("the space 'weight' has no z, so it takes no z_scale")
    elif norm == "activation" and layer.save not in SAVES:
        raise ValueError(f"unknown save {layer.save!r}: choose one of {SAVES}")


def check_trained(layer: Layer, given: bool) -> None:
    """Raise ``ValueError`` where a layer whose tensors require a gradient cannot give it.

    ``given`` says that the base made y0 itself.
    """
    if not given:
        raise ValueError(
            "the layer's weight, bias or columns require a gradient, of which they would get none: "
            "detach or freeze them, or call secura_add with the base's own output"
        )
    if layer.options.norm == "channel" and layer.weight is None:
        raise ValueError("the space 'channel' takes norms of a weight that is trained: give it")


__all__ = ["check_call", "check_trained"]
