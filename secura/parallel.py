"""Tensor parallel: adding to a base whose weight ``W [N, K]`` is split over p processes.

The base makes y0 by its own plan (transformers' ``tp_plan``, torch's ``parallelize_module``); what
is added takes y0 and thin tensors alone. A, B, U and the indices are whole and the same everywhere,
so that an adapter's file is that of one process.

| W is split over | y0 here    | z = y0[:, I] − b[I]     | C, ‖W_i‖ kept | ∂z              | ∂U              |
|-----------------|------------|-------------------------|---------------|-----------------|-----------------|
| N (colwise)     | [T, N / p] | all-reduce of T m       | N / p rows    | all-reduce: T m | all-reduce: m m |
| K (rowwise)     | [T, N]     | here                    | N rows        | here            | here            |

C and the norms come from the gathered weight once, when the adapter is made (or a file loaded).
Where tokens are split as well (sequence parallel, y0 ``[T / p, N]``), ∂U is summed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secura_kernels import secura_add
from secura_kernels.layer import update
from secura_kernels.norm import resolve_norm

from . import bases

if TYPE_CHECKING:
    from .adapter import CABR


def forward(adapter: CABR, base: nn.Module, x: Tensor, y0: Tensor | None = None) -> Tensor:
    """The adapted layer's output, laid out as the base's, for an ``x`` laid out as it takes it.

    Every process of the group has to call this.

    Raises:
        ValueError: for what :func:`check` refuses.
    """
    adapter._refresh(base)
    laid: Any = base(x) if y0 is None else y0
    y0 = laid.to_local() if bases.is_dtensor(laid) else laid
    assert y0 is not None
    whole = y0.shape[-1] == adapter.out_features
    if adapter.columns is None or whole != (adapter.here is None):
        adapter.wants_whole = whole
        adapter._derive(base, None)
    group, lead, m = _group(base), y0.shape[:-1], adapter.rows.numel()
    tokens = x.to_local() if bases.is_dtensor(x) else x
    some_tokens = whole and lead.numel() < tokens.shape[:-1].numel()
    if some_tokens:
        check(adapter, adapter.config.norm == "activation")
    core, delta_bias = update(*adapter.factors(), 1.0), adapter.bias
    if not whole or some_tokens:
        core = _SumOfGradients.apply(core, group)
        delta_bias = None if delta_bias is None else _SumOfGradients.apply(delta_bias, group)
    mask = adapter.dropout_mask(y0)
    if mask is not None and not some_tokens:
        torch.distributed.broadcast(mask, group=group, group_src=0)
    layer, bias = adapter._layer(base, None), bases.bias(base)
    if bases.is_dtensor(bias):
        bias = bias.full_tensor() if whole else bias.to_local()
    if whole:
        out = secura_add(y0, layer._replace(bias=bias), core, delta_bias=delta_bias, z_scale=mask)
    else:
        n = y0.shape[-1]
        none = y0.new_zeros(m)
        if delta_bias is not None:
            own = _rows_here(bases.dense_weight(base))
            delta_bias = torch.cat([delta_bias[own], none.to(delta_bias)])
        layer = layer._replace(
            rows=torch.arange(n, n + m, device=y0.device),
            bias=None if bias is None else torch.cat([bias, none.to(bias)]),
        )
        beside_z = _BesideZ.apply(y0.reshape(-1, n), bias, adapter.here, m, group)
        mask = None if mask is None else mask.reshape(-1, m)
        out = secura_add(beside_z, layer, core, delta_bias=delta_bias, z_scale=mask)
        out = out[:, :n].reshape(*lead, n)
    if laid is y0:
        return out
    like: Any = {"run_check": False, "shape": laid.shape, "stride": laid.stride()}
    return type(laid).from_local(out, laid.device_mesh, laid.placements, **like)


def keep_rows(adapter: CABR, base: nn.Module) -> None:
    """Cut ``columns [N, m]`` and ``base_norms [N]`` to the output channels made here.

    m rows are added for z's own columns, ``[N / p + m]`` in all, with C = 0. ``adapter.here [2,
    m']`` then says which of R's rows lie here, and where; it is None where every channel is made.
    """
    own = None if adapter.wants_whole else _rows_here(bases.dense_weight(base))
    adapter.here = None
    if own is None:
        return
    check(adapter, split=True)
    columns, norms, m = adapter.columns, adapter.base_norms, adapter.rows.numel()
    assert columns is not None
    adapter.columns = torch.cat([columns[own], columns.new_zeros(m, m)])
    if norms is not None:
        adapter.base_norms = torch.cat([norms[own], norms.new_ones(m)])
    adapter.here = (adapter.rows.unsqueeze(1) == own).nonzero().t().contiguous()


def share_start(adapter: CABR, base: nn.Module) -> None:
    """Give every process of the group the first one's A, B, U and bias, which may be random."""
    for parameter in adapter.parameters():
        torch.distributed.broadcast(parameter.data, group=_group(base), group_src=0)


