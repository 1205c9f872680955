"""Run an adapted layer as one op, from the adapter's own parameters to the output.

    U = s · A B      P = C (U + U_acc)   or, with the norm's reference "folded",
                     P = C U, P_base = C U_acc
    out = the norm space's layer of x (or y0), W, b, P, P_base

    ∂U = Cᵀ ∂P      ∂A = s · ∂U Bᵀ      ∂B = s · Aᵀ ∂U

| norm         | out                                                  | folder           |
|--------------|------------------------------------------------------|------------------|
| `none`       | x (W + P R)ᵀ + b + δb                                | `ops/lowrank`    |
| `channel`    | the same with one gain an output row                 | `ops/channel`    |
| `activation` | S-MagNorm of y0 and its change                       | `ops/activation` |
| `weight`     | x W'ᵀ + b + δb, W' = S-MagNorm of W and its change   | `ops/weight`     |

What each saves for the backward pass, and the bytes it moves, stand in its folder's ``op.py``;
:mod:`secura_kernels.naive` has the same functions as plain equations. One function of
:mod:`secura_kernels.autograd` serves them all. Under torch.compile, a dispatch mode or with a
tensor subclass it calls the ops through torch's dispatcher, else their bodies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import naive
from .autograd import SPACES, SecuraFunction
from .checks import check_call, check_trained
from .dispatch import (
    FLOATS,
    SETTLED,
    compute_dtype,
    is_watched,
    resolve,
    supported,
    without_autocast,
)
from .layer import Layer, cores
from .norm import NO_WEIGHT, pack
from .ops import flops
from .ops.common import Call, rounding_seed
from .ops.project import op as project
from .ops.weight import op as weight
from .shared import Total, shared

flops.register()


def secura_linear(
    x: Tensor,
    layer: Layer,
    a: Tensor,
    b: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    z_scale: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute an adapted layer's output ``[..., N]`` from its input ``x [..., K]``.

    Args:
        x: ``[..., K]``.
        layer: the frozen layer and how it is adapted.
        a: ``A [m, r]``, or ``[m, m]`` where there is no ``b``; multiplied in fp32 or wider.
        b: ``B [r, m]``, or None.
        delta_bias: trainable bias ``[N]`` or None; ``activation`` counts it to Δ, the others add it
            after the norm.
        z_scale: ``[..., m]``, multiplies ``z = x Rᵀ`` (dropout), or None; not for ``weight``.
        impl: ``"auto"``, ``"triton"``, ``"reference"``, or None for what ``SECURA_IMPL`` says.

    Returns:
        ``[..., N]`` in the compute dtype: autocast's where it is on, x's own otherwise. Gradients
        reach x, a, b and delta_bias, once differentiable.

    Raises:
        TypeError: for operands of other dtypes than fp16, bf16, fp32 and fp64, DTensors, indices
            that are no int64, and options of another class.
        ValueError: where shapes do not fit, or for an unknown form, combination, ``save`` or
            ``impl``; for numbers of the norm that are out of range; for ``channel`` without
            ``gram`` and ``base_norms``; for ``weight`` with ``z_scale``; for a ``rounding_seed``
            with ``activation``, ``z_scale`` or in fp16, or one that is no integer; for a layer
            whose weight, bias, columns, core or scaling, or a z_scale, requires a gradient.
        RuntimeError: for ``impl="triton"`` where no kernel can take the tensors; in the backward
            pass, for a second derivative.
    """
    if layer.weight is None:
        raise ValueError("the layer has no weight: call secura_add with the base's own output")
    shape = layer.weight.shape
    if len(shape) != 2:
        raise ValueError(f"weight {list(shape)} must be [N, K]")
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(
            f"x {list(x.shape)} does not fit the weight [N, K]={list(shape)}: x has to be "
            f"[..., {shape[1]}]"
        )
    n = shape[0]
    return _run(x, n, compute_dtype(x), layer, a, b, delta_bias, z_scale, impl, given=False)


