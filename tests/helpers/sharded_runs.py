"""What two processes do for test_sharded_runs.py: every set-up in every space, in one group."""

from __future__ import annotations

import os
from functools import cache, partial
from types import SimpleNamespace

import tiny
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tiny import TEXTS
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from secura import anchor
from secura.continual import anchoring

TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head"]
STEPS, RATE = 3, 5e-2
WHOLE = StateDictOptions(full_state_dict=True)


def adapted(norm, base=None):
    """A fresh adapter whose settings all act, on a fresh base."""
    settings = {"norm": norm, "restrain": norm != "none", "train_bias": norm == "channel"}
    base = tiny.llama() if base is None else base
    return get_peft_model(base, tiny.config(target_modules=TARGETS, **settings))


def ddp(norm):
    return DistributedDataParallel(adapted(norm))


def by_layer(norm, model=None):
    model = adapted(norm) if model is None else model
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def whole(norm):
    return fully_shard(adapted(norm))


def linears_alone(norm):
    model = adapted(norm)
    for layer in tiny.layers(model).values():
        fully_shard(layer.base_layer)
    return by_layer(norm, model)


def fsdp1(norm, model=None):
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    cpu = torch.device("cpu")
    model = adapted(norm) if model is None else model
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu
    )


def on_meta(norm):
    """Built on the meta device, sharded there, then filled by torch's loading of whole weights."""
    with torch.device("meta"):
        base = tiny.llama()
    model = by_layer(norm, adapted(norm, base)).to_empty(device="cpu")
    rotary = model.base_model.model.model.rotary_emb
    fresh = tiny.llama()
    rotary.inv_freq = rotary.original_inv_freq = fresh.model.rotary_emb.inv_freq
    names = {name.replace(".base_layer", ""): name for name in model.state_dict()}
    state = {names[f"base_model.model.{n}"]: t for n, t in fresh.state_dict().items()}
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, state, options=options)
    return model


def ram_efficient(norm):
    """Weights on rank 0 alone, as transformers loads them, then accelerate's own preparation."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    os.environ.update(asked)
    try:
        base = tiny.llama()
        if dist.get_rank():
            rotary = base.model.rotary_emb
            base = base.to("meta")
            base.model.rotary_emb = rotary.to_empty(device="cpu")
            fresh = tiny.llama().model.rotary_emb.inv_freq
            rotary.inv_freq = rotary.original_inv_freq = fresh
        model = adapted(norm, base)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=True, reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )  # fmt: skip
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin), device=torch.device("cpu"),
            mixed_precision="no", is_main_process=dist.get_rank() == 0,
        )  # fmt: skip
        return fsdp2_prepare_model(accelerator, model)
    finally:
        for name in asked:
            del os.environ[name]


def loaded_by_transformers():
    """A base that transformers sharded while loading it."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    whole, split = tiny.llama(), DistributedConfig(fsdp_size=2)
    model = LlamaForCausalLM.from_pretrained(
        None, config=whole.config, state_dict=whole.state_dict(), distributed_config=split
    )
    assert all(isinstance(value, DTensor) for value in model.parameters())
    return model


def by_transformers(norm):
    """An adapter on a base that is sharded already: nobody averages its gradients but we."""
    model = adapted(norm, loaded_by_transformers())
    for value in model.parameters():
        if value.requires_grad:
            value.register_post_accumulate_grad_hook(average)
    return model


def average(value):
    dist.all_reduce(value.grad)
    value.grad /= 2


def lora_by_transformers(folder):
    """Whether the processes have different gradients of a LoRA on such a base."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    model = get_peft_model(loaded_by_transformers(), config)
    own = next(iter(tiny.gradients(model, tiny.tokens(4).chunk(2)[dist.get_rank()]).values()))
    first = own.clone()
    dist.broadcast(first, 0)
    return worst({"gap": gap(own, first)})["gap"] > 1e-2


def anchored(folder):
    """How many tokens were read, and a layer's ``right``; both processes have the same anchor."""
    model = tiny.adapted(core="u", norm="none")
    report, part = anchor(model, TEXTS, batch_size=1), tiny.parts(model)[1]
    found = torch.stack([part.left, part.right])
    both = [torch.empty_like(found) for _ in range(2)]
    dist.all_gather(both, found)
    assert torch.equal(*both)
    return [report.tokens, part.right.tolist()]


