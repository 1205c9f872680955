"""Random tensors of one adapted layer, for tests, benchmarks, the self-check and the recorder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import api
from ..dispatch import wide
from ..layer import Layer
from ..norm import NormOptions, Restrain
from ..ops.channel.op import with_norms


class Example(NamedTuple):
    """One adapted layer and what runs through it.

    Attributes:
        x: ``[T, K]``, or y0 ``[T, N]`` where it is ``given``.
        layer: what is not trained.
        a: ``A [m, r]``, or ``U [m, m]``.
        b: ``B [r, m]`` or None.
        delta_bias: ``[N]`` or None.
        z_scale: ``[T, m]`` or None.
        grad: ``∂loss/∂out [T, N]``.
        given: whether the layer works on its base's output.
        z: ``x Rᵀ [T, m]`` beside a given y0, or None.
    """

    x: Tensor
    layer: Layer
    a: Tensor
    b: Tensor | None
    delta_bias: Tensor | None
    z_scale: Tensor | None
    grad: Tensor
    given: bool
    z: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Example:
        """The same values with every floating tensor in ``dtype``."""

        def cast(value: object) -> object:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value  # type: ignore[attr-defined]

        own = self._replace(layer=self.layer._replace(**_cast(self.layer, cast)))
        return own._replace(**_cast(own, cast))

    def output(self, impl: str | None = None, functions: ModuleType = api) -> Tensor:
        """``out [T, N]`` by those of :mod:`secura_kernels.api` or :mod:`secura_kernels.naive`."""
        named = {"delta_bias": self.delta_bias, "z_scale": self.z_scale, "impl": impl}
        if self.given:
            return functions.secura_add(self.x, self.layer, self.a, self.b, z=self.z, **named)
        return functions.secura_linear(self.x, self.layer, self.a, self.b, **named)

    def run(self, impl: str | None = None, functions: ModuleType = api) -> list[Tensor]:
        """``[out, ∂x, ∂A, ∂B, ∂δb]``, those of tensors that are there."""
        held = {name: getattr(self, name) for name in ("x", "a", "b", "delta_bias")}
        leaves = {k: v.detach().clone().requires_grad_() for k, v in held.items() if v is not None}
        out = self._replace(**leaves).output(impl, functions)
        found = torch.autograd.grad(out, list(leaves.values()), self.grad.to(out.dtype))
        return [out.detach(), *found]


def _cast(values: Any, cast: Callable[[object], object]) -> dict[str, Any]:
    return {name: cast(value) for name, value in zip(values._fields, values, strict=True)}


@dataclass(frozen=True)
class Case:
    """One adapted layer by its settings.

    Attributes:
        options: the norm.
        dtype: of x and W; A, B, U, δb and the core are fp32 or wider.
        m: CUR rank.
        t: tokens.
        n, k: W's shape.
        inner: inner rank r of A and B; 0 for a core U that is trained itself.
        folded: ``"base"`` or ``"change"``: what U_acc counts to; ``""`` without one.
        dropout, restrained, biased, trains_bias: whether there is a z_scale (never in ``weight``),
            a restraint (never in ``none``), b, δb.
        given: whether y0 is given.
        own_z: whether z is given beside y0.
        save: ``activation``'s.
        transposed: whether W's rows are strided.
        scaling: s.
        rounding_seed: of the stochastic rounding of W', or None.
    """

    options: NormOptions
    dtype: torch.dtype = torch.float32
    m: int = 4
    t: int = 7
    n: int = 13
    k: int = 11
    inner: int = 0
    folded: str = ""
    dropout: bool = False
    restrained: bool = False
    biased: bool = True
    trains_bias: bool = True
    given: bool = False
    own_z: bool = False
    save: str = "recompute"
    transposed: bool = False
    scaling: float = 1.0
    rounding_seed: int | None = None

    def draw(self, device: str | torch.device = "cpu", seed: int = 0) -> Example:
        """Random tensors, outputs of order 1 and changes of half of that; on ``meta`` no numbers.

        C are columns of W, or where W has fewer than m a tensor of its own.
        """
        t, n, k, m = self.t, self.n, self.k, self.m
        exact = wide(self.dtype)
        norm, on_meta = self.options.norm, torch.device(device).type == "meta"
        source = None if on_meta else torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            if on_meta:
                return torch.empty(shape, dtype=exact, device=device)
            return torch.randn(shape, dtype=exact, generator=source, device=device) * scale

        def choice(count: int) -> Tensor:
            if on_meta or count < m:
                return torch.zeros(m, dtype=torch.int64, device=device)
            return torch.randperm(count, generator=source, device=device)[:m]

        weight = normal(n, k, scale=k**-0.5 if k else 1.0).to(self.dtype)
        weight = weight.t().contiguous().t() if self.transposed else weight
        rows, cols = choice(n), choice(k)
        columns = normal(n, m, scale=k**-0.5).to(self.dtype) if 0 < k < m else None
        size = 0.5 * k**0.5 / max(1, m)
        core = normal(m, m, scale=size) if self.folded else None
        a, b = normal(m, m, scale=size), None
        if self.inner:
            a, b = normal(m, self.inner, scale=size), normal(self.inner, m, scale=self.inner**-0.5)
        important = normal(n) > 0
        restrain = Restrain(important, 0.3, 1.9, 0.5)
        layer = Layer(
            weight,
            normal(n).to(self.dtype) if self.biased else None,
            rows,
            cols,
            self.options,
            self.scaling,
            core,
            self.folded == "base",
            restrain=restrain if self.restrained and norm != "none" else None,
            save=self.save,
            columns=columns,
            rounding_seed=self.rounding_seed,
        )
        if norm == "channel":
            layer = with_norms(layer)
        keep = normal(t, m) > -0.5
        return Example(
            x=normal(t, n if self.given else k).to(self.dtype),
            layer=layer,
            a=a,
            b=b,
            delta_bias=normal(n, scale=0.3) if self.trains_bias else None,
            z_scale=(keep / 0.7).to(self.dtype) if self.dropout and norm != "weight" else None,
            grad=normal(t, n).to(self.dtype),
            given=self.given,
            z=normal(t, m).to(self.dtype) if self.own_z else None,
        )


__all__ = ["Case", "Example"]
