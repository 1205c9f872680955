"""Other tiles of the kernels beside those that the launchers choose: questions of triage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from secura_kernels import NormOptions, channel_product, row_norms
from secura_kernels.activation import gradients

from . import oracle
from .asker import ActivationCase, Asker, Dims, Launched, Question, replaced

LAYER = (8192, 4096, 4096)
_ADD_BLOCKS = ((64, 128, 64, 8, 2), (64, 64, 64, 4, 2), (128, 128, 64, 8, 2))


def questions() -> list[Question]:
    """One for each kernel."""
    asked: dict[str, Callable[[Asker], dict[str, Any]]] = {
        "add": functools.partial(_add, LAYER),
        "add, gate+up": functools.partial(_add, (8192, 14336, 4096)),
        "activation forward": _forward_tiles,
        "activation backward": _backward_tiles,
        "W' of none, channel": _rebuild_tiles,
        "W' of weight": _weight_tiles,
        "gather": _gather_tiles,
        "P": _project_tiles,
        "Q of channel": _channel_tiles,
    }
    return [Question(f"tiles: {name}", ask) for name, ask in asked.items()]


def _timed(
    asker: Asker, run: Callable[[], Any], module: Any, chooser: str, choices: list[Any],
    begin: str = "", end: str = "",
) -> dict[str, Any]:  # fmt: skip
    """A call's microseconds where ``module.chooser`` returns each of the choices in turn."""
    figures = {}
    for choice in choices:
        with replaced(module, **{chooser: lambda *_, choice=choice: choice}):
            figures[f"{begin}{tuple(choice)}{end}_us"] = asker.us(run)
    return figures


def _add(dims: Dims, asker: Asker) -> dict[str, Any]:
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
        with replaced(additive, _add_product_kernel=Launched(kernel, maxnreg=most)):
            figures[f"pass maxnreg {most}_us"] = asker.us(ours)
    choices = [additive.Blocks(*blocks) for blocks in _ADD_BLOCKS]
    return figures | _timed(asker, ours, additive, "_add_blocks", choices, "pass ")


def _forward_tiles(asker: Asker) -> dict[str, Any]:
    from secura_kernels.kernels import activation

    case = ActivationCase.draw(asker, LAYER)

    def run() -> Any:
        return activation.forward(
            case.y0, case.z, case.q, None, None, None, case.options, None, False, False
        )

    figures = {"as it is_us": asker.us(run)}
    tiles = ((64, 64, 4, 2), (128, 128, 8, 2), (128, 64, 4, 2), (128, 64, 8, 3), (64, 128, 4, 2))
    choices = [activation.Tile(*tile) for tile in tiles]
    figures |= _timed(asker, run, activation, "forward_tile", choices)
    for count in (1, 4, 16):
        with replaced(activation, _TILES_A_PROGRAM=count):
            figures[f"{count} tiles a program_us"] = asker.us(run)
    return figures


def _backward_tiles(asker: Asker) -> dict[str, Any]:
    from secura_kernels.kernels import activation, activation_backward

    case = ActivationCase.draw(asker, LAYER)

    def run() -> Any:
        return gradients(
            case.data.grad, case.y0, None, case.z, case.data.rows, case.q, *case.how, impl="triton"
        )

    figures = {"as it is_us": asker.us(run)}
    tiles = ((64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 128, 4, 2))
    choices = [activation.Tile(*tile) for tile in tiles]
    return figures | _timed(asker, run, activation_backward, "backward_tile", choices)


def _rebuild_tiles(asker: Asker) -> dict[str, Any]:
    from secura_kernels.kernels import additive

    size = asker.size(*LAYER)
    data = asker.tensors(size)
    q = (torch.randn(size.n, size.m, device=asker.device) * 0.05).to(asker.dtype)
    share = torch.ones(size.n, device=asker.device)
    r = additive.padded_r(data.weight, data.rows)
    figures: dict[str, Any] = {}
    for shared in (None, share):
        end = "" if shared is None else ", share"
        run = functools.partial(additive.rebuilt_weight, data.weight, r, q, shared)
        figures[f"as it is{end}_us"] = asker.us(run)
        choices = [additive.Blocks(*blocks) for blocks in _ADD_BLOCKS]
        figures |= _timed(asker, run, additive, "_add_blocks", choices, end=end)
    figures["cuBLAS addmm_us"] = asker.us(lambda: torch.addmm(data.weight, q, r))
    return figures


def _weight_tiles(asker: Asker) -> dict[str, Any]:
    from secura_kernels.kernels import weight as whole

    size = asker.size(*LAYER)
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


def _gather_tiles(asker: Asker) -> dict[str, Any]:
    from secura_kernels.kernels import additive

    size = asker.size(*LAYER)
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

    size = asker.size(*LAYER)
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

    size = asker.size(*LAYER)
    data = asker.tensors(size)
    p = torch.randn(size.n, size.m, device=asker.device) * 0.05
    gram, norms = row_norms(data.weight, data.rows, None)
    options = NormOptions("channel")
    run = functools.partial(channel_product, p, None, gram, norms, options, impl="triton")
    figures: dict[str, Any] = {}
    exact = ((p.double() @ gram.double()) * p.double()).sum(1).sqrt()
    for precision in ("ieee", "tf32x3"):
        with replaced(channel, PRECISION=precision):
            found = channel.delta_norms(p, gram)
            figures[f"{precision} error"] = oracle.relative_error(found, exact)
        for n, m, warps in ((32, 64, 8), (16, 64, 4), (16, 128, 4), (16, 128, 8), (32, 128, 8)):
            values = {"BLOCK_N": n, "BLOCK_M": m, "NUM_WARPS": warps, "PRECISION": precision}
            with replaced(channel, **values):
                figures[f"{n} × {m}, {warps} warps, {precision}_us"] = asker.us(run)
    return figures


__all__ = ["questions"]
