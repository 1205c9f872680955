"""How a base layer makes its product, and whether a plain ``x Wᵀ`` may stand in its place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_kernels.dispatch import without_autocast

from . import bases, quantised

_GATHERS = ("torch.distributed.fsdp.", "deepspeed.runtime.zero.", "deepspeed.utils.nvtx")
"""Modules whose hooks gather a weight for a forward."""
_MODELS = "transformers.models."
_WRITTEN_OUT = ("FalconLinear",)
"""Classes of these whose own forward is x Wᵀ + b, written out."""


def product_weight(base: nn.Module) -> Tensor | None:
    """The weight ``[N, K]``, detached, of a base that is no more than a frozen product with it.

    None for every other base, a quantised or hooked one say.

    Raises:
        ValueError: where the weight is not here, as in :func:`secura.bases.weight`.
    """
    if type(base) is nn.Linear:  # most layers by far, and the quickest to tell
        stored: Any = base._parameters.get("weight")
        own_bias = base._parameters.get("bias")
        plain = type(stored) is nn.Parameter and stored.is_floating_point() and stored.dim() == 2
        if plain and stored.itemsize > 1 and not stored.is_meta and not stored.requires_grad:
            frozen = own_bias is None or not own_bias.requires_grad
            if frozen and not _adds(base) and "forward" not in base.__dict__:
                return stored.detach()
    if bases.dense_weight(base) is None or why_not_product(base):
        return None
    return bases.weight(base, values=False)


def is_trained(base: Any) -> bool:
    """Whether a weight or bias of ``base`` itself is trained."""
    # a view that is no leaf is FSDP1's, of a frozen weight beside trained ones
    return any(value.requires_grad and value.is_leaf for value in base.parameters())


def trained_tensors(base: Any, name: str) -> dict[str, Any]:
    """``weight [N, K]`` and ``bias [N]`` or None of a base that is trained, not detached.

    By the names of :class:`secura_kernels.Layer`, with None for ``columns``, which are constant.

    Raises:
        ValueError: where the weight of ``base``, the layer ``name``, is sharded now.
    """
    dense = bases.dense_weight(base)
    if bases.is_elsewhere(base):
        raise ValueError(
            f"{name}: its own weight is trained, and sharded again by the time the adapter reads "
            "it: freeze it, or shard by decoder layer with FSDP2"
        )
    own = bases.weight(base) if dense is None else dense
    bias = getattr(base, "bias", None)
    return {"weight": own, "bias": bias if isinstance(bias, Tensor) else None, "columns": None}


def why_not_product(base: nn.Module) -> str | None:
    """What of ``base`` a plain ``x Wᵀ + b`` in its place would pass over; None where nothing is."""
    if not _is_product(base, base.__dict__.get("forward")):
        return "its own forward"
    return _why_not_frozen(base)


def is_another_function(base: nn.Module) -> bool:
    """Whether a forward of its own makes something else than ``x Wᵀ + b``: tried on two tokens.

    Forwards that frameworks write differ by casts, or by inputs that are rounded. One that takes
    something else than ``x [1, 2, K]`` cannot be tried, and is taken for a product.
    """
    weight = bases.dense_weight(base)
    plain = _is_product(base, base.__dict__.get("forward"))
    if weight is None or plain or type(weight) not in (nn.Parameter, Tensor):
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(1, 2, weight.shape[1], generator=generator, device="cpu").to(weight)
    made, product = _tried(base, x), F.linear(x, weight, bases.bias(base))
    if not isinstance(made, Tensor) or made.shape != product.shape:
        return False
    return bool((made - product).norm() > 0.1 * product.norm())


@torch.no_grad()
def _tried(base: Any, x: Tensor) -> Any:
    """What the forward of ``base`` makes of ``x`` in evaluation, or None where it takes no such."""
    training = base.training
    base.training = False
    try:
        with without_autocast(x.device.type):
            return base.forward(x)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None
    finally:
        base.training = training


def check_forward(base: nn.Module) -> None:
    """Raise ``TypeError`` where an architecture's own linear layer is no function of one input.

    A class of transformers' models that is an ``nn.Linear`` and has a forward of its own is tried
    on two tokens: a router gives several tensors, a grouped one takes inputs of another shape.
    """
    kind, weight = type(base), bases.dense_weight(base)
    if not kind.__module__.startswith(_MODELS) or kind.forward is nn.Linear.forward:
        return
    if weight is None or type(weight) not in (nn.Parameter, Tensor):
        return
    made = _tried(base, weight.new_ones(1, 2, weight.shape[1]))
    if not isinstance(made, Tensor) or made.shape != (1, 2, weight.shape[0]):
        raise TypeError(
            f"the forward of {kind.__name__} takes or gives something else than a linear layer's "
            "[..., K] and [..., N], to which a change could be added: leave it out with "
            "exclude_modules"
        )


def only_places(base: nn.Module) -> bool:
    """Whether what ``base`` adds to its product only says where its input and weight have to be.

    Such are accelerate's hook that moves x, and those with which FSDP2 or ZeRO-3 gather a weight.
    """
    hook: Any = base.__dict__.get("_hf_hook")
    if hook is None:
        plain = _is_product(base, base.__dict__.get("forward")) and not base._modules
        frozen = not any(value.requires_grad for value in base.parameters(recurse=False))
        return plain and frozen and _hooks_gather(base)
    if not _moves(hook) or hook.offload:
        return False
    return _is_product(base, base.__dict__["_old_forward"]) and _why_not_frozen(base) is None


def multiplies_input(base: nn.Module) -> bool:
    """Whether ``base`` multiplies the very x it is called with: nothing was put over it."""
    hook = base.__dict__.get("_hf_hook")
    own = base.__dict__.get("forward" if hook is None else "_old_forward")
    if (hook is not None and not _moves(hook)) or not _hooks_gather(base) or base._modules:
        return False
    quantised_here = bases.dense_weight(base) is None
    return _is_of_class(base, own) if quantised_here else _is_product(base, own)


def may_cast(base: nn.Module) -> bool:
    """Whether a forward of its own, or a hook before it, may cast what ``base`` is called with."""
    own = base.__dict__.get("forward")
    return bool(base._forward_pre_hooks) or not _is_product(base, own)


def _moves(hook: Any) -> bool:
    """Whether a hook of accelerate's brings x and weight to a device, and does no more."""
    return type(hook).__name__ == "AlignDevicesHook"


