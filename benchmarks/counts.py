"""Launches, bytes and operations of layers, counted on tensors without data: no GPU is needed.

    python -m benchmarks.counts --out benchmarks/results/counts.json

    python -m benchmarks.counts --together --out benchmarks/results/counts-together.json

Every kernel of ours and every operator of torch's, ours and our rivals' alike, is one launch
(:mod:`.launches`). Its time is its bytes or its operations at the chip's ceilings, whichever is
longer; a layer's is the sum. Not seen: gaps between launches and the time a launch
takes to begin and end, multiprocessors that idle because a launch has few programs or many
registers, what stays in the L2 cache, reductions inside cuBLAS. With ``--together`` q, k and v are
given one tensor, gate and up another, and the sums of its gradient's parts are counted too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from secura_kernels import NormOptions
from secura_kernels.held import Held
from secura_kernels.inspection.examples import Case
from secura_kernels.inspection.recorder import TARGETS, record
from secura_kernels.plan import CEILINGS

from .count_tables import BEFORE, counts_table
from .launches import Launch, counting
from .registry import SPACES, Ranks, catalogue, frozen_linear
from .schema import Result, Row, new_result
from .session import add_recording
from .shapes import LAYER_PRESETS, TOKENS_OF_COUNTS, LayerCase, layer_preset, sibling_cases

KEEPERS = ("none", "channel", "weight")
"""Spaces of a W' that may be kept for the backward pass."""
RIVALS = ("frozen", "peft lora bf16", "strong lora", "peft dora bf16", "strong dora")


Count = Callable[..., tuple[list[Launch], int]]
"""The launches of layers that are given one tensor, and how many of them are the forward's."""


def ours(
    space: str,
    keep: str = "never",
    shares: bool = False,
    holds: bool = False,
    columns: bool = False,
) -> Count:
    """What counts SECURA layers of bf16 in one norm space, of core A B.

    ``keep`` is for their W'; with ``shares`` ∂x is added up in place; with ``holds`` it is a
    micro-batch between the first of an optimizer step and the last; with ``columns`` C is kept.
    """
    options = NormOptions(space)

    def build(case: LayerCase) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        sizes = (case.m, case.T, case.N, case.K, 2 * case.m)
        plain = Case(options, torch.bfloat16, *sizes, biased=False, trains_bias=False)
        with record(TARGETS["sm_90"]):
            example = plain.draw("meta")
        held = Held(lambda: False) if holds else None
        layer = example.layer._replace(shares_input=shares, held=held)
        layer = layer._replace(columns=_empty(case.N, case.m)) if columns else layer
        leaves = [t.requires_grad_() for t in (example.a, example.b) if t is not None]
        return lambda x: example._replace(x=x, layer=layer).output("triton"), leaves

    def count(*cases: LayerCase) -> tuple[list[Launch], int]:
        with patch.dict(os.environ, SECURA_KEEP_WEIGHT=keep):
            return _count(build, cases, warm=holds)

    return count


def rival(name: str) -> Count:
    """What counts a provider's layers of bf16."""
    (provider,) = (one for one in catalogue(torch.bfloat16) if one.name == name)

    def build(case: LayerCase) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        layer = provider.build(frozen_linear(_empty(case.N, case.K)), Ranks(case.m, case.r))
        return layer, [one for one in layer.parameters() if one.requires_grad]

    return lambda *cases: _count(build, cases)


