"""Layers whose ``forward`` can take the place of another's, for ``kernels.kernelize``."""

from __future__ import annotations

from torch import Tensor, nn

from .api import secura_linear
from .layer import Layer
from .norm import NormOptions


class SecuraLinear(nn.Module):
    """Compute an adapted linear layer's output ``[..., N]`` from ``x [..., K]``.

    It has no state: the layer that adopts its ``forward`` has the attributes below, of which
    ``A``, ``B`` and x get gradients. Shapes are those of :class:`secura_kernels.Layer`.

    Attributes:
        weight: ``W [N, K]``, frozen.
        bias: ``b [N]`` or None.
        rows: ``[m]`` int64.
        cols: ``[m]`` int64.
        A: ``[m, r]``, or ``[m, m]`` where B is None.
        B: ``[r, m]`` or None.
        core: ``[m, m]``, what was folded, counted to the change; or None.
        gram: ``[m, m]`` of :func:`secura_kernels.with_norms` for ``channel``, else None.
        base_norms: ``[N]``, from there too.
        scaling: s.
        options: the fields of :class:`secura_kernels.NormOptions`, in their order.
    """

    can_torch_compile: bool = True

    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    cols: Tensor
    A: Tensor
    B: Tensor | None
    core: Tensor | None
    gram: Tensor | None
    base_norms: Tensor | None
    scaling: float
    options: tuple

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output ``[..., N]``, as of :func:`secura_kernels.secura_linear`."""
        layer = Layer(self.weight, self.bias, self.rows, self.cols, NormOptions(*self.options))
        layer = layer._replace(scaling=self.scaling, core=self.core)
        layer = layer._replace(gram=self.gram, base_norms=self.base_norms)
        return secura_linear(x, layer, self.A, self.B)


__all__ = ["SecuraLinear"]
