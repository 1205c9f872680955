"""Launches, bytes and operations of layers, counted on tensors without data: no GPU is needed.

    python -m benchmarks.counts --out benchmarks/results/counts.json

Our launchers run as they would on the chip (:mod:`secura_kernels.inspection.recorder`), and every
kernel of theirs and every operator of torch's, ours and our rivals' alike, is one launch that reads
its inputs and writes its outputs through memory: of scattered columns the 32-byte sectors they lie
in, of gathered rows those rows. Its time is its bytes or its operations at the chip's ceilings,
whichever is longer; a layer's is the sum. Not seen: gaps between launches and the time a launch
takes to begin and end, multiprocessors that idle because a launch has few programs or many
registers, what stays in the L2 cache, reductions inside cuBLAS.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from secura_kernels import NormOptions
from secura_kernels.inspection.layers import Case
from secura_kernels.inspection.recorder import TARGETS, record
from secura_kernels.ops import launch
from secura_kernels.ops.flops import FORMULAS
from secura_kernels.plan import CHIPS, Cost, sectors

from .registry import SPACES, Ranks, catalogue, frozen_linear
from .schema import Result, Row, new_result
from .shapes import LAYER_PRESETS, LayerCase, layer_preset
from .tables import counts_table

RIVALS = ("frozen", "peft lora bf16", "strong lora", "peft dora bf16", "strong dora")


class Launch(NamedTuple):
    """One kernel or operator by name, and what it moves and computes."""

    name: str
    cost: Cost


def _columns(name: str, height: str, width: str, count: str) -> Callable[[dict[str, Any]], float]:
    """Bytes of the sectors of ``count`` scattered columns of the tensor ``name``."""

    def found(given: dict[str, Any]) -> float:
        return sectors(given[height], given[width], given[count], given[name].element_size())

    return found


def _rows(given: dict[str, Any]) -> float:
    source, k = given["r_ptr"], given["K"]
    return given["M"] * k * source.element_size()


Moved = dict[str, Callable[[dict[str, Any]], float]]
_OF_W: Moved = {"r_ptr": _rows}
_OF_C: Moved = {"w_ptr": _columns("w_ptr", "N", "K", "M")}
MOVED: dict[str, Moved] = {
    "_gather_kernel": {"y_ptr": _columns("y_ptr", "T", "N", "M")},
    "_add_columns_kernel": {
        "base_ptr": _columns("base_ptr", "T", "N", "M"),
        "dy_ptr": lambda given: 2 * _columns("dy_ptr", "T", "N", "M")(given),
    },
    "_project_fwd_kernel": _OF_C,
    "_project_bwd_kernel": _OF_C,
    "weight_stat_kernel": _OF_W,
    "weight_fwd_kernel": _OF_W,
    "weight_bwd_kernel": _OF_W,
    "activation_bwd_kernel": {
        "h_ptr": lambda given: (1.0 if given["first"] == 0 else 2.0) * _size(given["h_ptr"])
    },
}
"""By kernel and argument, the bytes of what is not each element once; by what a kernel takes."""

PRODUCTS: dict[str, tuple[str, ...]] = {
    "_add_product": ("T", "N", "M"),
    "_output_gradient_kernel": ("T", "N", "M"),
    "_project_fwd_kernel": ("N", "M", "M"),
    "_project_bwd_kernel": ("N", "M", "M"),
    "_channel_kernel": ("N", "M", "M"),
    "activation_fwd_kernel": ("t", "n", "m"),
    "activation_bwd_kernel": ("t", "n", "m"),
    "weight_stat_kernel": ("N", "K", "M"),
    "weight_fwd_kernel": ("N", "K", "M"),
    "weight_bwd_kernel": ("N", "K", "M"),
}
"""By kernel the sizes of its product; twice their product are its operations."""


TWICE = ("activation_bwd_kernel", "weight_bwd_kernel")
"""Kernels of two such products."""


def _size(tensor: Tensor) -> float:
    """Bytes of a tensor in memory: what is expanded counts once."""
    spread = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return float(spread * tensor.element_size()) if tensor.numel() else 0.0


def _of_kernel(kernel: Any, arguments: tuple[Any, ...]) -> Launch:
    name = kernel.fn.__name__
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    special = MOVED.get(name, {})
    tensors = {key: of for key, of in given.items() if isinstance(of, Tensor)}
    moved = sum(special[key](given) if key in special else _size(of) for key, of in tensors.items())
    flop = 2.0 * math.prod(given[size] for size in PRODUCTS[name]) if name in PRODUCTS else 0.0
    flop *= 2 if name in TWICE else 1
    return Launch(name, Cost(moved, flop))


def _of_operator(func: Any, args: Any, kwargs: Any, out: Any) -> Launch | None:
    """The launch of an operator; None for one that only makes a view or an empty tensor."""
    name = func.overloadpacket.__name__
    if "empty" in name or any(
        r.alias_info and not r.alias_info.is_write for r in func._schema.returns
    ):
        return None
    if name in ("_unsafe_view", "detach", "alias", "_local_scalar_dense"):
        return None
    read = {key: of for key, of in kwargs.items() if key != "out"}
    inputs, outputs = list(_tensors((args, read))), list(_tensors(out))
    if not any(tensor.numel() for tensor in outputs):
        return None
    if name in ("index_select", "index", "embedding"):
        inputs[0] = outputs[0]
    if name in ("fill_", "zero_"):
        inputs = []
    moved = sum(map(_size, [*inputs, *outputs]))
    product = getattr(torch.ops.aten, name.removesuffix("_"), None)  # addmm_ counts as addmm
    formula = flop_registry.get(product)
    flop = formula(*args, **kwargs, out_val=out) if formula else 0
    return Launch(name, Cost(moved, float(flop)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


class Counter(TorchDispatchMode):
    """Within, keeps every launch; our operators are seen through."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one operator."""
        kwargs = kwargs or {}
        if func.namespace == "secura":
            body: Any = FORMULAS[func.overloadpacket.__name__][0]
            with self:
                return body.body(*args, **kwargs)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if found := _of_operator(func, args, kwargs, out):
            self.launches.append(found)
        return out

    def kernel(self, kernel: Any, arguments: tuple[Any, ...]) -> None:
        """Count one of our kernels."""
        self.launches.append(_of_kernel(kernel, arguments))


