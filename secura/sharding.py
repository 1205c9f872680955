"""Tensors that are not whole on this process: sharded, on rank 0 alone, or on the meta device."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_WHOLE = (Tensor, nn.Parameter)


def gathered(tensor: Any) -> Any:
    """``tensor`` whole, of which every process has a part; else as it is.

    A DTensor, or a parameter that ZeRO-3 has partitioned: every process has to call this then.
    """
    if type(tensor) in _WHOLE and tensor.numel():
        return tensor
    if is_dtensor(tensor):
        return tensor.full_tensor()
    if is_partitioned(tensor):
        deepspeed: Any = sys.modules["deepspeed"]
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach()  # which outlives the parameter's own hold on the numbers
    return tensor


def is_dtensor(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor, of which every process has a part."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def is_fsdp_managed(module: Any) -> bool:
    """Whether FSDP gathers the parameters of ``module`` itself."""
    return getattr(module, "_is_fsdp_managed_module", False)


def is_zero3(tensor: Any) -> bool:
    """Whether ``tensor`` is a parameter that ZeRO-3 gathers for its layer's forward."""
    return hasattr(tensor, "ds_numel")


def is_partitioned(tensor: Any) -> bool:
    """Whether ZeRO-3 has left of ``tensor`` a part that is elsewhere."""
    return is_zero3(tensor) and tensor.numel() != tensor.ds_numel


def part_of(value: Tensor, own: Any) -> Tensor:
    """Of ``value``, whole and equal on all processes, what this one has of ``own``."""
    if not is_dtensor(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None).to_local()


@torch.no_grad()
def exchange(parameter: Any, value: Tensor) -> Tensor:
    """Put ``value`` in the place of a parameter's numbers, and return those.

    Of a DTensor both are this process's part, which is written in place: FSDP2 gathers from there.
    """
    if is_dtensor(parameter):
        held = parameter._local_tensor.clone()
        parameter._local_tensor.copy_(value)
        return held
    held = parameter.data
    with torch.inference_mode(held.is_inference()):  # a tensor of the kind that it replaces
        parameter.data = value.to(held, copy=held.is_inference())
    return held


@torch.no_grad()
def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer of ``module`` the numbers of ``value``, equal on all processes.

    A sharded one takes its part. One on the meta device becomes real, and stays the same object.
    """
    own: Any = getattr(module, name)
    value = value.to(own.dtype)
    if name in module._buffers:
        module._buffers[name] = value
        return
    if is_dtensor(own):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, own.device_mesh, own.placements)
    if own.is_meta:
        torch.utils.swap_tensors(own, nn.Parameter(value, requires_grad=own.requires_grad))
    else:
        own.copy_(value)


def unit_by_unit(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[list[Any]]:
    """Yield modules of a model in groups whose parameters are whole meanwhile, and may be written.

    Where FSDP1 holds parts of them: a group is what lies in one of its units. Else all in one.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    wrapper = getattr(fsdp, "FullyShardedDataParallel", ())
    units: dict[nn.Module, Any] = {}
    for unit in model.modules():
        if isinstance(unit, wrapper):
            units |= dict.fromkeys(unit.modules(), unit)  # those within come later
    groups: dict[Any, list[Any]] = {}
    for module in modules:
        groups.setdefault(units.get(module), []).append(module)
    for unit, group in groups.items():
        if unit is None or unit.training_state.name == "SUMMON_FULL_PARAMS":
            yield group
            continue
        with fsdp.FullyShardedDataParallel.summon_full_params(unit, recurse=False):
            yield group


def is_distributed() -> bool:
    """Whether processes of ``torch.distributed`` work together."""
    return dist.is_available() and dist.is_initialized()


def on_rank_0_alone() -> bool:
    """Whether accelerate has the first process load the weights, and the others wait for them."""
    asked = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    yes = all(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in asked)
    return yes and is_distributed()


@torch.no_grad()
def from_rank_0(make: Callable[[], dict[str, Tensor]], like: Mapping[str, Tensor]) -> dict:
    """What ``make()`` gives; on every process what it gives on rank 0, where that is alone.

    Shapes and dtypes are then those of ``like``.

    Raises:
        ValueError: on every process, where rank 0 could not make it.
    """
    if not on_rank_0_alone():
        return make()
    made, error, device = {}, None, _device_of_messages()
    if dist.get_rank() == 0:
        try:
            made = make()
        except ValueError as problem:
            error = problem
    failed = torch.tensor(int(error is not None), device=device)
    dist.broadcast(failed, 0)
    if failed:
        raise error or ValueError("the first process met an error: see there")
    sent = {}
    for name, own in sorted(like.items()):
        value = made.get(name, own).to(device, own.dtype, copy=True)
        dist.broadcast(value, 0)
        sent[name] = value.to(own.device)
    return sent


def number_of_rank_0(number: float) -> float:
    """``number`` as the first process has it, on every process, each of which calls this."""
    if not is_distributed():
        return number
    sent = torch.tensor(number, dtype=torch.float64, device=_device_of_messages())
    dist.broadcast(sent, 0)
    return float(sent)


def _device_of_messages() -> Any:
    """The device whose tensors processes send each other."""
    return "cpu" if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 gathered for the last forward: writes to them would be lost.

    Those of the units that ``model`` is a part of too.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    from torch.distributed import _composable_state

    known: Any = getattr(_composable_state, "_module_state_mapping", ())
    around = (unit for unit in list(known) if any(part is model for part in unit.modules()))
    for unit in {*around, *model.modules()}:
        if isinstance(unit, fsdp.FSDPModule):
            unit.reshard()


def largest(count: int, device: torch.device) -> int:
    """The largest ``count`` of all processes."""
    most = torch.tensor(count, device=device)
    if processes()[1] > 1:
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def processes() -> tuple[int, int]:
    """``(rank, processes)``."""
    if not is_distributed():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


__all__ = [
    "exchange",
    "from_rank_0",
    "gathered",
    "is_distributed",
    "is_dtensor",
    "is_fsdp_managed",
    "is_partitioned",
    "is_zero3",
    "largest",
    "number_of_rank_0",
    "on_rank_0_alone",
    "part_of",
    "processes",
    "put",
    "reshard",
    "unit_by_unit",
]
