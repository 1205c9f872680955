"""What the adapter asks of the layer it sits on: shape, weight and bias, and where they are."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from . import quantised
from .sharding import (
    gathered,
    is_dtensor,
    is_fsdp_managed,
    is_partitioned,
    is_zero3,
    on_rank_0_alone,
    reshard,
)

_FEATURES_FIRST = ("Llama4TextExperts",)
"""Classes of experts that store ``[E, K, N]`` and do not say so."""


class Stack:
    """A parameter of a module as weights ``[E, N, K]`` of E experts; ``[N, K]`` is one.

    Attributes:
        owner: the module.
        name: the parameter's in it.
        bias: None; the module adds its own.
        transposed: whether the module stores ``[E, K, N]``: it says so itself (``is_transposed``),
            or is known to.

    Raises:
        ValueError: for a parameter that is not 2-D or 3-D, has no expert, or is not of floats.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name, self.bias = owner, name, None
        self.transposed = False
        stored = owner._parameters.get(name)
        if stored is None or dense_weight(self) is None:
            raise ValueError(
                f"{name} is no parameter of floating numbers in {type(owner).__name__}: quantised "
                "or parametrised experts are not adapted; load the model in full precision (MXFP4 "
                "with quantization_config=Mxfp4Config(dequantize=True))"
            )
        if stored.dim() not in (2, 3) or not stored.numel():
            raise ValueError(
                f"{name} is {list(stored.shape)}: target_parameters takes weights [N, K] and "
                "experts' weights [E, N, K], none of them empty"
            )
        features_first = getattr(owner, "is_transposed", type(owner).__name__ in _FEATURES_FIRST)
        self.transposed = stored.dim() == 3 and bool(features_first)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it is stored."""
        stored = self.owner._parameters[self.name]
        assert stored is not None
        return stored


def oriented(base: Any, stored: Tensor) -> Tensor:
    """A view ``[N, K]``, or ``[E, N, K]`` of experts, of a tensor stored as ``base`` stores it."""
    if isinstance(base, Stack) and stored.dim() == 2:
        return stored[None]
    return stored.mT if is_transposed(base) else stored


def is_transposed(base: Any) -> bool:
    """Whether ``base`` stores its weight input features first."""
    return is_conv1d(base) or getattr(base, "transposed", False)


def is_conv1d(base: nn.Module) -> bool:
    """Whether ``base`` is transformers' ``Conv1D``, whose weight is ``[K, N]``."""
    conv1d = conv1d_class()
    return conv1d is not None and isinstance(base, conv1d)


def check_linear(base: nn.Module) -> None:
    """Raise ``TypeError`` unless ``base`` is a linear layer SECURA can adapt."""
    if isinstance(base, nn.Linear) or is_conv1d(base) or quantised.dequantizer(base) is not None:
        return
    if quantised.is_packed(base):
        raise TypeError(
            f"{type(base).__name__} is a quantised layer that cannot be dequantised here, so its "
            "rows and columns cannot be read: load the model in full precision, or quantised by "
            "bitsandbytes, torchao or HQQ, or leave this layer out with exclude_modules"
        )
    raise TypeError(
        f"{type(base).__name__} is no linear layer: SECURA adapts torch.nn.Linear, transformers' "
        "Conv1D and quantised linear layers that can be dequantised; name such layers in "
        "target_modules"
    )


def dense_weight(base: Any) -> Tensor | None:
    """The weight as a view ``[N, K]`` where it is stored as floating numbers, else None.

    Experts' is ``[E, N, K]``, here and below.
    """
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    if weight.dtype.itemsize < 2 or quantised.dequantizer(base) is not None:
        return None
    return oriented(base, weight)


