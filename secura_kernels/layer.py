"""The frozen part and settings of one adapted layer (:class:`Layer`), and its cores U of A and B.

    U = s · A B      P = C (U + U_acc)   or, with the norm's reference "folded",
                     P = C U, P_base = C U_acc

Without B, A is ``[m, m]`` and U = s · A: a core that is trained itself.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .dispatch import as_dtype, wide, without_autocast
from .held import Held
from .norm import NormOptions, Restrain


class Layer(NamedTuple):
    """Hold what of an adapted layer ``W [N, K]`` is not trained, and how it is adapted.

    Indices are not checked: ``rows`` within [0, N), ``cols`` within [0, K).

    Attributes:
        weight: ``W [N, K]``, frozen, fp16 to fp64, any strides; None where only its output is
            at hand (a quantised base). One that requires a gradient is taken by ``secura_add``
            alone.
        bias: ``b [N]``, frozen, or None.
        rows: ``[m]`` int64, R = W[rows]. A row named twice adds up.
        cols: ``[m]`` int64, C = W[:, cols].
        options: the norm; its space decides the op.
        scaling: s.
        core: ``U_acc [m, m]``, fp32, what was folded, or None.
        core_is_base: whether U_acc belongs to the norm's base, or to its change.
        gram: ``R Rᵀ [m, m]`` of :func:`secura_kernels.with_norms`, fp32 or wider; ``channel``
            alone.
        base_norms: ``‖W_base,i‖ [N]``, from there too; ``channel`` alone.
        restrain: the suppression, or None.
        save: ``activation`` alone: ``"recompute"`` keeps the base's output for the backward pass,
            ``"8bit"`` one byte of 1/M an element.
        columns: ``C [N, m]`` where it is to be read there and not from ``weight``, or None.
        shares_input: whether x's gradient is added up in place with that of other layers that are
            given the same x (:mod:`secura_kernels.shared`); where x is not y0.
        held: what the layer holds over the micro-batches of an optimizer step, or None; for forward
            passes that a backward pass follows.
        rounding_seed: of the stochastic rounding of W' to bf16, in the forward pass and in the
            merge alike; None rounds to nearest. It acts where bf16 is computed in or merged to,
            and needs ``weight``; not in ``activation``, which has no W'.
    """

    weight: Tensor | None
    bias: Tensor | None
    rows: Tensor
    cols: Tensor
    options: NormOptions
    scaling: float = 1.0
    core: Tensor | None = None
    core_is_base: bool = False
    gram: Tensor | None = None
    base_norms: Tensor | None = None
    restrain: Restrain | None = None
    save: str = "recompute"
    columns: Tensor | None = None
    rounding_seed: int | None = None
    shares_input: bool = False
    held: Held | None = None

    @property
    def replaces_product(self) -> bool:
        """Whether the layer multiplies by another weight than W, so that W itself is needed."""
        return self.options.replaces_product or self.rounding_seed is not None


def update(a: Tensor, b: Tensor | None, scaling: float) -> Tensor:
    """``U = s · A B [m, m]``, or ``s · A`` without B, in fp32 or wider, autocast or not."""
    with without_autocast(a.device.type):
        return _update(a, b, scaling)


def _update(a: Tensor, b: Tensor | None, scaling: float) -> Tensor:
    dtype = wide(a.dtype)
    if a.dtype != dtype:
        a = a.to(dtype)
    if b is not None:
        a = a @ (b if b.dtype == dtype else b.to(dtype))
    return a if scaling == 1 else a * scaling


def cores(layer: Layer, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``(U of the change, U of the base or None)``, each ``[m, m]``, fp32 or wider.

    Autocast has to be off. The space ``none`` tells no base from a change.
    """
    u = _update(a, b, layer.scaling)
    if layer.core is None:
        return u, None
    return with_folded(u, as_dtype(layer.core, u.dtype), layer.core_is_base, layer.options.norm)


def with_folded(u: Tensor, core: Tensor, is_base: bool, norm: str) -> tuple[Tensor, Tensor | None]:
    """``(U of the change, U of the base or None)`` of a trained U and what was folded.

    Args:
        u: ``[..., m, m]``.
        core: U_acc, of the same shape and dtype.
        is_base: whether U_acc belongs to the norm's base, or to its change.
        norm: the space.
    """
    return (u, core) if is_base and norm != "none" else (u + core, None)


__all__ = ["Layer", "cores", "update", "with_folded"]
