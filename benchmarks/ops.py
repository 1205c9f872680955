"""The ops a layer is made of, each with the bytes it must move; and each space's passes in a layer.

s bytes an element, S for the bytes of the 32-byte sectors that scattered columns lie in
(:func:`scattered`). Inputs count once and outputs once, forward, then backward. Operations are not
written down here: torch counts them by the kernels' own formulas (``secura_kernels`` registers
them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from secura_kernels import Layer, NormOptions, effective_weight, init_a, row_norms, secura_add
from secura_kernels.api import additive_product

from .registry import SPACES, Ranks, frozen_linear, secura

SECTOR_BYTES = 32


class Size(NamedTuple):
    """T tokens, N outputs, K inputs, rank m."""

    t: int
    n: int
    k: int
    m: int


class Tensors:
    """Random tensors of one layer, outputs of order 1.

    Attributes:
        x, y0, grad: ``[T, K]``, ``[T, N]``, ``[T, N]``.
        weight: ``W [N, K]``.
        rows, cols: ``[m]`` int64.
        a, b, u: ``A [m, r]``, ``B [r, m]`` and their product, fp32.
    """

    def __init__(self, size: Size, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        t, n, k, m = self.size = size
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device) * scale

        def choice(count: int) -> Tensor:
            return torch.randperm(count, generator=generator, device=device)[:m].sort().values

        self.x = normal(t, k).to(dtype)
        self.weight = normal(n, k, scale=k**-0.5).to(dtype)
        self.rows, self.cols = choice(n), choice(k)
        self.a = init_a(self.weight, m, min(2 * m, k))
        self.b = normal(self.a.shape[1], m, scale=0.5)
        self.grad = normal(t, n).to(dtype)
        self.u = self.a @ self.b
        self.y0 = linear(self.x, self.weight)
        self._norms = row_norms(self.weight, self.rows, None)

    def layer(self, norm: str, form: str | None = None, save: str = "recompute") -> Layer:
        """The adapted layer in a norm space, without its core."""
        gram, norms = self._norms if norm == "channel" else (None, None)
        options = NormOptions(norm, form)
        return Layer(
            self.weight,
            None,
            self.rows,
            self.cols,
            options,
            gram=gram,
            base_norms=norms,
            save=save,
        )


def scattered(height: int, width: int, m: int, itemsize: int) -> float:
    """Bytes of the sectors that m random columns of a ``[height, width]`` tensor lie in."""
    sectors = max(1.0, width * itemsize / SECTOR_BYTES)
    return height * SECTOR_BYTES * sectors * (1 - (1 - 1 / sectors) ** m)


class Op(NamedTuple):
    """Something to time.

    Attributes:
        name: what it is.
        run: the op on a layer's tensors and the leaves, in an implementation.
        leaves: the names of the tensors that gradients reach; none for what has no backward.
        moved: the bytes it must move forward and backward, from T, N, K, m and s.
        rate: the ceiling its operations run under: ``gemm_tflop_s`` or ``fp32_tflop_s``.
    """

    name: str
    run: Callable[..., Tensor]
    leaves: tuple[str, ...]
    moved: Callable[[int, int, int, int, int], tuple[float, float]]
    rate: str = "fp32_tflop_s"

    def calls(self, data: Tensors, impl: str) -> dict[str, Callable[[], Any]]:
        """``{"forward"}``, and ``"both"`` where it has a backward: what to time."""
        leaves = [getattr(data, name).clone().requires_grad_() for name in self.leaves]
        gradient = torch.randn_like(self.run(data, impl, *leaves).detach())

        def forward() -> Tensor:
            return self.run(data, impl, *leaves)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), leaves, gradient)

        return {"forward": forward, "both": both} if leaves else {"forward": forward}

    def floors_us(
        self, calls: dict[str, Callable[[], Any]], data: Tensors, ceilings: dict[str, float]
    ) -> dict[str, float]:
        """The least microseconds of each of its calls, by bytes or by operations."""
        forward, backward = self.moved(*data.size, data.weight.itemsize)
        moved, floors = {"forward": forward, "both": forward + backward}, {}
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            flop = counter.get_total_flops()
            by_bytes = moved[name] / ceilings["copy_gb_s"] / 1e3
            floors[name] = max(by_bytes, flop / ceilings[self.rate] / 1e6)
        return floors


def _merged(data: Tensors, impl: str, norm: str, **how: Any) -> Tensor:
    return effective_weight(data.layer(norm), data.u, impl=impl, **how)


def _projected(n: int, k: int, m: int, s: int) -> float:
    """Bytes of P = C U, or of ∂U = Cᵀ ∂P: scattered columns of W, P in fp32, U."""
    return scattered(n, k, m, s) + 4 * n * m + 4 * m * m


def _q(norm: str, form: str | None) -> Op:
    return Op(
        f"{norm}: Q of U" + (f", {form}" if form else ""),
        lambda d, impl: additive_product(d.layer(norm, form), d.u, impl=impl)[0],
        (),
        lambda t, n, k, m, s: (
            _projected(n, k, m, s) + (8 * n * m + 4 * m * m if norm == "channel" else 0),
            0,
        ),
    )


def _activation(save: str) -> Op:
    kept = int(save == "8bit")
    return Op(
        f"activation: norm of y0, {save}",
        lambda d, impl, y0, u: secura_add(y0, d.layer("activation", save=save), u, impl=impl),
        ("y0", "u"),
        lambda t, n, k, m, s: (
            (2 * s + kept) * t * n
            + scattered(t, n, m, s)
            + s * m * (2 * t + n)
            + _projected(n, k, m, s),
            (2 * s + (1 if kept else s)) * t * n
            + scattered(t, n, m, s)
            + s * m * (t + n)
            + _projected(n, k, m, s),
        ),
        "gemm_tflop_s",
    )


OPS = (
    Op(
        "A B",
        lambda d, impl, a, b: a @ b,
        ("a", "b"),
        lambda t, n, k, m, s: (20 * m * m, 36 * m * m),
    ),
    _q("none", None),
    _q("channel", "calibrated"),
    _q("channel", "paper"),
    Op(
        "none: thin product added to y0",
        lambda d, impl, y0, u: secura_add(y0, d.layer("none"), u, impl=impl),
        ("y0", "u"),
        lambda t, n, k, m, s: (
            2 * s * t * n + scattered(t, n, m, s) + s * m * (2 * t + n) + _projected(n, k, m, s),
            3 * s * t * n
            + scattered(t, n, m, s)
            + s * m * (t + n)
            + 4 * n * m
            + _projected(n, k, m, s),
        ),
        "gemm_tflop_s",
    ),
    _activation("recompute"),
    _activation("8bit"),
    Op(
        "none: W' to nearest",
        lambda d, impl: _merged(d, impl, "none"),
        (),
        lambda t, n, k, m, s: (2 * s * n * k, 0),
    ),
    Op(
        "none: W' rounded stochastically",
        lambda d, impl: _merged(d, impl, "none", stochastic_rounding=True),
        (),
        lambda t, n, k, m, s: (2 * s * n * k, 0),
    ),
    Op(
        "weight: W'",
        lambda d, impl: _merged(d, impl, "weight"),
        (),
        lambda t, n, k, m, s: (3 * s * n * k, 0),
    ),
)
"""The thin launches that stand between a layer and its floor, the norms on a given y0, and W'."""

