"""Where the questions of :mod:`benchmarks.triage` are asked, and the clock they are timed by."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from secura_kernels import NormOptions
from secura_kernels.activation import checked
from secura_kernels.gain import known_scalars

from . import graphs, measure
from .gpu_ops import Size, Tensors

Dims = tuple[int, int, int]
"""T, N, K."""


class Asker:
    """Where the questions are asked, and the clock they are timed by.

    Args:
        device: ``"cuda"``, or ``"cpu"`` for a dry run in the interpreter.
        warming: whether every call runs once, to be compiled, and nothing is timed.
    """

    def __init__(self, device: str, warming: bool = False) -> None:
        self.device, self.warming = torch.device(device), warming
        self.dry, self.dtype = device == "cpu", torch.bfloat16

    def size(self, t: int, n: int, k: int, m: int = 128) -> Size:
        """The size asked for, or on a CPU one with as many blocks of nearly nothing."""
        if not self.dry:
            return Size(t, n, k, m)
        return Size(max(16, t // 256), max(32, n // 128), max(32, k // 128), 16)

    @functools.lru_cache(maxsize=1)  # noqa: B019  one size at a time is all a GPU should hold
    def tensors(self, size: Size) -> Tensors:
        """Random tensors of a layer."""
        return Tensors(size, str(self.device), self.dtype)

    def us(self, call: Callable[[], Any]) -> float | None:
        """Microseconds of a call by itself, as a CUDA graph where it can be one."""
        if self.warming or self.dry:
            call()
            return None
        try:
            run = graphs.graphed(call)
        except graphs.NotCapturableError:
            run = call
        return 1e3 * measure.timing(measure.sample(run, self.device))["median"]

    def host_us(self, call: Callable[[], Any], count: int = 100) -> float | None:
        """Microseconds from one eager call to the next, when many follow each other."""
        call()
        if self.warming or self.dry:
            return None
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count * 1e6


class Question(NamedTuple):
    """A name and what finds its figures."""

    name: str
    ask: Callable[[Asker], dict[str, Any]]


class Launched:
    """A kernel that is launched with options of its own beside the launcher's."""

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launch = self.kernel[grid]
        return lambda *args, **named: launch(*args, **named | self.options)


@contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Within, names of a module stand for other values."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


class ActivationCase(NamedTuple):
    """A layer of ``activation`` between its passes, and how its gradients are asked for.

    Attributes:
        data: the layer's own tensors.
        y0: ``[T, N]``.
        z: ``[T, m]``.
        q: P in the compute dtype, ``[N, m]``.
        options: the norm, filled in.
    """

    data: Tensors
    y0: Tensor
    z: Tensor
    q: Tensor
    options: NormOptions

    @classmethod
    def draw(cls, asker: Asker, dims: Dims) -> ActivationCase:
        """Random tensors of a size."""
        size = asker.size(*dims)
        data = asker.tensors(size)
        y0 = linear(data.x, data.weight)
        q = (torch.randn(size.n, size.m, device=asker.device) * 0.05).to(asker.dtype)
        options = checked(NormOptions("activation"), "recompute")
        return cls(data, y0, y0.index_select(1, data.rows), q, options)

    @property
    def how(self) -> tuple[Any, ...]:
        """What a backward takes behind its tensors: no scale, no factor, ∂y0 and ∂P wanted."""
        known = known_scalars(self.options)
        absent = (None, None, None, None, None)
        return *absent, known, self.options.form, self.options.combine, [True, True, False]


__all__ = ["ActivationCase", "Asker", "Dims", "Launched", "Question", "replaced"]
