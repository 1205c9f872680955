"""What two processes do for test_tensor_parallel.py, all of it in one group."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import tiny
import torch
import torch.distributed as dist
import two_processes
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from benchmarks import scale
from secura import AdapterConfig, SECURALinear, anchor, export_lora, fold

PLANS = ("transformers", "torch")
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
COLUMNS = ["q_proj", "v_proj", "gate_proj"]
COLWISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def split_model(plan, folder):
    """The tiny Llama, its linear layers split over the two processes."""
    if plan == "transformers":
        if dist.get_rank() == 0 and not (folder / "base").exists():
            tiny.llama().save_pretrained(folder / "base")
        dist.barrier()
        config = DistributedConfig(tp_plan="auto", tp_size=2)
        return LlamaForCausalLM.from_pretrained(folder / "base", distributed_config=config).eval()
    model = tiny.llama()
    styles = {
        name: ColwiseParallel() if name.endswith(COLWISE) else RowwiseParallel()
        for name, module in model.model.named_modules()
        if isinstance(module, nn.Linear)
    }
    parallelize_module(model.model, init_device_mesh("cpu", (2,)), styles)
    return model


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def error(got, expected):
    """The largest relative distance of tensors from those of the same names."""
    assert got.keys() == expected.keys() != set()
    gaps = [(whole(got[name]) - value).norm() / value.norm() for name, value in expected.items()]
    return max(float(gap.detach()) for gap in gaps)


def outputs(model, one):
    return error({"": tiny.logits(model)}, {"": tiny.logits(one)})


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model):
    return {name: p.grad for name, p in trained(model).items()}


def train(model, folds):
    """Three steps, and a fold after the second."""
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.3, momentum=0.9)
    for step in range(3):
        ids = tiny.tokens(seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if folds and step == 1:
            fold(model)


def compare(model, one, folder, folds):
    """Errors of ``model`` against ``one``, before, while and after both are trained and saved."""
    found = {"outputs": outputs(model, one)}
    found["gradients"] = error(tiny.gradients(model), tiny.gradients(one))
    for each in (model, one):
        each.zero_grad()
        train(each.train(), folds)
        each.eval()
    found["training"] = error(trained(model), trained(one))
    found["trained outputs"] = outputs(model, one)
    return found | ({} if folder is None else files(model, one, folder))


def files(model, one, folder):
    """Errors of the file that ``model`` writes against ``one``'s."""
    model.save_pretrained(folder / "split")
    one.save_pretrained(folder / "one")
    both = [load_file(folder / of / "adapter_model.safetensors") for of in ("split", "one")]
    for file in both:
        for name in [name for name in file if name.endswith("checksum")]:
            del file[name]  # of values that differ in their last bits
    indices = [name for name in both[0] if name.endswith(("rows", "cols"))]
    assert all(torch.equal(both[0].pop(name), both[1].pop(name)) for name in indices)
    empty = [name for name in both[1] if not both[1][name].any()]
    assert not any(both[0].pop(name).any() or both[1].pop(name).any() for name in empty)
    loaded = PeftModel.from_pretrained(tiny.llama(), folder / "split")
    return {"file": error(*both), "loaded by one": outputs(loaded, one)}


