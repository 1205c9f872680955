"""Gradients of an optimizer step's micro-batches, finished once a step in the adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from secura_kernels.held import Held

from .adapter import CABR
from .folding import secura_layers


class Accumulation:
    """What :func:`accumulate` is told and asks.

    Attributes:
        last: whether the next backward pass is the last before the optimizer's step; for a loop to
            set, where :func:`accumulate` was given no ``is_last``.
    """

    def __init__(self, held: dict[str, Held]) -> None:
        self.last = False
        self._held = held

    def drop(self) -> None:
        """Forget what is held: with ``optimizer.zero_grad()``, where a step is not to be taken."""
        for one in self._held.values():
            one.forget()

    def waiting(self) -> list[str]:
        """The names of the layers that hold a part of a gradient."""
        return [name for name, one in self._held.items() if one.waits]


@contextmanager
def accumulate(
    model: nn.Module, is_last: Callable[[], bool] | None = None
) -> Iterator[Accumulation]:
    """Within, compute what depends on the adapters alone once an optimizer step, not a micro-batch.

    A layer keeps P, and adds up ∂P ``[N, m]``; the step's last backward pass makes ∂A and ∂B (or
    ∂U) of the sum. They are what plain accumulation gives, up to rounding; until then the adapters'
    ``.grad`` lacks them. It saves four to six launches a layer and micro-batch where batches are
    small, for N m (4 + s) bytes a layer; with ``SECURA_KEEP_WEIGHT=always`` and ``norm="weight"``
    also all but one forming of W'. Fused experts and tensor parallel layers do as without.

    Example:
        >>> with secura.accumulate(model) as accumulation:
        ...     for index, batch in enumerate(batches):
        ...         accumulation.last = index % 8 == 7
        ...         model(**batch).loss.backward()
        ...         if accumulation.last:
        ...             optimizer.step()
        ...             optimizer.zero_grad()

    With accelerate, ``is_last=lambda: accelerator.sync_gradients``; in a Trainer,
    :class:`secura.AccumulateCallback`.

    Args:
        model: anything that holds :class:`secura.SECURALinear` or PEFT-wrapped SECURA layers.
        is_last: whether the backward pass that asks is the step's last; None asks
            :attr:`Accumulation.last`.

    Raises:
        ValueError: the model has no SECURA layer.
        RuntimeError: on leaving, or at the next forward pass after the parameters were written to,
            where a part of a gradient is held that no last backward pass came for.
    """
    layers = secura_layers(model)
    if not layers:
        raise ValueError("the model has no SECURA layer to accumulate in: add an adapter first")
    names = {module: name for name, module in model.named_modules()}
    adapters = {
        names[adapter]: adapter
        for layer in layers
        for adapter in layer.modules()
        if isinstance(adapter, CABR)
    }
    held: dict[str, Held] = {}
    accumulation = Accumulation(held)
    ask = is_last or (lambda: accumulation.last)
    for name, adapter in adapters.items():
        adapter.held = held[name] = Held(ask)
    try:
        yield accumulation
        if waiting := accumulation.waiting():
            raise RuntimeError(
                f"{len(waiting)} layers hold a part of their gradient ({waiting[0]} first), and no "
                "backward pass was the last: set accumulation.last before it, or drop() them"
            )
    finally:
        for name, adapter in adapters.items():
            if adapter.held is held[name]:
                adapter.held = None


__all__ = ["Accumulation", "accumulate"]
