"""The questions that only a GPU answers, each a few variants of one thing timed beside each other.

A question is asked by :mod:`benchmarks.triage`, which prints and keeps its figures: times in
microseconds by variant (``NAME_us``), errors and shares as plain numbers. Variants stand in the
place of what the launchers choose while they run; nothing is left changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from secura_kernels import lowrank_linear
from secura_kernels.additive import product_wide

from . import measure, oracle
from .asker import ActivationCase, Asker, Dims, Question, replaced
from .gpu_kernels import workspace
from .gpu_ops import Size, Tensors
from .layer import Problem, prepare
from .providers import Provider, Ranks, catalogue, frozen_linear
from .schema import Row
from .shapes import LayerCase

LAYERS = (
    "frozen", "peft lora bf16", "strong lora", "secura none triton", "secura channel triton",
    "secura activation triton", "secura weight triton", "peft dora bf16",
)  # fmt: skip
LANDING = (1e-3, 3e-4)
"""‖ΔW‖ / ‖W‖ of the small updates whose way to the output is measured."""
HOST_TOKENS = 16


def questions() -> list[Question]:
    """All of them, the most important first; nothing is made before its turn."""
    sizes = {"q+o": (8192, 4096, 4096), "gate+up": (8192, 14336, 4096)}
    short = {"q+o T=2048": (2048, 4096, 4096), "gate+up T=2048": (2048, 14336, 4096)}
    found = [
        Question(f"layer: {name}", functools.partial(_layer, name, sizes["q+o"])) for name in LAYERS
    ]
    wide = {"down": (8192, 4096, 14336)}
    for label, size in (sizes | wide | short).items():
        found.append(Question(f"forward way: {label}", functools.partial(_forward_ways, size)))
    for label, size in sizes.items():
        found.append(Question(f"dQ: {label}", functools.partial(_dq, size)))
    for name in LAYERS[:-1]:
        found.append(Question(f"host: {name}", functools.partial(_host, name)))
    found.append(Question("repeated rows", _repeated_rows))
    for name in LAYERS[1:-1]:
        found.append(Question(f"lands: {name}", functools.partial(_lands, name)))
    found.append(Question("lands: ways", _lands_ways))
    for label, size in (sizes | wide).items():
        ask = functools.partial(_activation_dx, size)
        found.append(Question(f"activation dx way: {label}", ask))
    for label, size in short.items():
        found.append(Question(f"dx way: {label}", functools.partial(_dx_ways, size)))
    return found


def _provider(name: str, asker: Asker) -> Provider:
    return next(one for one in catalogue(asker.dtype, dropout=False) if one.name == name)


def _case(size: Size) -> LayerCase:
    return LayerCase("triage", "linear", 1, size.t, size.n, size.k, size.m, min(16, size.m))


def _layer(name: str, dims: Dims, asker: Asker) -> dict[str, Any]:
    """A provider's layer: errors against fp64, memory, and forward, backward and graph."""
    size = asker.size(*dims)
    runner = prepare(_provider(name, asker), Problem(_case(size), asker.device, asker.dtype, 0))
    if isinstance(runner, Row):
        raise RuntimeError(f"{runner.status}: {runner.note}")
    figures = dict(runner.figures)
    with runner.provider.running():
        for phase in ("forward", "backward", "both"):
            call = getattr(runner, f"{phase}_call")()
            if asker.warming or asker.dry:
                call()
                continue
            sampled = measure.sample(call, asker.device)
            figures[f"{phase}_eager_us"] = 1e3 * measure.timing(sampled)["median"]
            del call
        figures["both_graph_us"] = asker.us(runner.both)
    return figures