def weight(base: Any, *, values: bool = True) -> Tensor:
    """The weight ``[N, K]``, detached; dequantised where it must be, gathered where it is sharded.

    Every process has to call this where it is a DTensor or ZeRO-3's.

    Args:
        base: the linear layer.
        values: whether its numbers are read; without, a weight on the meta device will do.

    Raises:
        ValueError: where it cannot be had: on the meta device, offloaded, sharded by FSDP1, or in a
            form that cannot be dequantised.
    """
    dense = dense_weight(base)
    if dense is None or "quantization_status" in base.__dict__:
        quantised.check_decompressed(base)
    if dense is None:
        return quantised.dequantized(base)
    detached = dense.detach()
    if type(detached) is Tensor and not detached.is_meta and detached.dim() > 1:
        return detached
    check_at_hand(base)
    if values and detached.is_meta:
        raise ValueError("the base weight is on the meta device: load the weights first")
    return oriented(base, gathered(base.weight).detach())


def shape(base: nn.Module) -> tuple[int, int]:
    """``(N, K)`` of the weight, wherever it is kept."""
    if dense_weight(base) is None:
        n, k = weight(base).shape
        return n, k
    stored: Any = base.weight
    n, k = getattr(stored, "ds_shape", stored.shape)
    return (k, n) if is_conv1d(base) else (n, k)


def comes_later(base: nn.Module) -> bool:
    """Whether the weight is on the meta device, to be loaded or sent by the first process."""
    stored: Any = getattr(base, "weight", None)
    return stored is not None and stored.is_meta and "_hf_hook" not in base.__dict__


def is_elsewhere(base: nn.Module) -> bool:
    """Whether the weight is sharded now: its layer's own hooks gather it for its own forward."""
    stored: Any = getattr(base, "weight", None)
    return is_dtensor(stored) or is_zero3(stored)


def is_split(base: Any) -> bool:
    """Whether tensor parallelism split the weight of ``base``, which works on its part as it is."""
    module = getattr(base, "owner", base)
    if not ("forward" in module.__dict__ or getattr(module, "_forward_pre_hooks", None)):
        return False  # transformers puts a forward, torch hooks, where a plan splits the weight
    if not is_dtensor(dense_weight(base)):
        return False
    from torch.distributed.fsdp import FSDPModule

    return not isinstance(module, FSDPModule)


def check_whole(base: nn.Module) -> None:
    """Raise ``ValueError`` where tensor parallelism split the weight of ``base``."""
    if is_split(base):
        raise ValueError(
            "tensor parallelism split the base weight over processes: save the adapter, and merge, "
            "export or anchor it on one process"
        )


def weight_here(base: Any) -> Tensor | None:
    """The weight ``[N, K]``, detached, where it is dense and whole on this process, else None."""
    dense = dense_weight(base)
    if dense is None or on_rank_0_alone():
        return None
    detached = dense.detach()
    here = type(detached) is Tensor and not detached.is_meta and detached.dim() > 1
    return detached if here else None


def weight_between(base: Any) -> Tensor | None:
    """The weight ``[N, K]``, detached, if the stored tensor is the same in every forward.

    None if it is quantised, not here, or gathered for a forward by FSDP2.
    """
    return None if _is_gathered(base) else weight_here(base)


def _is_gathered(base: Any) -> bool:
    """Whether FSDP gathers the stored weight for a forward."""
    return is_fsdp_managed(getattr(base, "owner", base))


def is_computed(module: nn.Module, name: str = "weight") -> bool:
    """Whether a module's tensor is made of other tensors.

    By torch's parametrizations, pruning, or the weight or spectral norm that came before them.
    """
    own = module._parameters
    if name in own:
        return False
    return is_parametrized(module, name) or f"{name}_orig" in own or f"{name}_g" in own


UNKNOWN = (-1, 0, 0)
"""What :func:`mark` says of a weight that is not to be taken for any other."""


