"""Single ops for ``benchmarks.triage`` to time, each with the least it can move and compute.

Bytes count inputs once and outputs once, s of them an element; columns scattered over a row count
by the 32-byte sectors they lie in, 32 S of them for the columns ``rows`` of a [T, N] tensor.
Operations are counted as they run, twice a multiplication with its addition. A backward is called
as the function that autograd calls, on tensors saved beforehand, so that it becomes a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from secura_kernels import NormOptions, channel_product, normed_weight, row_norms
from secura_kernels.activation import checked, gradients, normed
from secura_kernels.additive import product_wide
from secura_kernels.columns import project_backward
from secura_kernels.gain import known_scalars
from secura_kernels.weight import primitives

from .gpu_ops import Size, Tensors

SECTOR_BYTES = 32
WORKSPACES_MIB = (16, 32, 1024)


class Call(NamedTuple):
    """Something to time, and the least it takes.

    Attributes:
        run: the call.
        bytes: that it must move.
        formula: how they were counted.
        flop: that it runs.
        rate: the ceiling they run under: ``gemm_tflop_s`` or ``fp32_tflop_s``.
    """

    run: Callable[[], Any]
    bytes: int
    formula: str
    flop: float = 0.0
    rate: str = "gemm_tflop_s"


class Kernel(NamedTuple):
    """An op's name, and what makes its tensors and its call when it is its turn."""

    name: str
    make: Callable[[], Call]


def sectors(columns: Tensor, height: int, width: int, itemsize: int) -> int:
    """Distinct 32-byte sectors of a row-major ``[height, width]`` tensor that columns lie in.

    Args:
        columns: ``[m]`` int64, distinct.
        height: rows of the tensor, which begins on a sector.
        width: its columns, ``itemsize`` bytes each.
        itemsize: a divisor of 32.
    """
    starts = torch.arange(height)[:, None] * width
    touched = (starts + columns.cpu().sort().values) * itemsize // SECTOR_BYTES
    return touched.flatten().unique_consecutive().numel()


@contextmanager
def workspace(mib: int) -> Iterator[None]:
    """Within, the activation backward's chunks of dΔ take so many MiB."""
    from secura_kernels.kernels import activation_backward

    before = activation_backward.WORKSPACE_MIB
    activation_backward.WORKSPACE_MIB = mib
    try:
        yield
    finally:
        activation_backward.WORKSPACE_MIB = before


class Bench:
    """The tensors that the ops share, each made when it is first asked for."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype, impl: str) -> None:
        self.size, self.device, self.dtype, self.impl = size, device, dtype, impl
        self.s = dtype.itemsize

    @functools.cached_property
    def data(self) -> Tensors:
        """The layer's own."""
        return Tensors(self.size, self.device, self.dtype)

    @functools.cached_property
    def y0(self) -> Tensor:
        """``[T, N]``."""
        return linear(self.data.x, self.data.weight)

    @functools.cached_property
    def z(self) -> Tensor:
        """``[T, m]``."""
        return self.y0.index_select(1, self.data.rows)

    @functools.cached_property
    def p(self) -> Tensor:
        """``[N, m]`` fp32."""
        return self.data.product(self.data.a, self.data.b, self.impl)

    @functools.cached_property
    def q(self) -> Tensor:
        """``[N, m]`` in the compute dtype."""
        return self.p.to(self.dtype)

    @functools.cached_property
    def share(self) -> Tensor:
        """``[N]`` fp32, in [½, 1]."""
        return torch.rand(self.size.n, device=self.device) / 2 + 0.5

    @functools.cached_property
    def row_sectors(self) -> int:
        """Bytes of the sectors that the columns ``rows`` of a [T, N] tensor lie in."""
        t, n = self.size.t, self.size.n
        return SECTOR_BYTES * sectors(self.data.rows, t, n, self.s)

    @functools.cached_property
    def column_sectors(self) -> int:
        """Bytes of the sectors that C's columns of W lie in."""
        n, k = self.size.n, self.size.k
        return SECTOR_BYTES * sectors(self.data.cols, n, k, self.s)


def kernels(size: Size, device: str, dtype: torch.dtype, impl: str) -> list[Kernel]:
    """Every op, the additive spaces' first; nothing is made before an op's turn."""
    bench = Bench(size, device, dtype, impl)
    return [
        *_additive(bench),
        *_product(bench),
        *_activation(bench),
        *_weight(bench),
    ]


