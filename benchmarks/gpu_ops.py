"""The tensors of one layer, and its forward and backward under each norm, P = C A B included."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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

SPACES = ("none", "channel", "activation", "activation 8bit", "weight")


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
    """What runs a layer's forward and backward: ``(out, ∂x, ∂A, ∂B)``."""
    x = data.x.clone().requires_grad_()
    a, b = data.a.clone().requires_grad_(), data.b.clone().requires_grad_()
    rows, weight = data.rows, data.weight
    gram, norms = row_norms(weight, rows, None)

    def forward() -> Tensor:
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
        return out, *torch.autograd.grad(out, (x, a, b), data.grad)

    return step


def every_op_once(device: str = "cuda", impl: str = "triton") -> None:
    """Every layer once, forward and backward, on shapes that fill no block."""
    for m in (5, 64):
        for dtype in (torch.bfloat16, torch.float32):
            data = Tensors(Size(67, 131, 77, m), device, dtype)
            for name in SPACES:
                layer_step(name, data, impl)()
    if device == "cuda":
        torch.cuda.synchronize()


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """This machine's ``copy_gb_s``, ``gemm_tflop_s`` of ``dtype``, and ``fp32_tflop_s``."""
    cuda = device == "cuda"
    edge, numel = (8192, 2**29) if cuda else (256, 2**18)
    found = measure.rates(torch.device(device), dtype, edge=edge, numel=numel)
    narrow = measure.rates(torch.device(device), torch.float32, edge=edge // 2, numel=2**18)
    return found | {"fp32_tflop_s": narrow["gemm_tflop_s"]}


__all__ = ["SPACES", "Size", "Tensors", "ceilings", "every_op_once", "layer_step"]
