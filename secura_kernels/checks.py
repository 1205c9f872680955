"""What every public op asks of its arguments, before a kernel reads them by their shapes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .gain import NormOptions, Restrain


def check_operands(
    lead: Sequence[int],
    n: int,
    rows: Tensor,
    *,
    restrain: Restrain | None = None,
    **tensors: Tensor | None,
) -> None:
    """Raise ``ValueError`` for a tensor whose shape is not the one its name has in every op.

    Args:
        lead: ``[...]``, the dimensions of the tokens.
        n: N, output features.
        rows: ``[m]``.
        restrain: ``important [N]``.
        **tensors: by name; ``p``, ``p_base``, ``q``: ``[N, m]``; ``bias``, ``delta_bias``,
            ``share``: ``[N]``; ``z_scale``: ``[..., m]``. None is passed over.
    """
    m = rows.numel()
    if rows.dim() != 1:
        raise ValueError(f"rows {list(rows.shape)} must be [m]")
    if restrain is not None:
        tensors["important"] = restrain.important
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name == "z_scale":
            symbols, shape = "[..., m]", (*lead, m)
        elif name in ("p", "p_base", "q"):
            symbols, shape = "[N, m]", (n, m)
        else:
            symbols, shape = "[N]", (n,)
        if tensor.shape != shape:
            raise ValueError(f"{name} {list(tensor.shape)} must be {symbols} = {list(shape)}")


def check_input(x: Tensor, weight: Tensor) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``x [..., K]`` fits ``weight [N, K]``."""
    check_floating(x)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x [..., {x.shape[-1]}] does not fit the weight {list(weight.shape)}")


def check_floating(x: Tensor) -> None:
    """Raise ``TypeError`` for integers and complex numbers."""
    if not x.is_floating_point():
        raise TypeError(f"the input is {x.dtype}: the ops take floating numbers")


def check_space(options: NormOptions, norm: str) -> None:
    """Raise ``ValueError`` for options of another space than the op's."""
    if options.norm != norm:
        raise ValueError(f"this op is the space {norm!r}, and options.norm is {options.norm!r}")


__all__ = ["check_floating", "check_input", "check_operands", "check_space"]
