"""Which launches ``secura doctor --kernels`` and the tests compile: those of a table of layers.

A :class:`Recorded` is one layer forward and backward on tensors of the ``meta`` device, so the
launchers themselves say what they would start on a chip; nothing of it is written down a second
time. Every choice a launcher makes has a case: dtype, rank, many or few tokens, what is folded,
dropped or restrained, rows that begin aligned or not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..api import effective_weight
from ..norm import NormOptions
from ..ops.project.op import project
from .examples import Case
from .recorder import Launch, Rule, Target, inspect_launch, record

EVERY = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
SOME = ("sm_80", "sm_90")


PLAIN = Case(NormOptions(), torch.bfloat16, 128, 8192, 4096, 4096, biased=False, trains_bias=False)
FULL: dict[str, Any] = {
    "folded": "base",
    "dropout": True,
    "restrained": True,
    "biased": True,
    "trains_bias": True,
}
"""Something is folded, dropped and restrained, and biases are there and trained."""
ODD: dict[str, Any] = {"t": 8191, "n": 4099, "k": 4091, "m": 100}


@dataclass(frozen=True)
class Recorded:
    """One layer, forward and backward, or its merge.

    Attributes:
        case: the layer.
        merge: the merge of the layer instead of the layer.
        columns: whether C is kept beside W.
        targets: names of the chips it is compiled for.
    """

    case: Case
    merge: bool = False
    columns: bool = False
    targets: tuple[str, ...] = EVERY

    @property
    def aligned(self) -> bool:
        """Whether rows of W (Wᵀ, if transposed) and of outputs begin at multiples of 16 bytes."""
        return not (self.case.n % 16 or self.case.k % 16)

    @property
    def name(self) -> str:
        """What tells the case from the others."""
        case = self.case
        options = [str(part) for part in case.options[:3] if part is not None]
        options += ["relative ε"] * case.options.eps_relative
        sizes = [
            f"{size}={getattr(case, size)}"
            for size in "tnkm"
            if getattr(case, size) != getattr(PLAIN, size)
        ]
        flags = {
            "full": case.folded,
            "given": case.given,
            "transposed": case.transposed,
            "merge": self.merge,
            "stochastic": case.rounding_seed is not None,
            "columns": self.columns,
            "8bit": case.save == "8bit",
        }
        dtype = str(case.dtype).removeprefix("torch.")
        return " ".join([*options, dtype, *sizes, *(flag for flag, on in flags.items() if on)])

    def run(self) -> None:
        """The layer forward and backward, or its merge; and P as wide as a merge takes it."""
        case = self.case
        example = case.draw("meta")
        layer, a = example.layer, example.a
        assert layer.weight is not None
        if self.columns:
            layer = layer._replace(columns=layer.weight.new_empty(case.n, case.m))
            example = example._replace(layer=layer)
        for dtype in (torch.float32, case.dtype):
            project(layer.weight, layer.cols, a, dtype, "triton")
        if self.merge:
            effective_weight(layer, a, impl="triton")
        else:
            example.run("triton")


def _cases() -> Iterator[Recorded]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

    def one(options: NormOptions, of: dict[str, Any] | None = None, **changes: Any) -> Case:
        return replace(PLAIN, options=options, **(of or {}) | changes)

    norms = [NormOptions(norm) for norm in ("none", "channel", "weight", "activation")]
    none, channel, weight, activation = norms
    for norm in norms:
        yield Recorded(one(norm))
        yield Recorded(one(norm, FULL))
        yield Recorded(one(norm, FULL, dtype=fp32))
        yield Recorded(one(norm, FULL | ODD))
        yield Recorded(one(norm, FULL | ODD, dtype=fp32), targets=SOME)
        yield Recorded(one(norm, FULL | ODD, m=33), targets=SOME)
    for m in (64, 128, 256, 512):
        for dtype in (bf16, fp32):
            yield Recorded(one(none, FULL, m=m, dtype=dtype, given=True))
    for norm in norms:
        yield Recorded(one(norm, t=64))
        yield Recorded(one(norm, t=1), targets=SOME)
        yield Recorded(one(norm, FULL, m=150), targets=SOME)  # the released code's rank
    yield Recorded(one(channel, t=512), columns=True)
    yield Recorded(one(channel, FULL, t=512, dtype=fp32), columns=True)
    yield Recorded(one(channel, FULL, t=512, m=100), columns=True)
    yield Recorded(one(NormOptions("channel", "paper", "averaged"), FULL))
    yield Recorded(one(NormOptions("weight", "calibrated", "averaged")))
    yield Recorded(one(weight, FULL, dtype=fp16))
    yield Recorded(one(weight, FULL, transposed=True))
    for norm in (channel, weight):
        yield Recorded(one(norm, FULL), merge=True)
    rounded = FULL | {"rounding_seed": 0, "dropout": False}
    yield Recorded(one(none, rounding_seed=0))
    yield Recorded(one(channel, rounded))
    yield Recorded(one(weight, rounded))
    yield Recorded(one(channel, rounded | ODD, transposed=True), targets=SOME)
    yield Recorded(one(NormOptions("activation", "paper")))
    yield Recorded(one(NormOptions("activation", eps_relative=True), FULL))
    averaged = NormOptions("activation", combine="averaged")
    for save in ("recompute", "8bit"):
        yield Recorded(one(activation, save=save))
        yield Recorded(one(activation, save=save, n=14336))
        yield Recorded(one(activation, FULL, save=save, m=512))
        yield Recorded(one(averaged, FULL, save=save, given=True))


RECORDED = tuple(dict.fromkeys(_cases()))


def launches(target: Target, match: str = "") -> Iterator[tuple[str, Launch, Rule]]:
    """``(name, launch, rule)`` of each launch on a chip whose name contains ``match``, once."""
    seen = set()
    for case in RECORDED:
        if target.name not in case.targets:
            continue
        with record(target) as found:
            case.run()
        for launch in found:
            name = f"{launch.kernel.__name__.strip('_').removesuffix('_kernel')}: {case.name}"
            if launch.key not in seen and match in name:
                seen.add(launch.key)
                yield name, launch, rule(launch, case)


def problems(case: Recorded, target: Target) -> dict[str, list[str]]:
    """What :func:`rule` forbids and a chip's code of a case's launches does, by launch."""
    with record(target) as found:
        case.run()
    return {launch.key: _inspect(launch, target).problems(rule(launch, case)) for launch in found}


_inspect = functools.cache(inspect_launch)


def rule(launch: Launch, of: Recorded) -> Rule:
    """What is asked of a launch's code: of one whose rows are not aligned no more than no spill."""
    unpadded = launch.kernel.__name__.startswith(("_channel", "_project"))
    if not of.aligned or (unpadded and of.case.m % 16):
        return Rule()
    constant, kernel = launch.constant, launch.kernel.__name__
    mma = constant("PRECISION") == "tf32"
    if kernel == "activation_fwd_kernel":
        return Rule(1, constant("PASS") == "out", 0, mma)
    if kernel == "activation_bwd_kernel":
        multiplies = constant("HAS_H") or constant("y0_ptr", 0) is not None
        return Rule(1, 1, 0, mma and multiplies)
    if kernel == "_channel_kernel":
        measures, applies = (constant(name, 0) is not None for name in ("gram_ptr", "q_ptr"))
        return Rule(measures, applies)
    if kernel.startswith("_project"):
        return Rule(1, 1, None, constant("PRECISION") != "ieee")
    if kernel in ("_output_gradient_kernel", "_add_product_kernel"):
        return Rule(1, 1, None, mma)
    if kernel.startswith("weight_"):
        narrow = None if of.case.transposed else 0
        return Rule(1, kernel != "weight_stat_kernel", narrow, mma)
    return Rule()


__all__ = ["RECORDED", "Recorded", "launches", "problems"]
