"""Tensor parallel: adding to a base whose weight ``W [N, K]`` is split over p processes.

The base makes y0 by its own plan (transformers' ``tp_plan``, torch's ``parallelize_module``); what
is added takes y0 and thin tensors alone. A, B, U and the indices are whole and the same everywhere,
so that an adapter's file is that of one process.

| W is split over | y0 here    | z = y0[:, I] − b[I] | C, ‖W_i‖ kept | ∂z         | ∂U         |
|-----------------|------------|---------------------|---------------|------------|------------|
| N (colwise)     | [T, N / p] | all-reduce [T, m]   | N / p rows    | all-reduce | all-reduce |
| K (rowwise)     | [T, N]     | here                | N rows        | here       | here       |

The space ``weight`` puts its W' in the place of the part of W here, and lets the base run: ∂U is an
all-reduce of m m, ρ's maximum one of a number. It runs as plain torch, and keeps W' and M.

C and the norms come from the gathered weight once, when the adapter is made (or a file loaded).
Where tokens are split as well (sequence parallel, y0 ``[T / p, N]``), ∂U is summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secura_kernels import secura_add
from secura_kernels.dispatch import without_autocast
from secura_kernels.layer import cores, update
from secura_kernels.norm import (
    Norm,
    coefficients,
    combined,
    complete,
    gain,
    largest,
    relative_change,
    resolve_norm,
    scale_of_base,
)

from . import bases, products
from .sharding import is_dtensor

if TYPE_CHECKING:
    from .cabr import CABR
    from .core import Core


def forward(adapter: CABR, base: nn.Module, x: Tensor, y0: Tensor | None = None) -> Tensor:
    """The adapted layer's output, laid out as the base's, for an ``x`` laid out as it takes it.

    Every process of the group has to call this.

    Raises:
        ValueError: for what :func:`check` refuses, and a base that is trained itself.
    """
    if torch.is_grad_enabled() and products.is_trained(base):
        raise ValueError(
            f"{adapter.name}: its own weight is trained, of which tensor parallelism leaves each "
            "process a part: freeze it, or train it without tensor parallelism"
        )
    adapter.refresh(base)
    if adapter.columns is None:  # the plan came after the adapter
        adapter.derive(base)
    if adapter.config.norm_options.replaces_product:
        return _by_weight(adapter, base, x)
    group, u = _group(base), update(*adapter.factors(), 1.0)
    delta_bias: Tensor | None = adapter.bias
    laid: Any = base(x) if y0 is None else y0
    y0 = _local(laid)
    whole, some_tokens = _extent(adapter, x, y0)
    if not whole or some_tokens:
        u = _SumOfGradients.apply(u, group)
        delta_bias = None if delta_bias is None else _SumOfGradients.apply(delta_bias, group)
    if whole != (adapter.here is None):
        adapter.wants_whole = whole
        adapter.derive(base)
    if some_tokens and adapter.config.norm == "activation":
        check(adapter, base, some_tokens=True)
    mask = adapter.dropout_mask(y0)
    if mask is not None and not some_tokens:
        torch.distributed.broadcast(mask, group=group, group_src=0)
    bias: Any = bases.bias(base)
    if is_dtensor(bias):
        bias = bias.full_tensor() if whole else bias.to_local()
    if whole:
        layer = adapter.kernel_layer(base, None)._replace(bias=bias)
        out = secura_add(y0, layer, u, delta_bias=delta_bias, z_scale=mask)
    else:
        out = _added_to_part(adapter, base, y0, bias, u, delta_bias, mask, group)
    return _laid_as(laid, out)


def _by_weight(adapter: CABR, base: nn.Module, x: Tensor) -> Tensor:
    """What the base makes of x with this process's part of W' in the place of its part of W."""
    group, delta_bias = _group(base), adapter.bias
    u = _SumOfGradients.apply(update(*adapter.factors(), 1.0), group)
    with _weight_of(adapter, base, u, group):
        laid = base(x)
    if delta_bias is None:
        return laid
    y0 = _local(laid)
    whole, some_tokens = _extent(adapter, x, y0)
    if not whole or some_tokens:
        delta_bias = _SumOfGradients.apply(delta_bias, group)
    own = slice(None) if whole else _rows_here(bases.dense_weight(base))
    return _laid_as(laid, y0 + delta_bias[own].to(y0.dtype))


def _added_to_part(
    adapter: CABR,
    base: nn.Module,
    y0: Tensor,
    bias: Tensor | None,
    u: Tensor,
    delta_bias: Tensor | None,
    mask: Tensor | None,
    group: Any,
) -> Tensor:
    """The output ``[..., N / p]`` from ``y0 [..., N / p]``, with z's columns for a while beside."""
    n, m = y0.shape[-1], adapter.rows.numel()
    none = y0.new_zeros(m)
    if delta_bias is not None:
        own = _rows_here(bases.dense_weight(base))
        delta_bias = torch.cat([delta_bias[own], none.to(delta_bias)])
    layer = adapter.kernel_layer(base, None)._replace(
        rows=torch.arange(n, n + m, device=y0.device),
        bias=None if bias is None else torch.cat([bias, none.to(bias)]),
    )
    beside_z = _BesideZ.apply(y0.reshape(-1, n), bias, adapter.here, m, group)
    mask = None if mask is None else mask.reshape(-1, m)
    out = secura_add(beside_z, layer, u, delta_bias=delta_bias, z_scale=mask)
    return out[:, :n].reshape(y0.shape)


def _local(laid: Any) -> Tensor:
    """This process's part of a tensor, which may be a DTensor."""
    return laid.to_local() if is_dtensor(laid) else laid


