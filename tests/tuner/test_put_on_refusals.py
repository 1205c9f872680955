"""What an adapter is not put on or taken off: refused by name, and nothing is left half done."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import (
    IA3Config,
    LoraConfig,
    get_peft_model,
    inject_adapter_in_model,
)

from secura.tuner import SecuraLayer, UnmatchedWarning


def test_target_that_matches_nothing():
    with (
        pytest.warns(UnmatchedWarning, match="'nowhere' matches no layer"),
        pytest.raises(ValueError, match="nowhere"),
    ):
        get_peft_model(tiny.llama(), tiny.config(target_modules=["nowhere"]))


def test_a_target_that_is_not_linear_names_the_layer():
    with pytest.raises(TypeError, match=r"model\.embed_tokens: Embedding is no linear layer"):
        get_peft_model(tiny.llama(), tiny.config(target_modules=["embed_tokens"]))


def test_a_layer_that_another_tuner_or_setting_has_says_so():
    model = tiny.llama()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model, "lora")
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(TypeError, match=r"q_proj: a peft\.tuners\.lora.* layer is here already"):
        get_peft_model(model, tiny.config(target_modules=["q_proj"]))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert "default" not in getattr(model, "peft_config", {})

    model = get_peft_model(tiny.llama(), tiny.config(modules_to_save=["lm_head"]))
    with pytest.raises(TypeError, match="lm_head: an adapter of the model trains this layer"):
        model.add_adapter("second", tiny.config(target_modules=["lm_head"]))


def test_another_tuners_settings_are_its_own():
    model = tiny.llama()
    inject_adapter_in_model(IA3Config(target_modules=["v_proj"], feedforward_modules=[]), model)
    assert tiny.layers(get_peft_model(model, tiny.config(target_modules=["q_proj"])))


def test_a_name_that_is_refused_keeps_the_adapter_it_has():
    model, inner = tiny.adapted(target_modules=["q_proj"]), "model.embed_tokens"
    model.peft_config["default"].target_modules = {"q_proj", "embed_tokens"}
    with pytest.raises(TypeError, match=f"{inner}: Embedding is no linear layer"):
        model.base_model.inject_adapter(model.base_model.model, "default")
    assert list(model.peft_config) == ["default"] and tiny.layers(model)


def test_what_lies_over_an_adapter_is_not_unloaded_with_it():
    """PEFT puts the innermost layer in the place of both: the adapter's change went unsaid."""
    model = tiny.adapted(norm="none", target_modules=["q_proj", "v_proj"])
    lora = LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, model.base_model.model, "lora")
    before = tiny.logits(model)
    for unload in (model.merge_and_unload, model.unload):
        with pytest.raises(ValueError, match=r"v_proj: a peft.*lora.* lies over the adapter"):
            unload()
    assert torch.equal(tiny.logits(model), before)


def test_what_a_lower_rank_would_not_mend_does_not_advise_one():
    base = tiny.llama()
    base.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"q_proj: .*NaN or inf") as raised:
        get_peft_model(base, tiny.config())
    assert "lower r" not in str(raised.value)


def test_a_rank_too_large_for_one_layer_names_it_and_leaves_the_model_alone():
    base = tiny.llama()
    before, types = tiny.snapshot(base), [type(module) for module in base.modules()]
    settings = {"r": 13, "inner_r": 8, "target_modules": ["q_proj", "k_proj"]}
    with pytest.raises(
        ValueError,
        match=r"layers\.0\.self_attn\.k_proj: r=13 .*min\(N, K\)=12.*; lower r, or for this "
        r"layer alone set rank_pattern or leave it out with exclude_modules$",
    ):
        get_peft_model(base, tiny.config(**settings))
    assert [type(module) for module in base.modules()] == types
    tiny.assert_same(tiny.snapshot(base), before)
    model = tiny.adapted(base, norm="none")
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match="k_proj"):
        model.add_adapter("second", tiny.config(**settings))
    tiny.assert_same(tiny.snapshot(model), before)
    mended = tiny.config(**settings, rank_pattern={"k_proj": 12})
    assert [part.rows.numel() for part in tiny.parts(get_peft_model(tiny.llama(), mended))] == [
        13, 12, 13, 12,
    ]  # fmt: skip


def test_an_interrupt_leaves_no_half_of_a_second_adapter(monkeypatch):
    model, made = tiny.adapted(), []
    before = tiny.snapshot(model)
    plain = SecuraLayer.update_layer

    def interrupted(self, *args, **kwargs):
        made.append(self)
        if len(made) == 3:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(SecuraLayer, "update_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.add_adapter("second", tiny.config())
    tiny.assert_same(tiny.snapshot(model), before)
    monkeypatch.undo()
    model.add_adapter("second", tiny.config())
