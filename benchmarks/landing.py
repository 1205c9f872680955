"""How much of a small change of the weight reaches a layer's output in bf16.

    python -m benchmarks.landing --out benchmarks/results/landing-cpu.json

The share of ΔW's exact effect that the output shows, by |ΔW| / |W|, for every space with and
without stochastic rounding, PEFT's LoRA and DoRA. Products of 16 bits are summed in fp32 and
rounded once, as on a GPU; on a CPU without units for them torch's own take twenty times as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import oracle
from .count_tables import landing_table
from .registry import SPACES, Provider, Ranks, catalogue, frozen_linear, secura
from .schema import SPENT, Result, Row
from .session import Session, command, parser

CHANGES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
"""|ΔW| / |W|."""
SIZES = {
    "quick": {"T": 512, "N": 512, "K": 512, "m": 64, "r": 16},
    "tiny": {"T": 64, "N": 64, "K": 64, "m": 8, "r": 4},
}
DRAWS = 5
"""Layers a figure is the mean of."""


@contextmanager
def wide_products() -> Iterator[None]:
    """Within, products of 16 bits on the CPU are made in fp32 and rounded once."""
    library = torch.library.Library("aten", "IMPL")

    def wide(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor

    def product(name: str) -> Callable[..., Tensor]:
        into = getattr(torch.ops.aten, name).out

        def run(*tensors: Tensor, **scales: Any) -> Tensor:
            made = [wide(tensor) for tensor in tensors]
            return into(*made, **scales, out=made[0].new_empty(0)).to(tensors[0].dtype)

        return run

    for name in ("mm", "bmm", "addmm", "baddbmm"):
        library.impl(name, product(name), "CPU", allow_override=True)
    add = product("addmm")
    library.impl(
        "addmm_",
        lambda out, *pair, **scales: out.copy_(add(out, *pair, **scales)),
        "CPU",
        allow_override=True,
    )
    try:
        yield
    finally:
        library._destroy()


def providers() -> list[Provider]:
    """Whose layers are asked: every space, plain and rounded, then PEFT's."""
    found = []
    for space in SPACES:
        found.append(secura(space, "reference", f"secura {space}"))
        if space != "activation":
            name = f"secura {space} stochastic"
            found.append(secura(space, "reference", name, stochastic_rounding=True))
    peft = [one for one in catalogue(torch.bfloat16, dropout=False) if one.name.startswith("peft")]
    return found + peft


def drawn(size: dict[str, int], seed: int) -> tuple[Tensor, Tensor]:
    """A weight ``[N, K]`` and an input ``[T, K]`` in bf16."""
    torch.manual_seed(seed)
    weight = (torch.randn(size["N"], size["K"]) * size["K"] ** -0.5).bfloat16()
    return weight, torch.randn(size["T"], size["K"]).bfloat16()


def shares(
    provider: Provider, weight: Tensor, x: Tensor, ranks: Ranks, change: float
) -> dict[str, float]:
    """The share of a change's effect that a layer's output shows, and the output's own error."""
    layer = provider.build(frozen_linear(weight), ranks)
    oracle.randomise(layer, weight, change)
    with provider.running(), torch.no_grad():
        exact = oracle.output(layer, weight, None, x)
        effect = exact - linear(x.double(), weight.double())
        out = layer(x)
        shown = (out - linear(x, weight)).double()
    share = float((shown * effect).sum() / effect.square().sum())
    return {"share": share, "error": oracle.relative_error(out, exact)}


def rows(provider: Provider, size: dict[str, int], seed: int) -> Iterator[Row]:
    """A provider's rows, one a change."""
    for change in CHANGES:
        found = [
            shares(provider, *drawn(size, seed + index), Ranks(size["m"], size["r"]), change)
            for index in range(DRAWS)
        ]
        figures = {name: fmean(one[name] for one in found) for name in found[0]}
        figures["spread"] = stdev(one["share"] for one in found)
        yield Row(size | {"change": change}, provider.name, figures=figures)


def run(options: Any) -> Result:
    """Everything the command line asked for."""
    options.dtype = options.dtype or "bf16"
    session = Session("landing", options, {"draws": DRAWS})
    size, recorder = SIZES[options.preset], session.recorder
    with wide_products():
        for provider in providers():
            if time.monotonic() < session.end:
                recorder.add(rows(provider, size, options.seed))
            else:
                recorder.add([Row(size, provider.name, "skipped", SPENT)])
    recorder.close()
    return session.result


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    flags = parser(__doc__ or "", tuple(SIZES))
    return command(flags, arguments, run, landing_table)


if __name__ == "__main__":
    raise SystemExit(main())
