"""What the adapter asks of the frozen layer it sits on: its shape, its weight, its product."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def is_conv1d(base: nn.Module) -> bool:
    """Whether ``base`` is transformers' ``Conv1D``, whose weight is ``[K, N]``."""
    conv1d = _conv1d()
    return conv1d is not None and isinstance(base, conv1d)


def check_linear(base: nn.Module) -> None:
    """Raise ``TypeError`` unless ``base`` is a linear layer SECURA can adapt."""
    if isinstance(base, nn.Linear) or is_conv1d(base) or _quantization(base) is not None:
        return
    raise TypeError(
        f"{type(base).__name__} is no linear layer: SECURA adapts torch.nn.Linear, transformers' "
        "Conv1D and the quantised linear layers PEFT knows; name such layers in target_modules"
    )


def dense_weight(base: nn.Module) -> Tensor | None:
    """The weight as a view ``[N, K]`` where it is stored as floating numbers, else None."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    if weight.dtype.itemsize < 2 or _quantization(base) is not None:
        return None
    return weight.t() if is_conv1d(base) else weight


def product_weight(base: nn.Module) -> Tensor | None:
    """The weight ``[N, K]``, detached, of a base that is no more than a frozen product with it.

    None for every other base, a quantised or hooked one say.

    Raises:
        ValueError: where the weight is not here, as in :func:`weight`.
    """
    if type(base) is nn.Linear:  # most layers by far, and the quickest to tell
        stored: Any = base._parameters.get("weight")
        own_bias = base._parameters.get("bias")
        plain = type(stored) is nn.Parameter and stored.is_floating_point() and stored.dim() == 2
        if plain and stored.itemsize > 1 and not stored.is_meta and not stored.requires_grad:
            frozen = own_bias is None or not own_bias.requires_grad
            if frozen and not _adds(base) and "forward" not in base.__dict__:
                return stored.detach()
    if dense_weight(base) is None or why_not_product(base):
        return None
    return weight(base, values=False)


def weight(base: nn.Module, *, values: bool = True) -> Tensor:
    """The weight ``[N, K]``, dequantised where it must be; detached.

    Args:
        base: the linear layer.
        values: whether its numbers are read; without, a weight on the meta device will do.

    Raises:
        ValueError: where the weight is not here: on the meta device, offloaded, or sharded.
    """
    dense = dense_weight(base)
    if dense is None:
        backend = _quantization(base)
        if backend is None:
            raise TypeError(
                f"{type(base).__name__} has no floating weight and no known quantisation"
            )
        state = getattr(base.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            # bitsandbytes' layout for inference on a CPU: dequantising it gives another weight.
            # Its state_dict() puts the ordinary one back.
            base.state_dict()
        return backend.get_base_weight(base).detach()
    detached = dense.detach()
    if type(detached) is not Tensor or detached.is_meta or detached.dim() != 2:
        check_at_hand(base)
        if values and detached.is_meta:
            raise ValueError(
                "the base weight is on the meta device, so its rows and columns cannot be chosen: "
                "load the weights before adding the adapter"
            )
    return detached


def is_dtensor(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor, of which every process has a part."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def is_split(base: nn.Module) -> bool:
    """Whether tensor parallelism split the weight of ``base``, which works on its part as it is."""
    if not ("forward" in base.__dict__ or base._forward_pre_hooks):
        return False  # transformers puts a forward, torch hooks, where a plan splits the weight
    if not is_dtensor(dense_weight(base)):
        return False
    from torch.distributed.fsdp import FSDPModule

    return not isinstance(base, FSDPModule)


def check_whole(base: nn.Module) -> None:
    """Raise ``ValueError`` where tensor parallelism split the weight of ``base``."""
    if is_split(base):
        raise ValueError(
            "tensor parallelism split the base weight over processes: save the adapter, and merge, "
            "export or anchor it on one process"
        )


def whole_weight(base: nn.Module) -> Tensor:
    """:func:`weight`, gathered where tensor parallelism split it, which every process must ask."""
    if not is_split(base):
        return weight(base)
    split: Any = dense_weight(base)
    return split.detach().full_tensor()


def weight_here(base: nn.Module) -> Tensor | None:
    """The weight ``[N, K]``, detached, where it is dense and whole on this process, else None."""
    dense = dense_weight(base)
    if dense is None:
        return None
    detached = dense.detach()
    here = type(detached) is Tensor and not detached.is_meta and detached.dim() == 2
    return detached if here else None


def check_at_hand(base: nn.Module) -> None:
    """Raise ``ValueError`` where the weight of ``base`` is kept elsewhere between its forwards."""
    stored = getattr(base, "weight", None)
    if not isinstance(stored, Tensor):
        return
    offloaded = stored.is_meta and "_hf_hook" in base.__dict__
    if offloaded or (stored.is_floating_point() and stored.dim() != 2):
        kept = "offloaded" if offloaded else "partitioned (ZeRO-3, FSDP1)"
        raise ValueError(
            f"the base weight is {kept}, and its rows and columns are not at hand: load the model "
            "without offloading to cpu or disk, or shard it by decoder layer with FSDP2"
        )
    if type(stored.detach()).__name__ == "DTensor":
        raise ValueError(
            "the base weight is a DTensor: to train, shard by decoder layer, not each Linear "
            "alone; to merge, save the adapter and merge on one process with `secura merge`"
        )


def bias(base: nn.Module) -> Tensor | None:
    """The bias ``[N]`` that the base adds, or None; detached."""
    own = base._parameters
    value = own["bias"] if "bias" in own else getattr(base, "bias", None)
    return value.detach() if value is not None and isinstance(value, Tensor) else None


def why_not_product(base: nn.Module) -> str | None:
    """What of ``base`` a plain ``x Wᵀ + b`` in its place would pass over; None where nothing is."""
    if not _is_product(base, base.__dict__.get("forward")):
        return "its own forward"
    return _why_not_frozen(base)


def only_moves_inputs(base: nn.Module) -> bool:
    """Whether all that ``base`` adds to its product is accelerate's hook for where x has to be."""
    hook: Any = base.__dict__.get("_hf_hook")
    if type(hook).__name__ != "AlignDevicesHook" or hook.offload:
        return False
    return _is_product(base, base.__dict__["_old_forward"]) and _why_not_frozen(base) is None


