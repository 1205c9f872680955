"""What ``benchmarks.gpu_check`` runs: the tensors of one layer, and whole layers under each norm.

A layer is the forward and backward of an adapted projection, P = C A B included, beside the frozen
projection alone (forward and gradient of its input), whose two products are its floor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from secura_kernels import (
    NormOptions,
    activation_linear,
    channel_product,
    init_a,
    lowrank_linear,
    project,
    row_norms,
    weight_norm_linear,
)

from . import measure

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


class Tensors:
    """Random tensors of one layer, outputs of order 1."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        t, n, k, m = size
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

    def product(self, a: Tensor, b: Tensor, impl: str | None = None) -> Tensor:
        """``P = C A B [N, m]``, as a layer of scaling 1 makes it each step."""
        return project(self.weight, self.cols, a @ b, impl=impl)


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
        p = data.product(a, b, impl)
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
    for field in ("x", "weight", "grad"):
        setattr(data, field, getattr(data, field).float())
    expected = [value.detach() for value in layer_step(name, data, "reference")()]
    return max(
        float((value.detach().float() - exact).norm() / exact.norm().clamp_min(1e-20))
        for value, exact in zip(got, expected, strict=True)
    )


def every_op_once(device: str = "cuda", impl: str = "triton") -> None:
    """Every layer once, forward and backward, on shapes that fill no block."""
    for m in (5, 64):
        for dtype in (torch.bfloat16, torch.float32):
            data = Tensors(Size(67, 131, 77, m), device, dtype)
            for name in LAYERS:
                layer_step(name, data, impl)()
    if device == "cuda":
        torch.cuda.synchronize()


def time_ms(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Median and 20% and 80% quantiles in milliseconds, the cache cleared between runs on CUDA."""
    return measure.timing(measure.sample(call, torch.device(device)))


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """This machine's ``copy_gb_s``, ``gemm_tflop_s`` of ``dtype``, and ``fp32_tflop_s``."""
    cuda = device == "cuda"
    edge, numel = (8192, 2**29) if cuda else (256, 2**18)
    found = measure.rates(torch.device(device), dtype, edge=edge, numel=numel)
    narrow = measure.rates(torch.device(device), torch.float32, edge=edge // 2, numel=2**18)
    return found | {"fp32_tflop_s": narrow["gemm_tflop_s"]}


__all__ = [
    "LAYERS",
    "PROJECTIONS",
    "TARGETS",
    "Size",
    "Tensors",
    "ceilings",
    "every_op_once",
    "layer_step",
    "time_ms",
    "worst_error",
]
