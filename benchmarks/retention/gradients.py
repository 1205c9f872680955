"""A step's loss and gradients: eagerly, or on a GPU as the replay of a graph.

A small model's step is thousands of launches of microseconds, which the host of a GPU cannot
issue as fast as they run: recorded once, they follow one another without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.graphs import NotCapturableError, graphed, supported
from benchmarks.retention.rows import Batch, Row, batch_loss, pack
from benchmarks.retention.score import autocast
from benchmarks.retention.strategies import Strategy


class Gradients:
    """Computes the gradients of rows into the trained parameters.

    Args:
        strategy: whose loss it is.
        recorded: whether to record the work where the device can: it then must be the same in
            every step, but for the rows.
    """

    def __init__(self, strategy: Strategy, *, recorded: bool) -> None:
        self.strategy = strategy
        self.model, self.material = strategy.context.model, strategy.context.material
        self.recorded = recorded and supported(self.material.device)
        self._recordings: dict[int, _Recording] = {}

    def __call__(self, rows: Sequence[Row]) -> float:
        """The rows' loss; their gradients take the place of those that were there."""
        if self.recorded:
            try:
                return self._replay(rows)
            except NotCapturableError as error:
                warnings.warn(f"steps run eagerly: {error}", stacklevel=2)
                self.recorded = False
        self.model.zero_grad(set_to_none=True)
        with autocast(self.material.device, self.material.bf16):
            loss = self.strategy.loss(rows)
        loss.backward()
        return loss.item()

    def _replay(self, rows: Sequence[Row]) -> float:
        batch = pack(rows, self.material.device, self.material.longest)
        recording = self._recordings.get(len(rows))
        if recording is None:
            recording = _Recording(self.model, batch, self.material.bf16)
            self._recordings[len(rows)] = recording
        return recording(batch)


class _Recording:
    """The work of one batch, replayed for others of the same shapes."""

    def __init__(self, model: nn.Module, batch: Batch, bf16: bool) -> None:
        self.model, self.batch, self.bf16 = model, batch, bf16
        self.trained = [value for value in model.parameters() if value.requires_grad]
        self.loss = torch.empty(0)
        self.replay = graphed(self._compute)
        self.grads = [value.grad for value in self.trained]

    def __call__(self, batch: Batch) -> float:
        for own, other in zip(self._tensors(self.batch), self._tensors(batch), strict=True):
            own.copy_(other)
        self.replay()
        for value, grad in zip(self.trained, self.grads, strict=True):
            value.grad = grad
        return self.loss.item()

    def _compute(self) -> None:
        for value in self.trained:
            value.grad = None
        with autocast(self.batch.ids.device, self.bf16):
            loss = batch_loss(self.model, self.batch)
        loss.backward()
        self.loss = loss.detach()

    @staticmethod
    def _tensors(batch: Batch) -> list[Tensor]:
        return [value for value in vars(batch).values() if value is not None]


__all__ = ["Gradients"]
