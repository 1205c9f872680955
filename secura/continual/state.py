"""Tensors kept by the name of a trainable parameter: matched to a model, written and read."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from secura._extras import require
from secura.core import Core
from secura.folders import use_umask
from secura.folding import fold_periods
from secura.integrity import check_file, version
from secura.layers import active_adapters
from secura.sharding import is_distributed


class Unfolded:
    """Refuses folds in a run that watches the parameters which a fold sets to 0.

    Args:
        model: the model being trained.

    Raises:
        ValueError: for an adapter whose config folds while training.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(fold_periods(model)):
            raise ValueError(
                "the adapter's config has fold_every set, and folding while training moves what "
                "was learned out of the parameters this method watches: set fold_every=0, and fold "
                "at the end of the task"
            )
        every = (module for module in model.modules() if isinstance(module, Core))
        self._before = {adapter: version(adapter.core) for adapter in every}

    def check(self, model: nn.Module) -> None:
        """Raise ``ValueError`` where an adapter that acts in ``model`` was folded since."""
        adapters = [adapter for adapter, _ in active_adapters(model).values()]
        here = {one: version(one.core) for one in adapters if one in self._before}
        if any(now != self._before[one] for one, now in here.items()):
            raise ValueError(
                "an adapter was folded while training, which moved what was learned out of the "
                "parameters this method watches: leave out FoldCallback, and fold at the end of "
                "the task"
            )


def check_run(model: nn.Module) -> Unfolded:
    """Refuse a training run in which a callback cannot do its work.

    Args:
        model: the model being trained.

    Returns:
        What refuses a fold, to be asked at every step.

    Raises:
        ValueError: for sharded training, or an adapter whose config folds while training.
    """
    launched_with = require("accelerate.utils", "train").parse_flag_from_env
    for sharding in ("FSDP", "DEEPSPEED"):
        if launched_with(f"ACCELERATE_USE_{sharding}"):
            raise ValueError(
                "the continual-learning callbacks work in one process and under DDP, not with "
                f"{sharding}, which shards what they have to reach: train without it"
            )
    return Unfolded(model)


def coordinates(model: nn.Module) -> str:
    """A digest of the folded cores and anchors of the model's adapters.

    What a trained parameter computes depends on them: its values mean something beside them alone.
    """
    parts = {
        f"{name}.{part}": getattr(adapter, part)
        for name, (adapter, _) in active_adapters(model).items()
        for part in ("core", "left", "right")
    }
    tensors = {name: t.detach().contiguous() for name, t in parts.items() if t is not None}
    return hashlib.sha256(save(tensors)).hexdigest()


def check_alike(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise ``ValueError`` where the processes of a run hold other numbers of ``what``."""
    if not is_distributed():
        return
    distributed = torch.distributed
    here = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, hashlib.sha256(save(here)).hexdigest())
    if len(set(found)) > 1:
        raise ValueError(
            f"the processes hold different numbers of {what}, by which their copies of the model "
            "would drift apart: make it on one, save it, and load that file on every process"
        )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's trainable parameters by name.

    Raises:
        ValueError: there is none.
    """
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not found:
        raise ValueError("the model has no trainable parameter: load it with is_trainable=True")
    return found


def known(tensors: Mapping[str, Tensor], model: nn.Module, what: str) -> dict[str, nn.Parameter]:
    """The model's trainable parameters by name, all of which are among ``tensors``.

    Raises:
        ValueError: others are trained by now.
    """
    parameters = trainable(model)
    if other := sorted(parameters.keys() - tensors.keys()):
        raise ValueError(
            f"{other[0]} is trained by now, and {what} is of the parameters that were trained when "
            "training began: leave set_adapter() alone until train() has ended, and let what is "
            "to be trained later require its gradient from the beginning"
        )
    return parameters


def placed(
    tensors: Mapping[str, Tensor], model: nn.Module, what: str, made_in: str
) -> dict[str, Tensor]:
    """``tensors`` on the devices of the trainable parameters of the same names; no needless copy.

    Args:
        tensors: by parameter name.
        model: the model they belong to.
        what: what they are, for the message.
        made_in: :func:`coordinates` of the model they were taken from; empty if not known.

    Raises:
        ValueError: names or shapes are not those of the model's trainable parameters, or these have
            been folded or anchored anew since.
    """
    parameters = trainable(model)
    for name in sorted(tensors.keys() | parameters.keys()):
        has, takes = (
            list(side[name].shape) if name in side else "nothing" for side in (tensors, parameters)
        )
        if has != takes:
            raise ValueError(
                f"{what} belongs to other parameters than this model trains: for {name} it has "
                f"{has}, the model {takes}. Use the model and the adapter settings it was made with"
            )
    if made_in and made_in != coordinates(model):
        raise ValueError(
            f"{what} was made before the adapter was folded or anchored anew, and its values stand "
            "for something else now: do not fold or anchor between the tasks that it joins"
        )
    return {name: tensors[name].to(value.device) for name, value in parameters.items()}


def write(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], made_in: str) -> None:
    """Write a safetensors file that is whole as soon as it is there, and its coordinates."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        made = Path(scratch) / path.name
        own = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(own, made, metadata={"coordinates": made_in})
        use_umask(Path(scratch))
        os.replace(made, path)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file that :func:`write` wrote, and their coordinates.

    Raises:
        ValueError: the file is missing, cut short, or holds anything but finite fp32 tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not there: save it first, or name another file")
    check_file(path)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{path} is damaged or was written by something else: {name} is no tensor of "
                "finite fp32 numbers. Make it again"
            )
    with safe_open(path, "pt") as file:
        return tensors, (file.metadata() or {}).get("coordinates", "")


__all__ = [
    "Unfolded",
    "check_alike",
    "check_run",
    "coordinates",
    "known",
    "placed",
    "read",
    "trainable",
    "write",
]
