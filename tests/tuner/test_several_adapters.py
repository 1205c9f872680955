"""Several SECURA adapters on one model: switching, adding up, scaling, being left alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import PeftModel

import secura


def two_adapters(norm="none", build=tiny.llama, **second):
    targets = {"target_modules": tiny.TARGETS[build]}
    model = tiny.adapted(build(), norm=norm, **targets)
    model.add_adapter(
        "second", tiny.config(**({"norm": norm, "seed": 1, "r": 6} | targets | second))
    )
    tiny.perturb(model, 1, "second")
    return model


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_adding_switching_and_deleting_adapters(norm):
    first = tiny.logits(tiny.adapted(norm=norm))
    model = two_adapters(norm)
    assert torch.equal(tiny.logits(model), first)
    model.set_adapter("second")
    second = tiny.logits(model)
    assert not torch.equal(second, first)
    grads = tiny.gradients(model)
    assert grads
    assert all(".second." in name for name in grads)
    model.set_adapter("default")
    assert all(".default." in name for name in tiny.gradients(model))
    assert torch.equal(tiny.logits(model), first)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(tiny.logits(model), second)
    assert not any(".default." in name for name in model.state_dict())


def test_two_active_additive_adapters_add_up():
    model = tiny.adapted(norm="none", train_bias=True)
    model.add_adapter("second", tiny.config(norm="none", r=6, train_bias=True))
    tiny.perturb(model, 1, "second")
    base = tiny.llama()
    for name, layer in tiny.layers(model).items():
        plain = base.get_submodule(name.removeprefix("base_model.model."))
        for adapter in ("default", "second"):
            plain.weight.data += layer.get_delta_weight(adapter)
            plain.bias.data += layer.secura_adapter[adapter].bias
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(tiny.logits(model), tiny.logits(base), rtol=0, atol=1e-5)
    grads = tiny.gradients(model)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in grads} == {"default", "second"}


def test_trained_biases_of_a_sum_have_gradients_of_their_own():
    model = two_adapters(train_bias=True)
    model.base_model.set_adapter(["default", "second"])
    once = tiny.gradients(model)
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    for name, value in model.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value.grad, 2 * once[name])


def test_a_sum_takes_the_columns_that_were_loaded_last():
    def summed(selection):
        model = tiny.adapted(norm="none", keep_columns=True, selection=selection)
        model.add_adapter("second", tiny.config(norm="none", keep_columns=True, r=6))
        tiny.perturb(model, 1, "second")
        model.base_model.set_adapter(["default", "second"])
        return model

    model, other = summed("least_norm"), summed("inverse_sampling")
    before, expected = tiny.logits(model), tiny.logits(other)
    assert all(part.columns is not None for part in tiny.parts(model))
    model.load_state_dict(other.state_dict())
    assert torch.equal(tiny.logits(model), expected)
    assert not torch.equal(expected, before)


def test_adapters_on_different_layers_load_with_little_memory(tmp_path):
    for name, targets in (("first", ["q_proj"]), ("second", ["v_proj"])):
        tiny.adapted(norm="none", target_modules=targets).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    alone = PeftModel.from_pretrained(tiny.llama(), tmp_path / "second")
    assert torch.equal(tiny.logits(model), tiny.logits(alone))


def test_dropout_of_one_of_two_active_adapters():
    model = two_adapters(dropout=0.5).train()
    model.base_model.set_adapter(["default", "second"])
    torch.manual_seed(0)
    first = tiny.logits(model)
    assert not torch.equal(tiny.logits(model), first)
    with torch.no_grad():
        for part in tiny.parts(model, "second"):
            part.B.zero_()
    assert torch.equal(tiny.logits(model), tiny.logits(model))


def test_active_adapters_add_up_after_a_fold():
    model = two_adapters()
    model.base_model.set_adapter(["default", "second"])
    before = tiny.logits(model)
    secura.fold(model)
    assert not any(part.trained.any() for part in tiny.parts(model, "second"))
    torch.testing.assert_close(tiny.logits(model), before, rtol=0, atol=1e-5)


def test_dropout_of_one_of_two_adapters_leaves_the_other_whole():
    model = tiny.adapted(norm="none", dropout=0.5)
    model.add_adapter("second", tiny.config(norm="none", seed=1, r=6))
    tiny.perturb(model, 1, "second")
    with torch.no_grad():
        for part in tiny.parts(model):
            part.B.zero_()
    model.set_adapter("second")
    alone = tiny.logits(model)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(tiny.logits(model.train()), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "second"),
    [("channel", {}), ("weight", {}), ("activation", {}), ("none", {"stochastic_rounding": True})],
    ids=str,
)
def test_two_active_adapters_that_do_not_add_up_are_an_error(norm, second):
    model = two_adapters(norm, **second)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="only norm='none' adds up"):
        tiny.logits(model)


@pytest.mark.parametrize("norm", tiny.NORMS)
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.t5, tiny.classifier])
def test_rows_of_one_batch_with_adapters_of_their_own(build, norm):
    model = two_adapters(norm, build, **({"dropout": 0.5} if norm != "weight" else {}))
    ids = tiny.tokens(6)
    names = ["second", "__base__", "default", "second", "default", "__base__"]
    with model.disable_adapter():
        alone = {"__base__": tiny.logits(model, ids)}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = tiny.logits(model, ids)
        assert not torch.allclose(alone[name], alone["__base__"])
    want = torch.stack([alone[name][row] for row, name in enumerate(names)])
    got = tiny.logits(model, ids, adapter_names=names)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(tiny.logits(model, ids), alone["second"])  # the next call has no names


def test_the_base_runs_once_for_all_rows():
    model, runs = two_adapters("channel"), []
    for layer in tiny.layers(model).values():
        layer.base_layer.register_forward_hook(lambda base, *_: runs.append(base))
    tiny.logits(model, tiny.tokens(3), adapter_names=["second", "__base__", "default"])
    assert runs == [layer.base_layer for layer in tiny.layers(model).values()]


def test_rows_with_adapters_on_different_layers_and_of_different_norms():
    model = tiny.adapted(norm="channel", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.add_adapter("second", tiny.config(norm="weight", target_modules=["v_proj"]))
    tiny.perturb(model, 1, "second")
    ids = tiny.tokens(2)
    want = []
    for row, name in enumerate(["second", "default"]):
        model.set_adapter(name)
        want.append(tiny.logits(model, ids)[row])
    got = tiny.logits(model, ids, adapter_names=["second", "default"])
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [tiny.llama, tiny.t5])
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_with_an_adapter_a_row(build, beams):
    model = two_adapters("channel", build)
    ids = tiny.tokens(2)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
    want = []
    for row, name in enumerate(["second", "default"]):
        model.set_adapter(name)
        want.append(model.generate(input_ids=ids[row : row + 1], **how)[0])
    got = model.generate(input_ids=ids, adapter_names=["second", "default"], **how)
    assert torch.equal(got, torch.stack(want))


def test_what_rows_of_adapters_cannot_be():
    model = two_adapters()
    names, ids = ["default", "second"], tiny.tokens(2)
    with pytest.raises(ValueError, match="the model has no adapter thrid"):
        model(input_ids=ids, adapter_names=["default", "thrid"])
    with pytest.raises(TypeError, match="adapter_names is a str: give a list"):
        model(input_ids=ids, adapter_names="default")
    with pytest.raises(ValueError, match="2 names for a batch of 3 rows"):
        model(input_ids=tiny.tokens(3), adapter_names=names)
    with pytest.raises(ValueError, match="for inference alone"):
        model.train()(input_ids=ids, adapter_names=names)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="would act in every row of adapter_names: unmerge it"):
        model(input_ids=ids, adapter_names=names)
    model.unmerge_adapter()
    assert not any(part._forward_pre_hooks for part in tiny.layers(model).values())
    assert torch.isfinite(tiny.logits(model)).all()


def test_adapters_on_different_layers_may_be_active_together():
    model = tiny.adapted(norm="channel", target_modules=["q_proj"])
    model.add_adapter("second", tiny.config(norm="weight", target_modules=["v_proj"]))
    tiny.perturb(model, 1, "second")
    first = tiny.logits(model)
    model.base_model.set_adapter(["default", "second"])
    assert not torch.equal(tiny.logits(model), first)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "__base__"])
def test_an_adapter_name_that_no_module_can_have_is_an_error(name):
    model = tiny.adapted()
    with pytest.raises(ValueError, match=f"adapter name '{name}' is '__base__'"):
        model.add_adapter(name, tiny.config())
    assert set(model.peft_config) == {"default"}


def test_an_adapter_name_that_is_also_a_tensors_is_an_error():
    model = tiny.adapted()
    with pytest.raises(ValueError, match="adapter name 'B' is a tensor's name"):
        model.add_adapter("B", tiny.config())
    assert set(model.peft_config) == {"default"}


def test_a_second_adapter_on_all_linear_layers():
    model = tiny.adapted(norm="none", target_modules="all-linear")
    model.add_adapter("second", tiny.config(norm="none", target_modules="all-linear"))
    assert all(
        set(one.secura_adapter) == {"default", "second"} for one in tiny.layers(model).values()
    )
    assert not any("lm_head" in name for name in tiny.layers(model))
    plain = tiny.logits(tiny.llama())
    model.set_adapter("second")
    tiny.perturb(model, 2, "second")
    assert not torch.equal(tiny.logits(model), plain)


def test_scales(tmp_path):
    model = tiny.adapted(norm="none", scaling=0.5)
    plain, whole = tiny.logits(tiny.llama()), tiny.logits(model)
    scale(model, lambda layer: layer.set_scale("default", 0))
    torch.testing.assert_close(tiny.logits(model), plain, rtol=0, atol=1e-5)
    scale(model, lambda layer: layer.set_scale("default", 3))
    tripled = tiny.logits(model)
    assert {part.scaling for part in tiny.parts(model)} == {1.5}
    scale(model, lambda layer: layer.unscale_layer())
    assert torch.equal(tiny.logits(model), whole)
    scale(model, lambda layer: layer.scale_layer(3))
    assert torch.equal(tiny.logits(model), tripled)
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.llama(), tmp_path)), whole)
    scale(model, lambda layer: layer.unscale_layer(3))
    torch.testing.assert_close(tiny.logits(model), whole)
    secura.fold(model)
    with pytest.raises(RuntimeError, match=r"q_proj: an adapter that is merged or was folded"):
        scale(model, lambda layer: layer.set_scale("default", 0))


def scale(model, change) -> None:
    for layer in tiny.layers(model).values():
        change(layer)


@pytest.mark.parametrize(
    "act",
    [
        lambda model: model.base_model.set_adapter(["default", "secnod"]),
        lambda model: model.base_model.set_adapter("secnod"),
        lambda model: model.merge_adapter(["secnod"]),
        lambda model: model.merge_and_unload(adapter_names=["secnod"]),
        lambda model: model.merge_and_unload(adapter_names=[]),
    ],
)
def test_a_name_that_no_adapter_has_is_refused(act):
    """PEFT passes over it: the base alone acted, or was all that a merge left."""
    model = two_adapters()
    before = tiny.logits(model)
    with pytest.raises(ValueError, match="no adapter"):
        act(model)
    assert torch.equal(tiny.logits(model), before) and tiny.layers(model)
