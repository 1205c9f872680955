"""The questions that only a GPU answers, each a few variants of one thing timed beside each other.

A question is asked by :mod:`benchmarks.triage`, which prints and keeps its figures: times in
microseconds by variant (``NAME_us``), errors and shares as plain numbers. Variants stand in the
place of what the launchers choose while they run; nothing is left changed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from secura_kernels import NormOptions, channel_product, lowrank_linear, row_norms
from secura_kernels.activation import checked, gradients, normed
from secura_kernels.additive import product_wide
from secura_kernels.gain import known_scalars

from . import graphs, measure, oracle
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


class Asker:
    """Where the questions are asked, and the clock they are timed by.

    Args:
        device: ``"cuda"``, or ``"cpu"`` for a dry run in the interpreter.
        warming: whether every call runs once, to be compiled, and nothing is timed.
    """

    def __init__(self, device: str, warming: bool = False) -> None:
        self.device, self.warming = torch.device(device), warming
        self.dry, self.dtype = device == "cpu", torch.bfloat16

    def size(self, t: int, n: int, k: int, m: int = 128) -> Size:
        """The size asked for, or on a CPU one with as many blocks of nearly nothing."""
        if not self.dry:
            return Size(t, n, k, m)
        return Size(max(16, t // 256), max(32, n // 128), max(32, k // 128), 16)

    @functools.lru_cache(maxsize=1)  # noqa: B019  one size at a time is all a GPU should hold
    def tensors(self, size: Size) -> Tensors:
        """Random tensors of a layer."""
        return Tensors(size, str(self.device), self.dtype)

    def us(self, call: Callable[[], Any]) -> float | None:
        """Microseconds of a call by itself, as a CUDA graph where it can be one."""
        if self.warming or self.dry:
            call()
            return None
        try:
            run = graphs.graphed(call)
        except graphs.NotCapturableError:
            run = call
        return 1e3 * measure.timing(measure.sample(run, self.device))["median"]

    def host_us(self, call: Callable[[], Any], count: int = 100) -> float | None:
        """Microseconds from one eager call to the next, when many follow each other."""
        call()
        if self.warming or self.dry:
            return None
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count * 1e6


class Question(NamedTuple):
    """A name and what finds its figures."""

    name: str
    ask: Callable[[Asker], dict[str, Any]]


class _Options:
    """A kernel that is launched with options of its own beside the launcher's."""

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launch = self.kernel[grid]
        return lambda *args, **named: launch(*args, **named | self.options)


@contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Within, names of a module stand for other values."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def questions() -> list[Question]:
    """All of them, the most important first; nothing is made before its turn."""
    sizes = {"q+o": (8192, 4096, 4096), "gate+up": (8192, 14336, 4096)}
    short = {"q+o T=2048": (2048, 4096, 4096), "gate+up T=2048": (2048, 14336, 4096)}
    found = [
        Question(f"layer: {name}", functools.partial(_layer, name, sizes["q+o"])) for name in LAYERS
    ]
    for label, size in sizes.items():
        found.append(Question(f"add: {label}", functools.partial(_add, size)))
    wide = {"down": (8192, 4096, 14336)}
    for label, size in (sizes | wide | short).items():
        found.append(Question(f"forward way: {label}", functools.partial(_forward_ways, size)))
    for label, size in sizes.items():
        found.append(Question(f"dQ: {label}", functools.partial(_dq, size)))
        found.append(Question(f"activation backward MiB: {label}", functools.partial(_mib, size)))
    for name in LAYERS[:-1]:
        found.append(Question(f"host: {name}", functools.partial(_host, name)))
    found.append(Question("repeated rows", _repeated_rows))
    for name in LAYERS[1:-1]:
        found.append(Question(f"lands: {name}", functools.partial(_lands, name)))
    found += [
        Question("lands: ways", _lands_ways),
        Question("tiles: activation forward", _forward_tiles),
        Question("tiles: activation backward", _backward_tiles),
        Question("tiles: W' of none, channel", _rebuild_tiles),
        Question("tiles: W' of weight", _weight_tiles),
        Question("channel precision", _channel_precision),
        Question("tiles: gather", _gather_tiles),
        Question("tiles: P", _project_tiles),
        Question("tiles: Q of channel", _channel_tiles),
    ]
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


def _layer(name: str, dims: tuple[int, int, int], asker: Asker) -> dict[str, Any]:
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


