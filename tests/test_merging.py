"""Merging through PEFT: exact where it can be, refused where it cannot, undone bit for bit."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model

EXACT = ("none", "channel", "weight")


def folded(model):
    """The model after a fold and another round of learning."""
    for layer in tiny.layers(model).values():
        layer.fold()
    tiny.perturb(model, 1)
    return model


@pytest.mark.parametrize("norm", EXACT)
@pytest.mark.parametrize("combine", ["averaged", "gated"])
@pytest.mark.parametrize("reference", ["folded", "pretrained"])
def test_merge_and_unload_is_exact(norm, combine, reference):
    model = tiny.adapted(
        norm=norm, norm_combine=combine, norm_reference=reference, train_bias=True,
        restrain=norm == "weight", restrain_percent=0.1, restrain_edge=1.9, restrain_decay=0.5,
    )  # fmt: skip
    adapted = tiny.logits(folded(model))
    plain = model.merge_and_unload()
    assert not tiny.layers(plain)
    assert [type(part) for part in plain.modules()] == [
        type(part) for part in tiny.llama().modules()
    ]
    torch.testing.assert_close(tiny.logits(plain), adapted, rtol=0, atol=1e-5)
    assert (adapted - tiny.logits(tiny.llama())).abs().max() > 0.05


@pytest.mark.parametrize("norm", EXACT)
def test_merge_into_bf16_is_the_rounded_exact_weight(norm):
    model = tiny.adapted(tiny.llama(dtype=torch.bfloat16), norm=norm)
    exact = {}
    for name, layer in tiny.layers(model).items():
        base = torch.nn.Linear(24, layer.out_features).to(torch.float32)
        base.weight.data = layer.base_layer.weight.data.float()
        part = layer.secura_adapter["default"]
        exact[name] = part.effective_of(base)
    adapted = tiny.logits(model)
    model.merge_adapter()
    for name, layer in tiny.layers(model).items():
        assert layer.base_layer.weight.dtype == torch.bfloat16
        error = (layer.base_layer.weight.float() - exact[name]).abs()
        assert (error <= exact[name].abs() * 2**-7 + 1e-6).all()
    torch.testing.assert_close(tiny.logits(model), adapted, rtol=0, atol=0.05)


@pytest.mark.parametrize("norm", EXACT)
def test_stochastic_rounding_is_the_same_merged_saved_and_loaded(norm, tmp_path):
    """One W': a merged model and one that was loaded give the bits of the one that was trained."""
    settings = {"norm": norm, "train_bias": True, "stochastic_rounding": True}
    model = folded(tiny.adapted(tiny.llama(dtype=torch.bfloat16), **settings))
    expected = tiny.logits(model)
    seeds = {
        layer.secura_adapter["default"]._rounding_seed for layer in tiny.layers(model).values()
    }
    assert len(seeds) == len(tiny.layers(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(dtype=torch.bfloat16), tmp_path)
    assert torch.equal(tiny.logits(loaded), expected)
    model.merge_adapter()
    assert torch.equal(tiny.logits(model), expected)
    model.unmerge_adapter()
    for layer in tiny.layers(model).values():
        layer.secura_adapter["default"]._rounding_seed = None
    assert not torch.equal(tiny.logits(model), expected)
    exact, plain = (tiny.logits(folded(tiny.adapted(**settings | {"stochastic_rounding": draws})))
                    for draws in (True, False))  # fmt: skip
    assert torch.equal(exact, plain)  # in fp32 nothing is rounded
    config = tiny.config(**settings, seed=1)
    other = get_peft_model(tiny.llama(dtype=torch.bfloat16), config).eval()
    tiny.perturb(other)
    assert not torch.equal(tiny.logits(folded(other)), expected)


def test_merge_without_a_base_bias_makes_one():
    model = tiny.adapted(tiny.llama(bias=False), norm="channel", train_bias=True)
    adapted = tiny.logits(model)
    model.merge_adapter()
    torch.testing.assert_close(tiny.logits(model), adapted, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert all(layer.base_layer.bias is None for layer in tiny.layers(model).values())


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_activation_refuses_and_leaves_every_weight(merge):
    model = tiny.adapted(norm="activation")
    before, adapted = tiny.snapshot(model), tiny.logits(model)
    with pytest.raises(ValueError, match=r"q_proj: .*no merged weight is exact.*allow_inexact"):
        getattr(model, merge)()
    tiny.assert_same(tiny.snapshot(model), before)
    assert torch.equal(tiny.logits(model), adapted)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_one_layer_that_refuses_keeps_the_others_from_merging(merge):
    model = tiny.adapted(norm="none", target_modules=["q_proj"])
    model.add_adapter("second", tiny.config(norm="activation", target_modules=["v_proj"]))
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match="v_proj"):
        getattr(model, merge)(adapter_names=["default", "second"])
    tiny.assert_same(tiny.snapshot(model), before)
    model.merge_adapter()


def test_allow_inexact_merge_writes_the_released_codes_weight():
    model = tiny.adapted(norm="activation", allow_inexact_merge=True)
    expected = {
        name: layer.base_layer.weight + layer.get_delta_weight("default")
        for name, layer in tiny.layers(model).items()
    }
    adapted = tiny.logits(model)
    model.merge_adapter()
    for name, layer in tiny.layers(model).items():
        torch.testing.assert_close(layer.base_layer.weight, expected[name])
    assert not torch.allclose(tiny.logits(model), adapted, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", EXACT)
def test_unmerge_is_bit_for_bit(norm, dtype):
    model = tiny.adapted(tiny.llama(dtype=dtype), norm=norm, train_bias=True)
    before, adapted = tiny.snapshot(model), tiny.logits(model)
    model.merge_adapter()
    merged = model.state_dict()
    assert any(not torch.equal(merged[name], value) for name, value in before.items())
    model.unmerge_adapter()
    tiny.assert_same(tiny.snapshot(model), before)
    assert torch.equal(tiny.logits(model), adapted)
    with pytest.warns(UserWarning, match="nothing to undo"):
        model.unmerge_adapter()
    tiny.assert_same(tiny.snapshot(model), before)


def test_unmerge_where_some_layers_hold_nothing():
    model = tiny.adapted(norm="channel", target_modules=["q_proj"])
    model.add_adapter("second", tiny.config(target_modules=["k_proj", "v_proj"]))
    before = tiny.snapshot(model)
    model.merge_adapter()
    model.unmerge_adapter()
    tiny.assert_same(tiny.snapshot(model), before)


@pytest.mark.parametrize("norm", EXACT)
def test_merging_twice_warns_and_changes_nothing(norm):
    model = tiny.adapted(norm=norm)
    before, adapted = tiny.snapshot(model), tiny.logits(model)
    model.merge_adapter()
    once = tiny.snapshot(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    tiny.assert_same(tiny.snapshot(model), once)
    model.unmerge_adapter()
    tiny.assert_same(tiny.snapshot(model), before)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        plain = model.merge_and_unload()
    torch.testing.assert_close(tiny.logits(plain), adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["v_proj"], ["o_proj"]], ids=str)
def test_merging_one_adapter_after_the_other(targets):
    model = tiny.adapted(norm="none", train_bias=True)
    model.add_adapter("second", tiny.config(norm="none", r=6, target_modules=targets))
    tiny.perturb(model, 1, "second")
    before = tiny.snapshot(model)
    model.base_model.set_adapter(["default", "second"])
    adapted = tiny.logits(model)
    model.merge_adapter(["default"])
    delta = next(iter(tiny.layers(model).values())).get_delta_weight("default")
    model.merge_adapter(["second"])
    torch.testing.assert_close(tiny.logits(model), adapted, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    tiny.assert_same(tiny.snapshot(model), before)
    layer = next(iter(tiny.layers(model).values()))
    assert torch.equal(layer.get_delta_weight("default"), delta)
    with pytest.raises(ValueError, match="no adapter 'other', only default"):
        layer.get_delta_weight("other")


def test_a_second_adapter_with_a_norm_is_not_merged_into_the_same_layer():
    model = tiny.adapted(norm="channel")
    model.add_adapter("second", tiny.config(norm="channel"))
    tiny.perturb(model, 1, "second")
    model.merge_adapter(["default"])
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"q_proj: .*do not add up"):
        model.merge_adapter(["second"])
    tiny.assert_same(tiny.snapshot(model), before)


def test_a_layer_added_after_eval_is_in_eval_and_merges():
    model = tiny.adapted(norm="none")
    model.add_adapter("second", tiny.config(norm="none", target_modules=["o_proj", "q_proj"]))
    tiny.perturb(model, 1, "second")
    assert not any(part.training for part in model.modules())
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter()
    model(input_ids=tiny.tokens())


@pytest.mark.parametrize("norm", EXACT)
def test_unmerging_after_a_cast_leaves_one_dtype(norm):
    model = tiny.adapted(norm=norm, train_bias=True)
    adapted = tiny.logits(model)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    dtypes = {v.dtype for n, v in model.named_parameters()}
    assert dtypes == {torch.bfloat16}
    torch.testing.assert_close(tiny.logits(model).float(), adapted, rtol=0, atol=0.1)
    fresh = tiny.adapted(norm=norm, train_bias=True).to(torch.bfloat16)
    assert torch.equal(tiny.logits(model), tiny.logits(fresh))


def test_a_merged_models_state_is_not_taken_up_and_none_is_while_merged(tmp_path):
    model, other = tiny.adapted(norm="channel"), tiny.adapted(norm="channel", seed=3)
    state = tiny.snapshot(model)
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    before = tiny.snapshot(other)
    with pytest.raises(ValueError, match=r"q_proj: .*while the adapter was merged.*unmerge before"):
        other.load_state_dict(model.state_dict())
    tiny.assert_same(tiny.snapshot(other), before)
    for load in (
        lambda: model.load_state_dict(state),
        lambda: model.load_adapter(tmp_path / "before", "default"),
    ):
        with pytest.raises(ValueError, match=r"q_proj: the adapter is merged.*unmerge it to load"):
            load()
    model.save_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "merged")
    model.unmerge_adapter()
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_a_merged_adapter_can_not_be_trained_folded_or_joined():
    model = tiny.adapted(norm="channel")
    adapted = tiny.logits(model)
    model.merge_adapter()
    torch.testing.assert_close(tiny.logits(model), adapted, rtol=0, atol=1e-5)
    model.train()
    with pytest.raises(RuntimeError, match="training would not reach it"):
        model(input_ids=tiny.tokens())
    with pytest.raises(RuntimeError, match="unmerge"):
        next(iter(tiny.layers(model).values())).fold()
    with pytest.raises(RuntimeError, match="unmerge"):
        model.add_adapter("second", tiny.config())
    assert set(model.peft_config) == {"default"}
    assert torch.equal(tiny.logits(model), tiny.logits(model.eval()))


def test_disabling_a_merged_adapter_restores_the_base():
    model = tiny.adapted(norm="weight")
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))


