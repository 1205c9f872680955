"""State dicts of adapted models: whole, in part, cast; a base or a core that was written to."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import (
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn

from secura import SECURALinear


def test_a_full_state_dict_brings_its_base_along():
    model = tiny.adapted(tiny.llama(3), norm="channel", seed=3)
    other = tiny.adapted(norm="channel")
    other.load_state_dict(model.state_dict())
    assert torch.equal(tiny.logits(other), tiny.logits(model))
    tiny.assert_same(tiny.snapshot(other), tiny.snapshot(model))


def test_a_partial_state_dict_of_what_was_trained():
    model, other = tiny.adapted(norm="channel"), tiny.adapted(norm="channel", seed=3)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    result = other.load_state_dict(trained, strict=False)
    assert not result.unexpected_keys
    assert torch.equal(tiny.logits(other), tiny.logits(model))
    one = {name: value for name, value in model.state_dict().items() if ".layers.1." in name}
    third = tiny.adapted(norm="channel", seed=3)
    third.load_state_dict(one, strict=False)
    assert torch.equal(tiny.parts(third)[2].B, tiny.parts(model)[2].B)
    assert not torch.equal(tiny.parts(third)[0].B, tiny.parts(model)[0].B)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("way", [set_peft_model_state_dict, nn.Module.load_state_dict])
def test_a_cast_state_dict(dtype, way):
    model, other = tiny.adapted(norm="channel"), tiny.adapted(norm="channel", seed=3)
    whole = way is nn.Module.load_state_dict
    state = model.state_dict() if whole else get_peft_model_state_dict(model)
    way(other, {n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()})
    assert tiny.parts(other)[0].B.dtype == tiny.parts(other)[0].core.dtype == torch.float32
    torch.testing.assert_close(tiny.logits(other), tiny.logits(model), rtol=0, atol=0.05)


def test_the_fingerprint_is_of_the_weights_at_saving(tmp_path):
    model = tiny.adapted(tiny.llama(1), norm="channel")
    base = tiny.llama()
    for name, layer in tiny.layers(model).items():
        plain = base.get_submodule(name.removeprefix("base_model.model."))
        layer.base_layer.weight.data.copy_(plain.weight.data)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    for got, expected in zip(tiny.parts(loaded), tiny.parts(model), strict=True):
        assert torch.equal(got.B, expected.B)
    layer = SECURALinear(nn.Linear(12, 10), tiny.config())
    layer.base.weight.data.mul_(-1)
    other = SECURALinear(nn.Linear(12, 10), tiny.config())
    other.base.load_state_dict(layer.base.state_dict())
    own = {name: value for name, value in layer.state_dict().items() if "base." not in name}
    other.load_state_dict(own, strict=False)


@pytest.mark.parametrize("norm", tiny.NORMS)
@pytest.mark.parametrize("reference", ["folded", "pretrained"])
def test_a_core_changed_in_place_acts(norm, reference):
    torch.manual_seed(0)
    layer = SECURALinear(nn.Linear(12, 10), tiny.config(norm=norm, norm_reference=reference)).eval()
    x = torch.randn(5, 12)
    plain = layer(x).detach()
    with torch.no_grad():
        layer.core.normal_()
    changed = layer(x).detach()
    assert not torch.equal(changed, plain)
    fresh = SECURALinear(layer.base, layer.config).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), changed)
    with torch.no_grad():
        layer.core.zero_()
    assert torch.equal(layer(x), plain)


def test_layers_made_and_used_in_inference_mode():
    with torch.inference_mode():
        layer = SECURALinear(nn.Linear(12, 10), tiny.config(norm="channel")).eval()
        assert layer(torch.randn(2, 12)).shape == (2, 10)
