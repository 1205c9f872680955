"""Who is measured, all through one interface: a frozen ``nn.Linear`` in, an adapted layer out.

| name                            | what it is                                                 |
|---------------------------------|------------------------------------------------------------|
| ``frozen``                      | the layer alone: the floor everyone pays                   |
| ``secura SPACE triton``         | our kernels                                                |
| ``secura SPACE reference``      | our ops in plain torch                                     |
| ``secura SPACE compiled``       | the same under ``torch.compile``                           |
| ``released way``                | the released code's algorithm, written by us               |
| ``peft lora DTYPE``, ``… dora`` | as installed; DTYPE is the adapters', fp32 PEFT's default  |
| ``strong lora``, ``… dora``     | hand-written rivals, see ``rivals``                        |

Liger-kernel (0.8.5) brings no LoRA layer. Unsloth does, but importing it patches transformers and
PEFT for the whole process, which would change the others: ``strong lora`` is the same algorithm.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secura import SECURALinear
from secura_kernels.dispatch import why_not_triton

from .machine import dtype_name
from .rivals import ReleasedWay, StrongDoRA, StrongLoRA

SPACES = ("none", "channel", "activation", "weight")
DROPOUT = 0.1


class MissingError(Exception):
    """A provider cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Ranks:
    """SECURA's CUR rank and the rivals' rank."""

    m: int
    r: int


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Attributes:
        name: as in the table above.
        family: ``frozen``, ``secura SPACE``, ``released``, ``lora`` or ``dora``: what it computes.
        make: the layer from the frozen one; raises :class:`MissingError`.
        impl: ``SECURA_IMPL`` while it runs, or None.
        compiled: whether it runs under ``torch.compile``.
    """

    name: str
    family: str
    make: Callable[[nn.Linear, Ranks], nn.Module]
    impl: str | None = None
    compiled: bool = False

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


def _allow_compiling() -> None:
    """Let ``torch.compile`` be measured as it is, never as a silent return to eager."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    dynamo.recompile_limit = 64  # every space runs the same code with another configuration
    dynamo.fail_on_recompile_limit_hit = True
    functorch.donated_buffer = False  # a graph is kept to time its backward alone


def excuse(error: Exception) -> tuple[str, str]:
    """The status and the note of a row whose provider raised ``error``."""
    if isinstance(error, MissingError):
        return "missing", str(error)
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


def catalogue(dtype: torch.dtype, *, dropout: bool = True) -> list[Provider]:
    """Every provider for layers of ``dtype``."""
    providers = [Provider("frozen", "frozen", lambda base, ranks: base)]
    for space in SPACES:
        for impl in ("triton", "reference"):
            providers.append(secura(space, impl, f"secura {space} {impl}"))
        name = f"secura {space} compiled"
        providers.append(
            Provider(name, f"secura {space}", _secura(space, "reference"), "reference", True)
        )
    providers.append(Provider("released way", "released", _released))
    adapters = dict.fromkeys((torch.float32, dtype))
    for kind in ("lora", "dora"):
        for adapter in adapters:
            for rate in (0.0, DROPOUT) if dropout else (0.0,):
                suffix = f" dropout {rate:g}" if rate else ""
                name = f"peft {kind} {dtype_name(adapter)}{suffix}"
                providers.append(Provider(name, kind, _peft(kind, adapter, rate)))
    providers.append(Provider("strong lora", "lora", lambda base, ranks: StrongLoRA(base, ranks.r)))
    providers.append(Provider("strong dora", "dora", lambda base, ranks: StrongDoRA(base, ranks.r)))
    return providers


def secura(space: str, impl: str, name: str) -> Provider:
    """SECURA in one norm space; ``impl`` may be ``auto``."""
    return Provider(name, f"secura {space}", _secura(space, impl), impl)


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


def _secura(space: str, impl: str) -> Callable[[nn.Linear, Ranks], nn.Module]:
    def make(base: nn.Linear, ranks: Ranks) -> nn.Module:
        if impl == "triton" and (reason := why_not_triton(base.weight)):
            raise MissingError(reason)
        return SECURALinear.from_linear(base, r=ranks.m, norm=space)

    return make


def _released(base: nn.Linear, ranks: Ranks) -> nn.Module:
    return ReleasedWay(base, ranks.m)


def _peft(kind: str, adapter: torch.dtype, rate: float) -> Callable[[nn.Linear, Ranks], nn.Module]:
    def make(base: nn.Linear, ranks: Ranks) -> nn.Module:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise MissingError(f"PEFT is not installed ({error})") from error
        holder = nn.Sequential(base)
        config = LoraConfig(
            r=ranks.r,
            lora_alpha=ranks.r,
            lora_dropout=rate,
            target_modules=["0"],
            use_dora=kind == "dora",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_peft_model(holder, config, autocast_adapter_dtype=adapter == torch.float32)
        return holder[0]

    return make


__all__ = [
    "DROPOUT",
    "SPACES",
    "MissingError",
    "Provider",
    "Ranks",
    "catalogue",
    "choose",
    "excuse",
    "frozen_linear",
    "secura",
]
