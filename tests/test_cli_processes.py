"""`secura train` in two processes: what DDP sends."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
import torch.distributed as dist
import two_processes
from cli_fixtures import train_flags

TCP = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "LOCAL_WORLD_SIZE": "2"}
"""Asked for by accelerate, which finds the processes connected already."""


def trains(name, folder):
    """The trainer of a run; the second process would choose other rows than the first."""
    import secura.choosing
    import secura.cli.train as command
    from secura.cli import main

    os.environ |= TCP
    select, make, made = secura.choosing.select, command.make_trainer, []

    def chosen(*args):
        rows, cols = select(*args)
        return (rows.flip(0) if dist.get_rank() else rows), cols

    def kept(**kwargs):
        made.append(make(**kwargs))
        return made[-1]

    secura.choosing.select, command.make_trainer = chosen, kept
    try:
        flags = train_flags(folder / "base", folder / "rows.jsonl", folder / name, "--use_cpu")
        assert main([*flags, "--save_steps", "2"]) == 0
    finally:
        secura.choosing.select, command.make_trainer = select, make
    dist.barrier()
    return made[0]


def ddp(folder):
    """Whether buffers are sent each step, and how many differ at the end."""
    trainer, differ = trains("ddp", folder), 0
    for buffer in trainer.model.buffers():
        both = [torch.empty_like(buffer) for _ in range(2)]
        dist.all_gather(both, buffer)
        differ += not torch.equal(*both)
    return [trainer.model_wrapped.broadcast_buffers, differ]


def cases():
    """What both processes run."""
    return {"ddp": ddp}


@pytest.fixture(scope="module")
def ran(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(base, folder / "base")
    shutil.copy(data, folder / "rows.jsonl")
    return folder, two_processes.run("test_cli_processes:cases", folder)


def test_ddp_sends_the_adapters_buffers_once(ran):
    assert ran[1]["ddp"] == [False, 0]
