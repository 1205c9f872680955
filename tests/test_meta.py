"""Adapters on models whose weights come later: they become real with them, and lose nothing."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from secura import AdapterConfig, SECURALinear, fold


def unloaded():
    with torch.device("meta"):
        return tiny.llama()


def load(model, fresh):
    """The weights of ``fresh`` into the adapted ``model``, and what no state_dict holds."""
    names = {name.replace(".base_layer", ""): name for name in model.state_dict()}
    state = {names[f"base_model.model.{n}"]: v for n, v in fresh.state_dict().items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.base_model.model.model.rotary_emb = fresh.model.rotary_emb


def assign(model, fresh):
    """As a loader does that sets tensors one by one, past the adapters."""
    base = model.base_model.model
    for name, value in fresh.named_parameters():
        owner, _, own = name.rpartition(".")
        module = base.get_submodule(owner)
        setattr(getattr(module, "base_layer", module), own, value.requires_grad_(False))
    base.model.rotary_emb = fresh.model.rotary_emb
    tiny.logits(model)  # the first use


@pytest.mark.parametrize("bring", [load, assign])
@pytest.mark.parametrize("norm", tiny.NORMS)
def test_an_adapter_becomes_real_with_its_base(norm, bring):
    settings = {"norm": norm, "restrain": norm != "none", "train_bias": True}
    plain = tiny.adapted(**settings)
    model = get_peft_model(unloaded(), tiny.config(**settings))
    trained = [value for value in model.parameters() if value.requires_grad]
    bring(model, tiny.llama())
    now = [value for value in model.parameters() if value.requires_grad]
    assert all(one is other for one, other in zip(trained, now, strict=True))  # an optimizer's too
    tiny.perturb(model)
    assert torch.equal(tiny.logits(model.eval()), tiny.logits(plain))
    got, expected = tiny.gradients(model), tiny.gradients(plain)
    tiny.assert_same(got, expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_file_loaded_before_its_base_is_kept_and_compared_with_it(
    seed, low_cpu_mem_usage, tmp_path
):
    plain = tiny.adapted(norm="channel", selection="inverse_sampling")
    fold(plain)
    tiny.perturb(plain, seed=3)
    plain.save_pretrained(tmp_path)
    how = {"low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(unloaded(), tmp_path, **how).eval()
    load(model, tiny.llama(seed))
    if seed:
        with pytest.raises(ValueError, match="trained on another base weight"):
            tiny.logits(model)
    else:
        assert torch.equal(tiny.logits(model), tiny.logits(plain))


@pytest.mark.parametrize("to_empty", [True, False])
def test_what_was_moved_to_the_meta_device_comes_back(to_empty):
    model = tiny.adapted(norm="channel")
    fold(model)
    tiny.perturb(model)
    before, kept = tiny.logits(model), tiny.snapshot(model)
    rotary = tiny.llama().model.rotary_emb
    model.to("meta")
    names = model.state_dict().keys()
    assert not [n for n in names if n.endswith(("rows", "cols", "core", "checksum"))]
    if to_empty:
        model.to_empty(device="cpu")
    given = {name: kept[name] for name in names}
    model.load_state_dict(given, strict=not to_empty, assign=not to_empty)
    model.base_model.model.model.rotary_emb = rotary
    assert torch.equal(tiny.logits(model), before)


def test_ranks_are_checked_before_the_weights_come():
    with pytest.raises(ValueError, match="between 1 and min"):
        SECURALinear(nn.Linear(8, 4, device="meta"), AdapterConfig(r=5))
