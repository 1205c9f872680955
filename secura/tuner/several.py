"""Several adapters of one layer at work: an adapter for each row of a batch, or a sum of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from secura import bases, products, sharding
from secura.cabr import CABR
from secura_kernels import Layer, NormOptions, secura_add

if TYPE_CHECKING:
    from .layer import SecuraLayer

BASE = "__base__"
"""PEFT's name, among ``adapter_names``, for rows that no adapter changes."""

REFERENCE = "ref"
"""TRL's name for a copy of an adapter, which it adds with that one's very config."""


def by_row(layer: SecuraLayer, x: Tensor, names: Sequence[str]) -> Tensor:
    """The output ``[B, ..., N]`` where row i of ``x [B, ..., K]`` has the adapter names[i].

    The base's product is formed once for all rows; adapters that replace it form their own.

    Raises:
        ValueError: for another number of names than of rows.
    """
    if len(names) != len(x):
        raise ValueError(
            f"adapter_names has {len(names)} names for a batch of {len(x)} rows: give one name "
            f"a row, {BASE!r} for none"
        )
    out = layer.base_layer(x)
    for name in dict.fromkeys(names):
        for adapter in layer.adapters_named([name]):
            own = [row for row, other in enumerate(names) if other == name]
            rows = torch.tensor(own, device=x.device)
            part = adapter.beside(layer.base_layer, x[rows], out[rows])
            out.index_copy_(0, rows, part)
    return out


def forward_sum(base: Any, adapters: list[CABR], x: Tensor) -> Tensor:
    """The output ``[..., N]`` of a layer for ``x [..., K]`` with the sum of what adapters add.

    Raises:
        ValueError: for a tensor parallel base.
    """
    if bases.is_split(base):
        raise ValueError(
            f"{adapters[0].name}: several adapters are active together, which a tensor parallel "
            "base does not take: activate one with set_adapter()"
        )
    u = torch.block_diag(*(adapter.core_and_update(base) for adapter in adapters))
    masks = [adapter.dropout_mask(x) for adapter in adapters]
    if any(mask is not None for mask in masks):
        shapes = [(*x.shape[:-1], adapter.rows.numel()) for adapter in adapters]
        pairs = zip(masks, shapes, strict=True)
        masks = [x.new_ones(shape) if mask is None else mask for mask, shape in pairs]
    parts: Any = [adapter.columns for adapter in adapters]
    kept = all(part is not None for part in parts)
    layer = Layer(
        None if kept else bases.weight(base, values=False),
        bases.bias(base),
        rows=torch.cat([adapter.rows for adapter in adapters]),
        cols=torch.cat([adapter.cols for adapter in adapters]),
        options=NormOptions("none"),
        columns=torch.cat(parts, dim=1) if kept else None,
    )
    if adapters[0]._base_trained and torch.is_grad_enabled():
        layer = layer._replace(**products.trained_tensors(base, adapters[0].name))
    y0 = products.base_output(base, x, adapters[0].name)
    of_each = [adapter.own_z(base, x, y0) for adapter in adapters]
    own_z = None if of_each[0] is None else torch.cat(cast(list[Tensor], of_each), dim=-1)
    return secura_add(
        y0,
        layer,
        u,
        delta_bias=sum_biases(adapters),
        z_scale=None if masks[0] is None else torch.cat(cast(list[Tensor], masks), dim=-1),
        z=own_z,
    )


def is_additive(adapter: CABR) -> bool:
    """Whether the adapter can act on a layer together with others."""
    return adapter.config.norm == "none" and not adapter.config.stochastic_rounding


def sum_biases(adapters: list[CABR]) -> Tensor | None:
    """The sum ``[N]`` of the adapters' trained biases, or None where none has one."""
    biases = [sharding.gathered(adapter.bias) for adapter in adapters if adapter.bias is not None]
    if not biases:
        return None
    # a new tensor; not of a stack, whose backward gives all of them one tensor for a gradient
    return functools.reduce(torch.add, biases, torch.zeros_like(biases[0]))


__all__ = ["BASE", "REFERENCE", "by_row", "forward_sum", "is_additive", "sum_biases"]