def _forward_ways(dims: Dims, asker: Asker) -> dict[str, Any]:
    """A forward of ``none``: gather and add, or W' rebuilt and x Rᵀ."""
    from secura_kernels.kernels import additive
    from secura_kernels.kernels import weight as whole

    size = asker.size(*dims)
    data = asker.tensors(size)
    x, w, rows = data.x, data.weight, data.rows
    p = torch.randn(size.n, size.m, device=asker.device) * 0.01
    q = p.to(asker.dtype)
    r = w.index_select(0, rows)

    def gathered() -> tuple[Tensor, Tensor]:
        y0 = linear(x, w)
        z = additive.gather(y0, None, rows, None)
        return additive.add_product(y0, z, q, out=y0), z

    def rebuilt() -> tuple[Tensor, Tensor]:
        return linear(x, additive.rebuilt_weight(w, additive.padded_r(w, rows), q, None)), x @ r.t()

    def stochastic() -> Tensor:
        tiles = whole.Tiles.whole(w, rows, p, None, asker.dtype)
        return whole.fused_weight(tiles, None, None, None, None, asker.dtype, 1)

    parts: dict[str, Callable[[], Any]] = {
        "frozen": lambda: linear(x, w),
        "gather + add": gathered,
        "W' + x R": rebuilt,
        "W' alone": lambda: additive.rebuilt_weight(w, additive.padded_r(w, rows), q, None),
        "W' stochastic alone": stochastic,
        "x R alone": lambda: x @ r.t(),
        "gather alone": lambda: additive.gather(data.grad, None, rows, None),
    }
    return {f"{name}_us": asker.us(call) for name, call in parts.items()}


