"""What the adapter asks of the frozen layer it sits on: its shape, its weight, its product."""

from __future__ import annotations

import sys

from torch import Tensor, nn


def is_conv1d(base: nn.Module) -> bool:
    """Whether ``base`` is transformers' ``Conv1D``, whose weight is ``[K, N]``."""
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and isinstance(base, module.Conv1D)


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


def weight(base: nn.Module) -> Tensor:
    """The weight ``[N, K]``, dequantised where it must be; detached.

    Raises:
        ValueError: where the weight is not here (on the meta device, or sharded by itself).
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
    if dense.device.type == "meta":
        raise ValueError(
            "the base weight is on the meta device, so its rows and columns cannot be chosen: load "
            "the weights before adding the adapter"
        )
    if type(dense.detach()).__name__ == "DTensor":
        raise ValueError(
            "the base weight is a DTensor: shard by decoder layer, not each Linear alone"
        )
    return dense.detach()


def bias(base: nn.Module) -> Tensor | None:
    """The bias ``[N]`` that the base adds, or None; detached."""
    value = getattr(base, "bias", None)
    return value.detach() if isinstance(value, Tensor) else None


def runs_as_product(base: nn.Module) -> bool:
    """Whether ``x Wᵀ + b`` may stand for ``base(x)``: a plain frozen layer that nothing hooks."""
    plain = type(base) is nn.Linear or (is_conv1d(base) and type(base).__name__ == "Conv1D")
    return (
        plain
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
        and not base._backward_pre_hooks
        and not hasattr(base, "_hf_hook")
        and not any(parameter.requires_grad for parameter in base.parameters(recurse=False))
    )


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


def _quantization(base: nn.Module):
    if "peft" not in sys.modules or type(base) is nn.Linear:
        return None
    from peft.utils import resolve_quantization_backend

    return resolve_quantization_backend(base)


__all__ = [
    "bias",
    "check_linear",
    "dense_weight",
    "is_conv1d",
    "runs_as_product",
    "set_weight",
    "weight",
]