def test_diverged_adapters_are_not_merged():
    model = tiny.adapted(norm="none")
    with torch.no_grad():
        tiny.parts(model)[-1].B[0, 0] = float("nan")
    before = {name: value for name, value in tiny.base_weights(model).items()}
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj: .*NaN or inf"):
        model.merge_and_unload()
    tiny.assert_same(tiny.base_weights(model), before)


def test_unload_gives_the_base_back():
    model = tiny.adapted(norm="weight")
    plain = model.unload()
    tiny.assert_same(tiny.snapshot(plain), tiny.snapshot(tiny.llama()))


def test_two_additive_adapters_merge_together():
    model = tiny.adapted(norm="none", train_bias=True)
    model.add_adapter("second", tiny.config(norm="none", r=6, train_bias=True))
    tiny.perturb(model, 1, "second")
    model.base_model.set_adapter(["default", "second"])
    adapted = tiny.logits(model)
    torch.testing.assert_close(tiny.logits(model.merge_and_unload()), adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", EXACT)
def test_autocast_changes_no_merge(norm):
    weights, products = [], []
    for enabled in (False, True):
        model = folded(tiny.adapted(norm=norm))
        (layer, *_), (part, *_) = tiny.layers(model).values(), tiny.parts(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            if norm != "weight":
                products.append(part.additive_product(layer.base_layer)[0])
            model.merge_adapter()
        weights.append(tiny.base_weights(model))
    tiny.assert_same(*weights)
    assert norm == "weight" or torch.equal(*products)


def test_the_merged_checkpoint_is_plain(tmp_path):
    model = tiny.adapted(norm="channel", train_bias=True)
    adapted = tiny.logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    plain = type(tiny.llama()).from_pretrained(tmp_path)
    torch.testing.assert_close(tiny.logits(plain), adapted, rtol=0, atol=1e-5)


def test_a_loaded_adapter_merges_to_the_same_bits(tmp_path):
    model = folded(tiny.adapted(norm="channel"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    tiny.assert_same(
        tiny.snapshot(loaded.merge_and_unload()), tiny.snapshot(model.merge_and_unload())
    )
