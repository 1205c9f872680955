"""The additive spaces, ``none`` and ``channel``: a thin product added to the frozen output.

    y0 = x Wᵀ + b         z = (y0[:, rows] − b[rows]) · z_scale
    out = base_scale · (y0 − b) + b + z Qᵀ + δb

    ∂Q = ḡᵀ z          ∂δb = Σ ḡ          ∂y0 = base_scale · ḡ,  ∂y0[:, rows] += (ḡ Q) · z_scale
    ∂x = ∂y0 W = ḡ W',  W' = base_scale · W + Q R (where there is no z_scale)
       = h R + ḡ W,     h = (ḡ Q) · z_scale  (where there is no base_scale)

| tensor      | shape    | dtype                           |
|-------------|----------|---------------------------------|
| x, y0, out  | [..., K] [..., N] | compute dtype (autocast's) |
| W           | [N, K]   | compute dtype                   |
| Q           | [N, m]   | compute dtype; ∂Q in fp32       |
| base_scale  | [N]      | fp32, or None for 1             |
| rows        | [m]      | int64                           |

Saved for backward: z ``[T, m]`` (only where Q is trained), Q, base_scale and the frozen W itself;
never x or y0. R's rows are rows of W, so z costs a gather of y0 and no product with x. Where y0 is
given rather than made here, there is no W, and ∂y0 is what the backward pass ends with.

Forward and ∂x each take the way that :mod:`secura_kernels.plan` finds to move less; out is then
cuBLAS's ``addmm_`` in place of y0 where there is no base_scale and no bias. A W' that the forward
made may be kept for the backward pass (:func:`secura_kernels.kept_weight.keeps_weight`).

W' rounded to bf16 drops a change smaller than half a unit in W's last place, y0 rounded to bf16 one
smaller than half a unit in y0's: of a change of 1e-3 of the weight 0.52 and 0.53 reach the output
(benchmarks/results/triage-h100.json), so the forward takes whichever moves less. With a seed it
always goes through W', rounded stochastically, and 1.00 of the change reaches the output in the
mean; the backward pass takes W' before it is rounded, which is the mean over the draws.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import kept_weight, plan
from ...dispatch import absent, as_dtype, kernels, op, wide
from ...held import once
from ...shared import added
from ..common import (
    Call,
    Gradients,
    Saved,
    Step,
    frozen,
    gather,
    gradients_fake,
    product_wide,
    rounding_seed,
    summed_bias,
    times_rows,
)
from ..project.op import projections
from ..weight.op import merged_weight

MAX_RANK = 512
"""The one-pass ∂y0 holds h ``[T block, m]`` in registers; above it plain torch computes it."""


def takes_weight(x: Tensor, q: Tensor, z_scale: Tensor | None, keep: bool) -> bool:
    """Whether the kernels' forward of flat ``x [T, K]`` goes through W', as the plan says."""
    (t, k), (n, m) = x.shape, q.shape
    if z_scale is not None:
        return False
    shape = plan.Shape(t, n, k, m, x.element_size())
    return plan.takes_weight(shape, keep and kept_weight.foresees_kept(), plan.ceilings_of(x))


@op("lowrank")
def lowrank(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor,
    q: Tensor,
    beside: list[Tensor | None],
    needs_z: bool,
    keep: bool,
    seed: int | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out [T, N], z [T, m], W')`` of flat inputs in one dtype.

    ``beside`` is base_scale ``[N]`` and δb ``[N]``, which may be wider, z_scale ``[T, m]``, and z
    ``[T, m]``, scaled already, where it is not to be read off y0; each may be None. Without
    ``weight``, x is y0, bias included; it is not written. z is empty unless ``needs_z`` asks for
    one that is made here, which does not change out. W' ``[N, K]`` is empty unless ``keep`` asks
    for it and the forward went through it. With ``seed``, W' is the one that a merge writes, of Q
    in fp32 and W in any dtype, rounded stochastically; it is not kept.
    """
    base_scale, delta_bias, z_scale, z = beside
    needs_z = needs_z and z is None
    if seed is not None and weight is not None:
        fused = merged_weight.body(weight, rows, q, base_scale, x.dtype, seed, impl)
        out = F.linear(x, fused, summed_bias(bias, delta_bias, x.dtype))
        return out, times_rows(x, weight, rows) if needs_z else absent(x), absent(x)
    triton = kernels(__package__, impl, x)
    if weight is None:
        y0, inside = x, bias
    elif triton is not None and takes_weight(x, q, z_scale, keep):
        fused = merged_weight.body(weight, rows, q, base_scale, x.dtype, None, impl)
        out = F.linear(x, fused, summed_bias(bias, delta_bias, x.dtype))
        z = times_rows(x, weight, rows) if needs_z else absent(x)
        return out, z, fused if keep else absent(x)
    else:
        # No bias in the product: z is then y0's columns themselves, with nothing to cancel.
        y0, inside = F.linear(x, weight), None
    if triton is not None:
        z = triton.gather(y0, inside, rows, z_scale) if z is None else z
        given = weight is None
        out = torch.empty_like(y0, memory_format=torch.contiguous_format) if given else y0
        triton.add_product(y0, z, q, base_scale, bias, delta_bias, bias_inside=given, out=out)
        return out, z if needs_z else absent(x), absent(x)
    z = gather(y0, inside, rows, z_scale) if z is None else z
    out = y0.clone(memory_format=torch.contiguous_format) if weight is None else y0
    if base_scale is not None:
        out.mul_(base_scale)
    if inside is not None:
        bias = None if base_scale is None else (1 - base_scale) * inside
    out.addmm_(z, q.t())
    for term in (bias, delta_bias):
        if term is not None:
            out.add_(term)
    return out, z if needs_z else absent(x), absent(x)


