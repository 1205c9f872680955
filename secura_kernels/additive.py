"""The additive spaces, ``none`` and ``channel``: a thin product added to the frozen output.

    out = share · (y0 − b) + b + z Qᵀ + δb,   y0 = x Wᵀ + b,   z = (y0[:, rows] − b[rows]) · z_scale

    ∂Q = ḡᵀ z          ∂δb = Σ ḡ          ∂y0 = share · ḡ,  ∂y0[:, rows] += (ḡ Q) · z_scale
    ∂x = ∂y0 W = (share · ḡ) W + ((ḡ Q) · z_scale) R

| tensor      | shape    | dtype                           |
|-------------|----------|---------------------------------|
| x, y0, out  | [..., K] [..., N] | compute dtype (autocast's) |
| W           | [N, K]   | compute dtype                   |
| Q           | [N, m]   | fp32 in, cast once; ∂Q in fp32  |
| share       | [N]      | fp32, or None for 1             |
| rows        | [m]      | int64                           |

Saved for backward: z ``[T, m]``, Q, share and the frozen W itself; never x or y0. R's rows are rows
of W, so z costs a gather of y0 and no product with x (DESIGN section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import compute_dtype


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    q: Tensor,
    *,
    share: Tensor | None = None,
    delta_bias: Tensor | None = None,
    z_scale: Tensor | None = None,
) -> Tensor:
    """A frozen linear layer and the additive adapter on it, in one op.

    Args:
        x: ``[..., K]``.
        weight: ``W [N, K]``, frozen, any strides.
        bias: ``b [N]``, frozen, or None.
        rows: ``[m]`` int64, the rows of W that are R.
        q: ``Q [N, m]``.
        share: ``[N]``, scales ``y0 − b``, or None for 1.
        delta_bias: trainable bias ``[N]`` or None.
        z_scale: ``[..., m]`` (dropout) or None.

    Returns:
        ``[..., N]`` in the compute dtype. Gradients reach x, q and delta_bias, once differentiable.

    Raises:
        ValueError: where shapes do not fit.
    """
    _check_shapes(weight.shape[0], rows, q)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x [..., {x.shape[-1]}] does not fit the weight {list(weight.shape)}")
    dtype = compute_dtype(x)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    out = _LowrankLinear.apply(
        _flat(x).to(dtype), weight, bias, rows, q, share, delta_bias, _flat(z_scale)
    )
    return out.view(*x.shape[:-1], weight.shape[0])


def lowrank_add(
    y0: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    q: Tensor,
    *,
    share: Tensor | None = None,
    delta_bias: Tensor | None = None,
    z_scale: Tensor | None = None,
) -> Tensor:
    """The additive adapter on the output of any frozen base, quantised ones included.

    Args:
        y0: ``[..., N]``, the base layer's output, its bias included; never written.
        bias: the ``b [N]`` that ``y0`` includes, or None.
        rows, q, share, delta_bias, z_scale: as in :func:`lowrank_linear`.

    Returns:
        ``[..., N]`` in y0's dtype. Gradients reach y0, q and delta_bias, once differentiable.

    Raises:
        ValueError: where shapes do not fit.
    """
    _check_shapes(y0.shape[-1], rows, q)
    bias = None if bias is None else bias.to(y0.dtype)
    out = _LowrankAdd.apply(_flat(y0), bias, rows, q, share, delta_bias, _flat(z_scale))
    return out.view(y0.shape)


def gather(y0: Tensor, bias: Tensor | None, rows: Tensor, z_scale: Tensor | None = None) -> Tensor:
    """``z [T, m] = (y0[:, rows] − b[rows]) · z_scale``, which is ``x Rᵀ`` scaled."""
    z = y0.index_select(1, rows)
    if bias is not None:
        z.sub_(bias[rows])
    return z if z_scale is None else z.mul_(z_scale)


def _flat(tensor: Any) -> Any:
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])


def _check_shapes(n: int, rows: Tensor, q: Tensor) -> None:
    if q.shape != (n, rows.numel()):
        raise ValueError(f"q {list(q.shape)} must be [N, m] = [{n}, {rows.numel()}]")


def _add_product_(
    y0: Tensor,
    z: Tensor,
    bias: Tensor | None,
    q: Tensor,
    share: Tensor | None,
    delta_bias: Tensor | None,
) -> Tensor:
    if share is not None:
        y0.mul_(share)
        if bias is not None:
            y0.add_((1 - share) * bias)
    y0.addmm_(z, q.t())
    return y0 if delta_bias is None else y0.add_(delta_bias)


def _thin_gradients(ctx: Any, g: Tensor, z: Tensor, q_index: int, bias_index: int) -> tuple:
    dq = (g.t() @ z).to(ctx.q_dtype) if ctx.needs_input_grad[q_index] else None
    dbias = g.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[bias_index] else None
    return dq, dbias


class _LowrankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, rows, q, share, delta_bias, z_scale) -> Tensor:
        ctx.q_dtype, ctx.bias_dtype = q.dtype, None if delta_bias is None else delta_bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            q = q.to(x.dtype)
            share = None if share is None else share.to(x.dtype)
            y0 = F.linear(x, weight, bias)
            z = gather(y0, bias, rows, z_scale)
            ctx.save_for_backward(z, weight, rows, q, share, z_scale)
            return _add_product_(y0, z, bias, q, share, delta_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        z, weight, rows, q, share, z_scale = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            dx = None
            if ctx.needs_input_grad[0]:
                h = g @ q if z_scale is None else (g @ q).mul_(z_scale)
                dx = (g if share is None else g * share) @ weight
                dx.addmm_(h, weight.index_select(0, rows))
            dq, dbias = _thin_gradients(ctx, g, z, 4, 6)
        return dx, None, None, None, dq, None, dbias, None


class _LowrankAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y0, bias, rows, q, share, delta_bias, z_scale) -> Tensor:
        ctx.q_dtype, ctx.bias_dtype = q.dtype, None if delta_bias is None else delta_bias.dtype
        with torch.autocast(y0.device.type, enabled=False):
            q = q.to(y0.dtype)
            share = None if share is None else share.to(y0.dtype)
            z = gather(y0, bias, rows, z_scale)
            ctx.save_for_backward(z, rows, q, share, z_scale)
            return _add_product_(y0.clone(), z, bias, q, share, delta_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        z, rows, q, share, z_scale = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            dy0 = None
            if ctx.needs_input_grad[0]:
                h = g @ q if z_scale is None else (g @ q).mul_(z_scale)
                dy0 = g.clone() if share is None else g * share
                dy0.index_add_(1, rows, h)
            dq, dbias = _thin_gradients(ctx, g, z, 3, 5)
        return dy0, None, None, dq, None, dbias, None


__all__ = ["gather", "lowrank_add", "lowrank_linear"]
