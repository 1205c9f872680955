"""Time and peak memory to put adapters on a whole model, against an SVD initialisation.

    python -m benchmarks.startup --preset quick --out benchmarks/results/startup-cpu.json

The model is the linear layers of all blocks; each adapter is put on all of them by one call of
``get_peft_model``, SECURA's and its rivals' alike. ``secura`` takes A as a slice of W; ``svd init``
computes the same A as the released code does, from each layer's whole SVD. The SVD is timed on one
layer of each shape and multiplied by how many there are. Both must agree on A before they are
timed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import measure
from .machine import dtype_name
from .oracle import relative_error
from .registry import SPACES, Provider, Ranks, catalogue, choose, frozen_linear, put_peft, secura
from .schema import Result, Row
from .session import Session, Turn, command, in_turns, parser
from .shapes import MODELS, M, R
from .tables import startup_table

REPEATS = 3


def preset(name: str) -> dict[str, Any]:
    """The case: ``quick`` is all of SmolLM2-135M's shape, else a whole model by name."""
    model = "smollm2-135m" if name == "quick" else name
    return {"model": model, "blocks": MODELS[model].layers, "m": M, "r": R}


def linears(case: dict[str, Any], device: torch.device, dtype: torch.dtype) -> list[nn.Linear]:
    """Every frozen linear layer of the model's blocks, random weights."""
    layers = []
    for part in MODELS[case["model"]].projections():
        for _ in range(case["blocks"] * part.per_block):
            weight = torch.randn(part.n, part.k, device=device, dtype=dtype)
            layers.append(frozen_linear(weight.mul_(part.k**-0.5)))
    return layers


def put(provider: Provider, layers: list[nn.Linear], ranks: Ranks) -> nn.Sequential:
    """A model of ``layers`` with a provider's adapters on all of them."""
    dtype = layers[0].weight.dtype
    adapter = dtype if provider.name.endswith(dtype_name(dtype)) else torch.float32
    return put_peft(layers, provider.family, ranks, adapter=adapter)


def svd_init(weight: Tensor, m: int, r: int) -> Tensor:
    """``A [m, r] = U[:m] Σ V[:r]ᵀ`` of ``W = U Σ Vᵀ``, as the released code starts."""
    u, sigma, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return (u[:m] * sigma) @ vh[:, :r]


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """``(seconds, peak MiB)`` of a call: the median of ``REPEATS``, and of one more."""
    times_ms = [time for _ in range(REPEATS) for time in measure.stopwatch(call, device)]
    return statistics.median(times_ms) / 1e3, measure.peak_mib(call, device)


def svd_row(case: dict[str, Any], layers: list[nn.Linear], device: torch.device) -> Row:
    """The cost of starting from SVDs; ``wrong`` where they disagree with SECURA's A."""
    row, seconds, peaks = Row(case, "svd init"), 0.0, list[float]()
    shapes = [layer.weight.shape for layer in layers]
    for shape in dict.fromkeys(shapes):
        layer = layers[shapes.index(shape)]
        a = secura("none", "auto").build(layer, Ranks(case["m"], case["r"])).get_parameter("A")
        error = relative_error(svd_init(layer.weight, *a.shape), a.detach().double())
        if not error < 1e-3:
            row.fail("wrong", f"A differs from the slice of W by {error:.1e}")
            return row
        call = functools.partial(svd_init, layer.weight, *a.shape)
        took, peak = timed(call, device)
        seconds += took * shapes.count(shape)
        peaks.append(peak)
    row.figures = {"seconds": seconds, "peak_mib": max(peaks)}
    row.note = "one layer of each shape, times their number"
    return row


def run(options: argparse.Namespace) -> Result:
    """Everything the command line asked for."""
    session = Session("startup", options, {})
    device, dtype = session.device, session.dtype
    rivals = [entry for entry in catalogue(dtype, dropout=False) if entry.name.startswith("peft")]
    ours = [secura(space, "auto", f"secura {space}") for space in SPACES]
    providers = choose([*ours, *rivals], options.providers)

    def rows_of(case: dict[str, Any], turn: Turn) -> list[Row]:
        torch.manual_seed(options.seed)
        layers, ranks = linears(case, device, dtype), Ranks(case["m"], case["r"])

        def prepare(provider: Provider, row: Row) -> dict[str, measure.Task]:
            put(provider, layers[:1], ranks)
            seconds, peak = timed(lambda: put(provider, layers, ranks), device)
            row.figures = {"seconds": seconds, "peak_mib": peak, "layers": len(layers)}
            return {}

        rows = in_turns(case, providers, prepare, lambda *_: None, device, turn=turn, rounds=1)
        return [*rows, svd_row(case, layers, device)]

    case = preset(options.preset)
    return session.run([(case, case["model"], 1.0)], providers, rows_of)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    flags = parser(__doc__ or "", ("quick", *MODELS))
    return command(flags, arguments, run, startup_table)


if __name__ == "__main__":
    raise SystemExit(main())
