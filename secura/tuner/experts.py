"""A parameter targeted by name (``target_parameters``), as PEFT wants it: fused experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from secura import bases, merging
from secura.experts import Experts

from .layer import SecuraLayer


class ParamWrapper(SecuraLayer):
    """A module and the adapters of one of its parameters ``[E, N, K]`` (or ``[N, K]``).

    During a forward the module finds W' where its parameter was. Several parameters of a module
    have a wrapper each, one in the other. PEFT looks for this class by its name.
    """

    adapter_class = Experts

    def __init__(self, base_layer: nn.Module, *rest: Any, name: str) -> None:
        self.parameter_name: str = name.rpartition(".")[2]
        super().__init__(base_layer, *rest, name=name)

    @property
    def adapted(self) -> Any:
        """The parameter as experts' weights."""
        return bases.Stack(self.get_base_layer(), self.parameter_name)

    @property
    def _weight_key(self) -> str:
        inner, depth = self.base_layer, 1
        while isinstance(inner, ParamWrapper):
            inner, depth = inner.base_layer, depth + 1
        return "base_layer." * depth + str(self.parameter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes with the adapted weights.

        Raises:
            ValueError: for ``adapter_names``, or several active adapters.
            RuntimeError: when trained while merged.
        """
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names: experts take one adapter for the whole batch")
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged:
            merging.check_not_training(self)
        active = [] if self.disable_adapters or self.merged else self.acting_adapters()
        if not active:
            return self.base_layer(*args, **kwargs)
        stack = self.adapted
        weights = cast(Experts, active[0]).weights(stack)
        with _in_place_of(stack, weights):
            return self.base_layer(*args, **kwargs)

    def acting_adapters(self) -> list[Any]:
        """The adapter that acts on the parameter, or none.

        Raises:
            ValueError: for several.
        """
        adapters = self.adapters_named(self.active_adapters)
        if len(adapters) > 1:
            raise ValueError(
                f"adapters {self.active_adapters} are active together, and experts take one: "
                "activate one with set_adapter()"
            )
        return adapters

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Never: PEFT's conversion is for layers."""
        return False

    def _sum_weight(self, names: list[str]) -> tuple[Tensor, Tensor | None]:
        if len(names) > 1:
            raise ValueError(f"adapters {names} of experts do not add up: merge one alone")
        return super()._sum_weight(names)

    def _put_base(self, base: Any) -> None:
        """The module stays; a merge writes into its parameter."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without this wrapper and those in it, for PEFT."""
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge, adapter_names)
            layer = layer.base_layer
        return layer


@contextmanager
def _in_place_of(stack: bases.Stack, weights: Tensor) -> Iterator[None]:
    """Let the module find ``weights [E, N, K]``, as it stores them, where its parameter is."""
    stored = weights.mT if stack.transposed else weights
    stack.owner.__dict__[stack.name] = stored.reshape(stack.weight.shape)
    try:
        yield
    finally:
        del stack.owner.__dict__[stack.name]


def check_nesting(model: nn.Module) -> None:
    """Refuse adapters of parameters that could not be loaded alone once they were saved.

    A file names a wrapper by its nesting depth alone, so an adapter's wrappers have to be the
    outermost, in the order in which PEFT makes them: the last parameter's first.

    Raises:
        ValueError: names the module, the adapter and its parameters.
    """
    within = {one.base_layer for one in model.modules() if isinstance(one, ParamWrapper)}
    for name, outermost in model.named_modules():
        if not isinstance(outermost, ParamWrapper) or outermost in within:
            continue
        chain = [outermost]
        while isinstance(inner := chain[-1].base_layer, ParamWrapper):
            chain.append(inner)
        made = list(outermost.get_base_layer()._parameters)[::-1]
        for adapter in {adapter for one in chain for adapter in one.secura_adapter}:
            own = [one.parameter_name for one in chain if adapter in one.secura_adapter]
            around = [one.parameter_name for one in chain[: len(own)]]
            if own != around or own != sorted(own, key=made.index):
                raise ValueError(
                    f"{name}: target_parameters of the adapter {adapter!r} are {', '.join(own)}, "
                    f"which could not be found again among {', '.join(made)} once it is saved: "
                    "give all adapters of a model the same target_parameters"
                )


__all__ = ["ParamWrapper", "check_nesting"]
