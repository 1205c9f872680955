"""DDP, and FSDP2 by decoder layer: the same numbers, files that load, folding, merges."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from secura import accumulate, anchor, fold, sharding


@pytest.fixture
def shard(mesh):
    def shard(model):
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return shard


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_outputs_and_gradients_are_the_same(norm, shard):
    plain, model = tiny.adapted(norm=norm), shard(tiny.adapted(norm=norm))
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    expected, got = tiny.gradients(plain), tiny.gradients(model)
    assert got.keys() == expected.keys() != set()
    for name, value in got.items():
        torch.testing.assert_close(full(value), expected[name])


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_ddp_reaches_every_gradient_and_folds(norm, mesh):
    plain, model = tiny.adapted(norm=norm).train(), tiny.adapted(norm=norm).train()
    run = DistributedDataParallel(model)
    got, expected = tiny.gradients(run), tiny.gradients(plain)
    assert {name.removeprefix("module.") for name in got} == expected.keys() != set()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name.removeprefix("module.")])
    assert fold(run) == fold(plain) == len(tiny.layers(plain))
    assert torch.equal(tiny.logits(run), tiny.logits(plain))


def gathered_by_tensor(model):
    return {name: full(tensor) for name, tensor in model.state_dict().items()}


def gathered_by_torch(model):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


@pytest.mark.parametrize("gather", [gathered_by_tensor, gathered_by_torch])
def test_a_gathered_adapter_loads(gather, shard, tmp_path):
    plain = tiny.adapted(norm="channel", train_bias=True)
    model = shard(tiny.adapted(norm="channel", train_bias=True))
    state = gather(model)
    assert not [name for name in state if name.endswith("checksum")]
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(plain))


@pytest.mark.parametrize("full_state_dict", [True, False])
def test_a_sharded_model_takes_up_a_saved_state(full_state_dict, shard):
    options = StateDictOptions(full_state_dict=full_state_dict)
    model = shard(tiny.adapted(norm="channel"))
    other = shard(tiny.adapted(norm="channel", seed=5))
    assert not torch.equal(full(tiny.parts(other)[0].B), full(tiny.parts(model)[0].B))
    set_model_state_dict(other, get_model_state_dict(model, options=options), options=options)
    assert torch.equal(tiny.logits(other), tiny.logits(model))


@pytest.mark.parametrize("reference", ["folded", "pretrained"])
@pytest.mark.parametrize("norm", tiny.NORMS)
def test_folding(norm, reference, shard):
    plain = tiny.adapted(norm=norm, norm_reference=reference)
    model = shard(tiny.adapted(norm=norm, norm_reference=reference))
    for one in (plain, model):
        assert fold(one) == 4
    for got, expected in zip(tiny.parts(model), tiny.parts(plain), strict=True):
        assert torch.equal(got.core, expected.core)
        assert not full(got.B).any() and expected.core.any()
    assert torch.equal(tiny.logits(model), tiny.logits(plain))


def test_folding_reaches_what_is_still_gathered_from_a_forward(shard):
    model = shard(tiny.adapted(norm="none", target_modules=["lm_head"]))
    before = tiny.logits(model)
    fold(model)
    model.reshard()
    assert not full(tiny.parts(model)[0].B).any()
    torch.testing.assert_close(tiny.logits(model), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_merge_into_what_cannot_be_resharded_is_refused(merge, shard, monkeypatch):
    """The root unit stays gathered after a forward, and lies above what is merged."""
    model = shard(tiny.adapted(norm="channel", target_modules=["v_proj", "lm_head"]))
    before = tiny.logits(model)
    monkeypatch.setattr("torch.distributed._composable_state._module_state_mapping", {})
    with pytest.raises(ValueError, match=r"lm_head: .*FSDP holds.*with `secura merge`"):
        getattr(model, merge)()
    assert torch.equal(tiny.logits(model), before)


def test_layers_merge_one_by_one_into_their_shards(shard):
    model = shard(tiny.adapted(norm="channel", target_modules=["v_proj", "lm_head"]))
    before = tiny.logits(model)
    for layer in tiny.layers(model).values():
        layer.merge()
    torch.testing.assert_close(tiny.logits(model), before, rtol=0, atol=1e-5)
    for layer in tiny.layers(model).values():
        layer.unmerge()
    assert torch.equal(tiny.logits(model), before)


def two_adapters(**second):
    model = tiny.adapted(norm="none", train_bias=True)
    model.add_adapter("second", tiny.config(norm="none", r=6, train_bias=True, **second))
    tiny.perturb(model, 1, "second")
    return model


def test_two_adapters_and_their_biases_merge_into_shards(shard):
    plain, model = two_adapters(), shard(two_adapters())
    for one in (plain, model):
        one.merge_adapter(["default", "second"])
    torch.testing.assert_close(tiny.logits(model), tiny.logits(plain), rtol=0, atol=1e-5)


def test_one_of_two_active_adapters_ran_before_and_kept_its_columns(mesh, shard):
    plain, model = two_adapters(), two_adapters()
    for layer in tiny.layers(model).values():
        fully_shard(layer.base_layer, mesh=mesh)
    model = shard(model)
    tiny.logits(model)
    kept = [[part.columns is None for part in tiny.parts(model, n)] for n in ("default", "second")]
    assert not any(kept[0]) and all(kept[1])
    for one in (plain, model):
        one.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(tiny.logits(model), tiny.logits(plain), rtol=0, atol=1e-5)


def test_nothing_is_chosen_in_a_forward_that_would_lose_it(shard):
    with torch.device("meta"):
        base = tiny.llama()
    model = shard(tiny.adapted(base)).to_empty(device="cpu")
    model.base_model.model.model.rotary_emb = tiny.llama().model.rotary_emb
    with pytest.raises(ValueError, match=r"q_proj: the rows and columns were not chosen yet"):
        tiny.logits(model)


SENT = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")


@pytest.mark.parametrize(
    "names", [(), SENT[:1], SENT[1:], SENT], ids=["neither", "sharded", "sparing", "both"]
)
def test_the_first_process_chooses_alone_only_where_the_others_wait(names, mesh, monkeypatch):
    for name in SENT:
        monkeypatch.delenv(name, raising=False)
    for name in names:
        monkeypatch.setenv(name, "true")
    assert sharding.on_rank_0_alone() == (names == SENT)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_hears_of_a_choice_that_failed(rank, mesh, monkeypatch):
    def make():
        raise ValueError("the weight holds NaN")

    for name in SENT:
        monkeypatch.setenv(name, "true")
    if rank:  # what the first process sends, as another one sees it
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "broadcast", lambda tensor, source: tensor.fill_(1))
    with pytest.raises(ValueError, match="see there" if rank else "NaN"):
        sharding.from_rank_0(make, {"rows": torch.zeros(2)})


def test_anchoring(shard):
    settings = {"core": "u", "norm": "none", "target_modules": ["v_proj", "down_proj"]}
    plain, model = tiny.adapted(**settings), shard(tiny.adapted(**settings))
    texts = [torch.arange(3, 25), torch.arange(5, 30)]
    before = tiny.logits(plain)
    for one in (plain, model):
        anchor(one, texts)
        anchor(one, tokens=40, length=10, add=True)
        torch.testing.assert_close(tiny.logits(one), before, rtol=0, atol=2e-5)
    for got, expected in zip(tiny.parts(model), tiny.parts(plain), strict=True):
        assert torch.equal(got.left, expected.left) and torch.equal(got.right, expected.right)
        assert torch.equal(full(got.U), expected.U)
    fold(model)
    assert not full(tiny.parts(model)[0].U).any()
    torch.testing.assert_close(tiny.logits(model), before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("wrap", ["fsdp2", "linears", "ddp"])
def test_gradients_held_over_micro_batches(wrap, mesh, shard):
    """FSDP2's parameters keep their versions; a metric's forward stands before each step."""
    ends, ids = [], tiny.tokens(9).unsqueeze(1)
    for held in (False, True):
        model = tiny.adapted(norm="channel").train()
        if wrap == "linears":  # each gathered by itself, and left so until its backward pass
            for layer in tiny.layers(model).values():
                fully_shard(layer.base_layer, mesh=mesh, reshard_after_forward=False)
        run = DistributedDataParallel(model) if wrap == "ddp" else shard(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, 1.0)
        plainly = nullcontext(SimpleNamespace())
        with accumulate(model, optimizer) if held else plainly as accumulation:
            for index, row in enumerate(ids):
                accumulation.last = index % 3 == 2
                run(input_ids=row, labels=row).loss.backward()
                if index % 3 == 2:
                    run(input_ids=row)
                    optimizer.step()
                    optimizer.zero_grad()
        ends.append([full(p.detach()) for p in trained])
    before = [p for p in tiny.adapted(norm="channel").parameters() if p.requires_grad]
    for start, plain, found in zip(before, *ends, strict=True):
        assert (plain - start).abs().max() > 1e-4
        torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-5)