def texts_of_all(folder):
    """Texts of which each process has read its own, as both know them then."""
    rank = dist.get_rank()
    own = [torch.arange(3 + 10 * rank, 9 + 10 * rank), torch.arange(5)][: 2 - rank]
    return [text.tolist() for text in anchoring._of_all(own)]


def anchored_shards(folder):
    """What is said where a sharded checkpoint finds no room for its anchor, and the gap with it."""
    core, ids = {"core": "u", "norm": "none"}, tiny.tokens(2, seed=1)
    first = tiny.adapted(**core)
    tiny.perturb(first)
    anchor(first, TEXTS)
    first = by_layer("none", first)
    truth = tiny.logits(first, ids)
    checkpoint.save(get_model_state_dict(first), checkpoint_id=folder)

    def load(model):
        state = get_model_state_dict(model)
        checkpoint.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state)
        return tiny.logits(model, ids)

    said, plain = [], by_layer("none", tiny.adapted(**core))
    for use in (load, partial(tiny.logits, ids=ids)):  # torch has written into its tensors
        try:
            use(plain)
        except ValueError as refusal:
            said.append(str(refusal))
    again = by_layer("none", tiny.adapted(**core))
    anchor(again, TEXTS[:1])
    return said, worst({"gap": gap(load(again), truth)})["gap"]


def zero(stage, *, partitioned_first=False):
    """A set-up of DeepSpeed's; ``partitioned_first`` says before the adapter is made."""

    def set_up(norm):
        import deepspeed

        # an operation for inference, which would be compiled here
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        base = tiny.llama()
        if partitioned_first:
            deepspeed.zero.Init(module=base, config_dict_or_path=config)
        model = adapted(norm, base)
        optimizer = torch.optim.AdamW([v for v in model.parameters() if v.requires_grad], lr=RATE)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    return set_up


SET_UPS = {
    "DDP": ddp,
    "FSDP2 by layer": by_layer,
    "FSDP2 whole": whole,
    "FSDP2 each Linear": linears_alone,
    "FSDP1": fsdp1,
    "meta device": on_meta,
    "accelerate ram-efficient": ram_efficient,
    "transformers fsdp_size": by_transformers,
}
MERGED = {"FSDP2 by layer", "FSDP2 whole", "FSDP2 each Linear", "ZeRO-2"}
REFUSED = {"FSDP1", "ZeRO-3", "ZeRO-3, zero.Init"}
"""Set-ups that merge, but for the space activation, and those that never do."""
DEEPSPEED = {
    "ZeRO-2": zero(2),
    "ZeRO-3": zero(3),
    "ZeRO-3, zero.Init": zero(3, partitioned_first=True),
}