def mark(base: Any) -> tuple[int, int, int] | None:
    """Version, place and storage of the weight, which tell when it was written to or replaced.

    None where every forward makes the weight anew (FSDP, ZeRO-3), or it has no version;
    :data:`UNKNOWN` where another one stands in its place for a while.
    """
    stored = getattr(base, "_parameters", {}).get("weight")
    if stored is None or _is_gathered(base) or is_elsewhere(base):
        return None
    if stored.is_meta or stored.is_inference():
        return None
    if not isinstance(stored, nn.Parameter):  # torch.func.functional_call's, or a view of FSDP1's
        return None if getattr(stored._base, "_is_flat_param", False) else UNKNOWN
    plain = innermost(stored)
    if plain is stored and dense_weight(base) is None:  # which bitsandbytes may pack in place
        return stored._version, id(stored), 0
    # an address alone may be another's later
    return stored._version, plain.data_ptr(), plain.untyped_storage()._cdata


def innermost(weight: Tensor) -> Tensor:
    """The first plain tensor of those that a quantised weight (torchao's) is made of, or itself."""
    while hasattr(weight, "__tensor_flatten__"):
        names, _ = weight.__tensor_flatten__()
        weight = getattr(weight, names[0])
    return weight


def check_at_hand(base: Any) -> None:
    """Raise ``ValueError`` where the weight of ``base`` is kept elsewhere between its forwards."""
    stored = getattr(base, "weight", None)
    if not isinstance(stored, Tensor):
        return
    offloaded = stored.is_meta and "_hf_hook" in base.__dict__
    parted = stored.is_floating_point() and stored.dim() < 2 and not is_partitioned(stored)
    if offloaded or parted:
        kept = "offloaded" if offloaded else "a part of FSDP1's"
        raise ValueError(
            f"the base weight is {kept}, and its rows and columns are not at hand: load the model "
            "without offloading to cpu or disk, or shard it by decoder layer with FSDP2"
        )


def bias(base: Any) -> Tensor | None:
    """The bias ``[N]`` that the base adds, or None; detached, a part where a plan split it."""
    own = getattr(base, "_parameters", {})
    value = own["bias"] if "bias" in own else getattr(base, "bias", None)
    if not isinstance(value, Tensor):
        return None
    return (value if is_split(base) else gathered(value)).detach()


def make_writable(base: Any) -> None:
    """Have FSDP2 put its shards in the place of what it gathered for a forward, to be written.

    Raises:
        ValueError: where what a merge wrote into the weight would be lost.
    """
    managed = _is_gathered(base)
    if managed and not is_dtensor(base.weight):
        reshard(getattr(base, "owner", base))
    lost = "partitioned by ZeRO-3" if is_zero3(base.weight) else None
    if managed and not is_dtensor(base.weight):
        lost = "a copy or a part that FSDP holds"
    if lost:
        raise ValueError(
            f"the base weight is {lost}, and a merge into it would be lost: save the adapter and "
            "merge on one process with `secura merge`"
        )


def plain_linear(base: nn.Module, value: Tensor, delta_bias: Tensor | None) -> nn.Linear:
    """A frozen ``nn.Linear`` with the weight ``value [N, K]`` and the bias of ``base`` plus δb."""
    total, (n, k) = bias(base), value.shape
    if delta_bias is not None:
        total = delta_bias if total is None else total + delta_bias
    made = nn.Linear(k, n, bias=total is not None, device="meta", dtype=value.dtype)
    made.weight = nn.Parameter(value, requires_grad=False)
    if total is not None:
        made.bias = nn.Parameter(total.to(value.dtype, copy=True), requires_grad=False)
    return made.train(base.training)


def conv1d_class() -> Any:
    """transformers' ``Conv1D``, or None where nothing has imported it."""
    module = sys.modules.get("transformers.pytorch_utils")
    return None if module is None else module.Conv1D


__all__ = [
    "UNKNOWN",
    "Stack",
    "bias",
    "check_at_hand",
    "check_linear",
    "check_whole",
    "comes_later",
    "conv1d_class",
    "dense_weight",
    "innermost",
    "is_computed",
    "is_conv1d",
    "is_elsewhere",
    "is_split",
    "is_transposed",
    "make_writable",
    "mark",
    "oriented",
    "plain_linear",
    "shape",
    "weight",
    "weight_between",
    "weight_here",
]