def _hooks_gather(base: nn.Module) -> bool:
    own = (getattr(one, "__module__", "") for hooks in _hooks(base) for one in hooks.values())
    return all(name.startswith(_GATHERS) for name in own)


def _is_product(base: nn.Module, own_forward: Any) -> bool:
    plain: Any = nn.Linear if isinstance(base, nn.Linear) else bases.conv1d_class()
    kind: Any = type(base)
    forward, theirs = kind.forward, kind.__module__.startswith(_MODELS)
    written_out = theirs and kind.__name__ in _WRITTEN_OUT
    if plain is None or (forward is not plain.forward and not written_out):
        return False
    return _is_of_class(base, own_forward)


def _is_of_class(base: nn.Module, own_forward: Any) -> bool:
    """Whether a forward among the attributes of ``base``, if there is one, is its class's."""
    if own_forward is None:
        return True
    same = getattr(own_forward, "__func__", None) is type(base).forward
    return same and own_forward.__self__ is base


def _why_not_frozen(base: nn.Module) -> str | None:
    if added := _adds(base):
        return added
    return "the training of its weight" if is_trained(base) else None


def _adds(base: nn.Module) -> str | None:
    """Name the hooks or the modules in ``base``, which its weight does not show, or None."""
    if any(_hooks(base)):
        return "its hooks"
    return "the modules in it" if base._modules else None


def _hooks(base: nn.Module) -> tuple[Any, ...]:
    return (
        base._forward_hooks,
        base._forward_pre_hooks,
        base._backward_hooks,
        base._backward_pre_hooks,
    )


def base_output(base: nn.Module, x: Tensor, name: str, *args: Any, **kwargs: Any) -> Tensor:
    """The output ``[..., N]`` that ``base``, the layer ``name``, itself makes of ``x [..., K]``.

    ``args`` and ``kwargs`` are what else the layer is called with.

    Raises:
        ValueError: where the gradient of ``x`` would be lost in it.
    """
    if torch.is_grad_enabled():
        quantised.unpack(base)
    y0 = base(x, *args, **kwargs)
    if x.requires_grad and torch.is_grad_enabled() and not _is_derived(base, y0, x):
        kind = type(getattr(base, "weight", base)).__name__
        raise ValueError(
            f"{name}: the base layer ({kind}, which rounds its inputs) passes no gradient on to "
            "its input, so the layers below it would not be trained: use norm='weight', which "
            "multiplies by the dequantised weight, or quantise the weights alone"
        )
    return y0


def _is_derived(base: Any, y0: Tensor, x: Tensor) -> bool:
    """Whether a gradient of ``y0`` reaches ``x``: not past an op that has no derivative."""
    if not y0.requires_grad or torch.compiler.is_compiling():
        return y0.requires_grad
    if not quantised.is_torchao(getattr(base, "weight", None)):
        return True
    nodes, seen = [y0.grad_fn], {x.grad_fn, None}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if "NotImplemented" in node.name():
            return False
        seen.add(node)
        nodes.extend(before for before, _ in node.next_functions)
    return True


__all__ = [
    "base_output",
    "check_forward",
    "is_another_function",
    "is_trained",
    "may_cast",
    "multiplies_input",
    "only_places",
    "product_weight",
    "trained_tensors",
    "why_not_product",
]
