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

import torch

from ..api import effective_weight
from ..norm import NormOptions
from ..ops.project.op import project
from .layers import Case
from .recorder import Launch, Rule, Target, inspect_launch, record

EVERY = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
SOME = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Recorded:
    """One layer, forward and backward, or its merge.

    Attributes:
        options: the norm.
        dtype: of x and W.
        m: the rank.
        t: tokens.
        n, k: W's shape.
        full: whether something is folded, dropped and restrained, and biases are there and trained.
        given: whether y0 is given rather than x.
        save: ``activation``'s ``save``.
        transposed: whether W's rows are strided.
        merge: the merge of the layer instead of the layer.
        stochastic: whether W' is rounded stochastically.
        columns: whether C is kept beside W.
        targets: names of the chips it is compiled for.
    """

    options: NormOptions
    dtype: torch.dtype = torch.bfloat16
    m: int = 128
    t: int = 8192
    n: int = 4096
    k: int = 4096
    full: bool = False
    given: bool = False
    save: str = "recompute"
    transposed: bool = False
    merge: bool = False
    stochastic: bool = False
    columns: bool = False
    targets: tuple[str, ...] = EVERY

    @property
    def aligned(self) -> bool:
        """Whether rows of W (Wᵀ, if transposed) and of outputs begin at multiples of 16 bytes."""
        return not (self.n % 16 or self.k % 16)

    @property
    def name(self) -> str:
        """What tells the case from the others."""
        default = Recorded(self.options)
        options = [str(part) for part in self.options[:3] if part is not None]
        options += ["relative ε"] * self.options.eps_relative
        sizes = [
            f"{size}={getattr(self, size)}"
            for size in "tnkm"
            if getattr(self, size) != getattr(default, size)
        ]
        names = ("full", "given", "transposed", "merge", "stochastic", "columns")
        flags = [flag for flag in names if getattr(self, flag)]
        flags += ["8bit"] * (self.save == "8bit")
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([*options, dtype, *sizes, *flags])

    def run(self) -> None:
        """The layer forward and backward, or its merge; and P as wide as a merge takes it."""
        full = self.full
        example = Case(
            self.options,
            self.dtype,
            self.m,
            self.t,
            self.n,
            self.k,
            folded="base" if full else "",
            dropout=full and not self.stochastic,
            restrained=full,
            biased=full,
            trains_bias=full,
            given=self.given,
            save=self.save,
            transposed=self.transposed,
            rounding_seed=0 if self.stochastic else None,
        ).draw("meta")
        layer, a = example.layer, example.a
        assert layer.weight is not None
        if self.columns:
            layer = layer._replace(columns=layer.weight.new_empty(self.n, self.m))
            example = example._replace(layer=layer)
        for dtype in (torch.float32, self.dtype):
            project(layer.weight, layer.cols, a, dtype, "triton")
        if self.merge:
            effective_weight(layer, a, impl="triton")
        else:
            example.run("triton")


def _cases() -> Iterator[Recorded]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    none, channel, weight, activation = (
        Recorded(NormOptions(norm)) for norm in ("none", "channel", "weight", "activation")
    )
    for plain in (none, channel, weight, activation):
        full = replace(plain, full=True)
        odd = replace(full, t=8191, n=4099, k=4091, m=100)
        yield from (plain, full, replace(full, dtype=fp32), odd)
        yield replace(odd, dtype=fp32, targets=SOME)
        yield replace(odd, m=33, targets=SOME)
    for m in (64, 128, 256, 512):
        for dtype in (bf16, fp32):
            yield replace(none, m=m, dtype=dtype, full=True, given=True)
    for few in (none, channel, weight, activation):
        yield from (replace(few, t=64), replace(few, t=1, targets=SOME))
        yield replace(few, m=150, full=True, targets=SOME)  # the released code's rank
    kept = replace(channel, columns=True, t=512)
    yield from (kept, replace(kept, full=True, dtype=fp32), replace(kept, full=True, m=100))
    yield replace(channel, options=NormOptions("channel", "paper", "averaged"), full=True)
    yield replace(weight, options=NormOptions("weight", "calibrated", "averaged"))
    yield replace(weight, dtype=fp16, full=True)
    yield replace(weight, full=True, transposed=True)
    for norm in (channel, weight):
        yield replace(norm, full=True, merge=True)
    rounded = replace(channel, full=True, stochastic=True)
    yield from (
        replace(none, stochastic=True),
        rounded,
        replace(weight, full=True, stochastic=True),
    )
    yield replace(rounded, t=8191, n=4099, k=4091, m=100, transposed=True, targets=SOME)
    yield replace(activation, options=NormOptions("activation", "paper"))
    yield replace(activation, options=NormOptions("activation", eps_relative=True), full=True)
    for save in ("recompute", "8bit"):
        saved = replace(activation, save=save)
        yield from (saved, replace(saved, n=14336), replace(saved, m=512, full=True))
        averaged = NormOptions("activation", combine="averaged")
        yield replace(saved, options=averaged, full=True, given=True)


CASES = tuple(dict.fromkeys(_cases()))


def launches(target: Target, match: str = "") -> Iterator[tuple[str, Launch, Rule]]:
    """``(name, launch, rule)`` of each launch on a chip whose name contains ``match``, once."""
    seen = set()
    for case in CASES:
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


def rule(launch: Launch, case: Recorded) -> Rule:
    """What is asked of a launch's code: of one whose rows are not aligned no more than no spill."""
    unpadded = launch.kernel.__name__.startswith(("_channel", "_project"))
    if not case.aligned or (unpadded and case.m % 16):
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
        narrow = None if case.transposed else 0
        return Rule(1, kernel != "weight_stat_kernel", narrow, mma)
    return Rule()


__all__ = ["CASES", "Recorded", "launches", "problems", "rule"]
