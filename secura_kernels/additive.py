"""The additive spaces, ``none`` and ``channel``: a thin product added to the frozen output.

    out = share · (y0 − b) + b + z Qᵀ + δb,   y0 = x Wᵀ + b,   z = (y0[:, rows] − b[rows]) · z_scale

    ∂Q = ḡᵀ z          ∂δb = Σ ḡ          ∂y0 = share · ḡ,  ∂y0[:, rows] += (ḡ Q) · z_scale
    ∂x = ∂y0 W = ḡ W',  W' = share · W + Q R (where there is no z_scale)

| tensor      | shape    | dtype                           |
|-------------|----------|---------------------------------|
| x, y0, out  | [..., K] [..., N] | compute dtype (autocast's) |
| W           | [N, K]   | compute dtype                   |
| Q           | [N, m]   | fp32 in, cast once; ∂Q in fp32  |
| share       | [N]      | fp32, or None for 1             |
| rows        | [m]      | int64                           |

Saved for backward: z ``[T, m]`` (only where Q is trained), Q, share and the frozen W itself; never
x or y0. R's rows are rows of W, so z costs a gather of y0 and no product with x (DESIGN section 3).

Bytes, s of them an element, beside the frozen layer's own two products:

| step                   | moves            | note                                         |
|------------------------|------------------|----------------------------------------------|
| z                      | 32 T m + s T m   | a 32-byte sector of y0 an element at worst   |
| out, in place of y0    | 2 s T N          | cuBLAS addmm_ without share and biases       |
| out by W', z = x Rᵀ    | 2 s N K + s T K  | instead of both; :func:`takes_weight`        |
| ∂x by W'               | 2 s N K          | :func:`rebuilds_weight` chooses              |
| ∂x by ∂y0 (the gather) | 2 s T N          |                                              |
| ∂Q                     | s T N            | cuBLAS, fp32 out                             |

W' rounded to bf16 drops a change smaller than half a unit in W's last place, y0 rounded to bf16 one
smaller than half a unit in y0's: of a change of 1e-3 of the weight 0.52 and 0.53 reach the output
(benchmarks/results/triage-h100.json), so the forward takes whichever moves less.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_floating, check_input, check_operands
from .dispatch import absent, compute_dtype, op, resolve, wide

# The one-pass ∂y0 holds h [T block, m] in registers; above this rank plain torch computes it.
MAX_RANK = 512


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
    impl: str | None = None,
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
        impl: ``"auto"``, ``"triton"``, ``"reference"``, or None for what ``SECURA_IMPL`` says.

    Returns:
        ``[..., N]`` in the compute dtype. Gradients reach x, q and delta_bias, once differentiable.

    Raises:
        TypeError: for an x of integers or complex numbers.
        ValueError: where shapes do not fit, or for an unknown ``impl``.
        RuntimeError: for ``impl="triton"`` where no kernel can take ``x``.
    """
    check_input(x, weight)
    check_operands(
        x.shape[:-1], weight.shape[0], rows, q=q, bias=bias, share=share, delta_bias=delta_bias,
        z_scale=z_scale,
    )  # fmt: skip
    dtype = compute_dtype(x)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    out = _LowrankLinear.apply(
        _flat(x).to(dtype), weight, bias, rows, q, share, delta_bias, _flat(z_scale), impl
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
    impl: str | None = None,
) -> Tensor:
    """The additive adapter on the output of any frozen base, quantised ones included.

    Args:
        y0: ``[..., N]``, the base layer's output, its bias included; never written.
        bias: the ``b [N]`` that ``y0`` includes, or None.
        rows, q, share, delta_bias, z_scale, impl: as in :func:`lowrank_linear`.

    Returns:
        ``[..., N]`` in y0's dtype. Gradients reach y0, q and delta_bias, once differentiable.

    Raises:
        TypeError: for a y0 of integers or complex numbers.
        ValueError: where shapes do not fit, or for an unknown ``impl``.
        RuntimeError: for ``impl="triton"`` where no kernel can take ``y0``.
    """
    check_floating(y0)
    check_operands(
        y0.shape[:-1], y0.shape[-1], rows, q=q, bias=bias, share=share, delta_bias=delta_bias,
        z_scale=z_scale,
    )  # fmt: skip
    bias = None if bias is None else bias.to(y0.dtype)
    out = _LowrankAdd.apply(_flat(y0), bias, rows, q, share, delta_bias, _flat(z_scale), impl)
    return out.view(y0.shape)


def gather(y0: Tensor, bias: Tensor | None, rows: Tensor, z_scale: Tensor | None = None) -> Tensor:
    """``z [T, m] = (y0[:, rows] − b[rows]) · z_scale``, which is ``x Rᵀ`` scaled."""
    z = y0.index_select(1, rows)
    if bias is not None:
        z.sub_(bias[rows])
    return z if z_scale is None else z.mul_(z_scale)


