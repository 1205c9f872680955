"""What one launch reads, writes and computes: our kernels by their arguments, torch's by theirs.

Everything runs on tensors of the ``meta`` device as if a chip were there
(:mod:`secura_kernels.inspection.recorder`): inputs are read once and outputs written once, of
scattered columns the 32-byte sectors they lie in, of gathered rows those rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from secura_kernels.inspection.recorder import TARGETS, record
from secura_kernels.ops import launch
from secura_kernels.ops.flops import FORMULAS
from secura_kernels.plan import Cost, sectors


class Launch(NamedTuple):
    """One kernel or operator by name, and what it moves and computes."""

    name: str
    cost: Cost


def _columns(name: str, height: str, width: str, count: str) -> Callable[[dict[str, Any]], float]:
    """Bytes of the sectors of ``count`` scattered columns of the tensor ``name``."""

    def found(given: dict[str, Any]) -> float:
        return sectors(given[height], given[width], given[count], given[name].element_size())

    return found


def _rows(given: dict[str, Any]) -> float:
    source, k = given["r_ptr"], given["K"]
    return given["m"] * k * source.element_size()


Moved = dict[str, Callable[[dict[str, Any]], float]]
_OF_W: Moved = {"r_ptr": _rows}
_OF_C: Moved = {"w_ptr": _columns("w_ptr", "N", "K", "m")}
MOVED: dict[str, Moved] = {
    "_gather_kernel": {"y_ptr": _columns("y_ptr", "T", "N", "m")},
    "_add_columns_kernel": {
        "base_ptr": _columns("base_ptr", "T", "N", "m"),
        "dy_ptr": lambda given: 2 * _columns("dy_ptr", "T", "N", "m")(given),
    },
    "_project_fwd_kernel": _OF_C,
    "_project_bwd_kernel": _OF_C,
    "weight_stat_kernel": _OF_W,
    "weight_fwd_kernel": _OF_W,
    "weight_bwd_kernel": _OF_W,
    "activation_bwd_kernel": {
        "h_ptr": lambda given: (1.0 if given["first"] == 0 else 2.0) * _size(given["h_ptr"])
    },
}
"""For each kernel, the arguments not read or written just once, and their bytes by its launch."""

PRODUCTS: dict[str, tuple[str, ...]] = {
    "_add_product_kernel": ("T", "N", "m"),
    "_output_gradient_kernel": ("T", "N", "m"),
    "_project_fwd_kernel": ("N", "m", "m"),
    "_project_bwd_kernel": ("N", "m", "m"),
    "_channel_kernel": ("N", "m", "m"),
    "activation_fwd_kernel": ("t", "n", "m"),
    "activation_bwd_kernel": ("t", "n", "m"),
    "weight_stat_kernel": ("N", "K", "m"),
    "weight_fwd_kernel": ("N", "K", "m"),
    "weight_bwd_kernel": ("N", "K", "m"),
}
"""By kernel the sizes of its product; twice their product are its operations."""


TWICE = ("activation_bwd_kernel", "weight_bwd_kernel")
"""Kernels of two such products."""


def _size(tensor: Tensor) -> float:
    """Bytes of a tensor in memory: what is expanded counts once."""
    spread = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return float(spread * tensor.element_size()) if tensor.numel() else 0.0


def _of_kernel(kernel: Any, arguments: tuple[Any, ...]) -> Launch:
    name = kernel.fn.__name__
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    special = MOVED.get(name, {})
    tensors = {key: of for key, of in given.items() if isinstance(of, Tensor)}
    moved = sum(special[key](given) if key in special else _size(of) for key, of in tensors.items())
    flop = 2.0 * math.prod(given[size] for size in PRODUCTS[name]) if name in PRODUCTS else 0.0
    flop *= 2 if name in TWICE else 1
    return Launch(name, Cost(moved, flop))


def _of_operator(func: Any, args: Any, kwargs: Any, out: Any) -> Launch | None:
    """The launch of an operator; None for one that only makes a view or an empty tensor."""
    name = func.overloadpacket.__name__
    if "empty" in name or any(
        r.alias_info and not r.alias_info.is_write for r in func._schema.returns
    ):
        return None
    if name in ("_unsafe_view", "detach", "alias", "_local_scalar_dense"):
        return None
    read = {key: of for key, of in kwargs.items() if key != "out"}
    inputs, outputs = list(_tensors((args, read))), list(_tensors(out))
    if not any(tensor.numel() for tensor in outputs):
        return None
    if name in ("index_select", "index", "embedding"):
        inputs[0] = outputs[0]
    if name in ("fill_", "zero_"):
        inputs = []
    moved = sum(map(_size, [*inputs, *outputs]))
    product = getattr(torch.ops.aten, name.removesuffix("_"), None)  # addmm_ counts as addmm
    formula = flop_registry.get(product)
    flop = formula(*args, **kwargs, out_val=out) if formula else 0
    return Launch(name, Cost(moved, float(flop)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


class Counter(TorchDispatchMode):
    """Within, keeps every launch; our operators are seen through."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one operator."""
        kwargs = kwargs or {}
        if func.namespace == "secura":
            body: Any = FORMULAS[func.overloadpacket.__name__][0]
            with self:
                return body.body(*args, **kwargs)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if found := _of_operator(func, args, kwargs, out):
            self.launches.append(found)
        return out

    def kernel(self, kernel: Any, arguments: tuple[Any, ...]) -> None:
        """Count one of our kernels."""
        self.launches.append(_of_kernel(kernel, arguments))


@contextmanager
def counting() -> Iterator[list[Launch]]:
    """Within, the launches on tensors of the ``meta`` device, cut for an H100 (``sm_90``)."""
    with record(TARGETS["sm_90"]), Counter() as counter:
        launch.watchers.append(counter.kernel)
        try:
            yield counter.launches
        finally:
            launch.watchers.remove(counter.kernel)
