"""Operations of every op's matrix products, for ``torch.utils.flop_counter.FlopCounterMode``.

A multiplication and an addition are two operations, as torch counts its own products. Elementwise
work is left out, as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .activation_dense import adds_thin
from .additive import rebuilds_weight
from .gain import needs_peak


def _product(*sizes: int) -> int:
    return 2 * math.prod(sizes)


def _lowrank_linear(x, weight, bias, rows, q, *_: Any, **__: Any) -> int:
    (t, k), (n, m) = x, q
    return _product(t, n, k) + _product(t, n, m)


def _lowrank_linear_backward(
    g, z, weight, rows, q, share, z_scale, needs, *_: Any, **__: Any
) -> int:
    (t, n), k, m = g, weight[1], q[1]
    whole = rebuilds_weight(t, n, k, z_scale)
    to_x = _product(t, n, k) + (_product(n, k, m) if whole else _product(t, n, m))
    return needs[0] * to_x + needs[1] * _product(t, n, m)


def _lowrank_add(y0, bias, rows, q, *_: Any, **__: Any) -> int:
    return _product(*y0, q[1])


def _lowrank_add_backward(g, z, rows, q, share, z_scale, needs, *_: Any, **__: Any) -> int:
    return (needs[0] + needs[1]) * _product(*g, q[1])


def _channel_product(p, *_: Any, **__: Any) -> int:
    return _product(*p, p[1])


def _activation_norm(y0, bias, rows, p, p_base, *_: Any, **__: Any) -> int:
    return _sides(p_base) * _product(*y0, p[1])


def _activation_norm_backward(
    g, y0, kept, z, rows, p, p_base, delta_bias, z_scale, scalars, factor, known, form, combine,
    needs, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _gain_gradients(g, y0, p, p_base, needs)


def _activation_linear(x, weight, bias, rows, p, p_base, *_: Any, **__: Any) -> int:
    (t, k), (n, m) = x, p
    return _product(t, n, k) + _sides(p_base) * _product(t, n, m)


def _activation_linear_backward(
    g, y0, kept, z, weight, rows, p, p_base, delta_bias, z_scale, scalars, factor, known, form,
    combine, needs, *_: Any, **__: Any,
) -> int:  # fmt: skip
    (t, n), k, m = g, weight[1], p[1]
    thin = _product(t, m, k) if adds_thin(n, k, combine, factor) else 0
    return needs[0] * (_product(t, n, k) + thin) + _gain_gradients(g, y0, p, p_base, needs)


def _weight_norm_linear(
    x, weight, bias, rows, p, p_base, delta_bias, important, form, *_: Any, **__: Any
) -> int:
    (t, k), (n, m) = x, p
    passes = 1 + needs_peak(form) + (important is not None)
    return _product(t, n, k) + passes * _sides(p_base) * _product(n, k, m)


def _weight_norm_linear_backward(
    g, x, weight, rows, p, p_base, scalars, factor, form, combine, needs, *_: Any, **__: Any
) -> int:
    (t, n), k, m = g, weight[1], p[1]
    rebuilt = _sides(p_base) * _product(n, k, m)
    to_x = _product(t, n, k) + rebuilt
    return needs[0] * to_x + needs[1] * (to_x + _product(n, k, m))


def _sides(p_base: Any) -> int:
    """Thin products that make Δ and, where something was folded, the base."""
    return 1 if p_base is None else 2


def _gain_gradients(g, y0, p, p_base, needs) -> int:
    again = 0 if y0 is None else _sides(p_base)
    return (again + needs[0] * _sides(p_base) + needs[1]) * _product(*g, p[1])


def _project(weight, cols, u, *_: Any, **__: Any) -> int:
    return _product(weight[0], *u)


def _project_backward(dp, weight, cols, *_: Any, **__: Any) -> int:
    return _product(*dp, cols[0])


FORMULAS: dict[str, Callable[..., int]] = {
    "project": _project,
    "project_backward": _project_backward,
    "lowrank_linear": _lowrank_linear,
    "lowrank_linear_backward": _lowrank_linear_backward,
    "lowrank_add": _lowrank_add,
    "lowrank_add_backward": _lowrank_add_backward,
    "channel_product": _channel_product,
    "activation_norm": _activation_norm,
    "activation_norm_backward": _activation_norm_backward,
    "activation_linear": _activation_linear,
    "activation_linear_backward": _activation_linear_backward,
    "weight_norm_linear": _weight_norm_linear,
    "weight_norm_linear_backward": _weight_norm_linear_backward,
}
"""By op; each takes shapes in the place of tensors."""


def register() -> None:
    """Tell torch's counter, once all ops are defined."""
    for name, formula in FORMULAS.items():
        register_flop_formula(getattr(torch.ops.secura, name))(formula)


__all__ = ["FORMULAS", "register"]