def _add(dims: tuple[int, int, int], asker: Asker) -> dict[str, Any]:
    """``y0 + z Qᵀ`` in place: cuBLAS, our pass, with fewer registers, in other blocks."""
    from secura_kernels.kernels import additive

    size = asker.size(*dims)
    data = asker.tensors(size)
    y, z = data.grad.clone(), data.x[:, : size.m].contiguous()
    q = torch.randn(size.n, size.m, device=asker.device).to(asker.dtype) * 0.01
    share = torch.ones(size.n, device=asker.device)
    ours = functools.partial(additive.add_product, y, z, q, share, out=y)
    figures = {"addmm_us": asker.us(lambda: y.addmm_(z, q.t())), "pass_us": asker.us(ours)}
    kernel = additive._add_product_kernel
    for most in (80, 128):
        with replaced(additive, _add_product_kernel=_Options(kernel, maxnreg=most)):
            figures[f"pass maxnreg {most}_us"] = asker.us(ours)
    for blocks in ((64, 128, 64, 8, 2), (64, 64, 64, 4, 2), (128, 128, 64, 8, 2)):
        chosen = additive.Blocks(*blocks)
        with replaced(additive, _add_blocks=lambda *_, chosen=chosen: chosen):
            figures[f"pass {blocks}_us"] = asker.us(ours)
    return figures


def _forward_ways(dims: tuple[int, int, int], asker: Asker) -> dict[str, Any]:
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


def _dq(dims: tuple[int, int, int], asker: Asker) -> dict[str, Any]:
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


def _mib(dims: tuple[int, int, int], asker: Asker) -> dict[str, Any]:
    """The backward of ``activation`` with dΔ in chunks of so many MiB, thin or with ∂y0."""
    size = asker.size(*dims)
    data = asker.tensors(size)
    options = checked(NormOptions("activation"), "recompute")
    y0 = linear(data.x, data.weight)
    q = (torch.randn(size.n, size.m, device=asker.device) * 0.05).to(asker.dtype)
    _, z, _, _, _ = normed(y0, None, data.rows, q, None, None, None, options, None, False, "triton")
    figures = {}
    for thin in (False, True):
        for mib in (16, 32, 64, 1024):

            def run(mib: int = mib, thin: bool = thin) -> Any:
                with workspace(mib):
                    return gradients(
                        data.grad, y0, None, z, data.rows, q, None, None, None, None, None,
                        known_scalars(options), options.form, options.combine,
                        [True, True, False], impl="triton", thin=thin,
                    )  # fmt: skip

            figures[f"{'thin' if thin else '∂y0'} {mib} MiB_us"] = asker.us(run)
    return figures


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


def _forward_tiles(asker: Asker) -> dict[str, Any]:
    from secura_kernels.kernels import activation

    size = asker.size(8192, 4096, 4096)
    data = asker.tensors(size)
    options = checked(NormOptions("activation"), "recompute")
    y0 = linear(data.x, data.weight)
    q = (torch.randn(size.n, size.m, device=asker.device) * 0.05).to(asker.dtype)
    z = y0.index_select(1, data.rows)

    def run() -> Any:
        return activation.forward(y0, z, q, None, None, None, options, None, False, False)

    figures = {"as it is_us": asker.us(run)}
    tiles = ((64, 64, 4, 2), (128, 128, 8, 2), (128, 64, 4, 2), (128, 64, 8, 3), (64, 128, 4, 2))
    for tile in tiles:
        chosen = activation.Tile(*tile)
        with replaced(activation, forward_tile=lambda *_, chosen=chosen: chosen):
            figures[f"{tile}_us"] = asker.us(run)
    for count in (1, 4, 16):
        with replaced(activation, _TILES_A_PROGRAM=count):
            figures[f"{count} tiles a program_us"] = asker.us(run)
    return figures


def _backward_tiles(asker: Asker) -> dict[str, Any]:
    from secura_kernels.kernels import activation, activation_backward

    size = asker.size(8192, 4096, 4096)
    data = asker.tensors(size)
    options = checked(NormOptions("activation"), "recompute")
    y0 = linear(data.x, data.weight)
    q = (torch.randn(size.n, size.m, device=asker.device) * 0.05).to(asker.dtype)
    z = y0.index_select(1, data.rows)

    def run() -> Any:
        return gradients(
            data.grad, y0, None, z, data.rows, q, None, None, None, None, None,
            known_scalars(options), options.form, options.combine, [True, True, False],
            impl="triton",
        )  # fmt: skip

    figures = {"as it is_us": asker.us(run)}
    tiles = ((64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 128, 4, 2))
    for tile in tiles:
        chosen = activation.Tile(*tile)
        with replaced(activation_backward, backward_tile=lambda *_, chosen=chosen: chosen):
            figures[f"{tile}_us"] = asker.us(run)
    return figures


