"""What the adapter asks of the frozen layer it sits on: its shape, its weight, its product."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Stack:
    """A parameter of a module as weights ``[E, N, K]`` of E experts; ``[N, K]`` is one.

    Attributes:
        owner: the module.
        name: the parameter's in it.
        bias: None; the module adds its own.
        transposed: whether the module stores ``[E, K, N]``, as it says itself (``is_transposed``).

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
                "or parametrised experts are not adapted; load the model in full precision"
            )
        if stored.dim() not in (2, 3) or not stored.numel():
            raise ValueError(
                f"{name} is {list(stored.shape)}: target_parameters takes weights [N, K] and "
                "experts' weights [E, N, K], none of them empty"
            )
        self.transposed = stored.dim() == 3 and bool(getattr(owner, "is_transposed", False))

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
    conv1d = _conv1d()
    return conv1d is not None and isinstance(base, conv1d)


def check_linear(base: nn.Module) -> None:
    """Raise ``TypeError`` unless ``base`` is a linear layer SECURA can adapt."""
    if isinstance(base, nn.Linear) or is_conv1d(base) or _dequantizer(base) is not None:
        return
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
    if weight.dtype.itemsize < 2 or _dequantizer(base) is not None:
        return None
    return oriented(base, weight)


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


def weight(base: Any, *, values: bool = True) -> Tensor:
    """The weight ``[N, K]``, dequantised where it must be; detached.

    Args:
        base: the linear layer.
        values: whether its numbers are read; without, a weight on the meta device will do.

    Raises:
        ValueError: where the weight is not here: on the meta device, offloaded, or sharded; or
            where it cannot be dequantised.
    """
    dense = dense_weight(base)
    if dense is None or "quantization_status" in base.__dict__:
        _check_decompressed(base)
    if dense is None:
        return _dequantized(base)
    detached = dense.detach()
    if type(detached) is not Tensor or detached.is_meta or detached.dim() < 2:
        check_at_hand(base)
        if values and detached.is_meta:
            raise ValueError(
                "the base weight is on the meta device, so its rows and columns cannot be chosen: "
                "load the weights before adding the adapter"
            )
    return detached


def weight_here(base: Any) -> Tensor | None:
    """The weight ``[N, K]``, detached, where it is dense and whole on this process, else None."""
    dense = dense_weight(base)
    if dense is None:
        return None
    detached = dense.detach()
    here = type(detached) is Tensor and not detached.is_meta and detached.dim() > 1
    return detached if here else None


def check_at_hand(base: Any) -> None:
    """Raise ``ValueError`` where the weight of ``base`` is kept elsewhere between its forwards."""
    stored = getattr(base, "weight", None)
    if not isinstance(stored, Tensor):
        return
    offloaded = stored.is_meta and "_hf_hook" in base.__dict__
    if offloaded or (stored.is_floating_point() and stored.dim() < 2):
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


def product(base: nn.Module, x: Tensor, name: str) -> Tensor:
    """The output ``[..., N]`` that ``base``, the layer ``name``, itself makes of ``x [..., K]``.

    Raises:
        ValueError: where the gradient of ``x`` would be lost in it.
    """
    y0 = base(x)
    if x.requires_grad and not y0.requires_grad and torch.is_grad_enabled():
        kind = type(getattr(base, "weight", base)).__name__
        raise ValueError(
            f"{name}: the base layer ({kind}, which rounds its inputs) passes no gradient on to "
            "its input, so the layers below it would not be trained: use norm='weight', which "
            "multiplies by the dequantised weight, or quantise the weights alone"
        )
    return y0


def set_weight(base: Any, value: Tensor) -> None:
    """Put ``value [N, K]``, or ``[E, N, K]``, in the place of a dense weight, in its dtype."""
    dense = dense_weight(base)
    assert dense is not None
    stored = value.mT if is_transposed(base) else value
    base.weight.data = stored.to(dense.dtype).reshape(base.weight.shape).contiguous()


def plain_linear(base: nn.Module, value: Tensor) -> nn.Linear:
    """A frozen ``nn.Linear`` with the weight ``value [N, K]`` and the bias of ``base``."""
    own = bias(base)
    n, k = value.shape
    made = nn.Linear(k, n, bias=own is not None, device="meta", dtype=value.dtype)
    made.weight = nn.Parameter(value, requires_grad=False)
    if own is not None:
        made.bias = nn.Parameter(own.to(value.dtype, copy=True), requires_grad=False)
    return made.train(base.training)


def _conv1d() -> Any:
    module = sys.modules.get("transformers.pytorch_utils")
    return None if module is None else module.Conv1D


def _dequantizer(base: Any) -> Callable[[], Tensor] | None:
    """What makes the weight ``[N, K]`` of a quantised base; None for any other."""
    stored: Any = getattr(base, "weight", None)
    if isinstance(stored, Tensor) and type(stored).dequantize is not Tensor.dequantize:
        return stored.dequantize  # torchao's tensors, on a plain nn.Linear
    if type(base) in (nn.Linear, Stack):
        return None
    if "weight_scale_inv" in base._parameters:
        return None if stored.itemsize > 1 else lambda: _scaled(base, stored)
    if "peft" not in sys.modules:
        return None
    from peft.utils import resolve_quantization_backend

    backend = resolve_quantization_backend(base)
    return None if backend is None else lambda: backend.get_base_weight(base)


def _dequantized(base: Any) -> Tensor:
    """The weight ``[N, K]`` of a quantised base, detached."""
    make, kind = _dequantizer(base), type(getattr(base, "weight", base)).__name__
    if make is None:
        raise ValueError(
            f"{type(base).__name__} ({kind}) has no floating weight and no known quantisation, so "
            "its rows and columns cannot be read: load it in full precision"
        )
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        # bitsandbytes' layout for inference on a CPU: dequantising it gives another weight.
        # Its state_dict() puts the ordinary one back.
        base.state_dict()
    try:
        return make().detach()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{type(base).__name__} ({kind}) cannot be dequantised ({error}), so its rows and "
            "columns cannot be read: load it in full precision, or quantised otherwise"
        ) from error


def _scaled(base: Any, weight: Tensor) -> Tensor:
    """The weight ``[N, K]``, fp32, of transformers' ``FP8Linear``: a scale a block, or one."""
    scale = base.weight_scale_inv.float()
    for dim, size in enumerate(base.block_size or ()):
        scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
    return weight.float() * scale


def _check_decompressed(base: Any) -> None:
    """Raise ``ValueError`` where compressed-tensors holds another weight than it multiplies by."""
    status = getattr(base.__dict__.get("quantization_status"), "value", "decompressed")
    if status != "decompressed":
        raise ValueError(
            f"the weight is not dense yet (compressed-tensors, {status}): load the model with "
            "CompressedTensorsConfig(dequantize=True), or run it once before it is adapted"
        )


__all__ = [
    "Stack",
    "bias",
    "check_at_hand",
    "check_linear",
    "dense_weight",
    "is_conv1d",
    "is_transposed",
    "only_moves_inputs",
    "oriented",
    "plain_linear",
    "product",
    "product_weight",
    "set_weight",
    "weight",
    "weight_here",
    "why_not_product",
]
