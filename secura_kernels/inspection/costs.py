"""What a whole layer launches by count, and which ways it takes: for ``secura doctor``, benchmarks.

Held to the launches that :mod:`benchmarks.counts` records.
"""

from __future__ import annotations

from .. import plan
from ..norm import Norm
from ..plan import DEFAULT, Ceilings, Cost, Shape, Steps


def projection(shape: Shape, itemsize: int) -> Steps:
    """``P = C U`` in elements of ``itemsize`` bytes: the sectors of C, 4 m² and N m elements."""
    _, n, k, m, s = shape
    return {"P": Cost(plan.sectors(n, k, m, s) + 4 * m * m + itemsize * n * m, 2 * n * m * m)}


def channel_norm(shape: Shape) -> Steps:
    """``Q`` of P: P in fp32, Q in the weight's dtype and R Rᵀ, (4 + s) N m + 4 m² bytes."""
    _, n, _, m, s = shape
    return {"Q": Cost((4 + s) * n * m + 4 * m * m, 2 * n * m * m)}


def core_gradient(shape: Shape) -> Steps:
    """``∂U = Cᵀ ∂P``: the sectors of C, ∂P in fp32, and its sums of parts of W's rows."""
    _, n, k, m, s = shape
    parts = 4 * min(plan.MOST_ROW_SPLITS, -(-n // plan.ROWS_OF_A_SPLIT)) * m * m
    return {
        "∂U": Cost(plan.sectors(n, k, m, s) + 4 * n * m + parts, 2 * n * m * m),
        "its parts": Cost(parts + 4 * m * m),
    }


def _additive(shape: Shape, scaled: bool, kept: bool, ceilings: Ceilings) -> tuple[Steps, Steps]:
    t, n, _, m, s = shape
    forward = projection(shape, 4 if scaled else s)
    if scaled:
        forward |= channel_norm(shape)
    by_weight = plan.takes_weight(shape, kept, ceilings)
    forward["product"] = plan.product(shape)
    forward |= plan.out_by_weight(shape) if by_weight else plan.out_by_output(shape)
    if by_weight and kept:
        backward = {"product": plan.product(shape)}
    else:
        way = plan.input_way(shape, ceilings=ceilings)
        backward = dict(plan.input_ways(shape, ceilings=ceilings)[way])
        if way == "weight":
            del backward["R"]  # read in W
    backward["∂P"] = Cost(s * (t * n + t * m) + 4 * n * m, 2 * t * n * m)
    return forward, backward | core_gradient(shape)


def _activation(shape: Shape, norm: Norm, ceilings: Ceilings) -> tuple[Steps, Steps]:
    t, n, _, m, s = shape
    z, _ = plan.out_by_output(shape).items()
    normed = Cost(s * (2 * t * n + t * m + n * m), 2 * t * n * m)
    forward = projection(shape, s) | {"product": plan.product(shape)} | dict([z]) | {"norm": normed}
    h = 4 * plan.parts_of_h(shape, ceilings) * t * m
    change = Cost(s * (3 * t * n + t * m + n * m) + h, 4 * t * n * m)
    adds = plan.adds_h(shape, norm, ceilings)
    way = (
        plan.summed_h(shape, ceilings) | plan.added_h(shape)
        if adds
        else plan.base_gradient(shape, ceilings)
    )
    backward = {"dΔ and h": change} | way
    backward["∂P"] = Cost(s * (t * n + t * m) + 4 * n * m, 2 * t * n * m)
    return forward, backward | core_gradient(shape)


def _weight(shape: Shape, norm: Norm, kept: bool, ceilings: Ceilings) -> tuple[Steps, Steps]:
    t, n, k, m, s = shape
    made, thin = plan.fused_weight(shape), 2 * n * k * m
    forward = projection(shape, s)
    if norm.needs_peak:
        forward["largest ρ"] = Cost(s * (n * k + m * (n + k)), thin)
    forward |= made | {"product": plan.product(shape)}
    chunks = -(-n // plan.rows_of_chunk(n, k, s))
    of_chunk = plan.product(Shape(n // chunks, k, t, m, s))
    programs = -(-n // (chunks * plan.ROWS_OF_A_PROGRAM))
    parts = 4 * plan.splits(programs, plan.MOST_SPLITS, ceilings.processors) * n * m
    backward = ({} if kept else made) | {"product": plan.product(shape)}
    backward |= plan.gathered_rows(shape) | {
        "gᵀx": Cost(chunks * of_chunk.bytes, 2 * t * n * k),
        "∂P": Cost(s * (2 * n * k + m * (n + chunks * k)) + parts, 2 * thin),
        "its sum": Cost(parts + 4 * n * m if parts > 4 * n * m else 0.0),
    }
    return forward, backward | core_gradient(shape)


def layer_costs(
    shape: Shape, norm: Norm, kept: bool = False, ceilings: Ceilings = DEFAULT
) -> tuple[Steps, Steps]:
    """What a layer's forward and its backward pass launch, as :mod:`secura_kernels.plan` chooses.

    A U that is trained itself, nothing folded, dropped or restrained, no biases, y0 saved.

    Args:
        shape: the layer's; its ``itemsize`` is of 16 bits.
        norm: of :func:`secura_kernels.norm.complete`.
        kept: whether W' is kept (:func:`secura_kernels.kept_weight.keeps_weight`).
        ceilings: the chip's.
    """
    if norm.space == "activation":
        return _activation(shape, norm, ceilings)
    if norm.space == "weight":
        return _weight(shape, norm, kept, ceilings)
    return _additive(shape, norm.space == "channel", kept, ceilings)


def over_frozen(
    shape: Shape, norm: Norm, kept: bool = False, ceilings: Ceilings = DEFAULT
) -> float:
    """The least time of a layer's two passes over the frozen layer's two products.

    Arguments of :func:`layer_costs`.
    """
    both = layer_costs(shape, norm, kept, ceilings)
    frozen = 2 * plan.product(shape).seconds(ceilings)
    return sum(plan.seconds(steps, ceilings) for steps in both) / frozen


def choices(
    shape: Shape, norm: Norm, kept: bool = False, ceilings: Ceilings = DEFAULT
) -> dict[str, str]:
    """Which ways a layer takes, in words; arguments of :func:`layer_costs`."""
    ways = {"weight": "g W'", "h": "h R + g W", "output": "∂y0 W"}
    if norm.space == "activation":
        return {
            "out": "y0, normed",
            "∂x": ways["h" if plan.adds_h(shape, norm, ceilings) else "output"],
        }
    by_weight = norm.space == "weight" or plan.takes_weight(shape, kept, ceilings)
    always = norm.space == "weight" or (by_weight and kept)
    way = "weight" if always else plan.input_way(shape, ceilings=ceilings)
    found = {"out": "x W'ᵀ" if by_weight else "y0 + z Qᵀ", "∂x": ways[way]}
    return found | ({"W'": "kept" if kept else "rebuilt"} if way == "weight" else {})


__all__ = ["channel_norm", "choices", "layer_costs", "over_frozen", "projection"]
