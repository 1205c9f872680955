"""The additive spaces, ``none`` and ``channel``: a thin product added to the frozen output.

    out = share · (y0 − b) + b + z Qᵀ + δb,   y0 = x Wᵀ + b,   z = (y0[:, rows] − b[rows]) · z_scale

    ∂Q = ḡᵀ z          ∂δb = Σ ḡ          ∂y0 = share · ḡ,  ∂y0[:, rows] += (ḡ Q) · z_scale
    ∂x = ∂y0 W = ḡ W',  W' = share · W + Q R (where there is no z_scale)

| tensor      | shape    | dtype                           |
|-------------|----------|---------------------------------|
| x, y0, out  | [..., K] [..., N] | compute dtype (autocast's) |
| W           | [N, K]   | compute dtype                   |
| Q           | [N, m]   | compute dtype; ∂Q in fp32       |
| share       | [N]      | fp32, or None for 1             |
| rows        | [m]      | int64                           |

Saved for backward: z ``[T, m]`` (only where Q is trained), Q, share and the frozen W itself; never
x or y0. R's rows are rows of W, so z costs a gather of y0 and no product with x. Where y0 is given
rather than made here, there is no W, and ∂y0 is what the backward pass ends with.

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
(benchmarks/results/triage-h100.json), so the forward takes whichever moves less. With a seed it
goes through W' rounded stochastically, of which 1.00 reaches the output, whatever that moves; the
backward pass takes W' before it is rounded, by either way: the mean of what the draws give.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch import absent, as_dtype, op, resolve, wide
from ..common import (
    Call,
    Gradients,
    Saved,
    Step,
    cast,
    gather,
    gradients_fake,
    product_wide,
    rounding_seed,
    summed_bias,
)
from ..project.op import projection
from ..weight.op import merged_weight

# The one-pass ∂y0 holds h [T block, m] in registers; above this rank plain torch computes it.
MAX_RANK = 512


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


def _kernels() -> Any:
    from . import triton

    return triton


@op("lowrank")
def lowrank(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor,
    q: Tensor,
    share: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    seed: int | None,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """``(out [T, N], z [T, m])`` of flat inputs in one dtype; share and δb may be wider.

    Without ``weight``, x is y0, bias included; it is not written. With ``seed``, W' is the one that
    a merge writes, of Q in fp32 and W in any dtype, rounded stochastically.
    """
    if seed is not None and weight is not None:
        fused = merged_weight.body(weight, rows, q, share, x.dtype, seed, impl)
        r = as_dtype(weight.index_select(0, rows), x.dtype)
        return F.linear(x, fused, summed_bias(bias, delta_bias, x.dtype)), x @ r.t()
    kernels = _kernels() if resolve(impl, x) == "triton" else None
    if weight is None:
        y0, inside = x, bias
    else:
        (t, k), (n, m) = x.shape, q.shape
        if kernels is not None and takes_weight(t, n, k, m, z_scale):
            r = kernels.padded_r(weight, rows)
            fused = kernels.rebuilt_weight(weight, r, q, share)
            return F.linear(x, fused, summed_bias(bias, delta_bias, x.dtype)), x @ r[:m].t()
        # No bias in the product: z is then y0's columns themselves, with nothing to cancel.
        y0, inside = F.linear(x, weight), None
    if kernels is not None:
        z = kernels.gather(y0, inside, rows, z_scale)
        given = weight is None
        out = torch.empty_like(y0, memory_format=torch.contiguous_format) if given else y0
        kernels.add_product(y0, z, q, share, bias, delta_bias, bias_inside=given, out=out)
        return out, z
    z = gather(y0, inside, rows, z_scale)
    out = y0.clone(memory_format=torch.contiguous_format) if weight is None else y0
    if share is not None:
        out.mul_(share)
    if inside is not None:
        bias = None if share is None else (1 - share) * inside
    return _add_(out.addmm_(z, q.t()), bias, delta_bias), z


@lowrank.register_fake
def _lowrank_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Tensor, q: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], q.shape[0]), x.new_empty(x.shape[0], rows.shape[0])


@op("lowrank_backward")
def lowrank_backward(
    g: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    rows: Tensor,
    q: Tensor,
    share: Tensor | None,
    z_scale: Tensor | None,
    needs: list[bool],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(∂x, ∂Q, ∂δb)``, those not needed empty; ∂Q and ∂δb in fp32 or wider.

    Without ``weight`` ∂y0 stands in ∂x's place.
    """
    dtype = wide(g.dtype)
    dx = _input_gradient(g, weight, rows, q, share, z_scale, impl) if needs[0] else absent(g)
    dq = product_wide(g.t(), z) if needs[1] and z is not None else absent(g, dtype)
    return dx, dq, g.sum(0, dtype=dtype) if needs[2] else absent(g, dtype)


@lowrank_backward.register_fake
def _lowrank_backward_fake(
    g: Tensor, z: Tensor | None, weight: Tensor | None, rows: Tensor, q: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs, _ = rest
    return gradients_fake(g, weight, q, needs)


def _input_gradient(
    g: Tensor,
    weight: Tensor | None,
    rows: Tensor,
    q: Tensor,
    share: Tensor | None,
    z_scale: Tensor | None,
    impl: str | None,
) -> Tensor:
    if weight is None:
        return _output_gradient(g, rows, q, share, z_scale, impl)
    n, k = weight.shape
    if not rebuilds_weight(g.shape[0], n, k, z_scale):
        return _output_gradient(g, rows, q, share, z_scale, impl) @ weight
    if resolve(impl, g) == "triton":
        kernels = _kernels()
        return g @ kernels.rebuilt_weight(weight, kernels.padded_r(weight, rows), q, share)
    fused = weight if share is None else (weight * share[:, None]).to(weight.dtype)
    return g @ torch.addmm(fused, q, weight.index_select(0, rows))


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


def _add_(out: Tensor, *biases: Tensor | None) -> Tensor:
    for bias in biases:
        if bias is not None:
            out.add_(bias)
    return out


def forward(call: Call, step: Step) -> tuple[Tensor, Saved]:
    """``(out [T, N], what is saved)`` of the space ``none``: Q is P."""
    dtype = step.x.dtype
    wanted = dtype if rounding_seed(call.layer, dtype) is None else step.u.dtype
    return add(call, step, projection(call, step.u, wanted), None)


def add(call: Call, step: Step, q: Tensor, share: Tensor | None) -> tuple[Tensor, Saved]:
    """``(out [T, N], what is saved)`` of an additive layer."""
    layer, dtype = call.layer, step.x.dtype
    seed = rounding_seed(layer, dtype)
    weight = None if call.given else cast(layer.weight, dtype)
    wide_q, q = q, as_dtype(q, dtype)
    taken = (weight, q) if seed is None else (layer.weight, wide_q)
    run = lowrank if call.watched else lowrank.body
    out, z = run(
        step.x,
        taken[0],
        cast(layer.bias, dtype),
        layer.rows,
        taken[1],
        share,
        step.delta_bias,
        step.z_scale,
        seed,
        call.impl,
    )
    return out, (z if step.keeps else None, weight, layer.rows, q, share, step.z_scale)


def backward(call: Call, g: Tensor, saved: Saved, needs: list[bool]) -> Gradients:
    """``(∂x or ∂y0, ∂Q, ∂δb)``."""
    run = lowrank_backward if call.watched else lowrank_backward.body
    return Gradients(*run(g, *saved, needs, call.impl))


__all__ = [
    "add",
    "backward",
    "forward",
    "lowrank",
    "lowrank_backward",
    "rebuilds_weight",
    "takes_weight",
]