def rebuilds_weight(t: int, n: int, k: int, z_scale: Tensor | None) -> bool:
    """Whether ∂x comes from W' (2 N K elements moved) rather than from ∂y0 (2 T N elements).

    With a ``z_scale`` each token has a W' of its own, so ∂y0 it is.
    """
    return z_scale is None and 2 * n * k <= 2 * t * n


def takes_weight(t: int, n: int, k: int, m: int, z_scale: Tensor | None) -> bool:
    """Whether the kernels' forward goes through W' and x Rᵀ rather than through y0.

    By elements moved: 2 N K + T K against 2 T N and a sector of 32 bytes for each of T m. That told
    the quicker of the two in all five shapes that were timed on an H100.
    """
    return z_scale is None and 2 * n * k + t * k < 2 * t * n + 16 * t * m


def _flat(tensor: Any) -> Any:
    # Not -1: torch cannot tell how many tokens an empty tensor has.
    shape = None if tensor is None else tensor.shape
    return None if shape is None else tensor.reshape(math.prod(shape[:-1]), shape[-1])


def _kernels() -> Any:
    from .kernels import additive

    return additive


@op("lowrank_linear")
def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    q: Tensor,
    share: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """``(out [T, N], z [T, m])`` of flat inputs in one dtype; share and δb may be wider."""
    kernels = _kernels() if resolve(impl, x) == "triton" else None
    (t, k), (n, m) = x.shape, q.shape
    if kernels is not None and takes_weight(t, n, k, m, z_scale):
        r = kernels.padded_r(weight, rows)
        fused = kernels.rebuilt_weight(weight, r, q, share)
        return F.linear(x, fused, _sum(bias, delta_bias, x.dtype)), x @ r[:m].t()
    # No bias in the product: z is then y0's columns themselves, with nothing to cancel.
    y0 = F.linear(x, weight)
    if kernels is not None:
        z = kernels.gather(y0, None, rows, z_scale)
        return kernels.add_product(y0, z, q, share, bias, delta_bias, out=y0), z
    z = gather(y0, None, rows, z_scale)
    if share is not None:
        y0.mul_(share)
    return _add_(y0.addmm_(z, q.t()), bias, delta_bias), z


@linear_forward.register_fake
def _linear_forward_fake(x, weight, bias, rows, q, share, delta_bias, z_scale, impl):
    t, n = x.shape[0], weight.shape[0]
    return x.new_empty(t, n), x.new_empty(t, rows.shape[0])