def _dq(dims: Dims, asker: Asker) -> dict[str, Any]:
    """``ḡᵀ z [N, m]`` by cuBLAS in the shapes and dtypes it may be asked for."""
    size = asker.size(*dims)
    data = asker.tensors(size)
    g, z = data.grad, data.x[:, : size.m].contiguous()
    q = torch.randn(size.n, size.m, device=asker.device).to(asker.dtype)
    part = max(16, size.n // 4)
    parts: dict[str, Callable[[], Any]] = {
        "gᵀz fp32": lambda: product_wide(g.t(), z),
        "zᵀg fp32": lambda: product_wide(z.t(), g),
        "gᵀz bf16": lambda: g.t() @ z,
        "zᵀg bf16": lambda: z.t() @ g,
        "gᵀz fp32, a quarter of the columns": lambda: product_wide(g[:, :part].t(), z),
        "g q": lambda: g @ q,
    }
    return {f"{name}_us": asker.us(call) for name, call in parts.items()}


def _host(name: str, asker: Asker) -> dict[str, Any]:
    """One layer on few tokens, so that its time is the host's."""
    size = asker.size(HOST_TOKENS, 4096, 4096)
    runner = prepare(_provider(name, asker), Problem(_case(size), asker.device, asker.dtype, 0))
    if isinstance(runner, Row):
        raise RuntimeError(f"{runner.status}: {runner.note}")
    with runner.provider.running():
        return {
            "eager forward_us": asker.host_us(runner.forward),
            "eager_us": asker.host_us(runner.both),
            "graph_us": asker.us(runner.both),
        }


def _repeated_rows(asker: Asker) -> dict[str, Any]:
    """Errors of ∂x by both ways where two of the rows are one, against plain torch."""
    figures = {}
    for name, t in (("W'", 2048), ("∂y0", 256)):
        size = asker.size(t, 1024, 1024, 32)
        data = Tensors(size, str(asker.device), asker.dtype)
        rows = data.rows.clone()
        rows[1] = rows[0]
        p = torch.randn(size.n, size.m, device=asker.device) * 0.1
        found = []
        for impl in ("triton", "reference"):
            x = data.x.clone().requires_grad_()
            out = lowrank_linear(x, data.weight, None, rows, p, impl=impl)
            found.append(torch.autograd.grad(out, x, data.grad)[0])
        figures[f"∂x by {name}: error"] = oracle.relative_error(found[0], found[1].double())
    return figures


def _lands(name: str, asker: Asker) -> dict[str, Any]:
    """The share of a small update's exact effect that a layer's output shows."""
    size = asker.size(1024, 4096, 4096)
    weight = Problem(_case(size), asker.device, asker.dtype, 0).weight
    provider, figures = _provider(name, asker), {}
    x = torch.randn(size.t, size.k, device=asker.device).to(asker.dtype)
    for change in LANDING:
        layer = provider.build(frozen_linear(weight), Ranks(size.m, 16))
        oracle.randomise(layer, weight, change)
        with provider.running(), torch.no_grad():
            wide = {key: value.double() for key, value in oracle.trainable(layer).items()}
            right = oracle.expected(layer, weight.double(), None, wide, x.double())
            effect = right - x.double() @ weight.double().t()
            figures[f"share at {change:g}"] = _share(layer(x) - linear(x, weight), effect)
    return figures


def _lands_ways(asker: Asker) -> dict[str, Any]:
    """The same for ways of an additive update: W' to nearest, stochastically, the sum in fp32."""
    from secura_kernels.kernels import weight as whole

    size = asker.size(1024, 4096, 4096)
    data = asker.tensors(size)
    x, w, rows = data.x, data.weight, data.rows
    base, figures = linear(x, w), {}
    for change in LANDING:
        p = torch.randn(size.n, size.m, device=asker.device)
        delta = p @ w[rows].float()
        p *= change * w.float().norm() / delta.norm()
        effect = (x.double() @ w[rows].double().t()) @ p.double().t()
        tiles = whole.Tiles.whole(w, rows, p, None, asker.dtype)
        for name, seed in (("nearest", None), ("stochastic", 1)):
            fused = whole.fused_weight(tiles, None, None, None, None, asker.dtype, seed)
            figures[f"W' {name} at {change:g}"] = _share(linear(x, fused) - base, effect)
        exact = (x.float() @ w.float().t() + effect.float()).to(asker.dtype)
        figures[f"one rounding at {change:g}"] = _share(exact - base, effect)
    return figures


def _share(got: Tensor, effect: Tensor) -> float:
    return float((got.double() * effect).sum() / effect.square().sum())


def _activation_dx(dims: Dims, asker: Asker) -> dict[str, Any]:
    """∂x and ∂P of ``activation``, gated, with ∂y0 and with h R, by MiB of workspace."""
    from secura_kernels import activation_dense

    case = ActivationCase.draw(asker, dims)
    data = case.data
    figures = {"frozen_us": asker.us(lambda: data.grad @ data.weight)}
    for thin in (False, True):
        for mib in (16, 64, 128, 256):

            def run(mib: int = mib) -> Any:
                with workspace(mib):
                    return activation_dense.linear_backward.body(
                        data.grad, case.y0, None, case.z, data.weight, data.rows, case.q,
                        *case.how, "triton",
                    )  # fmt: skip

            with replaced(activation_dense, adds_thin=lambda *_, thin=thin: thin):
                figures[f"{'h R' if thin else '∂y0'} {mib} MiB_us"] = asker.us(run)
    return figures


def _dx_ways(dims: Dims, asker: Asker) -> dict[str, Any]:
    """∂x of the additive spaces from W' rebuilt, and from ∂y0 gathered."""
    from secura_kernels.kernels import additive

    size = asker.size(*dims)
    data = asker.tensors(size)
    g, w, rows = data.grad, data.weight, data.rows
    q = (torch.randn(size.n, size.m, device=asker.device) * 0.05).to(asker.dtype)
    parts: dict[str, Callable[[], Any]] = {
        "frozen": lambda: g @ w,
        "W'": lambda: g @ additive.rebuilt_weight(w, additive.padded_r(w, rows), q, None),
        "∂y0": lambda: additive.output_gradient(g, rows, q, None, None) @ w,
        "∂y0 alone": lambda: additive.output_gradient(g, rows, q, None, None),
    }
    return {f"{name}_us": asker.us(call) for name, call in parts.items()}


__all__ = ["HOST_TOKENS", "LANDING", "LAYERS", "questions"]