def train(model, ids):
    """Some steps of AdamW, and the logits afterwards."""
    model.train()
    if hasattr(model, "zero_optimization"):  # DeepSpeed's engine
        for _ in range(STEPS):
            model.backward(model(input_ids=ids, labels=ids).loss)
            model.step()
        model.eval()  # which returns None here
        return model
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def gap(found, expected):
    """Largest difference, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def whole_state(model):
    """Every tensor of the model, whole, by its name there."""
    if hasattr(model, "zero_optimization"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.module.parameters())):
            return {name: value.clone() for name, value in model.module.state_dict().items()}
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            state = {name: value.clone() for name, value in model.state_dict().items()}
    else:
        state = get_model_state_dict(model, options=WHOLE)
    return {name.replace("_fsdp_wrapped_module.", ""): value for name, value in state.items()}


@cache
def logits_of_one(norm):
    """Logits after training in one process, and of the base."""
    ids = tiny.tokens(2, seed=1)
    return tiny.logits(train(adapted(norm), tiny.tokens(4)), ids), tiny.logits(tiny.llama(), ids)


def worst(mine):
    """The largest of both processes by name."""
    values = torch.tensor(list(mine.values()))
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(mine, values.tolist(), strict=True))


def trains(set_up, norm, folder):
    """Gaps to one process: of what was trained, and of the gathered adapter on a fresh model."""
    ids, (truth, untrained) = tiny.tokens(2, seed=1), logits_of_one(norm)
    model = (SET_UPS | DEEPSPEED)[set_up](norm)
    found = tiny.logits(train(model, tiny.tokens(4).chunk(2)[dist.get_rank()]), ids)
    plain = adapted(norm).eval()
    saved = get_peft_model_state_dict(plain, state_dict=whole_state(model))
    set_peft_model_state_dict(plain, saved)
    cell = {
        "error": gap(found, truth),
        "saved": gap(tiny.logits(plain, ids), truth),
        "moved": gap(untrained, truth),
    }
    return worst(cell | (merges(model, plain, ids) if set_up in MERGED | REFUSED else {}))


def merges(model, plain, ids):
    """How far a merge into shards, after a forward, is from one of the same adapter in one process.

    ``refused`` is 1 where it is refused and nothing changed.
    """
    found, before = tiny.logits(model, ids), base_weights(model)
    try:
        getattr(model, "module", model).merge_adapter()
    except ValueError:
        return {"refused": float(different(base_weights(model), before) == 0)}
    plain.merge_adapter()
    written = different(base_weights(model), base_weights(plain))
    merged = gap(tiny.logits(model, ids), found)
    model.unmerge_adapter()
    restored = different(base_weights(model), before)
    tiny.logits(model, ids)
    unloaded, expected = model.merge_and_unload(), plain.merge_and_unload()
    written += different(whole_state(unloaded), expected.state_dict())
    return {"written": float(written), "merged": merged, "restored": float(restored)}


def base_weights(model):
    return {name: value for name, value in whole_state(model).items() if ".base_layer." in name}


def different(found, expected):
    """How many tensors differ in a bit, or are in one model alone."""
    both = found.keys() & expected.keys()
    lacking = len(found.keys() ^ expected.keys())
    return lacking + sum(not torch.equal(found[name], expected[name]) for name in both)


def in_every_space(set_ups):
    return {
        f"{set_up}, {norm}": partial(trains, set_up, norm)
        for set_up in set_ups
        for norm in tiny.NORMS
    }


def trained_with_its_base(norm):
    """An adapter that acts, whose layers' own weights and biases are trained too."""
    model = adapted(norm)
    tiny.perturb(model)
    for layer in tiny.layers(model).values():
        layer.base_layer.requires_grad_(True)
    return model.train()


def trains_its_base(folder):
    """Gaps of all gradients to those of one process, by set-up and space."""
    ids, found = tiny.tokens(4), {}
    for norm in ("none", "channel", "activation"):
        truth = tiny.gradients(trained_with_its_base(norm), ids)
        for set_up, wrapped in (
            ("DDP", DistributedDataParallel),
            ("FSDP2 by layer", partial(by_layer, norm)),
        ):
            model = wrapped(trained_with_its_base(norm))
            gradients = tiny.gradients(model, ids.chunk(2)[dist.get_rank()])
            whole = {
                name.removeprefix("module."): of.full_tensor() if isinstance(of, DTensor) else of
                for name, of in gradients.items()
            }
            assert whole.keys() == truth.keys()
            found[f"{set_up}, {norm}"] = max(gap(whole[name], truth[name]) for name in truth)
    return worst(found)


def cases():
    """What both processes run."""
    return in_every_space(SET_UPS) | {
        "LoRA by itself": lora_by_transformers,
        "anchor": anchored,
        "anchor in shards": anchored_shards,
        "texts of all": texts_of_all,
        "trained base": trains_its_base,
    }


def deepspeed_cases():
    """The same of what needs DeepSpeed."""
    return in_every_space(DEEPSPEED)
