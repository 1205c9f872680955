"""Which launches ``secura doctor --kernels`` and the tests compile: every op on a table of layers.

A :class:`Case` is one layer forward and backward on tensors of the ``meta`` device, so the
launchers themselves say what they would start on a chip; nothing of it is written down a second
time. Every choice a launcher makes has a case: dtype, rank, many or few tokens, what is folded,
dropped or restrained, rows that begin aligned or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..activation import activation_norm
from ..activation_dense import activation_linear
from ..additive import lowrank_add, lowrank_linear
from ..channel import channel_product
from ..columns import project, projected
from ..gain import NormOptions, Restrain
from ..merge import effective_weight
from ..weight import weight_norm_linear
from .aot import Launch, Rule, Target, record

EVERY = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
SOME = ("sm_80", "sm_90")
_META = torch.device("meta")


@dataclass(frozen=True)
class Case:
    """One layer, forward and backward.

    Attributes:
        options: the norm.
        dtype: of x and W.
        m: the rank.
        t: tokens.
        n, k: W's shape.
        full: whether something is folded, dropped and restrained, and biases are there and trained.
        given: whether the op works on a given y0 rather than on x and W.
        save: ``activation``'s ``save``.
        transposed: whether W's rows are strided.
        merge: ``"nearest"`` or ``"stochastic"``: the merge of the layer instead of the layer.
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
    merge: str | None = None
    targets: tuple[str, ...] = EVERY

    @property
    def aligned(self) -> bool:
        """Whether rows of W (Wᵀ, if transposed) and of outputs begin at multiples of 16 bytes."""
        return not (self.n % 16 or self.k % 16)

    @property
    def name(self) -> str:
        """What tells the case from the others."""
        default = Case(self.options)
        options = [str(part) for part in self.options[:3] if part is not None]
        options += ["relative ε"] * self.options.eps_relative
        sizes = [
            f"{size}={getattr(self, size)}"
            for size in "tnkm"
            if getattr(self, size) != getattr(default, size)
        ]
        flags = [flag for flag in ("full", "given", "transposed") if getattr(self, flag)]
        flags += ["8bit"] * (self.save == "8bit")
        flags += [f"merge {self.merge}"] if self.merge else []
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([*options, dtype, *sizes, *flags])

    def run(self) -> None:
        """P and its gradient; the layer forward and backward, or its merge."""
        weight = self._empty(self.n, self.k)
        if self.transposed:
            weight = self._empty(self.k, self.n).t()
        rows = torch.empty(self.m, dtype=torch.int64, device=_META)
        p, p_base = (self._empty(self.n, self.m, dtype=torch.float32) for _ in "ab")
        u = self._empty(self.m, self.m, dtype=torch.float32).requires_grad_()
        project(weight, rows, u, impl="triton").sum().backward()
        projected(weight, rows, u.detach(), self.dtype, "triton")
        important = torch.empty(self.n, dtype=torch.bool, device=_META)
        restrain = Restrain(important) if self.full and self.options.norm != "none" else None
        if self.merge is not None:
            effective_weight(
                weight, rows, p, self.options, p_base=p_base if self.full else None,
                restrain=restrain, stochastic_rounding=self.merge == "stochastic", impl="triton",
            )  # fmt: skip
            return
        out, leaves = self._forward(weight, rows, p.requires_grad_(), p_base, restrain)
        torch.autograd.grad(out, leaves, self._empty(*out.shape))

    def _forward(
        self, weight: Tensor, rows: Tensor, p: Tensor, p_base: Tensor, restrain: Restrain | None
    ) -> tuple[Tensor, list[Tensor]]:
        bias = self._empty(self.n) if self.full else None
        delta_bias = self._empty(self.n, dtype=torch.float32) if self.full else None
        z_scale = self._empty(self.t, self.m) if self.full else None
        x = self._empty(self.t, self.n if self.given else self.k).requires_grad_()
        leaves = [x, p] + ([delta_bias.requires_grad_()] if delta_bias is not None else [])
        folded = p_base if self.full else None
        head: Any = (x, bias, rows) if self.given else (x, weight, bias, rows)
        norm, impl = self.options.norm, "triton"
        if norm == "weight":
            out = weight_norm_linear(
                x, weight, bias, rows, p, self.options, p_base=folded, delta_bias=delta_bias,
                restrain=restrain, impl=impl,
            )  # fmt: skip
        elif norm == "activation":
            op: Any = activation_norm if self.given else activation_linear
            out = op(
                *head, p, self.options, p_base=folded, delta_bias=delta_bias, z_scale=z_scale,
                restrain=restrain, save=self.save, impl=impl,
            )  # fmt: skip
        else:
            q, share = p, None
            if norm == "channel":
                gram = self._empty(self.m, self.m, dtype=torch.float32)
                norms = self._empty(self.n, dtype=torch.float32)
                q, share = channel_product(
                    p, folded, gram, norms, self.options, restrain, impl=impl
                )
            add: Any = lowrank_add if self.given else lowrank_linear
            out = add(*head, q, share=share, delta_bias=delta_bias, z_scale=z_scale, impl=impl)
        return out, leaves

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=_META)


def _cases() -> Iterator[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    none, channel, weight, activation = (
        Case(NormOptions(norm)) for norm in ("none", "channel", "weight", "activation")
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
    yield replace(channel, options=NormOptions("channel", "paper", "averaged"), full=True)
    yield replace(weight, options=NormOptions("weight", "calibrated", "averaged"))
    yield replace(weight, dtype=fp16, full=True)
    yield replace(weight, full=True, transposed=True)
    for norm in (channel, weight):
        for merge in ("nearest", "stochastic"):
            yield replace(norm, full=True, merge=merge)
    yield replace(activation, options=NormOptions("activation", "paper"))
    yield replace(activation, options=NormOptions("activation", eps_relative=True), full=True)
    for save in ("recompute", "8bit"):
        saved = replace(activation, save=save)
        yield from (saved, replace(saved, n=14336), replace(saved, m=512, full=True))
        yield replace(
            saved, options=NormOptions("activation", combine="averaged"), full=True, given=True
        )


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


def rule(launch: Launch, case: Case) -> Rule:
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
        return Rule(constant("MEASURE"), constant("APPLY"))
    if kernel.startswith("_project"):
        return Rule(1, 1, None, constant("PRECISION") != "ieee")
    if kernel == "_output_gradient_kernel":
        return Rule(1, 1, None, mma)
    if kernel == "_add_product_kernel":
        return Rule(1, 1, None, mma)
    if kernel.startswith("weight_") and kernel != "weight_scalars_kernel":
        narrow = None if case.transposed else 0
        return Rule(1, kernel != "weight_stat_kernel", narrow, mma)
    return Rule()


__all__ = ["CASES", "Case", "launches", "rule"]
