"""Tensors kept by the name of a trainable parameter: matched to a model, written and read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secura._extras import require
from secura.folders import use_umask
from secura.folding import fold_periods
from secura.integrity import check_file


def check_run(model: nn.Module) -> None:
    """Refuse a training run in which a callback cannot do its work.

    Args:
        model: the model being trained.

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
    if any(fold_periods(model)):
        raise ValueError(
            "the adapter's config has fold_every set, and folding while training moves what was "
            "learned out of the parameters this method watches: set fold_every=0, and fold at the "
            "end of the task"
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


def placed(tensors: Mapping[str, Tensor], model: nn.Module, what: str) -> dict[str, Tensor]:
    """``tensors`` on the devices of the trainable parameters of the same names; no needless copy.

    Args:
        tensors: by parameter name.
        model: the model they belong to.
        what: what they are, for the message.

    Raises:
        ValueError: names or shapes are not those of the model's trainable parameters.
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
    return {name: tensors[name].to(value.device) for name, value in parameters.items()}


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation, and each back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def write(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a safetensors file that is whole as soon as it is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        made = Path(scratch) / path.name
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, made)
        use_umask(Path(scratch))
        os.replace(made, path)


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file that :func:`write` wrote.

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
    return tensors


__all__ = ["check_run", "placed", "read", "trainable", "without_dropout", "write"]