def _additive(bench: Bench) -> Iterator[Kernel]:
    (t, n, k, m), s = bench.size, bench.s
    thin_bytes, thin_flop = s * m * (t + n), 2 * t * n * m
    add_bytes, add = 2 * s * t * n + thin_bytes, "2 s T N + s m (T + N)"

    def gather() -> Call:
        from secura_kernels.kernels.additive import gather

        y0, rows = bench.y0, bench.data.rows
        moved = bench.row_sectors + s * t * m
        return Call(lambda: gather(y0, None, rows, None), moved, "32 S + s T m")

    def add_product() -> Call:
        from secura_kernels.kernels.additive import add_product

        target, z, q, share = bench.y0.clone(), bench.z, bench.q, bench.share
        run = functools.partial(add_product, target, z, q, share, out=target)
        return Call(run, add_bytes, add, thin_flop)

    def addmm() -> Call:
        target, z, q = bench.y0.clone(), bench.z, bench.q
        return Call(lambda: target.addmm_(z, q.t()), add_bytes, add, thin_flop)

    def rebuild() -> Call:
        from secura_kernels.kernels.additive import add_product

        w, q, share = bench.data.weight, bench.q, bench.share
        r = w.index_select(0, bench.data.rows)
        moved = 2 * s * n * k + s * m * (n + k)
        run = functools.partial(add_product, w.t(), r.t(), q, share)
        return Call(run, moved, "2 s N K + s m (N + K)", 2 * n * k * m)

    def output_gradient() -> Call:
        from secura_kernels.kernels.additive import output_gradient

        run = functools.partial(
            output_gradient, bench.data.grad, bench.data.rows, bench.q, bench.share, None
        )
        moved = 2 * s * t * n + s * n * m + bench.row_sectors
        return Call(run, moved, "2 s T N + s N m + 32 S", thin_flop)

    def dq() -> Call:
        g, z = bench.data.grad, bench.z
        moved = s * t * n + s * t * m + 4 * n * m
        return Call(lambda: product_wide(g.t(), z), moved, "s T N + s T m + 4 N m", thin_flop)

    def q_of_p(form: str) -> Call:
        p, options = bench.p, NormOptions("channel", form)
        gram, norms = row_norms(bench.data.weight, bench.data.rows, None)
        run = functools.partial(channel_product, p, None, gram, norms, options, impl=bench.impl)
        moved = 8 * n * m + 4 * m * m
        return Call(run, moved, "8 N m + 4 m²", 2 * n * m * m, "fp32_tflop_s")

    yield Kernel("gather", gather)
    yield Kernel("channel: add product", add_product)
    yield Kernel("none: addmm_ (cuBLAS)", addmm)
    yield Kernel("channel: rebuild W'", rebuild)
    yield Kernel("channel: output gradient", output_gradient)
    yield Kernel("dQ (cuBLAS)", dq)
    for form in ("calibrated", "paper"):
        yield Kernel(f"channel: Q from P, {form}", functools.partial(q_of_p, form))


def _product(bench: Bench) -> Iterator[Kernel]:
    """P = C A B and its gradients, fp32 numbers."""
    _, n, _, m = bench.size

    def forward() -> Call:
        a, b = bench.data.a, bench.data.b
        moved = bench.column_sectors + 4 * n * m + 8 * a.numel()
        flop = 2 * n * m * m + 2 * m * a.numel()
        return Call(
            lambda: bench.data.product(a, b, bench.impl), moved, "32 S + 4 N m + 8 m r", flop,
            "fp32_tflop_s",
        )  # fmt: skip

    def both() -> Call:
        a, b = (leaf.clone().requires_grad_() for leaf in (bench.data.a, bench.data.b))
        dp = bench.p
        moved = 2 * bench.column_sectors + 8 * n * m + 16 * a.numel()
        flop = 4 * n * m * m + 6 * m * a.numel()

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(bench.data.product(a, b, bench.impl), (a, b), dp)

        return Call(run, moved, "64 S + 8 N m + 16 m r", flop, "fp32_tflop_s")

    def du() -> Call:
        w, cols, dp = bench.data.weight, bench.data.cols, bench.p
        moved, flop = bench.column_sectors + 4 * n * m + 4 * m * m, 2 * n * m * m
        return Call(
            lambda: project_backward(dp, w, cols, bench.impl), moved, "32 S + 4 N m + 4 m²", flop,
            "fp32_tflop_s",
        )  # fmt: skip

    yield Kernel("P: forward", forward)
    yield Kernel("P: forward and backward", both)
    yield Kernel("P: ∂U = Cᵀ ∂P", du)