def _rebuild_tiles(asker: Asker) -> dict[str, Any]:
    from secura_kernels.kernels import additive

    size = asker.size(8192, 4096, 4096)
    data = asker.tensors(size)
    q = (torch.randn(size.n, size.m, device=asker.device) * 0.05).to(asker.dtype)
    share = torch.ones(size.n, device=asker.device)
    r = additive.padded_r(data.weight, data.rows)
    figures: dict[str, Any] = {}
    for shared in (None, share):
        end = "" if shared is None else ", share"
        run = functools.partial(additive.rebuilt_weight, data.weight, r, q, shared)
        figures[f"as it is{end}_us"] = asker.us(run)
        for blocks in ((64, 128, 64, 8, 2), (64, 64, 64, 4, 2), (128, 128, 64, 8, 2)):
            chosen = additive.Blocks(*blocks)
            with replaced(additive, _add_blocks=lambda *_, chosen=chosen: chosen):
                figures[f"{blocks}{end}_us"] = asker.us(run)
    figures["cuBLAS addmm_us"] = asker.us(lambda: torch.addmm(data.weight, q, r))
    return figures


def _weight_tiles(asker: Asker) -> dict[str, Any]:
    from secura_kernels.kernels import weight as whole

    size = asker.size(8192, 4096, 4096)
    data = asker.tensors(size)
    p = torch.randn(size.n, size.m, device=asker.device) * 0.05
    scalars = torch.tensor([1e-10, 6.0, 0.0], device=asker.device)

    def run() -> Any:
        tiles = whole.Tiles.whole(data.weight, data.rows, p, None, asker.dtype)
        return whole.fused_weight(tiles, scalars, None, "paper", "gated", asker.dtype)

    def peak() -> Any:
        tiles = whole.Tiles.whole(data.weight, data.rows, p, None, asker.dtype)
        return whole._stat("peak", tiles, scalars, "paper")

    def grad() -> Any:
        return whole.grad_p(
            data.grad, data.x, data.weight, data.rows, p, None, scalars, None, "paper"
        )

    figures = {"as it is_us": asker.us(run), "peak_us": asker.us(peak), "∂P_us": asker.us(grad)}
    for mib in (32, 1024):
        with replaced(whole, WORKSPACE_MIB=mib):
            figures[f"∂P {mib} MiB_us"] = asker.us(grad)
    product = lambda: data.grad.t() @ data.x  # noqa: E731
    figures["gᵀx alone_us"] = asker.us(product)
    for n, k, warps in ((64, 64, 4), (128, 64, 8), (64, 128, 4), (128, 128, 8)):
        chosen = {"BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": 2}
        with replaced(whole, _blocks=lambda *_, chosen=chosen: dict(chosen)):
            figures[f"{n} × {k}, {warps} warps_us"] = asker.us(run)
            figures[f"{n} × {k}, {warps} warps, peak_us"] = asker.us(peak)
    return figures


def _channel_precision(asker: Asker) -> dict[str, Any]:
    from secura_kernels.kernels import channel

    size = asker.size(8192, 4096, 4096)
    data = asker.tensors(size)
    p = torch.randn(size.n, size.m, device=asker.device) * 0.05
    gram, norms = row_norms(data.weight, data.rows, None)
    exact = ((p.double() @ gram.double()) * p.double()).sum(1).sqrt()
    options = NormOptions("channel")
    run = functools.partial(channel_product, p, None, gram, norms, options, impl="triton")
    figures: dict[str, Any] = {}
    for precision in ("ieee", "tf32x3"):
        with replaced(channel, PRECISION=precision):
            found = channel.delta_norms(p, gram)
            figures[f"{precision} error"] = oracle.relative_error(found, exact)
            figures[f"{precision}_us"] = asker.us(run)
    return figures