@contextmanager
def counting(chip: str = "sm_90") -> Iterator[list[Launch]]:
    """Within, the launches on tensors of the ``meta`` device, cut for a chip of TARGETS."""
    with record(TARGETS[chip]), Counter() as counter:
        launch.watchers.append(counter.kernel)
        try:
            yield counter.launches
        finally:
            launch.watchers.remove(counter.kernel)


def ours(space: str, keep: str = "never") -> Callable[[LayerCase], tuple[list[Launch], int]]:
    """What counts a SECURA layer of bf16 in one norm space, of core A B; ``keep`` for its W'."""

    def count(case: LayerCase) -> tuple[list[Launch], int]:
        os.environ["SECURA_KEEP_WEIGHT"] = keep
        sizes = (case.m, case.T, case.N, case.K, 2 * case.m)
        options = NormOptions(space)
        plain = Case(options, torch.bfloat16, *sizes, biased=False, trains_bias=False)
        with record(TARGETS["sm_90"]):
            example = plain.draw("meta")
        leaves = [t.requires_grad_() for t in (example.x, example.a, example.b) if t is not None]
        return _count(lambda: example.output("triton"), leaves, example.grad)

    return count


def rival(name: str) -> Callable[[LayerCase], tuple[list[Launch], int]]:
    """What counts a provider's layer of bf16."""
    (provider,) = (one for one in catalogue(torch.bfloat16) if one.name == name)

    def count(case: LayerCase) -> tuple[list[Launch], int]:
        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

        layer = provider.build(frozen_linear(empty(case.N, case.K)), Ranks(case.m, case.r))
        x = empty(case.T, case.K).requires_grad_()
        leaves = [x, *(one for one in layer.parameters() if one.requires_grad)]
        return _count(lambda: layer(x), leaves, empty(case.T, case.N))

    return count


def _count(
    forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor
) -> tuple[list[Launch], int]:
    """The launches of a layer, and how many of them are the forward's."""
    with counting() as launches:
        out = forward()
        first = len(launches)
        torch.autograd.grad(out, leaves, grad)
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
        for name, chip in CHIPS.items()
    }


def count_all(preset: str, before: Result | None, measured: Result | None) -> list[Row]:
    """Every provider on every case of a layer preset.

    Args:
        preset: of :mod:`benchmarks.shapes`.
        before: an earlier result, whose SECURA rows are taken in with its commit in their names.
        measured: of :mod:`benchmarks.layer`: its ``both_graph_ms`` go to the rows of the same case,
            of ``before`` where that is given.
    """
    counters = {f"secura {space}": ours(space) for space in SPACES}
    keepers = [space for space in SPACES if space != "activation"]
    counters |= {f"secura {space}, W' kept": ours(space, "always") for space in keepers}
    counters |= {name: rival(name) for name in RIVALS}
    found = [
        Row(case.as_dict(), name, figures=figures(*count(case)))
        for case in layer_preset(preset).cases
        for name, count in counters.items()
    ]
    for row in before.rows if before else ():
        if before and row.provider in {f"secura {space}" for space in SPACES}:
            found.append(Row(row.case, f"{row.provider}, {before.commit[:8]}", figures=row.figures))
    for row in measured.rows if measured else ():
        name = row.provider.removesuffix(" triton")
        name += f", {before.commit[:8]}" if before and name not in RIVALS else ""
        for mine in found:
            if (mine.case, mine.provider) == (row.case, name) and "both_graph_ms" in row.figures:
                mine.figures["measured_us"] = 1e3 * row.figures["both_graph_ms"]["median"]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--preset", default="block", choices=LAYER_PRESETS)
    flags.add_argument("--out", type=Path, help="where the result goes")
    flags.add_argument("--before", type=Path, help="an earlier result, to stand beside this one")
    flags.add_argument("--measured", type=Path, help="of benchmarks.layer, to hold the count to")
    flags.add_argument("--commit", help="the code's name, where git does not know it")
    options = flags.parse_args(arguments)
    before, measured = (path and Result.load(path) for path in (options.before, options.measured))
    result = new_result(
        "counts", options.preset, torch.device("cpu"), torch.bfloat16, {}, options.commit
    )
    result.settings = {name: chip._asdict() for name, chip in CHIPS.items()}
    result.rows, result.complete = count_all(options.preset, before, measured), True
    if options.out:
        result.save(options.out)
    print(counts_table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
