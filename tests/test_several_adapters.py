"""Several SECURA adapters on one model: switching, adding up, scaling, being left alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import PeftModel

import secura


def two_adapters(norm="none", **second):
    model = tiny.adapted(norm=norm)
    model.add_adapter("second", tiny.config(**({"norm": norm, "seed": 1, "r": 6} | second)))
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


@pytest.mark.parametrize("norm", ["channel", "weight", "activation"])
def test_two_active_adapters_with_a_norm_are_an_error(norm):
    model = two_adapters(norm)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="only norm='none' adds up"):
        tiny.logits(model)


def test_adapters_within_one_batch_are_an_error():
    model = two_adapters()
    with pytest.raises(ValueError, match="within a batch"):
        model(input_ids=tiny.tokens(2), adapter_names=["default", "second"])


def test_adapters_on_different_layers_may_be_active_together():
    model = tiny.adapted(norm="channel", target_modules=["q_proj"])
    model.add_adapter("second", tiny.config(norm="weight", target_modules=["v_proj"]))
    tiny.perturb(model, 1, "second")
    first = tiny.logits(model)
    model.base_model.set_adapter(["default", "second"])
    assert not torch.equal(tiny.logits(model), first)


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
