"""PEFT's own checks of a tuner, over a table of models and settings, as its test suite has them."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft_cases import (
    CASES,
    MLP,
    adapted,
    build,
    changed_since,
    config,
    inputs,
    output,
    outputs_of,
    over_cases,
    over_pairs,
    pair_of,
    train,
)
from safetensors.torch import load_file

from secura.tuner import SecuraLayer

# One adapter


@over_cases
def test_a_fresh_adapter_changes_nothing_and_alone_can_be_trained(case):
    plain = build(case)
    model = get_peft_model(build(case), config(case)).eval()
    torch.testing.assert_close(output(model), output(plain), rtol=1e-5, atol=1e-5)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".secura_adapter." in n or ".modules_to_save." in n for n in trainable)
    assert model.get_nb_trainable_parameters()[0] < sum(p.numel() for p in plain.parameters())
    assert "secura.SecuraLinear" in repr(model)
    assert model.active_adapters == ["default"]


@over_cases
def test_training_moves_every_trained_number_and_no_other(case):
    model = get_peft_model(build(case), config(case))
    before, first = tiny.snapshot(model), output(model.eval())
    train(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert changed_since(before, model) == trained
    assert not torch.allclose(output(model), first)


@over_cases
def test_disabled_it_is_the_base_and_enabled_as_before(case):
    model = adapted(case)
    changed = output(model)
    with model.disable_adapter():
        assert torch.equal(output(model), output(build(case)))
    assert torch.equal(output(model), changed)
    assert not torch.allclose(changed, output(build(case)))
    assert torch.isfinite(changed).all()


@over_cases
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saving_and_loading(case, low_cpu_mem_usage, tmp_path):
    model = adapted(case)
    train(model, 1)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    full = config(case).modules_to_save or ["score"] * (config(case).task_type == "SEQ_CLS")
    assert all(".secura_adapter." in n or any(f".{m}." in n for m in full) for n in names)
    assert not any("default" in name for name in names)
    loaded = PeftModel.from_pretrained(build(case), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(loaded.eval()), output(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.peft_config["default"].inference_mode
    again = PeftModel.from_pretrained(build(case), tmp_path, is_trainable=True)
    train(again, 1)
    assert not torch.equal(output(again), output(model))


@over_cases
def test_merging_unmerging_and_unloading(case):
    model = adapted(case)
    changed, plain = output(model), build(case)
    if config(case).norm == "activation":
        with pytest.raises(ValueError, match="no merged weight is exact"):
            model.merge_and_unload()
        assert torch.equal(output(model), changed)
        return
    before = tiny.base_weights(model)
    model.merge_adapter()
    torch.testing.assert_close(output(model), changed, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    tiny.assert_same(tiny.base_weights(model), before)
    assert torch.equal(output(model), changed)
    unloaded = copy.deepcopy(model).unload()
    torch.testing.assert_close(output(unloaded), output(plain), rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(output(merged), changed, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(part, SecuraLayer) for part in merged.modules())
    assert [type(part) for part in merged.modules()] == [type(part) for part in plain.modules()]


@over_cases
def test_an_adapter_that_diverged_is_not_merged(case):
    model = adapted(case, allow_inexact_merge=True)
    next(iter(tiny.parts(model))).trained.data.fill_(torch.nan)
    before = tiny.base_weights(model)
    for merge in (model.merge_adapter, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match="would hold NaN or inf"):
            merge()
        tiny.assert_same(tiny.base_weights(model), before)


@over_cases
def test_copies_pickles_and_configs(case, tmp_path):
    model = adapted(case)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other), output(model))
        tiny.perturb(other, 7)
        assert not torch.allclose(output(other), output(model))
    own = config(case)
    own.save_pretrained(tmp_path)
    for same in (pickle.loads(pickle.dumps(own)), copy.deepcopy(own)):
        assert same == own
    assert PeftConfig.from_pretrained(tmp_path) == own


@over_cases
def test_adapters_come_and_go_by_name(case, tmp_path):
    model = adapted(case)
    first = output(model)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other")
    model.add_adapter("fresh", config(case))
    assert torch.equal(output(model), first)
    model.set_adapter("other")
    assert torch.equal(output(model), first)
    model.delete_adapter("default")
    assert torch.equal(output(model), first)
    with pytest.raises(ValueError, match="default"):
        model.set_adapter("default")
    with pytest.raises(ValueError, match="default"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    assert model.active_adapters == ["fresh"]
    assert "other" not in model.peft_config
    model.save_pretrained(tmp_path / "both", selected_adapters=["fresh"])
    assert [path.name for path in (tmp_path / "both").iterdir() if path.is_dir()] == ["fresh"]


@pytest.mark.parametrize("case", [case for case in CASES if "coder" in case])
def test_generating(case):
    model = adapted(case)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    got = model.generate(input_ids=tiny.tokens(2), **how)
    if config(case).norm != "activation":
        want = model.merge_and_unload().generate(input_ids=tiny.tokens(2), **how)
        assert torch.equal(got, want)


@over_cases
def test_checkpointing_and_bf16_train(case):
    model = get_peft_model(build(case).to(torch.bfloat16), config(case))
    if hasattr(model.get_base_model(), "gradient_checkpointing_enable"):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    else:
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    before = tiny.snapshot(model)
    train(model)
    assert all(p.isfinite().all() for p in model.parameters())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert changed_since(before, model) == trained


# Two adapters


@over_pairs
def test_two_adapters_are_switched_and_trained_alone(pair):
    model = pair_of(pair)
    found = outputs_of(model)
    for active, other in (("second", "first"), ("first", "second")):
        model.set_adapter(active)
        assert all(f".{active}." in n for n, p in model.named_parameters() if p.requires_grad)
        train(model, 1)
        assert not torch.allclose(output(model), found[active])
        if active == "second":
            model.set_adapter(other)
            assert torch.equal(output(model), found[other])


@over_pairs
def test_two_adapters_are_active_together_where_they_add_up(pair):
    model = pair_of(pair)
    found = outputs_of(model)
    model.base_model.set_adapter(["first", "second"])
    together = output(model)
    for alone in found.values():
        assert not torch.allclose(together, alone)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["first", "second"])
    torch.testing.assert_close(output(merged), together, rtol=1e-4, atol=1e-5)


@over_pairs
def test_two_adapters_are_merged_one_after_the_other(pair):
    model = pair_of(pair)
    found = outputs_of(model)
    model.base_model.set_adapter(["first", "second"])
    together = output(model)
    model.merge_adapter(adapter_names=["first"])
    if pair not in ("layers of their own", "norms of their own"):
        with pytest.warns(UserWarning, match="additionally merging second"):
            model.merge_adapter(adapter_names=["second"])
    else:
        model.merge_adapter(adapter_names=["second"])
    torch.testing.assert_close(output(model), together, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.set_adapter("first")
    assert torch.equal(output(model), found["first"])


@over_pairs
def test_two_adapters_are_saved_and_loaded(pair, tmp_path):
    model = pair_of(pair)
    found = outputs_of(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP(), tmp_path / "second", adapter_name="second")
    assert torch.equal(output(loaded.eval()), found["second"])
    loaded.load_adapter(tmp_path / "first", "first")
    assert torch.equal(output(loaded), found["second"])
    assert outputs_of(loaded).keys() == found.keys()


@over_pairs
def test_a_row_of_the_batch_has_an_adapter_of_its_own(pair):
    model = pair_of(pair)
    found = outputs_of(model)
    names = ["second", "__base__", "first", "first", "second"]
    want = [found[name.replace("__base__", "base")][row] for row, name in enumerate(names)]
    got = model(inputs(model), adapter_names=names).detach()
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)


@over_pairs
def test_the_gradient_is_asked_for_by_name(pair):
    model = pair_of(pair)
    model.set_requires_grad("first", requires_grad=False)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad(["first", "second"])
    assert {n.rpartition(".")[0].rpartition(".")[2] for n, p in model.named_parameters()
            if p.requires_grad} == {"first", "second"}  # fmt: skip
