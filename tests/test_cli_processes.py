"""`secura train` in two processes: what DDP sends, and what FSDP2 saves."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
import torch.distributed as dist
import two_processes
from cli_fixtures import train_flags
from safetensors.torch import load_file

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets, and no more."""
TCP = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "LOCAL_WORLD_SIZE": "2"}
"""Asked for by accelerate, which finds the processes connected already."""


def trains(name, environment, folder):
    """The trainer of a run; the second process would choose other rows than the first."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    import secura.choosing
    import secura.cli.train as command
    from secura.cli import main

    os.environ |= environment | TCP
    select, make, made = secura.choosing.select, command.make_trainer, []

    def chosen(*args):
        rows, cols = select(*args)
        return (rows.flip(0) if dist.get_rank() and not environment else rows), cols

    def kept(**kwargs):
        if environment:  # accelerate shards on no CPU
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
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
    trainer, differ = trains("ddp", {}, folder), 0
    for buffer in trainer.model.buffers():
        both = [torch.empty_like(buffer) for _ in range(2)]
        dist.all_gather(both, buffer)
        differ += not torch.equal(*both)
    return [trainer.model_wrapped.broadcast_buffers, differ]


def fsdp2(folder):
    """The type of the model that was trained."""
    return [type(trains("fsdp2", FSDP2, folder).model_wrapped).__name__]


def cases():
    """What both processes run, DDP first: the environment of FSDP2 stays."""
    return {"ddp": ddp, "fsdp2": fsdp2}


@pytest.fixture(scope="module")
def ran(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(base, folder / "base")
    shutil.copy(data, folder / "rows.jsonl")
    return folder, two_processes.run("test_cli_processes:cases", folder)


def test_ddp_sends_the_adapters_buffers_once(ran):
    assert ran[1]["ddp"] == [False, 0]


def test_fsdp2_publishes_what_ddp_does(ran):
    folder, found = ran
    assert found["fsdp2"] == ["FSDPPeftModelForCausalLM"]
    for place in ("", "checkpoint-2"):
        one, other = (
            load_file(folder / run / place / "adapter_model.safetensors")
            for run in ("ddp", "fsdp2")
        )
        assert one.keys() == other.keys()
        trained = [name for name in one if name.endswith((".A", ".B"))]
        assert trained
        for name in trained:
            torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-6)
