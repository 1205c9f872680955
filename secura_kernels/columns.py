"""P, which every space is made of, with C read where it lies: in the weight.

    P = C U,  C = W[:, cols]        ∂U = Cᵀ ∂P

| tensor | shape  | dtype                       |
|--------|--------|-----------------------------|
| W      | [N, K] | any floating, frozen        |
| cols   | [m]    | int64                       |
| U      | [m, m] | fp32 or wider, scaling in it |
| P      | [N, m] | U's                         |

Saved for backward: W itself and cols. A C kept beside them would be 4 N m bytes a layer, more than
z at T ≤ 2 N. Bytes: at most a 32-byte sector of W an element of C, each way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_floating
from .dispatch import op, supported, wide


def project(weight: Tensor, cols: Tensor, u: Tensor, *, impl: str | None = None) -> Tensor:
    """``P = W[:, cols] U`` in fp32 or wider, autocast or not.

    Args:
        weight: ``W [N, K]``, frozen, any strides.
        cols: ``[m]`` int64, the columns of W that are C.
        u: ``U [m, m]``, scaling included.
        impl: ``"auto"``, ``"triton"``, ``"reference"``, or None for what ``SECURA_IMPL`` says.

    Returns:
        ``[N, m]``. Gradients reach u, once differentiable.

    Raises:
        TypeError: for a weight that is not of floating numbers.
        ValueError: where shapes do not fit, or for an unknown ``impl``.
        RuntimeError: for ``impl="triton"`` where no kernel can take ``weight`` and ``u``.
    """
    check_floating(weight)
    if weight.dim() != 2 or cols.dim() != 1 or u.shape != (cols.numel(), cols.numel()):
        raise ValueError(
            f"weight {list(weight.shape)}, cols {list(cols.shape)} and u {list(u.shape)} must be "
            "[N, K], [m] and [m, m]"
        )
    return _Project.apply(weight, cols, u.to(wide(u.dtype)), impl)


def _runs_triton(impl: str | None, weight: Tensor, u: Tensor) -> bool:
    return supported(impl, weight, u) == "triton" and weight.numel() > 0 and u.numel() > 0


@op("project")
def project_forward(weight: Tensor, cols: Tensor, u: Tensor, impl: str | None) -> Tensor:
    """``P [N, m]``."""
    return projected(weight, cols, u, u.dtype, impl)


def projected(
    weight: Tensor, cols: Tensor, u: Tensor, dtype: torch.dtype, impl: str | None
) -> Tensor:
    """``P [N, m]``, summed in U's dtype and rounded once to ``dtype``."""
    if _runs_triton(impl, weight, u):
        from .kernels.columns import forward

        return forward(weight, cols, u, dtype)
    return (weight.index_select(1, cols).to(u.dtype) @ u).to(dtype)


@project_forward.register_fake
def _project_forward_fake(weight, cols, u, impl):
    return u.new_empty(weight.shape[0], u.shape[1])


@op("project_backward")
def project_backward(dp: Tensor, weight: Tensor, cols: Tensor, impl: str | None) -> Tensor:
    """``∂U [m, m]`` of ``∂P [N, m]``."""
    if _runs_triton(impl, weight, dp):
        from .kernels.columns import backward

        return backward(dp, weight, cols)
    return weight.index_select(1, cols).to(dp.dtype).t() @ dp


@project_backward.register_fake
def _project_backward_fake(dp, weight, cols, impl):
    return dp.new_empty(cols.shape[0], dp.shape[1])


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight, cols, u, impl) -> Tensor:
        ctx.impl = impl
        ctx.save_for_backward(weight, cols)
        return project_forward(weight, cols, u, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> tuple:
        return None, None, project_backward(dp, *ctx.saved_tensors, ctx.impl), None


__all__ = ["project"]