def _activation(bench: Bench) -> Iterator[Kernel]:
    (t, n, _, m), s = bench.size, bench.s
    options = checked(NormOptions("activation"), "recompute")
    thin_flop = 2 * t * n * m

    def forward(save: str) -> Call:
        keep = save == "8bit"
        run = functools.partial(
            normed, bench.y0, None, bench.data.rows, bench.q, None, None, None, options, None, keep,
            bench.impl,
        )  # fmt: skip
        moved = 2 * s * t * n + keep * t * n + s * m * (2 * t + n) + bench.row_sectors
        return Call(run, moved, "2 s T N (+ T N) + s m (2 T + N) + 32 S", thin_flop)

    def backward(save: str, mib: int, thin: bool) -> Call:
        keep, y0, q, rows, g = save == "8bit", bench.y0, bench.q, bench.data.rows, bench.data.grad
        _, z, kept, _, _ = normed(
            y0, None, rows, q, None, None, None, options, None, keep, bench.impl
        )

        def run() -> tuple[Tensor, ...]:
            with workspace(mib):
                return gradients(
                    g, None if keep else y0, kept if keep else None, z, rows, q, None, None, None,
                    None, None, known_scalars(options), options.form, options.combine,
                    [True, True, False], impl=bench.impl, thin=thin,
                )  # fmt: skip

        # 1/M from y0 or from a byte; dΔ, for ∂P = dΔᵀ z, is to stay in the L2 cache
        source = t * n if keep else s * t * n
        out = s * t * m if thin else s * t * n + bench.row_sectors
        moved = s * t * n + source + out + s * m * (t + n) + 4 * n * m
        end = "s T m" if thin else "s T N + 32 S"
        formula = f"(s + s or 1) T N + {end} + s m (T + N) + 4 N m"
        return Call(run, moved, formula, (2 if keep else 3) * thin_flop)

    for save in ("recompute", "8bit"):
        yield Kernel(f"activation forward, {save}", functools.partial(forward, save))
    for thin in (False, True):
        what = "to h" if thin else "to ∂y0"
        for save, mib in (*(("recompute", mib) for mib in WORKSPACES_MIB), ("8bit", 16)):
            name = f"activation backward {what}, {save}, {mib} MiB"
            yield Kernel(name, functools.partial(backward, save, mib, thin))


def _weight(bench: Bench) -> Iterator[Kernel]:
    (t, n, k, m), s = bench.size, bench.s
    thin_flop = 2 * n * k * m

    def fused(form: str, combine: str, passes: int) -> Call:
        from secura_kernels.kernels import weight as ours

        w, rows, p = bench.data.weight, bench.data.rows, bench.p
        norm = primitives(NormOptions("weight", form, combine), None)

        def run() -> Tensor:
            tiles = ours.Tiles.whole(w, rows, p, None, bench.dtype)
            scalars, factor = ours.measure(tiles, *norm)
            return ours.fused_weight(tiles, scalars, factor, form, combine, bench.dtype)

        return Call(run, passes * s * n * k, f"{passes} s N K", (passes - 1) * thin_flop)

    def grad_p() -> Call:
        from secura_kernels.kernels import weight as ours

        data, p, form = bench.data, bench.p, "paper"
        norm = primitives(NormOptions("weight", form, "averaged"), None)
        tiles = ours.Tiles.whole(data.weight, data.rows, p, None, bench.dtype)
        scalars, factor = ours.measure(tiles, *norm)
        run = functools.partial(
            ours.grad_p, data.grad, data.x, data.weight, data.rows, p, None, scalars, factor, form
        )
        moved = s * (t * n + t * k + n * k) + 4 * n * m
        flop = 2 * t * n * k + 2 * thin_flop
        return Call(run, moved, "s (T N + T K + N K) + 4 N m", flop)

    def merge(form: str, combine: str, passes: int) -> Call:
        options = NormOptions("weight", form, combine)
        run = functools.partial(
            normed_weight, bench.data.weight, bench.data.rows, bench.p, options, impl=bench.impl
        )
        flop = (passes - 1) * thin_flop
        return Call(run, passes * s * n * k, f"{passes} s N K", flop, "fp32_tflop_s")

    norms = (("paper", "averaged", 3), ("calibrated", "gated", 2))
    for form, combine, passes in norms:
        yield Kernel(f"weight: W' {form}", functools.partial(fused, form, combine, passes))
    yield Kernel("weight: ∂P", grad_p)
    for form, combine, passes in norms:
        yield Kernel(f"weight: merge {form}", functools.partial(merge, form, combine, passes))


__all__ = ["WORKSPACES_MIB", "Bench", "Call", "Kernel", "kernels", "sectors", "workspace"]
