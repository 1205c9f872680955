"""P, which every space starts from, with C read where it lies: in the weight.

    P = C U,  C = W[:, cols]        ∂U = Cᵀ ∂P,  or Cᵀ (row_scale · ∂P)

| tensor | shape  | dtype                        |
|--------|--------|------------------------------|
| W      | [N, K] | fp16 to fp64, frozen         |
| cols   | [m]    | int64                        |
| U      | [m, m] | fp32 or wider, scaling in it |
| P      | [N, m] | any; summed in U's           |

Saved for backward: W itself and cols. Bytes: at most a 32-byte sector of W an element of C, each
way; of a layer's own ``columns``, where it has them, the N m elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import kernels, op
from ..common import Call


@op("project")
def project(
    weight: Tensor, cols: Tensor | None, u: Tensor, dtype: torch.dtype, impl: str | None
) -> Tensor:
    """``P = W[:, cols] U  [N, m]``, summed in U's dtype and rounded once to ``dtype``.

    Without ``cols``, ``weight [N, m]`` is C.
    """
    some = weight.numel() and u.numel()
    if some and (triton := kernels(__package__, impl, weight, u)):
        return triton.forward(weight, cols, u, dtype)
    p = _columns(weight, cols, u) @ u
    return p if p.dtype == dtype else p.to(dtype)


@project.register_fake
def _project_fake(
    weight: Tensor, cols: Tensor | None, u: Tensor, dtype: torch.dtype, impl: str | None
) -> Tensor:
    return u.new_empty(weight.shape[0], u.shape[1], dtype=dtype)


@op("project_backward")
def project_backward(
    dp: Tensor, weight: Tensor, cols: Tensor | None, row_scale: Tensor | None, impl: str | None
) -> Tensor:
    """``∂U [m, m]`` of ``∂P [N, m]``, whose rows are multiplied by ``row_scale [N]`` if given."""
    some = weight.numel() and dp.numel()
    if some and (triton := kernels(__package__, impl, weight, dp)):
        return triton.backward(dp, weight, cols, row_scale)
    if row_scale is not None:
        dp = dp * row_scale.unsqueeze(1)
    return _columns(weight, cols, dp).t() @ dp


def _columns(weight: Tensor, cols: Tensor | None, like: Tensor) -> Tensor:
    """``C = W[:, cols]  [N, m]`` in the dtype of ``like``."""
    c = weight if cols is None else weight.index_select(1, cols)
    return c if c.dtype == like.dtype else c.to(like.dtype)


@project_backward.register_fake
def _project_backward_fake(
    dp: Tensor, weight: Tensor, cols: Tensor | None, row_scale: Tensor | None, impl: str | None
) -> Tensor:
    return dp.new_empty(dp.shape[1], dp.shape[1])


def projection(call: Call, u: Tensor, dtype: torch.dtype) -> Tensor:
    """``P = C U [N, m]`` of a layer in ``dtype``."""
    layer, run = call.layer, project if call.watched else project.body
    if layer.columns is not None:
        return run(layer.columns, None, u, dtype, call.impl)
    return run(layer.weight, layer.cols, u, dtype, call.impl)


def projections(
    call: Call, u: Tensor, u_base: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """``(P, P_base or None)`` of a layer in ``dtype``."""
    p = projection(call, u, dtype)
    return p, None if u_base is None else projection(call, u_base, dtype)


def backward(call: Call, dp: Tensor, row_scale: Tensor | None) -> Tensor:
    """``∂U [m, m]`` of ``∂P [N, m]``, whose rows are multiplied by ``row_scale [N]`` if given."""
    layer, run = call.layer, project_backward if call.watched else project_backward.body
    if layer.columns is not None:
        return run(dp, layer.columns, None, row_scale, call.impl)
    return run(dp, layer.weight, layer.cols, row_scale, call.impl)


__all__ = [
    "backward",
    "project",
    "project_backward",
    "projection",
    "projections",
]