PASSES: dict[str, Callable[[int, int, int, int, int], float]] = {
    "none": lambda t, n, k, m, s: (
        min(2 * s * n * k + s * t * k, 2 * s * t * n + scattered(t, n, m, s))
        + min(2 * s * n * k, 2 * s * t * n + scattered(t, n, m, s))
        + s * t * n
    ),
    "channel": lambda *size: PASSES["none"](*size),
    "activation": lambda t, n, k, m, s: (
        2 * s * t * n + scattered(t, n, m, s) + s * t * (2 * n + 2 * k if k <= n else 3 * n)
    ),
    "weight": lambda t, n, k, m, s: 6 * s * n * k,
}
"""Bytes that a layer's passes move beside its products, as the ops choose them (their docstrings),
forward and backward, from T, N, K, m and s: out and z, ∂x, ∂Q; ``weight`` W' twice, ρ's largest."""


def allowed_ratio(name: str, size: Size, ceilings: dict[str, float]) -> float | None:
    """What a machine's ceilings allow a SECURA layer in bf16, over the frozen layer's time.

    Two products (``weight``: three) at the speed of a product, its passes at that of a copy; thin
    products are left out.

    Args:
        name: a provider's; None is returned for one that is not SECURA's.
        size: the layer's.
        ceilings: ``copy_gb_s`` and ``gemm_tflop_s``.
    """
    space = next((space for space in SPACES if name.startswith(f"secura {space}")), None)
    if space is None:
        return None
    product_s = 2 * size.t * size.n * size.k / ceilings["gemm_tflop_s"] / 1e12
    passes_s = PASSES[space](*size, 2) / ceilings["copy_gb_s"] / 1e9
    return ((3 if space == "weight" else 2) * product_s + passes_s) / (2 * product_s)


def every_op_once(device: str = "cuda", impl: str = "triton") -> None:
    """Run every op and every space's layer, forward and backward, on shapes that fill no block."""
    for m in (5, 64):
        for dtype in (torch.bfloat16, torch.float32):
            data = Tensors(Size(67, 131, 77, m), device, dtype)
            for op in OPS:
                if dtype == torch.bfloat16 or "stochastically" not in op.name:
                    for call in op.calls(data, impl).values():
                        call()
            for space in SPACES:
                provider = secura(space, impl)
                layer = provider.build(frozen_linear(data.weight), Ranks(m, m))
                with provider.running():
                    layer(data.x.clone().requires_grad_()).backward(data.grad)
    if device == "cuda":
        torch.cuda.synchronize()