def check(adapter: CABR, split: bool) -> None:
    """Raise ``ValueError`` for settings that have to see what lies on other processes.

    ``split`` says that entries of what the norm compares are elsewhere.
    """
    config = adapter.config
    if config.norm == "weight":
        raise ValueError(
            f"{adapter.name}: norm='weight' multiplies by a weight of its own, where a tensor "
            "parallel base makes the product itself: use norm='channel'"
        )
    form, _ = resolve_norm(config.norm, config.norm_form)
    over_all = {
        f"norm_form={form!r}": config.norm != "none" and form != "calibrated",
        "eps_relative": config.norm != "none" and config.norm_options.eps_relative,
        "restrain": config.restrain,
    }
    for setting in (name for name, asked in over_all.items() if split and asked):
        raise ValueError(
            f"{adapter.name}: {setting} looks at every output of the layer at once, which tensor "
            "parallelism splits over processes: use norm_form='calibrated' without it"
        )


def _group(base: nn.Module) -> Any:
    """The process group over which the weight of ``base`` is split.

    Raises:
        ValueError: it is split over several dimensions of its mesh, or over none.
    """
    weight: Any = bases.dense_weight(base)
    split = [i for i, one in enumerate(weight.placements) if getattr(one, "dim", None) is not None]
    if len(split) != 1:
        raise ValueError(
            f"the base weight lies on its mesh as {weight.placements}: tensor parallelism splits "
            "it over one dimension of the mesh"
        )
    return weight.device_mesh.get_group(split[0])


def _rows_here(weight: Any) -> Tensor | None:
    """Which of the N rows of a DTensor ``[N, K]`` lie here, ``[N / p]``; None where all do."""
    from torch.distributed.tensor import distribute_tensor

    if all(getattr(one, "dim", None) not in (0, -2) for one in weight.placements):
        return None
    rows = torch.arange(weight.shape[0], device=weight.device).unsqueeze(1)
    mesh, placements = weight.device_mesh, weight.placements
    return distribute_tensor(rows, mesh, placements, src_data_rank=None).to_local().squeeze(1)


def _summed(tensor: Tensor, group: Any) -> Tensor:
    """The sum of the processes' tensors, a new one."""
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(tensor, "sum", group))


class _SumOfGradients(torch.autograd.Function):
    """What is the same on every process, and used on each for a part of the outputs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _summed(g.contiguous(), ctx.group), None


class _BesideZ(torch.autograd.Function):
    """``[y0, z] [T, N' + m]`` of ``y0 [T, N']``, z summed from the rows of R that lie here.

    ``here [2, m']`` are those rows, as numbers of z's columns and of y0's.
    """

    @staticmethod
    def forward(
        ctx: Any, y0: Tensor, bias: Tensor | None, here: Tensor, m: int, group: Any
    ) -> Tensor:
        ctx.group, ctx.m = group, m
        ctx.save_for_backward(here)
        of_z, of_y0 = here
        part = y0.index_select(1, of_y0)
        if bias is not None:
            part -= bias[of_y0]
        z = y0.new_zeros(len(y0), m).index_copy_(1, of_z, part)
        return torch.cat([y0, _summed(z, group)], dim=1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        (here,) = ctx.saved_tensors
        of_z, of_y0 = here
        n = g.shape[1] - ctx.m
        h = _summed(g[:, n:].contiguous(), ctx.group).index_select(1, of_z)
        dy0 = g[:, :n].clone(memory_format=torch.contiguous_format)
        return dy0.index_add_(1, of_y0, h), None, None, None, None


__all__ = ["check", "forward", "keep_rows", "share_start"]