@lowrank.register_fake
def _lowrank_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Tensor, q: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    t, ((*_, z), needs_z, *_) = x.shape[0], rest
    z = x.new_empty(t, rows.shape[0]) if needs_z and z is None else absent(x)
    return x.new_empty(t, q.shape[0]), z, absent(x)


@op("lowrank_backward")
def lowrank_backward(
    g: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    rows: Tensor,
    q: Tensor,
    base_scale: Tensor | None,
    z_scale: Tensor | None,
    needs: list[bool],
    impl: str | None,
    *,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(∂x, ∂Q, ∂δb)``, those not needed empty; ∂Q and ∂δb in fp32 or wider.

    Without ``weight`` ∂y0 stands in ∂x's place. With ``total`` ∂x is that, added to in place.
    """
    dtype = wide(g.dtype)
    parts = (g, weight, rows, q, base_scale, z_scale)
    dx = _input_gradient(*parts, impl, total) if needs[0] else absent(g)
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
    base_scale: Tensor | None,
    z_scale: Tensor | None,
    impl: str | None,
    total: Tensor | None,
) -> Tensor:
    if weight is None:
        return _output_gradient(g, rows, q, base_scale, z_scale, impl)
    n, k = weight.shape
    shape = plan.Shape(g.shape[0], n, k, q.shape[1], g.element_size())
    way = plan.input_way(shape, z_scale is not None, base_scale is not None, plan.ceilings_of(g))
    if way == "output":
        return added(total, _output_gradient(g, rows, q, base_scale, z_scale, impl), weight)
    if way == "h":
        h = g @ q if z_scale is None else (g @ q).mul_(z_scale)
        return added(total, h, weight.index_select(0, rows)).addmm_(g, weight)
    return added(total, g, merged_weight.body(weight, rows, q, base_scale, g.dtype, None, impl))


def _output_gradient(
    g: Tensor,
    rows: Tensor,
    q: Tensor,
    base_scale: Tensor | None,
    z_scale: Tensor | None,
    impl: str | None,
) -> Tensor:
    """``∂y0 = base_scale · ḡ``, ``(ḡ Q) · z_scale`` added to the columns ``rows``; g is kept."""
    if q.shape[1] <= MAX_RANK and (triton := kernels(__package__, impl, g)):
        return triton.output_gradient(g, rows, q, base_scale, z_scale)
    h = g @ q
    if z_scale is not None:
        h.mul_(z_scale)
    if base_scale is None:
        return g.contiguous().index_add(1, rows, h)
    dy0 = g.clone(memory_format=torch.contiguous_format).mul_(base_scale)
    return dy0.index_add_(1, rows, h)


def product(
    call: Call, p: Tensor, p_base: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, None, None]:
    """``(Q [N, m] in dtype, None, None)`` of the space ``none``: Q is P, and the base W itself."""
    assert p_base is None
    return as_dtype(p, dtype), None, None


def forward(call: Call, step: Step) -> tuple[Tensor, Saved]:
    """``(out [T, N], what is saved)`` of the space ``none``: Q is P."""
    seed = rounding_seed(call.layer, step.x.dtype)
    wanted = step.x.dtype if seed is None else step.u.dtype
    thin = (call, step.u, step.u_base, wanted)
    p, _ = once(call.layer.held, ("P", wanted), projections, *thin)
    return add(call, step, p, None, seed)


def add(
    call: Call, step: Step, q: Tensor, base_scale: Tensor | None, seed: int | None
) -> tuple[Tensor, Saved]:
    """``(out [T, N], what is saved)`` of an additive layer; ``seed`` of :func:`rounding_seed`."""
    x, rows, z_scale, dtype = step.x, call.layer.rows, step.z_scale, step.x.dtype
    own_z = step.z if step.z is None or z_scale is None else step.z * z_scale
    weight, bias = frozen(call, dtype)
    wide_q = q
    if q.dtype != dtype:
        q = q.to(dtype)
    weight_in, q_in = (weight, q) if seed is None else (call.layer.weight, wide_q)
    keep = seed is None and kept_weight.keeps_weight(call.watched)
    beside = [base_scale, step.delta_bias, z_scale, own_z]
    run = lowrank if call.watched else lowrank.body
    settings = (step.needs_p, keep, seed, call.impl)
    out, z, fused = run(x, weight_in, bias, rows, q_in, beside, *settings)
    kept = fused if fused.numel() else None
    z = z if own_z is None else own_z
    return out, (kept, z if step.needs_p else None, weight, rows, q, base_scale, z_scale)


def backward(
    call: Call, g: Tensor, saved: Saved, needs: list[bool], total: Tensor | None
) -> Gradients:
    """``(∂x or ∂y0, ∂Q, ∂δb)``; ``total``, where one is given, is added to and is ∂x."""
    kept, *saved_by_op = saved
    wanted = needs if kept is None else [False, *needs[1:]]
    run = lowrank_backward if call.watched else lowrank_backward.body
    dx, dq, dbias = run(g, *saved_by_op, wanted, call.impl, total=total)
    if kept is not None and needs[0]:
        dx = added(total, g, kept)
    return Gradients(dx, dq, dbias)


__all__ = [
    "add",
    "backward",
    "forward",
    "lowrank",
    "lowrank_backward",
    "product",
    "takes_weight",
]
