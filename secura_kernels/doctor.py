"""A self-check of every op against the oracle, with the implementation it takes on a machine.

Small random layers, the same numbers for op and oracle (which sees them in fp64), forward and every
gradient. An error is ``‖got − exact‖ / ‖exact‖`` in the Frobenius norm, the largest over the output
and the gradients of x (or y0), P and the trainable bias.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import dispatch, reference
from .activation import activation_norm
from .activation_dense import activation_linear
from .additive import lowrank_add, lowrank_linear
from .channel import channel_product, row_norms
from .columns import project
from .cur import init_a, projection, select
from .gain import NORMS, NormOptions
from .linear import Layer, secura_linear
from .merge import effective_weight
from .weight import weight_norm_linear

LIMITS = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Largest error that passes, by dtype: some ten roundings of that dtype."""

N, K, M, INNER, T = 37, 41, 8, 12, 29


class Check(NamedTuple):
    """The outcome of one op on one device in one dtype."""

    op: str
    norm: str
    device: str
    dtype: str
    impl: str
    reason: str
    error: float
    limit: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the op ran and its error is within the limit."""
        return not self.failure and self.error <= self.limit


class _Layer(NamedTuple):
    """``x [T, K]``, ``W [N, K]``, b, δb ``[N]``, rows, cols ``[m]``, P, P_base ``[N, m]``, g."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    rows: Tensor
    cols: Tensor
    p: Tensor
    p_base: Tensor
    delta_bias: Tensor
    grad: Tensor


def self_check(
    device: torch.device | str = "cpu", dtypes: Iterable[torch.dtype] = (torch.float32,)
) -> list[Check]:
    """Run every op on ``device`` in each of ``dtypes`` and hold it against the oracle.

    Returns:
        One :class:`Check` an op and dtype. An op that raises is a failed check, not an error here.

    Raises:
        ValueError: ``SECURA_IMPL`` is unknown.
    """
    device = torch.device(device)
    checks = []
    for dtype in dtypes:
        layer = _random_layer(device, dtype)
        impl, reason = chosen(layer.weight)
        for op, norm, run in OPS:
            error, failure = float("nan"), "" if impl else "no implementation can run"
            try:
                error = _error(run, layer, NormOptions(norm)) if impl else error
            except Exception as problem:
                failure = f"{type(problem).__name__}: {problem}"
            name = str(dtype).removeprefix("torch.")
            checks.append(
                Check(op, norm, str(device), name, impl, reason, error, LIMITS[dtype], failure)
            )
    return checks


def chosen(tensor: Tensor) -> tuple[str, str]:
    """The implementation ops take for ``tensor``, and why; ``""`` where none can run.

    Raises:
        ValueError: ``SECURA_IMPL`` is unknown.
    """
    try:
        impl = dispatch.resolve(None, tensor)
    except RuntimeError as error:
        return "", str(error)
    if importlib.util.find_spec("secura_kernels.kernels") is None:
        return "reference", "this version has no Triton kernels"
    asked = os.environ.get("SECURA_IMPL", "auto")
    if asked != "auto":
        return impl, f"SECURA_IMPL={asked}"
    fits = f"a {tensor.device.type} tensor of a dtype the kernels take"
    return impl, dispatch.why_not_triton(tensor) or fits


def _random_layer(device: torch.device, dtype: torch.dtype) -> _Layer:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = draw(N, K)
    rows, cols = select(weight, M)
    columns = weight[:, cols]
    p = projection(columns, init_a(weight, M, INNER).double() @ draw(INNER, M) * 0.1)
    p_base = projection(columns, draw(M, M) * 0.05)
    x, bias, delta_bias, grad = draw(T, K), draw(N), draw(N), draw(T, N)
    floats = (value.to(device, dtype) for value in (x, weight, bias, p, p_base, delta_bias, grad))
    x, weight, bias, p, p_base, delta_bias, grad = floats
    rows, cols = rows.to(device), cols.to(device)
    return _Layer(x, weight, bias, rows, cols, p, p_base, delta_bias, grad)


def _projected(layer: _Layer, options: NormOptions) -> Tensor:
    p = project(layer.weight, layer.cols, layer.p[:M])
    return linear(layer.x[:, :M], p.to(layer.x.dtype), layer.delta_bias)


def _projected_oracle(layer: _Layer, options: NormOptions) -> Tensor:
    return linear(layer.x[:, :M], layer.weight[:, layer.cols] @ layer.p[:M], layer.delta_bias)


def _linear(layer: _Layer, options: NormOptions) -> Tensor:
    q, share = layer.p + layer.p_base, None
    if options.norm == "channel":
        gram, norms = row_norms(layer.weight, layer.rows, layer.p_base)
        q, share = channel_product(layer.p, layer.p_base, gram, norms, options, None)
    return lowrank_linear(
        layer.x, layer.weight, layer.bias, layer.rows, q, share=share, delta_bias=layer.delta_bias
    )