def _empty(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def _count(
    build: Callable[[LayerCase], tuple[Callable[[Tensor], Tensor], list[Tensor]]],
    cases: tuple[LayerCase, ...],
    warm: bool = False,
) -> tuple[list[Launch], int]:
    made = [build(case) for case in cases]
    leaf = _empty(cases[0].T, cases[0].K).requires_grad_()
    x = leaf.view_as(leaf)  # a layer's input is another's output
    leaves = [leaf, *(one for _, own in made for one in own)]
    grads = [_empty(case.T, case.N) for case in cases]
    with counting() as launches:
        for _ in range(1 + warm):
            launches.clear()
            for one in leaves:
                one.grad = None
            outs = [layer(x) for layer, _ in made]
            first = len(launches)
            torch.autograd.backward(outs, grads, inputs=leaves)  # what is returned is not held
    return launches, first


def figures(launches: list[Launch], first: int) -> dict[str, float]:
    """What a row of results says of a layer; ``us_CHIP`` is the least a chip's ceilings allow."""
    return {
        "launches_forward": first,
        "launches_backward": len(launches) - first,
        "moved_mib": sum(of.cost.bytes for of in launches) / 2**20,
        "gflop": sum(of.cost.flop for of in launches) / 1e9,
    } | {
        f"us_{name}": sum(of.cost.seconds(chip) for of in launches) * 1e6
        for name, chip in CEILINGS.items()
    }


def count_together(model: str, tokens: Sequence[int]) -> list[Row]:
    """A block's layers, those that are given one tensor together, inputs shared and not."""
    counters = {f"secura {space}": ours(space) for space in SPACES}
    for keep, kept, spaces in (("never", "", SPACES), ("always", ", W' kept", KEEPERS)):
        for space in spaces:
            name = f"secura {space}, ∂x in place{kept}"
            counters[name] = ours(space, keep, shares=True)
            counters[f"{name}, C kept"] = ours(space, keep, shares=True, columns=True)
            counters[f"{name}, ∂P held"] = ours(space, keep, shares=True, holds=True)
    counters |= {name: rival(name) for name in RIVALS if "dora" not in name}
    rows = []
    for t in tokens:
        for cases in sibling_cases(model, t):
            names, n = "+".join(case.projection for case in cases), sum(case.N for case in cases)
            whole = replace(cases[0], projection=names, N=n)
            for name, count in counters.items():
                rows.append(Row(asdict(whole), name, figures=figures(*count(*cases))))
    return rows


def count_all(preset: str, before: Result | None, measured: Result | None) -> list[Row]:
    """Every provider on every case of a layer preset.

    Args:
        preset: of :mod:`benchmarks.shapes`.
        before: an earlier result, whose SECURA rows are taken in.
        measured: of :mod:`benchmarks.layer`: its ``both_graph_ms`` go to the rows of the same case,
            of ``before`` where that is given.
    """
    counters = {f"secura {space}": ours(space) for space in SPACES}
    counters |= {f"secura {space}, W' kept": ours(space, "always") for space in KEEPERS}
    counters |= {name: rival(name) for name in RIVALS}
    found = [
        Row(asdict(case), name, figures=figures(*count(case)))
        for case in layer_preset(preset).cases
        for name, count in counters.items()
    ]
    for row in before.rows if before else ():
        if before and row.provider in {f"secura {space}" for space in SPACES}:
            found.append(Row(row.case, row.provider + BEFORE, figures=row.figures))
    for row in measured.rows if measured else ():
        name = row.provider.removesuffix(" triton")
        name += BEFORE if before and name not in RIVALS else ""
        for mine in found:
            if (mine.case, mine.provider) == (row.case, name) and "both_graph_ms" in row.figures:
                mine.figures["measured_us"] = 1e3 * row.figures["both_graph_ms"]["median"]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--preset", default="block", choices=LAYER_PRESETS)
    flags.add_argument("--together", action="store_true", help="Llama-3-8B's block, inputs shared")
    add_recording(flags)
    flags.add_argument("--before", type=Path, help="an earlier result, to stand beside this one")
    flags.add_argument("--measured", type=Path, help="of benchmarks.layer, to hold the count to")
    options = flags.parse_args(arguments)
    try:
        earlier = [path and Result.load(path) for path in (options.before, options.measured)]
    except ValueError as error:
        flags.error(str(error))
    before, measured = earlier
    result = new_result(
        "counts", options.preset, torch.device("cpu"), torch.bfloat16, {}, options.commit
    )
    chips = {name: chip._asdict() for name, chip in CEILINGS.items()}
    result.settings = {"chips": chips, "before": before.commit if before else None}
    if options.together:
        result.preset, result.rows = "together", count_together("llama3-8b", TOKENS_OF_COUNTS)
    else:
        result.rows = count_all(options.preset, before, measured)
    result.complete = True
    if options.out:
        result.save(options.out)
    print(counts_table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