def _is_product(base: nn.Module, own_forward: Any) -> bool:
    plain: Any = nn.Linear if isinstance(base, nn.Linear) else _conv1d()
    if plain is None or type(base).forward is not plain.forward:
        return False
    if own_forward is None:
        return True
    same = getattr(own_forward, "__func__", None) is plain.forward
    return same and own_forward.__self__ is base


def _why_not_frozen(base: nn.Module) -> str | None:
    if added := _adds(base):
        return added
    for parameter in base._parameters.values():
        # a view that is no leaf is FSDP1's, of a frozen weight beside trained ones
        if parameter is not None and parameter.requires_grad and parameter.is_leaf:
            return "the training of its weight"
    return None


def _adds(base: nn.Module) -> str | None:
    """What is hung on ``base`` beside its own forward, or None."""
    if (
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
    ):
        return "its hooks"
    return "the modules in it" if base._modules else None


def set_weight(base: nn.Module, value: Tensor) -> None:
    """Put ``value [N, K]`` in the place of a dense base weight, in its dtype.

    Raises:
        ValueError: for a base whose weight is not dense.
    """
    dense = dense_weight(base)
    if dense is None:
        raise ValueError(
            f"{type(base).__name__} holds a quantised weight: load the model in full precision to "
            "merge an adapter into it"
        )
    stored = value.t() if is_conv1d(base) else value
    base.weight.data = stored.to(dense.dtype).contiguous()


def _conv1d() -> Any:
    module = sys.modules.get("transformers.pytorch_utils")
    return None if module is None else module.Conv1D


def _quantization(base: nn.Module):
    if "peft" not in sys.modules or type(base) is nn.Linear:
        return None
    from peft.utils import resolve_quantization_backend

    return resolve_quantization_backend(base)


__all__ = [
    "bias",
    "check_at_hand",
    "check_linear",
    "check_whole",
    "dense_weight",
    "is_conv1d",
    "is_dtensor",
    "is_split",
    "only_moves_inputs",
    "product_weight",
    "set_weight",
    "weight",
    "weight_here",
    "whole_weight",
    "why_not_product",
]
