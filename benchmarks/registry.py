"""Every provider: how its layer is made, what it computes, the least it must compute and move.

| name                            | what it is                                                 |
|---------------------------------|------------------------------------------------------------|
| ``frozen``                      | the layer alone: the least time of every layer             |
| ``secura SPACE triton``         | our kernels                                                |
| ``secura SPACE reference``      | our ops in plain torch                                     |
| ``secura SPACE compiled``       | the same under ``torch.compile``                           |
| ``secura SPACE held``           | a micro-batch between a step's first and last, by ``auto`` |
| ``released way``                | the released code's algorithm, written by us               |
| ``peft lora DTYPE``, ``… dora`` | as installed; DTYPE is the adapters', fp32 PEFT's default  |
| ``strong lora``, ``… dora``     | hand-written rivals, see ``rivals``                        |

Liger-kernel (0.8.5) brings no LoRA layer. Unsloth does, but importing it patches transformers and
PEFT for the whole process, which would change the others: ``strong lora`` is the same algorithm.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secura import SECURALinear
from secura_kernels import NormOptions, naive
from secura_kernels.dispatch import why_not_triton
from secura_kernels.plan import Cost

from .machine import dtype_name
from .rivals import ReleasedWay, StrongDoRA, StrongLoRA
from .shapes import LayerCase

SPACES = ("none", "channel", "activation", "weight")
DROPOUT = 0.1


class MissingError(Exception):
    """A provider cannot run on this machine; the message says why."""


class WrongError(Exception):
    """A provider does not compute what it should; the message says by how much."""


class Ranks(NamedTuple):
    """SECURA's CUR rank and the rivals' rank."""

    m: int
    r: int


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Attributes:
        name: as in the table above.
        family: a key of :data:`FAMILIES`: what it computes.
        make: the layer from the frozen one; raises :class:`MissingError`.
        impl: ``SECURA_IMPL`` while it runs, or None.
        compiled: whether it runs under ``torch.compile``.
        holds: whether it is timed as a micro-batch between others (:mod:`secura_kernels.held`).
    """

    name: str
    family: str
    make: Callable[[nn.Linear, Ranks], nn.Module]
    impl: str | None = None
    compiled: bool = False
    holds: bool = False

    def build(self, base: nn.Linear, ranks: Ranks) -> nn.Module:
        """The adapted layer in training mode, sharing ``base``'s weight.

        Raises:
            MissingError: where this machine lacks what it needs.
        """
        layer = self.make(base, ranks).train()
        if self.compiled:
            _allow_compiling()
            layer.compile(dynamic=False)
        return layer

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, SECURA's ops take this provider's implementation, forward and backward."""
        before = os.environ.get("SECURA_IMPL")
        try:
            if self.impl is not None:
                os.environ["SECURA_IMPL"] = self.impl
            yield
        finally:
            if before is None:
                os.environ.pop("SECURA_IMPL", None)
            else:
                os.environ["SECURA_IMPL"] = before


def catalogue(dtype: torch.dtype, *, dropout: bool = True) -> list[Provider]:
    """Every provider for layers of ``dtype``."""
    providers = [Provider("frozen", "frozen", lambda base, ranks: base)]
    for space in SPACES:
        providers += [secura(space, impl) for impl in ("triton", "reference")]
        plain, name = secura(space, "reference"), f"secura {space} compiled"
        providers.append(Provider(name, plain.family, plain.make, plain.impl, compiled=True))
        providers.append(replace(secura(space, "auto", f"secura {space} held"), holds=True))
    providers.append(
        Provider("released way", "released", lambda base, ranks: ReleasedWay(base, ranks.m))
    )
    for kind in ("lora", "dora"):
        for adapter in dict.fromkeys((torch.float32, dtype)):
            for rate in (0.0, DROPOUT) if dropout else (0.0,):
                suffix = f" dropout {rate:g}" if rate else ""
                name = f"peft {kind} {dtype_name(adapter)}{suffix}"
                providers.append(Provider(name, kind, _peft(kind, adapter, rate)))
    providers.append(Provider("strong lora", "lora", lambda base, ranks: StrongLoRA(base, ranks.r)))
    providers.append(Provider("strong dora", "dora", lambda base, ranks: StrongDoRA(base, ranks.r)))
    return providers


def for_models(dtype: torch.dtype) -> list[Provider]:
    """What whole models are measured with: SECURA as a user gets it (``auto``), then the others."""
    ours = [secura(space, "auto", f"secura {space}") for space in SPACES]
    others = catalogue(dtype, dropout=False)
    return ours + [entry for entry in others if entry.family in ("lora", "dora", "released")]


def secura(space: str, impl: str, name: str | None = None, **settings: Any) -> Provider:
    """SECURA in one norm space, with these settings; ``impl`` may be ``auto``."""

    def make(base: nn.Linear, ranks: Ranks) -> nn.Module:
        if impl == "triton" and (reason := why_not_triton(base.weight)):
            raise MissingError(reason)
        return SECURALinear.from_linear(base, r=ranks.m, norm=space, **settings)

    return Provider(name or f"secura {space} {impl}", f"secura {space}", make, impl)


def choose(providers: list[Provider], wanted: str | None) -> list[Provider]:
    """Those whose name is, or else holds, one of the comma-separated parts; all for None.

    Raises:
        ValueError: where a part matches nothing.
    """
    if wanted is None:
        return providers
    names = [provider.name for provider in providers]
    chosen: set[str] = set()
    for part in filter(None, map(str.strip, wanted.split(","))):
        found = [part] if part in names else [name for name in names if part in name]
        if not found:
            raise ValueError(f"no provider is called {part!r}: choose among {', '.join(names)}")
        chosen.update(found)
    return [provider for provider in providers if provider.name in chosen]


def excuse(error: Exception) -> tuple[str, str]:
    """The status and the note of a row whose provider raised ``error``."""
    if isinstance(error, MissingError | WrongError):
        return "missing" if isinstance(error, MissingError) else "wrong", str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory", "in this setting"
    return "failed", f"{type(error).__name__}: {error}".splitlines()[0]


def frozen_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A frozen layer on ``weight [N, K]``, which is shared, not copied."""
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _allow_compiling() -> None:
    """Let ``torch.compile`` be measured as it is, never as a silent return to eager."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    dynamo.recompile_limit = 64  # every space runs the same code with another configuration
    dynamo.fail_on_recompile_limit_hit = True
    functorch.donated_buffer = False  # a graph is kept to time its backward alone


def put_peft(
    layers: Sequence[nn.Module],
    kind: str,
    ranks: Ranks,
    *,
    rate: float = 0.0,
    adapter: torch.dtype = torch.float32,
) -> nn.Sequential:
    """A model of frozen ``layers`` with an adapter on each, put on by one call of PEFT's.

    Args:
        layers: linear layers, which the model shares.
        kind: ``"lora"``, ``"dora"`` or ``"secura SPACE"``.
        ranks: the adapters'.
        rate: LoRA's dropout.
        adapter: dtype of LoRA's and DoRA's adapters: fp32, or else the layers'.

    Raises:
        MissingError: without PEFT.
    """
    try:
        from peft import LoraConfig, get_peft_model

        from secura.tuner import SecuraConfig
    except ImportError as error:
        raise MissingError(f"PEFT is not installed ({error})") from error
    model, every = nn.Sequential(*layers), r"\d+"
    config: Any
    if kind.startswith("secura"):
        config = SecuraConfig(r=ranks.m, norm=kind.split()[1], target_modules=every)
    else:
        config = LoraConfig(
            r=ranks.r,
            lora_alpha=ranks.r,
            lora_dropout=rate,
            target_modules=every,
            use_dora=kind == "dora",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, config, autocast_adapter_dtype=adapter == torch.float32)
    return model


def _peft(kind: str, adapter: torch.dtype, rate: float) -> Callable[[nn.Linear, Ranks], nn.Module]:
    return lambda base, ranks: put_peft([base], kind, ranks, rate=rate, adapter=adapter)[0]


# What a layer computes, in fp64.


def delta_weight(module: nn.Module, weight: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """``ΔW [N, K]`` in fp64 of the parameters given, before any norm."""
    if isinstance(module, SECURALinear | ReleasedWay):
        return _product(module, weight, parameters) @ weight[module.rows]
    scaling: Any = module.scaling
    scaling = scaling["default"] if isinstance(scaling, dict) else scaling
    return scaling * (named(parameters, "lora_B") @ named(parameters, "lora_A"))


def expected(
    module: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    parameters: Mapping[str, Tensor],
    x: Tensor,
) -> Tensor:
    """``out [T, N]`` in fp64, differentiable in x and the parameters.

    Args:
        module: a provider's layer.
        weight: ``W [N, K]`` fp64.
        bias: ``b [N]`` fp64 or None.
        parameters: the layer's trainable parameters by name, fp64.
        x: ``[T, K]`` fp64.
    """
    if not parameters:
        return nn.functional.linear(x, weight, bias)
    if isinstance(module, SECURALinear | ReleasedWay):
        options = NormOptions("activation", "released", "averaged")
        if isinstance(module, SECURALinear):
            options = module.config.norm_options
        p = _product(module, weight, parameters)
        return naive.linear(x, weight, bias, module.rows, p, options)
    direction = weight + delta_weight(module, weight, parameters)
    if any("magnitude" in name for name in parameters):
        norm = direction.detach().norm(dim=1)
        direction = direction * (named(parameters, "magnitude") / norm)[:, None]
    return nn.functional.linear(x, direction, bias)


def named(parameters: Mapping[str, Tensor], part: str) -> Tensor:
    """The one parameter whose name holds ``part``."""
    (found,) = (value for name, value in parameters.items() if part in name)
    return found


def _product(
    module: SECURALinear | ReleasedWay, weight: Tensor, parameters: Mapping[str, Tensor]
) -> Tensor:
    """``P = s · C A B [N, m]``."""
    core = parameters["A"] @ parameters["B"]
    return module.scaling * (weight[:, module.cols] @ core)


# The least each family must compute and move.


FAMILIES: dict[str, Callable[[int, int, int, int, int], tuple[int, int, int, int]]] = {
    "frozen": lambda t, n, k, m, r: (0, 0, 0, 0),
    "secura none": lambda t, n, k, m, r: (t * n * m + n * m * m, 0, 2 * t * n * m + t * k * m, 0),
    "secura channel": lambda t, n, k, m, r: FAMILIES["secura none"](t, n, k, m, r),
    "secura activation": lambda t, n, k, m, r: (
        t * n * m + n * m * m,
        2 * t * n,
        3 * t * n * m + (t * k * m if k <= n else 0),  # ∂x by h R (written, read) or by ∂y0
        2 * t * n + (2 * t * k if k <= n else t * n),
    ),
    "secura weight": lambda t, n, k, m, r: (
        n * k * m + n * m * m,
        2 * n * k,
        t * n * k + 2 * n * k * m,
        2 * n * k + t * k,
    ),
    "lora": lambda t, n, k, m, r: (t * r * (k + n), t * k, 2 * t * r * (k + n), t * k),
    "dora": lambda t, n, k, m, r: (
        n * k * r,
        2 * n * k,
        2 * t * r * (k + n) + n * k * r,
        t * k + t * n + 2 * n * k,
    ),
    "released": lambda t, n, k, m, r: (
        t * n * k + n * k * m + n * m * m,
        9 * t * n + t * k + 2 * n * k,
        2 * t * n * k + 2 * n * k * m,
        6 * t * n + 2 * t * k + 3 * n * k,
    ),
}
"""Beyond the frozen layer's ``T N K`` and ``T K + T N + N K`` each way: multiplications and
elements moved forward, then backward, from T, N, K, m, r. Every operand of a product or pass counts
as read once and its result as written once, weights included, thin ``[T, m]`` and ``[N, m]``
tensors left out. They are floors: what moves more shows as a small share of the ceilings."""


def work(family: str, case: LayerCase, itemsize: int) -> dict[str, Cost]:
    """``{"forward", "backward", "both"}`` of a provider's family."""
    t, n, k = case.T, case.N, case.K
    extra = FAMILIES[family](t, n, k, case.m, case.r)
    ways = [
        Cost(float(itemsize * (t * n + t * k + n * k + moved)), 2.0 * (t * n * k + products))
        for products, moved in (extra[:2], extra[2:])
    ]
    both = Cost(sum(way.bytes for way in ways), sum(way.flop for way in ways))
    return {"forward": ways[0], "backward": ways[1], "both": both}
