"""What ``benchmarks.gpu_check`` times: each op against the bytes it must move, and whole layers.

A *kernel* row is one op on q_proj's shape with the fewest bytes it can move: inputs once, outputs
once; its floor is those bytes over this machine's own copy bandwidth. A *layer* row is a forward
and a backward of an adapted projection, P = C A B included, beside the frozen projection alone
(forward and gradient of its input), whose two products are its floor.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from secura_kernels import (
    NormOptions,
    activation_linear,
    activation_norm,
    channel_product,
    init_a,
    lowrank_linear,
    normed_weight,
    projection,
    row_norms,
    weight_norm_linear,
)
from secura_kernels.activation import gradients, normed
from secura_kernels.additive import product_wide

# name, N, K and how many of them a Llama-3-8B decoder block holds
PROJECTIONS = [
    ("q+o", 4096, 4096, 2),
    ("k+v", 1024, 4096, 2),
    ("gate+up", 14336, 4096, 2),
    ("down", 4096, 14336, 1),
]
# share of the frozen layer's time a layer of each space may take (T = 8192, m = 128, bf16)
TARGETS = {
    "none": 1.10,
    "channel": 1.10,
    "activation": 1.15,
    "activation 8bit": 1.15,
    "weight": 1.60,
}
LAYERS = ("linear", *TARGETS)


class Size(NamedTuple):
    """T tokens, N outputs, K inputs, rank m."""

    t: int
    n: int
    k: int
    m: int


@dataclass
class Kernel:
    """An op to time: the call, the bytes it must move and how they were counted."""

    name: str
    call: Callable[[], Any]
    bytes_moved: int
    formula: str


class Tensors:
    """Random tensors of one layer, outputs of order 1."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        t, n, k, m = size
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device) * scale

        self.x = normal(t, k).to(dtype)
        self.weight = normal(n, k, scale=k**-0.5).to(dtype)
        self.rows = torch.randperm(n, generator=generator, device=device)[:m].sort().values
        columns = torch.randperm(k, generator=generator, device=device)[:m].sort().values
        self.columns = self.weight.index_select(1, columns)
        self.a = init_a(self.weight, m, min(2 * m, k))
        self.b = normal(self.a.shape[1], m, scale=0.5)
        self.grad = normal(t, n).to(dtype)


def kernels(size: Size, device: str, dtype: torch.dtype, impl: str) -> Iterator[Kernel]:
    """Every op whose cost is its bytes; tensors are made when the op is asked for."""
    from secura_kernels.kernels import additive as thin

    t, n, k, m = size
    s = dtype.itemsize
    data = Tensors(size, device, dtype)
    p = projection(data.columns, data.a @ data.b)
    q, share = p.to(dtype), torch.rand(n, device=device) / 2 + 0.5
    y0 = linear(data.x, data.weight)
    z = thin.gather(y0, None, data.rows, None)
    yield Kernel("gather", lambda: thin.gather(y0, None, data.rows, None), 2 * s * t * m, "2 s T m")
    thin_bytes = s * m * (t + n)
    add = "2 s T N + s m (T + N)"
    target = y0.clone()
    yield Kernel(
        "channel: add product", lambda: thin.add_product(target, z, q, share, out=target),
        2 * s * t * n + thin_bytes, add,
    )  # fmt: skip
    yield Kernel(
        "none: addmm_ (cuBLAS)", lambda: target.addmm_(z, q.t()),
        2 * s * t * n + thin_bytes, add,
    )  # fmt: skip
    r = data.weight.index_select(0, data.rows)
    yield Kernel(
        "channel: rebuild W'", lambda: thin.add_product(data.weight.t(), r.t(), q, share),
        2 * s * n * k + s * m * (n + k), "2 s N K + s m (N + K)",
    )  # fmt: skip
    yield Kernel(
        "channel: output gradient",
        lambda: thin.output_gradient(data.grad, data.rows, q, share, None),
        2 * s * t * n + s * n * m, "2 s T N + s N m",
    )  # fmt: skip
    yield Kernel(
        "dQ (cuBLAS)", lambda: product_wide(data.grad.t(), z),
        s * t * n + s * t * m + 4 * n * m, "s T N + s T m + 4 N m",
    )  # fmt: skip
    gram, norms = row_norms(data.weight, data.rows, None)
    for form in ("calibrated", "paper"):
        options = NormOptions("channel", form)
        yield Kernel(
            f"channel: Q from P, {form}",
            functools.partial(channel_product, p, None, gram, norms, options, impl=impl),
            8 * n * m + 4 * m * m, "8 N m + 4 m²",
        )  # fmt: skip
    for save in ("recompute", "8bit"):
        yield from _activation(data, y0, p, save, impl, s, size)
    for form, combine, passes in (("calibrated", "gated", 2), ("paper", "averaged", 3)):
        options = NormOptions("weight", form, combine)
        yield Kernel(
            f"weight: W' {form}",
            functools.partial(normed_weight, data.weight, data.rows, p, options, impl=impl),
            passes * s * n * k, f"{passes} s N K",
        )  # fmt: skip


