"""Operations of every op's matrix products, for ``torch.utils.flop_counter.FlopCounterMode``.

A multiplication and an addition are two operations, as torch counts its own products. Elementwise
work is left out, as there. A formula takes those arguments of its op that it names.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import plan
from .._ops import ops
from ..dispatch import resolve, supported
from ..norm import unpack
from .activation.op import activation, activation_backward, makes_z
from .channel.op import channel
from .common import Terms
from .lowrank.op import lowrank, lowrank_backward, takes_weight
from .project.op import project, project_backward
from .weight.op import weight, weight_backward
from .weight.plain import rows_at_once


def _product(*sizes: int) -> int:
    return 2 * math.prod(sizes)


def _sides(terms: list[Tensor | None]) -> int:
    """Thin products that make Δ and, where something was folded, the base."""
    return 1 if terms[1] is None else 2


def _rank(terms: list[Any]) -> int:
    return Terms._make(terms).p.shape[1]


def _project(weight: Tensor, u: Tensor) -> int:
    return _product(weight.shape[0], *u.shape)


def _project_backward(dp: Tensor) -> int:
    return _product(*dp.shape, dp.shape[1])


def _lowrank(
    x: Tensor,
    weight: Tensor | None,
    q: Tensor,
    beside: list[Tensor | None],
    needs_z: bool,
    keep: bool,
    seed: int | None,
    impl: str | None,
) -> int:
    (t, k), (n, m) = x.shape, q.shape
    if weight is None:
        return _product(t, n, m)
    on_gpu = resolve(impl, x) == "triton"
    fused = seed is not None or (on_gpu and takes_weight(x, q, beside[2], keep))
    thin = _product(n, k, m) + needs_z * _product(t, k, m) if fused else _product(t, n, m)
    return _product(t, n, k) + thin


def _lowrank_backward(
    g: Tensor,
    weight: Tensor | None,
    q: Tensor,
    base_scale: Tensor | None,
    z_scale: Tensor | None,
    needs: list[bool],
) -> int:
    t, (n, m) = g.shape[0], q.shape
    to_x = thin = _product(t, n, m)
    if weight is not None:
        k = weight.shape[1]
        shape = plan.Shape(t, n, k, m, g.element_size())
        way = plan.input_way(
            shape, z_scale is not None, base_scale is not None, plan.ceilings_of(g)
        )
        beside = {"weight": _product(n, k, m), "h": thin + _product(t, m, k), "output": thin}
        to_x = _product(t, n, k) + beside[way]
    return needs[0] * to_x + needs[1] * thin


def _channel(p: Tensor) -> int:
    return _product(*p.shape, p.shape[1])


def _activation(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Tensor, terms: list[Any]
) -> int:
    t, n = x.shape[0], Terms._make(terms).p.shape[0]
    made = 0 if weight is None else _product(t, *weight.shape)
    made += _product(t, x.shape[1], rows.shape[0]) if makes_z(x, weight, bias) else 0
    return made + _sides(terms) * _product(t, n, rows.shape[0])


def _activation_backward(
    g: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    terms: list[Any],
    packed: str,
    needs: list[bool],
) -> int:
    (t, n), m = g.shape, _rank(terms)
    to_x = 0
    if weight is not None:
        k = weight.shape[1]
        shape = plan.Shape(t, n, k, m, g.element_size())
        added = plan.adds_h(shape, unpack(packed), plan.ceilings_of(g))
        to_x = _product(t, n, k) + (_product(t, m, k) if added else 0)
    again = 0 if saved.dtype == torch.uint8 else _sides(terms)
    thin = again + needs[0] * _sides(terms) + needs[1]
    return needs[0] * to_x + thin * _product(t, n, m)


def _weight(x: Tensor, w: Tensor, terms: list[Any], packed: str, impl: str | None) -> int:
    norm, plain = unpack(packed), supported(impl, x, w) == "reference"
    whole = plain and w.shape[0] <= rows_at_once(w, torch.float32)  # and kept from pass to pass
    passes = 1 if whole else 1 + norm.needs_peak + norm.restrained
    thin = _sides(terms) * _product(*w.shape, _rank(terms))
    return _product(x.shape[0], *w.shape) + passes * thin


def _weight_backward(g: Tensor, w: Tensor, terms: list[Any], needs: list[bool]) -> int:
    thin, wide = _product(*w.shape, _rank(terms)), _product(g.shape[0], *w.shape)
    made = any(needs[:2]) * _sides(terms) * thin
    return made + needs[0] * wide + needs[1] * (wide + thin)


FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., int]]] = {
    "project": (project, _project),
    "project_backward": (project_backward, _project_backward),
    "lowrank": (lowrank, _lowrank),
    "lowrank_backward": (lowrank_backward, _lowrank_backward),
    "channel": (channel, _channel),
    "activation": (activation, _activation),
    "activation_backward": (activation_backward, _activation_backward),
    "weight": (weight, _weight),
    "weight_backward": (weight_backward, _weight_backward),
}
"""By operator: the op and its formula."""


def _by_name(op: Callable[..., Any], formula: Callable[..., int]) -> Callable[..., int]:
    names = tuple(inspect.signature(op).parameters)
    wanted = tuple(inspect.signature(formula).parameters)

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        given = dict(zip(names, args, strict=False)) | kwargs
        return formula(**{name: given[name] for name in wanted})

    return count


def register() -> None:
    """Tell torch's counter, once all ops are defined."""
    for name, (op, formula) in FORMULAS.items():
        operator = getattr(ops, name)
        register_flop_formula(operator, get_raw=True)(_by_name(op, formula))


__all__ = ["FORMULAS", "register"]