def adapter(plan, settings, folder):
    folder = folder / f"{dist.get_rank()}-{plan}-{'-'.join(map(str, settings.values()))}"
    settings = {"target_modules": TARGETS} | settings
    if plan == "transformers":  # whose head hands on the whole of what it splits
        settings["target_modules"] = [*settings["target_modules"], "lm_head"]
    model = tiny.adapted(split_model(plan, folder.parent), **settings)
    one = tiny.adapted(**settings)
    found = compare(model, one, folder if plan == "transformers" else None, folds=True)
    if plan == "transformers":
        loaded = PeftModel.from_pretrained(split_model(plan, folder.parent), folder / "one")
        found["loaded by two"] = outputs(loaded, one)
    mine = torch.cat([value.flatten() for value in trained(model).values()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    found["between the two"] = float((both[0] - both[1]).abs().max())
    return found


def lora(plan, targets, folder):
    models = []
    for base in (split_model(plan, folder), tiny.llama()):
        model = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, value in sorted(trained(model).items()):
                new = torch.randn(value.shape, generator=draw) * 0.3
                if isinstance(value, DTensor):
                    new = distribute_tensor(new, value.device_mesh, value.placements)
                model.get_parameter(name).copy_(new)
        models.append(model)
    return compare(*models, folder / f"lora-{plan}-{dist.get_rank()}", folds=False)


class MLP(nn.Module):
    """Two adapted layers, up and down."""

    def __init__(self, hidden=8, inner=12, up=None, **settings):
        super().__init__()
        torch.manual_seed(0)
        settings = {"r": 3, "norm": "channel", "train_bias": True} | settings
        of_up = AdapterConfig(**(settings | (up or {})))
        self.up = SECURALinear(nn.Linear(hidden, inner), of_up)
        self.down = SECURALinear(nn.Linear(inner, hidden), AdapterConfig(**settings))
        for layer in (self.up, self.down):
            for value in (layer.trained, layer.bias):
                nn.init.normal_(value)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def layers(settings, up, down, folder, tokens_split=False, training=False, casts=False):
    """Errors of an MLP's output and gradients against one process's."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    models = [MLP(**settings).train(training) for _ in range(2)]
    plan = {"up.base": ColwiseParallel(**up), "down.base": RowwiseParallel(**down)}
    parallelize_module(models[0], mesh, plan)
    torch.manual_seed(1)
    x, w = torch.randn(2, 2, 6, 8)
    results = []
    for model, split in zip(models, (tokens_split, False), strict=True):
        torch.manual_seed(7 + (rank if model is models[0] else 0))
        part = slice(3 * rank, 3 * rank + 3) if split else slice(None)
        own = x[:, part].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            out = model(own).float()
            (whole(out) * w[:, part]).sum().backward()
        pieces = {"out": out.detach(), "x": own.grad}
        if split:
            pieces = {
                name: DTensor.from_local(value, mesh, [Shard(1)]).full_tensor()
                for name, value in pieces.items()
            }
        results.append(pieces | gradients(model))
    return {"all": error(*results)}


def uneven(folder):
    """A layer of 7 outputs, whose last process has fewer, gathered as a DTensor."""
    models = [MLP(inner=7).up for _ in range(2)]
    plan = {"base": ColwiseParallel(use_local_output=False)}
    parallelize_module(models[0], init_device_mesh("cpu", (2,)), plan)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    outs = [model(x) for model in models]
    for out in outs:
        whole(out).square().sum().backward()
    assert isinstance(outs[0], DTensor) and outs[0].placements == (Shard(1),)
    return {
        "out": error({"": outs[0]}, {"": outs[1]}),
        "gradients": error(*map(gradients, models)),
    }


def starts(folder):
    """How far apart two adapters are that each process draws for itself."""
    base = split_model("torch", folder)
    torch.manual_seed(dist.get_rank())
    model = get_peft_model(base, tiny.config(norm="none", init_weights=False))
    mine = torch.cat([value.detach().flatten() for value in trained(model).values()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    return [float((both[0] - both[1]).abs().max()), float(mine.abs().max())]


def several(folder):
    model = tiny.adapted(split_model("torch", folder), norm="none")
    model.add_adapter("other", tiny.config(norm="none"))
    model.base_model.set_adapter(["default", "other"])
    tiny.logits(model)


def on_one_process(what, folder):
    what(tiny.adapted(split_model("torch", folder), norm="none", core="u"))


def targets_of(setup, method):
    """Every kind of layer, but for LoRA under tensor parallelism: PEFT's raises on rows."""
    return COLUMNS if (setup, method) == ("TP", "lora") else TARGETS


LAYERS = {
    "q_proj": scale.Linear(24, 24, "N"),
    "v_proj": scale.Linear(12, 24, "N"),
    "o_proj": scale.Linear(24, 24, "K"),
    "gate_proj": scale.Linear(48, 24, "N"),
    "down_proj": scale.Linear(24, 48, "K"),
}


def sent(setup, method, folder):
    """What a step of the adapted model sends, less what one of the frozen model does."""
    counts = []
    targets = targets_of(setup, method)
    for adapts in (True, False):
        if not adapts and setup == "DDP":
            continue  # it has nothing to train
        model = split_model("transformers", folder) if setup == "TP" else tiny.llama()
        model.enable_input_require_grads()
        if not adapts:
            model.requires_grad_(False)
        elif method == "lora":
            model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
        else:
            model = tiny.adapted(model, norm="channel", target_modules=targets)
        count = two_processes.Sent()
        if setup == "FSDP2":
            mesh = init_device_mesh("cpu", (2,))
            blocks = [one for name, one in model.named_modules() if name.endswith(("rs.0", "rs.1"))]
            assert len(blocks) == 2
            for block in blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif setup == "DDP":
            model = DistributedDataParallel(model)
            model.register_comm_hook(None, default_hooks.allreduce_hook)  # Python's, to be seen
        for step in range(2):  # what is formed at the first use is no step's
            ids = tiny.tokens()
            count.found.clear()
            with count if step else nullcontext():
                model(input_ids=ids, labels=ids).loss.backward()
        counts.append(count.found)
    counts[0].subtract(counts[1] if len(counts) > 1 else {})
    return {name: n for name, n in counts[0].items() if n}


SEQUENCE = ({"input_layouts": Shard(1)}, {"output_layouts": Shard(1)})
REFUSED = {
    "channel, form": ("norm_form='paper'", {"norm": "channel", "norm_form": "paper"}),
    "activation, ε": ("norm_eps_relative", {"norm": "activation", "norm_eps_relative": True}),
    "weight, ε": ("norm_eps_relative", {"norm": "weight", "norm_eps_relative": True}),
    "channel, restrain": ("restrain", {"norm": "channel", "restrain": True}),
    "activation, tokens": (  # of a layer whose channels are all here
        "norm_form='paper'",
        {"norm": "activation", "norm_form": "paper", "up": {"norm": "none"}},
    ),
    **{
        f"{norm}, rounded": ("stochastic_rounding", {"norm": norm, "stochastic_rounding": True})
        for norm in ("none", "weight")
    },
}


WHOLE = {
    "merge": lambda model: model.merge_adapter(),
    "export": lambda model: export_lora(model, "never-written"),
    "anchor": lambda model: anchor(model, [torch.arange(3, 9)]),
}


def cases():
    """What both processes run."""
    adapters = {
        f"{plan} {space}": partial(adapter, plan, {"norm": space})
        for plan in PLANS
        for space in tiny.NORMS
    }
    folded = {
        f"folded {space}": partial(
            adapter, "torch", {"norm": space, "norm_reference": "folded", "core": core}
        )
        for space, core in (("channel", "u"), ("weight", "ab"), ("activation", "ab"))
    }
    of_layers = {
        f"layers {norm} {name}": partial(layers, {"norm": norm} | settings, *styles, **how)
        for norm in tiny.NORMS
        for name, settings, styles, how in (
            ("plain", {}, ({}, {}), {}),
            ("tokens split", {}, SEQUENCE, {"tokens_split": True}),
            ("dropout", {"dropout": 0.4}, ({}, {}), {"training": True}),
            ("cast", {}, ({}, {}), {"casts": True}),
            ("averaged", {"norm_combine": "averaged"}, ({}, {}), {}),
        )
        if (norm, name) != ("weight", "dropout")  # which has no z to drop
    }
    refusals = {
        f"refused {name}": partial(layers, settings, *styles, tokens_split=styles is SEQUENCE)
        for name, (_, settings) in REFUSED.items()
        for styles in (SEQUENCE if "tokens" in name else ({}, {}),)
    }
    moved = {
        f"{setup} {method}": partial(sent, setup, method)
        for setup in ("DDP", "FSDP2", "TP")
        for method in scale.METHODS
    }
    return {
        **adapters,
        **moved,
        **folded,
        **of_layers,
        **refusals,
        **{
            f"lora {plan} {split}": partial(lora, plan, targets)
            for plan in PLANS
            for split, targets in (("N", COLUMNS), ("K", ["o_proj"]))
        },
        "uneven": uneven,
        "several": several,
        "starts": starts,
        **{f"whole {name}": partial(on_one_process, what) for name, what in WHOLE.items()},
    }