def _activation(data, y0, p, save, impl, s, size) -> Iterator[Kernel]:
    t, n, _, m = size
    leaves = y0.clone().requires_grad_(), p.clone().requires_grad_()
    kept = t * n if save == "8bit" else 0

    def forward() -> Tensor:
        return activation_norm(
            leaves[0], None, data.rows, leaves[1], NormOptions("activation"), save=save, impl=impl
        )

    yield Kernel(
        f"activation forward, {save}", forward,
        2 * s * t * n + kept + s * m * (t + n), "2 s T N (+ T N) + s m (T + N)",
    )  # fmt: skip
    out = forward()
    # 1/M from y0 or from a byte; dΔ, for ∂P = dΔᵀ z, is to stay in the L2 cache
    source = s * t * n if save == "recompute" else kept
    yield Kernel(
        f"activation backward, {save}",
        lambda: torch.autograd.grad(out, leaves, data.grad, retain_graph=True),
        2 * s * t * n + source + s * m * (t + n), "2 s T N + (s or 1) T N + s m (T + N)",
    )  # fmt: skip
    low, options = p.to(y0.dtype), NormOptions("activation", "calibrated", "gated")
    keep = save == "8bit"
    _, z, codes, eps, slope, offset, _ = normed(
        y0, None, data.rows, low, None, None, None, options, None, keep, impl
    )
    yield Kernel(
        f"activation backward to h, {save}",
        lambda: gradients(
            data.grad, None if keep else y0, codes if keep else None, z, data.rows, low, None, None,
            None, eps, slope, offset, None, options.form, options.combine, [True, True, False],
            impl=impl, thin=True,
        ),
        s * t * n + source + s * m * (2 * t + n), "s T N + (s or 1) T N + s m (2 T + N)",
    )  # fmt: skip


def layer_step(name: str, data: Tensors, impl: str) -> Callable[[], tuple[Tensor, ...]]:
    """A forward and a backward of a layer: ``(out, ∂x, ∂A, ∂B)``, or ``(out, ∂x)`` when frozen."""
    x = data.x.clone().requires_grad_()
    a, b = data.a.clone().requires_grad_(), data.b.clone().requires_grad_()
    rows, weight = data.rows, data.weight
    gram, norms = row_norms(weight, rows, None)
    leaves = (x,) if name == "linear" else (x, a, b)

    def forward() -> Tensor:
        if name == "linear":
            return linear(x, weight)
        p = projection(data.columns, a @ b)
        if name == "weight":
            return weight_norm_linear(x, weight, None, rows, p, NormOptions("weight"), impl=impl)
        if name.startswith("activation"):
            save = "8bit" if name.endswith("8bit") else "recompute"
            options = NormOptions("activation")
            return activation_linear(x, weight, None, rows, p, options, save=save, impl=impl)
        share = None
        if name == "channel":
            options = NormOptions("channel")
            p, share = channel_product(p, None, gram, norms, options, impl=impl)
        return lowrank_linear(x, weight, None, rows, p, share=share, impl=impl)

    def step() -> tuple[Tensor, ...]:
        out = forward()
        return out, *torch.autograd.grad(out, leaves, data.grad)

    return step


def worst_error(name: str, size: Size, device: str, dtype: torch.dtype, impl: str) -> float:
    """Largest relative error of a layer's output and gradients against plain torch in fp32."""
    data = Tensors(size._replace(t=min(size.t, 256)), device, dtype)
    got = layer_step(name, data, impl)()
    for field in ("x", "weight", "columns", "grad"):
        setattr(data, field, getattr(data, field).float())
    expected = [value.detach() for value in layer_step(name, data, "reference")()]
    return max(
        float((value.detach().float() - exact).norm() / exact.norm().clamp_min(1e-20))
        for value, exact in zip(got, expected, strict=True)
    )


def graphed(step: Callable[[], Any]) -> Callable[[], Any]:
    """``step`` as a CUDA graph's replay, so that launches cost the host nothing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay(kept: Any = kept) -> None:
        graph.replay()

    return replay


def time_ms(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Median and 20% and 80% quantiles in milliseconds, the cache cleared between runs on CUDA."""
    if device == "cuda":
        from triton.testing import do_bench

        samples = do_bench(call, warmup=10, rep=60, return_mode="all")
    else:
        call()
        start = time.perf_counter()
        call()
        samples = [(time.perf_counter() - start) * 1e3] * 2
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    median = statistics.median(samples)
    return {"median": median, "q20": fifths[0], "q80": fifths[3], "samples": len(samples)}


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """This machine's ``copy_gb_s`` (bytes read and written) and ``gemm_tflop_s`` on random data."""
    edge, numel = (8192, 2**29) if device == "cuda" else (256, 2**18)
    source = torch.randn(numel, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_ms = time_ms(lambda: target.copy_(source), device)["median"]
    left, right = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    gemm_ms = time_ms(lambda: left @ right, device)["median"]
    return {
        "copy_gb_s": 2 * numel * dtype.itemsize / copy_ms / 1e6,
        "gemm_tflop_s": 2 * edge**3 / gemm_ms / 1e9,
    }


__all__ = [
    "LAYERS",
    "PROJECTIONS",
    "TARGETS",
    "Kernel",
    "Size",
    "Tensors",
    "ceilings",
    "graphed",
    "kernels",
    "layer_step",
    "time_ms",
    "worst_error",
]
