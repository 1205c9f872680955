"""Gradients of an optimizer step's micro-batches, finished once a step in the adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from secura_kernels.held import Held

from .cabr import CABR
from .layers import secura_layers


class Accumulation:
    """The state of one :func:`accumulate` block."""

    def __init__(
        self, model: nn.Module, optimizer: Any, is_last: Callable[[], bool] | None
    ) -> None:
        self._last, self._asks = False, is_last
        self._optimizer = optimizer
        self._adapters = {
            name: module for name, module in model.named_modules() if isinstance(module, CABR)
        }
        self._held = {name: Held(lambda: self.last) for name in self._adapters}
        for name, adapter in self._adapters.items():
            adapter.held = self._held[name]

    @property
    def last(self) -> bool:
        """Whether the next backward pass is the last before the optimizer's step; a loop sets it.

        Raises:
            AttributeError: set where :func:`accumulate` was given ``is_last``, which says it.
        """
        return self._last if self._asks is None else self._asks()

    @last.setter
    def last(self, value: bool) -> None:
        if self._asks is not None:
            raise AttributeError("is_last was given to accumulate, and says it: leave one of them")
        self._last = value

    def drop(self) -> None:
        """Forget what is held, as ``zero_grad()`` of the optimizer and of ``model`` do too."""
        for one in self._held.values():
            one.drop()

    def close(self) -> None:
        """Hold nothing any more."""
        for name, adapter in self._adapters.items():
            self._held[name].close()
            if adapter.held is self._held[name]:
                adapter.held = None

    def check_finished(self) -> None:
        """Raise ``RuntimeError`` where a layer holds a part of its gradient."""
        waiting = [name for name, one in self._held.items() if one.waits]
        if waiting:
            raise RuntimeError(
                f"{len(waiting)} layer(s) hold a part of their gradient "
                f"({waiting[0] or 'the model itself'} first), which no last backward pass came "
                "for: set accumulation.last before it, let it reach every layer, or drop() what is "
                "held; without secura.accumulate a step needs none of that"
            )

    def before_step(self, optimizer: Any, *_: Any) -> None:
        """Let no optimizer of the adapters take a step that lacks a part of a gradient."""
        if optimizer is self._optimizer:
            self.check_finished()
        elif self._is_of_adapters(optimizer):
            raise RuntimeError(
                "another optimizer than that of secura.accumulate takes a step: give it the "
                "optimizer whose step changes the adapters (of a wrapper, the one within); or a "
                "training that was interrupted has left it open: call close() of its "
                "AccumulateCallback, or load the model again"
            )

    def after_step(self, optimizer: Any, *_: Any) -> None:
        """Take the parameters for what they are now; a closure's passes must be finished too."""
        if optimizer is self._optimizer:
            self.check_finished()
            for one in self._held.values():
                one.renew()

    def _is_of_adapters(self, optimizer: Any) -> bool:
        own = {id(p) for adapter in self._adapters.values() for p in adapter.parameters()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])


@contextmanager
def accumulate(
    model: nn.Module, optimizer: Any, is_last: Callable[[], bool] | None = None
) -> Iterator[Accumulation]:
    """Compute, within a block, what depends on the adapters alone once an optimizer step.

    A layer keeps P, and adds up ∂P ``[N, m]``; the step's last backward pass makes ∂A and ∂B (or
    ∂U) of the sum. They are what plain accumulation gives, up to rounding; until then the adapters'
    ``.grad`` lacks them, and hooks on A and B are called with None. It saves five or six launches a
    layer and micro-batch where batches are small, for N m (4 + s) bytes a layer; with
    ``SECURA_KEEP_WEIGHT=always`` and ``norm="weight"`` also all but one forming of W'.

    Nothing is held in ``torch.autograd.grad``, in ``backward(inputs=...)`` unless the inputs are
    all that A and B are made of, while a CUDA graph is captured, under ``torch.compile`` and
    dispatch modes (selective checkpointing), nor by ``DataParallel``'s replicas, fused experts and
    tensor parallel layers.

    Example:
        >>> with secura.accumulate(model, optimizer) as accumulation:
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
        optimizer: that of the adapters, accelerate's too. Its ``zero_grad()`` and that of
            ``model`` itself forget what is held; a wrapper's and ``parameter.grad = None`` do not:
            call :meth:`Accumulation.drop` with these.
        is_last: whether the backward pass that asks is the step's last; None asks
            :attr:`Accumulation.last`.

    Yields:
        A :class:`secura.accumulation.Accumulation`, with ``last`` and ``drop()``.

    Raises:
        TypeError: for an optimizer that is not torch's or made of it, such as DeepSpeed's.
        ValueError: the model has no SECURA layer, or the optimizer is another's already; at a
            forward pass of ``DistributedDataParallel`` with ``static_graph``.
        RuntimeError: before a step, after one with a closure, or on leaving, where a layer holds a
            part of its gradient (the last backward pass did not reach it, or none was the last); at
            a forward pass, where the adapter is not the one whose gradient is held.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"{type(inner).__name__} is no torch.optim.Optimizer, whose steps can be watched: "
            "leave out secura.accumulate (AccumulateCallback, --hold_gradients)"
        )
    if not secura_layers(model):
        raise ValueError("the model has no SECURA layer to accumulate in: add an adapter first")
    if isinstance(getattr(inner.zero_grad, "drops", None), Accumulation):
        raise ValueError("the optimizer is in another secura.accumulate: leave that one first")
    accumulation = Accumulation(model, inner, is_last)
    with ExitStack() as stack:
        stack.callback(accumulation.close)
        _watch_steps()
        _open.append(accumulation)
        stack.callback(_open.remove, accumulation)
        for owner in (inner, model):
            stack.enter_context(_dropping(owner, accumulation))
        yield accumulation
        accumulation.check_finished()


_open: list[Accumulation] = []


@functools.cache
def _watch_steps() -> None:
    """See every optimizer's steps from now on.

    For good: torch walks its hooks of all optimizers while one steps, which fails in a thread that
    steps while another adds or removes one.
    """

    def before(optimizer: Any, *_: Any) -> None:
        for one in tuple(_open):
            one.before_step(optimizer)

    def after(optimizer: Any, *_: Any) -> None:
        for one in tuple(_open):
            one.after_step(optimizer)

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


class _Dropping:
    """The ``zero_grad`` of an optimizer or a model, which drops what is held too."""

    def __init__(self, owner: Any, drops: Accumulation) -> None:
        self.owner, self.plain, self.drops = owner, owner.zero_grad, drops

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.drops.drop()
        self.plain(*args, **kwargs)

    def __reduce__(self) -> Any:  # a copy of the owner holds nothing
        return functools.partial, (type(self.owner).zero_grad, self.owner)


@contextmanager
def _dropping(owner: Any, accumulation: Accumulation) -> Iterator[None]:
    """Within, ``zero_grad()`` of an optimizer or a model drops what is held too."""
    before = vars(owner).get("zero_grad")
    owner.zero_grad = _Dropping(owner, accumulation)
    try:
        yield
    finally:
        if before is None:
            del owner.zero_grad
        else:
            owner.zero_grad = before


__all__ = ["Accumulation", "accumulate"]