def secura_add(
    y0: Tensor,
    layer: Layer,
    a: Tensor,
    b: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    z_scale: Tensor | None = None,
    z: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute an adapted layer's output ``[..., N]`` from its base's ``y0 [..., N]``.

    For a base that is more than a frozen dense product (quantised, hooked, itself trained).

    Args:
        y0: ``[..., N]``, the base layer's output, ``layer.bias`` included; never written.
        layer: as for :func:`secura_linear`; ``weight`` may be None where ``columns`` are given.
        a, b, delta_bias, z_scale, impl: as for :func:`secura_linear`.
        z: ``x Rᵀ [..., m]``, made of the layer's input, or None to read it off y0, less the bias. A
            y0 in 16 bits has lost as many bits of z as the bias is larger. It is a number to the
            gradient, which goes through y0 either way.

    Returns:
        ``[..., N]`` in y0's dtype. Gradients reach y0, a, b and delta_bias, once differentiable;
        where they are asked of the layer's weight, bias or columns, these too, by plain equations.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`secura_linear`; ValueError also for
            ``weight`` or a ``rounding_seed``, which multiply by another weight and cannot use y0,
            for a layer with neither weight nor columns, and a z that requires a gradient.
    """
    if layer.weight is None and layer.columns is None:
        raise ValueError("the layer has neither weight nor columns, of which P is made")
    if y0.dim() == 0:
        raise ValueError("y0 [] must be [..., N]")
    n = y0.shape[-1]
    return _run(y0, n, y0.dtype, layer, a, b, delta_bias, z_scale, impl, z=z, given=True)


def effective_weight(
    layer: Layer,
    a: Tensor,
    b: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute the plain weight ``W' [N, K]`` that makes the same layer: what a merge writes.

    Args:
        layer: the frozen layer and how it is adapted.
        a, b, impl: as for :func:`secura_linear`.
        dtype: of the result, rounded to once; W's own by default. To bf16 from the layer's
            ``rounding_seed`` if it has one: up with the probability of the part that is cut off,
            each entry as in the forward pass. Entries that bf16 holds exactly never change.

    Returns:
        ``[N, K]`` in W's layout. No gradient; W is not written.

    Raises:
        TypeError: for operands or a ``dtype`` other than fp16, bf16, fp32 and fp64.
        ValueError: for ``norm="activation"``, stochastic rounding to fp16, a layer without weight,
            shapes that do not fit, or an unknown form or ``impl``.
        RuntimeError: for ``impl="triton"`` where no kernel can take the weight.
    """
    options, w, rows = layer.options, layer.weight, layer.rows
    if options.norm == "activation":
        raise ValueError(NO_WEIGHT)
    if w is None:
        raise ValueError("the layer has no weight to make another of: give Layer.weight")
    check_call(None, w.shape[0] if w.dim() else 0, (), layer, a, b, None, None)
    dtype = dtype or w.dtype
    if dtype not in FLOATS:
        raise TypeError(f"a weight in {dtype} is not made: choose fp16, bf16, fp32 or fp64")
    seed = rounding_seed(layer, dtype)
    call = _call(layer, given=False, watched=True, impl=impl)
    with torch.no_grad(), without_autocast(w.device.type):
        p, p_base = _projections(call, a, b)
        if options.norm == "weight":
            return weight.normed_weight(
                w, rows, p, p_base, call.important, call.packed, dtype, seed, impl
            )
        q, base_scale, _ = SPACES[options.norm].product(call, p, p_base, p.dtype)
        return weight.merged_weight(w, rows, q, base_scale, dtype, seed, impl)


@torch.no_grad()
def additive_product(
    layer: Layer, a: Tensor, b: Tensor | None = None, *, impl: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute ``(Q [N, m], base_scale [N] or None)``: the layer is base_scale · W + Q R.

    Of ``none`` and ``channel``. Where base_scale is None, R and Q are the factors of a LoRA that
    computes the same. No gradient.

    Raises:
        ValueError: for another space, or where shapes do not fit.
    """
    if layer.options.norm not in ("none", "channel"):
        raise ValueError(f"norm={layer.options.norm!r} adds no product of low rank")
    source = layer.weight if layer.columns is None else layer.columns
    if source is None:
        raise ValueError("the layer has neither weight nor columns, of which P is made")
    check_call(None, source.shape[0], (), layer, a, b, None, None)
    call = _call(layer, given=False, watched=True, impl=impl)
    with without_autocast(a.device.type):
        p, p_base = _projections(call, a, b)
        q, base_scale, _ = SPACES[layer.options.norm].product(call, p, p_base, p.dtype)
    return q, base_scale


def _call(
    layer: Layer,
    *,
    given: bool,
    watched: bool,
    impl: str | None,
    total: Total | None = None,
    differentiates: bool = False,
) -> Call:
    restrain = layer.restrain
    packed = pack(layer.options, restrain, traced=watched)
    important = None if restrain is None else restrain.important
    return Call(layer, packed, important, given, watched, impl, total, differentiates)


def _projections(call: Call, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``(P, P_base or None)``, ``[N, m]``, fp32 or wider."""
    u, u_base = cores(call.layer, a, b)
    return project.projections(call, u, u_base, u.dtype)


def _run(
    x: Tensor,
    n: int,
    dtype: torch.dtype,
    layer: Layer,
    a: Tensor,
    b: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    impl: str | None,
    *,
    z: Tensor | None = None,
    given: bool,
) -> Tensor:
    """Check, flatten, choose the implementation, and run the layer in ``dtype``."""
    lead = x.shape[:-1]
    check_call(x, n, lead, layer, a, b, delta_bias, z_scale, z)
    if given and layer.replaces_product:
        what = "stochastic rounding" if layer.options.norm != "weight" else "the space 'weight'"
        raise ValueError(f"{what} multiplies by W' itself: call secura_linear")
    w, bias, columns = layer.weight, layer.bias, layer.columns
    trained = (w is not None and w.requires_grad) or (bias is not None and bias.requires_grad)
    trained = trained or (columns is not None and columns.requires_grad)
    trained = trained and torch.is_grad_enabled()
    if trained or torch._C._get_tracing_state() is not None:  # torch.jit.trace
        if trained:
            check_trained(layer, given)
        elif w is None and layer.options.norm == "channel":
            raise ValueError(
                "torch.jit.trace needs W itself for 'channel': merge the adapter first"
            )
        resolve("auto" if impl in (None, "triton") else impl, x)  # refuses what it does not know
        if impl == "triton":
            why = "the layer's own weight is trained" if trained else "torch.jit.trace is at work"
            raise RuntimeError(f"impl='triton' cannot run: {why}, which plain torch computes")
        pack(layer.options, layer.restrain, traced=True)  # refuses what it would refuse elsewhere
        named: Any = {"delta_bias": delta_bias, "z_scale": z_scale}
        with without_autocast(x.device.type):
            if given:
                out = naive.secura_add(x, layer, a, b, z=z, **named)
            else:
                out = naive.secura_linear(x, layer, a, b, **named)
        return out.to(dtype)
    of_layer = w, bias, layer.rows, layer.cols, layer.core, columns, layer.gram, layer.base_norms
    watched = is_watched(x, a, b, delta_bias, z_scale, z, *of_layer, layer.restrain)
    z = z if z is None or z.dtype == dtype else z.to(dtype)
    total = None
    if layer.shares_input and not given:
        x, total = shared(x, dtype)
    elif x.dtype != dtype:
        x = x.to(dtype)
    if not watched:
        impl = supported(impl, x, layer.weight, layer.columns, a, b)
        impl = SETTLED if impl == "triton" else impl
    call = _call(
        layer,
        given=given,
        watched=watched,
        impl=impl,
        total=total,
        differentiates=torch.is_grad_enabled(),
    )
    return SecuraFunction.apply(x, a, b, delta_bias, z_scale, z, call)


__all__ = ["Layer", "additive_product", "effective_weight", "secura_add", "secura_linear"]
