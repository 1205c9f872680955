"""Two gloo processes that run named cases, and a count of what such processes send."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

TCP = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "LOCAL_WORLD_SIZE": "2"}
"""Asked for by accelerate, which finds the processes connected already."""

Cases = dict[str, Callable[[Path], Any]]


def run(cases: str, folder: Path) -> dict[str, Any]:
    """What the first process found of every case that ``module:function`` makes, by name.

    A case that raises is found as ``"Kind: message"``. Both processes have to find the same.
    """
    context = torch.multiprocessing.get_context("spawn")
    both = [context.Process(target=_process, args=(cases, str(folder), rank)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(240)
        process.kill()
    found = [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(2)]
    for name, value in found[0].items():
        if isinstance(value, str):
            assert found[1][name] == value, name
    return found[0]


def _process(cases: str, folder: str, rank: int) -> None:
    import importlib

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} | TCP
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    module, function = cases.split(":")
    found = {}
    for name, case in getattr(importlib.import_module(module), function)().items():
        try:
            found[name] = case(Path(folder))
        except Exception as error:  # the test that reads it says what was expected
            found[name] = f"{type(error).__name__}: {error}"
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found), "utf-8")
    dist.destroy_process_group()


KINDS = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


class Sent(TorchDispatchMode):
    """Counts collectives, and the bytes of the whole tensors they reduce, gather or scatter."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # until what it does with its parts comes by
        space, name = func._schema.name.split("::")
        if "c10d" in space and name in KINDS:
            tensors = [one for one in args if isinstance(one, torch.Tensor)]
            tensors += [one for many in args if isinstance(many, list) for one in many]
            nbytes = max(one.nbytes for one in tensors)
            self.found[f"{KINDS[name]} calls"] += 1
            self.found[f"{KINDS[name]} bytes"] += nbytes
        return func(*args, **kwargs or {})