def _gather_tiles(asker: Asker) -> dict[str, Any]:
    from secura_kernels.kernels import additive

    size = asker.size(8192, 4096, 4096)
    data = asker.tensors(size)
    figures = {}
    for t, m, warps in ((16, 64, 8), (16, 128, 8), (32, 64, 8), (8, 128, 4), (32, 128, 4)):
        with replaced(additive, _GATHER=additive.Blocks(t, 0, m, warps, 1)):
            run = functools.partial(additive.gather, data.grad, None, data.rows, None)
            figures[f"{t} × {m}, {warps} warps_us"] = asker.us(run)
    return figures


def _project_tiles(asker: Asker) -> dict[str, Any]:
    """P = C U, ∂U = Cᵀ ∂P and A B, as they are and in other tiles."""
    from secura_kernels.kernels import columns

    size = asker.size(8192, 4096, 4096)
    data = asker.tensors(size)
    u = torch.randn(size.m, size.m, device=asker.device)
    dp = torch.randn(size.n, size.m, device=asker.device)
    figures = {"A B_us": asker.us(lambda: data.a @ data.b)}
    forward = functools.partial(columns.forward, data.weight, data.cols, u, torch.float32)
    backward = functools.partial(columns.backward, dp, data.weight, data.cols)
    for n, i, warps in ((32, 32, 4), (16, 32, 4), (16, 64, 4), (16, 128, 4), (32, 128, 8)):
        with replaced(columns, FORWARD=columns.Blocks(n, i, warps)):
            figures[f"P {n} × {i}, {warps} warps_us"] = asker.us(forward)
    for n, i, warps, splits in (
        (32, 32, 4, 64), (64, 32, 4, 64), (64, 64, 8, 64), (64, 32, 4, 32), (32, 32, 4, 128),
        (32, 64, 8, 128),
    ):  # fmt: skip
        with replaced(columns, BACKWARD=columns.Blocks(n, i, warps), MOST_SPLITS=splits):
            figures[f"∂U {n} × {i}, {warps} warps, {splits} splits_us"] = asker.us(backward)
    return figures


def _channel_tiles(asker: Asker) -> dict[str, Any]:
    from secura_kernels.kernels import channel

    size = asker.size(8192, 4096, 4096)
    data = asker.tensors(size)
    p = torch.randn(size.n, size.m, device=asker.device) * 0.05
    gram, norms = row_norms(data.weight, data.rows, None)
    options = NormOptions("channel")
    run = functools.partial(channel_product, p, None, gram, norms, options, impl="triton")
    figures = {}
    for precision in ("ieee", "tf32x3"):
        for n, m, warps in ((32, 64, 8), (16, 64, 4), (16, 128, 4), (16, 128, 8), (32, 128, 8)):
            values = {"BLOCK_N": n, "BLOCK_M": m, "NUM_WARPS": warps, "PRECISION": precision}
            with replaced(channel, **values):
                figures[f"{n} × {m}, {warps} warps, {precision}_us"] = asker.us(run)
    return figures


def _activation_dx(dims: tuple[int, int, int], asker: Asker) -> dict[str, Any]:
    """∂x and ∂P of ``activation``, gated, with ∂y0 and with h R, by MiB of workspace."""
    from secura_kernels import activation_dense

    size = asker.size(*dims)
    data = asker.tensors(size)
    options = checked(NormOptions("activation"), "recompute")
    y0 = linear(data.x, data.weight)
    q = (torch.randn(size.n, size.m, device=asker.device) * 0.05).to(asker.dtype)
    z = y0.index_select(1, data.rows)
    figures = {"frozen_us": asker.us(lambda: data.grad @ data.weight)}
    for thin in (False, True):
        for mib in (16, 64, 128, 256):

            def run(mib: int = mib) -> Any:
                with workspace(mib):
                    return activation_dense.linear_backward.body(
                        data.grad, y0, None, z, data.weight, data.rows, q, None, None, None, None,
                        None, known_scalars(options), options.form, options.combine,
                        [True, True, False], "triton",
                    )  # fmt: skip

            with replaced(activation_dense, adds_thin=lambda *_, thin=thin: thin):
                figures[f"{'h R' if thin else '∂y0'} {mib} MiB_us"] = asker.us(run)
    return figures


def _dx_ways(dims: tuple[int, int, int], asker: Asker) -> dict[str, Any]:
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


__all__ = ["HOST_TOKENS", "LANDING", "LAYERS", "Asker", "Question", "questions", "replaced"]