def _add(layer: _Layer, options: NormOptions) -> Tensor:
    y0 = linear(layer.x, layer.weight, layer.bias)
    q = layer.p + layer.p_base
    return lowrank_add(y0, layer.bias, layer.rows, q, delta_bias=layer.delta_bias)


def _weight(layer: _Layer, options: NormOptions) -> Tensor:
    return weight_norm_linear(
        layer.x,
        layer.weight,
        layer.bias,
        layer.rows,
        layer.p,
        options,
        p_base=layer.p_base,
        delta_bias=layer.delta_bias,
    )


def _activation(layer: _Layer, options: NormOptions) -> Tensor:
    return activation_norm(
        linear(layer.x, layer.weight, layer.bias),
        layer.bias,
        layer.rows,
        layer.p,
        options,
        p_base=layer.p_base,
        delta_bias=layer.delta_bias,
    )


def _activation_linear(layer: _Layer, options: NormOptions) -> Tensor:
    return activation_linear(
        layer.x,
        layer.weight,
        layer.bias,
        layer.rows,
        layer.p,
        options,
        p_base=layer.p_base,
        delta_bias=layer.delta_bias,
    )


def _merged(layer: _Layer, options: NormOptions) -> Tensor:
    weight = effective_weight(layer.weight, layer.rows, layer.p, options, p_base=layer.p_base)
    return linear(layer.x, weight, layer.bias + layer.delta_bias)


def _oracle(layer: _Layer, options: NormOptions) -> Tensor:
    return reference.linear(
        layer.x,
        layer.weight,
        layer.bias,
        layer.rows,
        layer.p,
        options,
        p_base=layer.p_base,
        delta_bias=layer.delta_bias,
    )


def _whole(layer: _Layer, options: NormOptions) -> Tensor:
    core = layer.p_base[:M].to(dispatch.wide(layer.p_base.dtype))
    p_base = project(layer.weight, layer.cols, core)
    gram, norms = row_norms(layer.weight, layer.rows, p_base)
    frozen = Layer(
        layer.weight, layer.bias, layer.rows, layer.cols, options, core=core, core_is_base=True,
        gram=gram, base_norms=norms,
    )  # fmt: skip
    one = torch.eye(M, dtype=layer.p.dtype, device=layer.p.device)
    return secura_linear(layer.x, frozen, layer.p[:M], one, delta_bias=layer.delta_bias)


def _whole_oracle(layer: _Layer, options: NormOptions) -> Tensor:
    columns = layer.weight[:, layer.cols]
    p, p_base = columns @ layer.p[:M], columns @ layer.p_base[:M]
    return _oracle(layer._replace(p=p, p_base=p_base), options)


Run = Callable[[_Layer, NormOptions], Tensor]

OPS: tuple[tuple[str, str, Run], ...] = (
    ("project", "none", _projected),
    ("lowrank_linear", "none", _linear),
    ("lowrank_add", "none", _add),
    ("channel_product + lowrank_linear", "channel", _linear),
    ("weight_norm_linear", "weight", _weight),
    ("activation_norm", "activation", _activation),
    ("activation_linear", "activation", _activation_linear),
    *(("secura_linear", norm, _whole) for norm in NORMS),
    ("effective_weight", "none", _merged),
    ("effective_weight", "channel", _merged),
    ("effective_weight", "weight", _merged),
)
"""Every op, the space it is checked in, and how it is called."""


def _error(run: Run, layer: _Layer, options: NormOptions) -> float:
    """The largest relative error over the output and the gradients of x, P and δb."""
    wide = _Layer(*(t.double() if t.is_floating_point() else t for t in layer))
    backward = run is not _merged
    oracles: dict[Run, Run] = {_projected: _projected_oracle, _whole: _whole_oracle}
    oracle = oracles.get(run, _oracle)
    got, exact = (
        _output_and_gradients(function, which, options, backward)
        for function, which in ((run, layer), (oracle, wide))
    )
    return max(
        float((value.double() - true).norm() / true.norm())
        for value, true in zip(got, exact, strict=True)
    )


def _output_and_gradients(
    run: Run, layer: _Layer, options: NormOptions, backward: bool
) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (layer.x, layer.p, layer.delta_bias)]
    x, p, delta_bias = leaves
    out = run(layer._replace(x=x, p=p, delta_bias=delta_bias), options)
    if not backward:
        return [out.detach()]
    return [out.detach(), *torch.autograd.grad(out, leaves, layer.grad.to(out.dtype))]


__all__ = ["LIMITS", "OPS", "Check", "chosen", "self_check"]