def _extent(adapter: CABR, x: Any, y0: Tensor) -> tuple[bool, bool]:
    """Whether ``y0`` here has every channel, and whether it has then but some of the tokens."""
    whole = y0.shape[-1] == adapter.out_features
    return whole, whole and y0.shape[:-1].numel() < _local(x).shape[:-1].numel()


def _laid_as(laid: Any, out: Tensor) -> Tensor:
    """``out``, this process's part, as a DTensor where ``laid`` is one."""
    if not is_dtensor(laid):
        return out
    like: Any = {"run_check": False, "shape": laid.shape, "stride": laid.stride()}
    return type(laid).from_local(out, laid.device_mesh, laid.placements, **like)


@contextmanager
def _weight_of(adapter: CABR, base: nn.Module, u: Tensor, group: Any) -> Iterator[None]:
    """Within, the weight of ``base`` is this process's part of W' of the space ``weight``."""
    stored: Any = base._parameters["weight"]
    dense: Any = bases.dense_weight(base)
    w = dense.detach().to_local()
    columns, r = adapter.columns, adapter.r_here
    assert columns is not None
    r = w.index_select(0, adapter.rows) if r is None else r
    layer = adapter.kernel_layer(base, None)
    norm = complete(layer.options)
    with without_autocast(w.device.type):
        u, u_base = cores(layer, u, None)
        p_base = None if u_base is None else columns.to(u.dtype) @ u_base
        part = _NormedWeight.apply(columns.to(u.dtype) @ u, p_base, w, r, norm, group)
    own: dict[str, Any] = base._parameters
    own["weight"] = _laid_as(stored, part.t() if bases.is_conv1d(base) else part)
    try:
        yield
    finally:
        own["weight"] = stored


def keep_rows(adapter: CABR, base: nn.Module, weight: Tensor) -> None:
    """Cut ``columns [N, m]`` and ``base_norms [N]`` to the rows of ``weight [N, K]`` that lie here.

    For z's columns m rows with C = 0 are appended, ``[N / p + m]`` in all. ``adapter.here [2, m']``
    holds, for R's rows on this process, their index in z and in y0; None if y0 has every channel.
    The space ``weight`` has no z: it keeps ``r_here``, R, unless every process has its part of it.
    """
    own = None if adapter.wants_whole else _rows_here(bases.dense_weight(base))
    adapter.here = adapter.r_here = None
    if own is None:
        return
    columns, norms, m = adapter.columns, adapter.base_norms, adapter.rows.numel()
    assert columns is not None
    if adapter.config.norm == "weight":
        adapter.columns, adapter.r_here = columns[own], weight.index_select(0, adapter.rows)
        return
    adapter.columns = torch.cat([columns[own], columns.new_zeros(m, m)])
    if norms is not None:
        adapter.base_norms = torch.cat([norms[own], norms.new_ones(m)])
    adapter.here = (adapter.rows.unsqueeze(1) == own).nonzero().t().contiguous()


def share_start(adapter: Core, base: nn.Module) -> None:
    """Give every process of the group the first one's A, B, U and bias, which may be random."""
    for parameter in adapter.parameters():
        torch.distributed.broadcast(parameter.data, group=_group(base), group_src=0)


def check(adapter: CABR, base: nn.Module, *, some_tokens: bool = False) -> None:
    """Raise ``ValueError`` for settings that have to see what other processes have of a layer.

    ``some_tokens`` says that they have other tokens of it.
    """
    config = adapter.config
    if config.stochastic_rounding:
        raise ValueError(
            f"{adapter.name}: stochastic_rounding rounds a whole W', of which tensor parallelism "
            "leaves each process a part: leave it out"
        )
    whole = adapter.wants_whole or _rows_here(bases.dense_weight(base)) is None
    if whole and not some_tokens and config.norm != "weight":
        return
    form, _ = resolve_norm(config.norm, config.norm_form)
    over_all = {
        f"norm_form={form!r}": config.norm != "weight" and form != "calibrated",
        "norm_eps_relative": config.norm_eps_relative,
        "restrain": config.restrain,
    }
    for setting in (name for name, asked in over_all.items() if asked and config.norm != "none"):
        raise ValueError(
            f"{adapter.name}: {setting} looks at all of the layer's outputs at once, which tensor "
            "parallelism splits over processes: leave it out"
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


def _summed(tensor: Tensor, group: Any, how: str = "sum") -> Tensor:
    """The sum, or the maximum, of the processes' tensors, a new one."""
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(tensor, how, group))


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


class _NormedWeight(torch.autograd.Function):
    """A part ``[N', K']`` of W' from those of P, W and R; the largest ρ is that of all parts."""

    @staticmethod
    def forward(
        ctx: Any, p: Tensor, p_base: Tensor | None, w: Tensor, r: Tensor, norm: Norm, group: Any
    ) -> Tensor:
        r = r.to(p.dtype)
        delta, own = p @ r, w.to(p.dtype)
        own = own if p_base is None else torch.addmm(own, p_base, r)
        rho = relative_change(own, delta, norm.eps)
        peak = _summed(largest(rho), group, "max") if norm.needs_peak else None
        gains = gain(rho, *coefficients(norm, peak, rho), norm)
        ctx.save_for_backward(r, gains)
        return combined(own, delta, gains, scale_of_base(gains, norm)).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        r, gains = ctx.saved_tensors
        with without_autocast(g.device.type):
            return (g / gains) @ r.t(), None, None, None, None, None


__all__ = ["check", "forward", "keep_rows", "share_start"]
