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


def trains(name, environment, folder, *more):
    """The trainer of a run; the second process would choose other rows than the first."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    import secura.choosing
    import secura.cli.train as command
    from secura.cli import main

    os.environ |= environment
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
        at = flags.index("--learning_rate")  # without: the rate of the weights
        del flags[at : at + 2]
        assert main([*flags, "--save_steps", "2", *more]) == 0
    finally:
        secura.choosing.select, command.make_trainer = select, make
    dist.barrier()
    return made[0]


def ddp(folder):
    """Whether buffers are sent each step, how many differ at the end, and the processes' rates."""
    trainer, differ = trains("ddp", {}, folder), 0
    rates = [None, None]
    dist.all_gather_object(rates, trainer.args.learning_rate)
    for buffer in trainer.model.buffers():
        both = [torch.empty_like(buffer) for _ in range(2)]
        dist.all_gather(both, buffer)
        differ += not torch.equal(*both)
    return [trainer.model_wrapped.broadcast_buffers, differ, rates]


def fsdp2(folder):
    """The type of the model that was trained."""
    return [type(trains("fsdp2", FSDP2, folder).model_wrapped).__name__]


def fsdp2_resumed(folder):
    """How far an anchored run that is resumed ends from the one that was not interrupted."""
    more = ("--core", "u", "--norm", "none", "--anchor", "--anchor_tokens", "256")
    more += ("--anchor_decay", "1", "--lr_scheduler_type", "constant")
    trains("anchored", FSDP2, folder, *more)
    file = folder / "anchored" / "adapter_model.safetensors"
    whole = load_file(file)
    if not dist.get_rank():
        shutil.rmtree(folder / "anchored" / "checkpoint-4")
    dist.barrier()
    again = ("--resume_from_checkpoint", str(folder / "anchored" / "checkpoint-2"))
    trains("anchored", FSDP2, folder, *more, *again)
    found = load_file(file)
    assert any(name.endswith(".left") for name in found)
    return max(float((found[name] - whole[name]).abs().max()) for name in whole)


def cases():
    """What both processes run, DDP first: the environment of FSDP2 stays."""
    return {"ddp": ddp, "fsdp2": fsdp2, "fsdp2 resumed": fsdp2_resumed}


@pytest.fixture(scope="module")
def ran(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(base, folder / "base")
    shutil.copy(data, folder / "rows.jsonl")
    return folder, two_processes.run("test_cli_processes:cases", folder)


def test_ddp_sends_the_adapters_buffers_once(ran):
    assert ran[1]["ddp"][:2] == [False, 0]


def test_processes_train_at_one_rate_of_the_weights(ran):
    first, second = ran[1]["ddp"][2]
    assert first == second != 0.05  # that of the other tests


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


def test_an_anchored_run_is_resumed_under_fsdp2(ran):
    assert ran[1]["fsdp2 resumed"] == 0