@op("lowrank_linear_backward")
def linear_backward(
    g: Tensor,
    z: Tensor | None,
    weight: Tensor,
    rows: Tensor,
    q: Tensor,
    share: Tensor | None,
    z_scale: Tensor | None,
    needs: list[bool],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(∂x, ∂Q, ∂δb)``, those not needed empty; ∂Q and ∂δb in fp32 or wider."""
    dx = absent(g)
    if needs[0]:
        t, (n, k) = g.shape[0], weight.shape
        kernels = _kernels() if resolve(impl, g) == "triton" else None
        if rebuilds_weight(t, n, k, z_scale):
            if kernels is not None:
                r = kernels.padded_r(weight, rows)
                fused = kernels.rebuilt_weight(weight, r, q, share)
            else:
                fused = weight if share is None else (weight * share[:, None]).to(weight.dtype)
                fused = torch.addmm(fused, q, weight.index_select(0, rows))
            dx = g @ fused
        else:
            dx = _output_gradient(g, rows, q, share, z_scale, impl) @ weight
    return dx, *_thin_gradients(g, z, needs)


@linear_backward.register_fake
def _linear_backward_fake(g, z, weight, rows, q, share, z_scale, needs, impl):
    dx = g.new_empty(g.shape[0], weight.shape[1]) if needs[0] else absent(g)
    return dx, *_thin_gradients_fake(g, rows, needs)


@op("lowrank_add")
def add_forward(
    y0: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    q: Tensor,
    share: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """``(out [T, N], z [T, m])`` of flat inputs in one dtype; y0 includes the bias."""
    if resolve(impl, y0) == "triton":
        z = _kernels().gather(y0, bias, rows, z_scale)
        out = torch.empty_like(y0, memory_format=torch.contiguous_format)
        _kernels().add_product(y0, z, q, share, bias, delta_bias, bias_inside=True, out=out)
        return out, z
    z = gather(y0, bias, rows, z_scale)
    out = y0.clone(memory_format=torch.contiguous_format)
    if share is not None:
        out.mul_(share)
        bias = None if bias is None else (1 - share) * bias
    else:
        bias = None
    return _add_(out.addmm_(z, q.t()), bias, delta_bias), z


@add_forward.register_fake
def _add_forward_fake(y0, bias, rows, q, share, delta_bias, z_scale, impl):
    return y0.new_empty(y0.shape), y0.new_empty(y0.shape[0], rows.shape[0])


@op("lowrank_add_backward")
def add_backward(
    g: Tensor,
    z: Tensor | None,
    rows: Tensor,
    q: Tensor,
    share: Tensor | None,
    z_scale: Tensor | None,
    needs: list[bool],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(∂y0, ∂Q, ∂δb)``, those not needed empty; ∂Q and ∂δb in fp32 or wider."""
    dy0 = _output_gradient(g, rows, q, share, z_scale, impl) if needs[0] else absent(g)
    return dy0, *_thin_gradients(g, z, needs)


@add_backward.register_fake
def _add_backward_fake(g, z, rows, q, share, z_scale, needs, impl):
    dy0 = g.new_empty(g.shape) if needs[0] else absent(g)
    return dy0, *_thin_gradients_fake(g, rows, needs)


def _sum(bias: Tensor | None, delta: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``b + δb`` in ``dtype``, rounded once; None where neither is there."""
    if bias is None or delta is None:
        found = delta if bias is None else bias
        return None if found is None else found.to(dtype)
    return (bias.to(wide(dtype)) + delta).to(dtype)


def _add_(out: Tensor, *biases: Tensor | None) -> Tensor:
    for bias in biases:
        if bias is not None:
            out.add_(bias)
    return out


def _output_gradient(
    g: Tensor,
    rows: Tensor,
    q: Tensor,
    share: Tensor | None,
    z_scale: Tensor | None,
    impl: str | None,
) -> Tensor:
    """``∂y0 = share · ḡ``, with ``(ḡ Q) · z_scale`` added to the columns ``rows``; g is kept."""
    if resolve(impl, g) == "triton" and q.shape[1] <= MAX_RANK:
        return _kernels().output_gradient(g, rows, q, share, z_scale)
    h = g @ q
    if z_scale is not None:
        h.mul_(z_scale)
    dy0 = g.clone(memory_format=torch.contiguous_format)
    if share is not None:
        dy0.mul_(share)
    return dy0.index_add_(1, rows, h)


def _thin_gradients(g: Tensor, z: Tensor | None, needs: list[bool]) -> tuple[Tensor, Tensor]:
    dtype = wide(g.dtype)
    dq = product_wide(g.t(), z) if needs[1] and z is not None else absent(g, dtype)
    dbias = g.sum(0, dtype=dtype) if needs[2] else absent(g, dtype)
    return dq, dbias


def _thin_gradients_fake(g: Tensor, rows: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    dtype, n = wide(g.dtype), g.shape[1]
    dq = g.new_empty(n, rows.shape[0], dtype=dtype) if needs[1] else absent(g, dtype)
    return dq, g.new_empty(n, dtype=dtype) if needs[2] else absent(g, dtype)


def product_wide(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` in fp32 or wider: on CUDA the fp32 sums of a 16-bit product are never rounded.

    ``out``, if given, is written over; of fp32 or wider, with rows without gaps.
    """
    dtype = wide(a.dtype)
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda and a.numel() and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    product = (a @ b).to(dtype)
    return product if out is None else out.copy_(product)


class _LowrankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, rows, q, share, delta_bias, z_scale, impl) -> Tensor:
        ctx.impl, ctx.q_dtype = impl, q.dtype
        ctx.bias_dtype = None if delta_bias is None else delta_bias.dtype
        q = q.to(x.dtype)
        out, z = linear_forward(x, weight, bias, rows, q, share, delta_bias, z_scale, impl)
        z = z if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(z, weight, rows, q, share, z_scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        needs = [ctx.needs_input_grad[index] for index in (0, 4, 6)]
        dx, dq, dbias = linear_backward(g, *ctx.saved_tensors, needs, ctx.impl)
        return (
            dx if needs[0] else None, None, None, None,
            dq.to(ctx.q_dtype) if needs[1] else None, None,
            dbias.to(ctx.bias_dtype) if needs[2] else None, None, None,
        )  # fmt: skip


class _LowrankAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y0, bias, rows, q, share, delta_bias, z_scale, impl) -> Tensor:
        ctx.impl, ctx.q_dtype = impl, q.dtype
        ctx.bias_dtype = None if delta_bias is None else delta_bias.dtype
        q = q.to(y0.dtype)
        out, z = add_forward(y0, bias, rows, q, share, delta_bias, z_scale, impl)
        z = z if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(z, rows, q, share, z_scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        needs = [ctx.needs_input_grad[index] for index in (0, 3, 5)]
        dy0, dq, dbias = add_backward(g, *ctx.saved_tensors, needs, ctx.impl)
        return (
            dy0 if needs[0] else None, None, None,
            dq.to(ctx.q_dtype) if needs[1] else None, None,
            dbias.to(ctx.bias_dtype) if needs[2] else None, None, None,
        )  # fmt: skip


__all__ = [
    "gather",
    "lowrank_add",
    "lowrank_linear",
    "product_wide",
    "rebuilds_weight",
    "takes_weight",
]
