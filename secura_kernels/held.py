"""Share P and add up ∂P over the micro-batches of one optimizer step.

    ∂U = Cᵀ Σ ∂P      the sum over the micro-batches' backward passes

What depends on the parameters alone (P, the gains of ``channel``, a W' of ``weight`` that is kept)
is computed by the first and used again by the others; ∂P ``[N, m]`` is added up, and contracted
with C by the last alone, whose ∂A and ∂B are those of all. It saves a layer and micro-batch five
or six launches and the reading of C, N m scattered elements, both ways; it holds P and an fp32 ∂P.

A parameter's version does not show every change: fused optimizers and FSDP2 do not raise it. So
nothing is held from the last backward pass until :meth:`Held.renew`, which whoever sees the
optimizer's step calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor


class Held:
    """What one layer holds between the first micro-batch of a step and the last.

    Args:
        is_last: whether the backward pass that asks is the last before the optimizer's step.
        in_graphs: whether a CUDA graph that is captured may use what is held: its replays then use
            the same, whatever the parameters are by then.

    Attributes:
        layers: how often :meth:`of` was given another layer.
    """

    __slots__ = (
        "_is_last",
        "_known",
        "_remembers",
        "_sum",
        "_tensors",
        "_values",
        "in_graphs",
        "layers",
    )

    def __init__(self, is_last: Callable[[], bool], *, in_graphs: bool = False) -> None:
        self._is_last: Callable[[], bool] | None = is_last
        self._known: dict[Any, Any] = {}
        self._sum: Tensor | None = None
        self._remembers = True
        self._tensors: Sequence[Tensor | None] = ()
        self._values: Any = None
        self.in_graphs, self.layers = in_graphs, 0

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a layer holds nothing."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()

    @property
    def waits(self) -> bool:
        """Whether a part of a gradient is held."""
        return self._sum is not None

    def of(self, tensors: Sequence[Tensor | None], values: Any) -> Held:
        """Return this object; drop what is held if the tensors or values differ from last time.

        Give the CUDA stream among the values: what one stream made, another must not read at once.

        Raises:
            RuntimeError: they differ, and a part of a gradient is held.
        """
        same = len(tensors) == len(self._tensors) and values == self._values
        if not same or any(new is not old for new, old in zip(tensors, self._tensors, strict=True)):
            if self.waits:
                raise RuntimeError(
                    "the adapter is not the one whose gradient is held: it was written to, "
                    "replaced, frozen, scaled or run on another CUDA stream between the "
                    "micro-batches of a step, is sharded by FSDP1, for which secura.accumulate is "
                    "not made, or DistributedDataParallel of an old torch (2.11) broadcast its "
                    "buffers: give it broadcast_buffers=False"
                )
            self._known, self._tensors, self._values = {}, tensors, values
            self.layers += 1
        return self

    def get(self, key: Any) -> Any:
        """What :meth:`put` gave for ``key`` in this step, or None."""
        return self._known.get(key)

    def put(self, key: Any, value: Any) -> None:
        """Hold ``value``, which depends on the parameters alone, to the last backward pass."""
        if self._remembers:
            self._known[key] = value

    def add(self, dp: Tensor, layers: int) -> Tensor | None:
        """Add ``∂P [N, m]``, which is written to later; all of it in the last backward pass.

        ``layers`` is what :attr:`layers` was in the forward pass: a ∂P of another layer than the
        present one goes back as it came.
        """
        if layers != self.layers:
            return dp
        if self._sum is not None:
            dp = self._sum.add_(dp)
        if self._is_last is not None and not self._is_last():
            self._sum = dp
            return None
        self.drop()
        self._remembers = False
        return dp

    def drop(self) -> None:
        """Forget everything."""
        self._known, self._sum = {}, None

    def renew(self) -> None:
        """Begin a step: the parameters are now what they are until the next one."""
        self._known, self._remembers = {}, True

    def close(self) -> None:
        """Forget everything and hold nothing from now on.

        Every later backward pass counts as the last.
        """
        self.drop()
        self._is_last, self._remembers, self._tensors = None, False, ()


Value = TypeVar("Value")


def once(held: Held | None, key: Any, make: Callable[..., Value], *args: Any) -> Value:
    """``make(*args)``, or what it gave in the step's first forward pass, where a layer holds it."""
    if held is None:
        return make(*args)
    found = held.get(key)
    if found is None:
        found = make(*args)
        held.put(key, found)
    return found


__all__ = ["Held", "once"]
