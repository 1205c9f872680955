"""An anchored core in files: saved, loaded, taken over, refused, and small without its anchor."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from secura import SecuraConfig, anchor, unanchor


def anchored(**settings):
    """A tiny Llama with an anchored core, trained at random."""
    model = tiny.adapted(core="u", norm="none", **settings)
    anchor(model, [torch.arange(3, 25), torch.arange(5, 30)])
    tiny.perturb(model, 3)
    return model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files_go_on_where_they_were_bit_for_bit(low_cpu_mem_usage, tmp_path):
    model = anchored(rank_pattern={"v_proj": 3})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny.llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert loaded.peft_config["default"].anchored
    tiny.assert_same(tiny.snapshot(loaded), tiny.snapshot(model))
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    tiny.assert_same(tiny.gradients(loaded), tiny.gradients(model))


def test_a_fresh_adapter_takes_an_anchor_over_from_a_checkpoint(tmp_path):
    model = anchored()
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(tiny.llama(), tiny.config(core="u", norm="none"))
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(tiny.logits(fresh), tiny.logits(model))
    assert fresh.peft_config["default"].anchored


def test_an_anchor_of_another_file_is_found(tmp_path):
    model = anchored()
    state = tiny.snapshot(model)
    name = next(name for name in state if name.endswith("left"))
    state[name] = state[name] + 1
    with pytest.raises(ValueError, match="do not match their checksum"):
        model.load_state_dict(state)


def test_a_config_that_was_anchored_anchors_nothing_new(tmp_path):
    """A new adapter from an anchored one's config has no anchor, nor has its file."""
    model = anchored()
    fresh = get_peft_model(tiny.llama(), model.peft_config["default"])
    assert tiny.anchors(fresh)[0] == (None, None)
    fresh.save_pretrained(tmp_path)
    assert "without an anchor" in (tmp_path / "README.md").read_text()
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert not loaded.peft_config["default"].anchored and tiny.anchors(loaded)[0] == (None, None)


def test_settings_read_from_a_folder_are_no_adapter(tmp_path):
    """PEFT's ``get_peft_model`` takes them and reads no tensors, so every use is an error."""
    anchored().save_pretrained(tmp_path)
    for inference in (True, False):
        config = SecuraConfig.from_pretrained(tmp_path)
        config.inference_mode = inference
        with pytest.raises(ValueError, match="its settings alone were given"):
            tiny.logits(get_peft_model(tiny.llama(), config))


def test_the_small_file_needs_no_anchor(tmp_path):
    model = anchored()
    before = tiny.logits(model)
    unanchor(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    torch.testing.assert_close(tiny.logits(loaded), before, rtol=0, atol=2e-5)
    assert tiny.anchors(loaded)[0] == (None, None)


def test_a_core_without_its_anchor_is_not_taken_into_an_anchored_one():
    """U would be read in coordinates that it was not learned in."""
    model = anchored()
    before, state = tiny.snapshot(model), tiny.snapshot(tiny.adapted(core="u", norm="none"))
    for strict in (True, False):
        with pytest.raises(ValueError, match="the file's U has no anchor"):
            model.load_state_dict(state, strict=strict)
        tiny.assert_same(tiny.snapshot(model), before)
    unanchor(model)
    model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("way", ["load_state_dict", "assign", "transformers"])
def test_a_plain_core_without_damping_is_loaded(way, tmp_path):
    """As of a file that was written before there was one."""
    model, other = (tiny.adapted(core="u", norm="none") for _ in range(2))
    tiny.perturb(model)
    if way == "transformers":
        model.save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if not k.endswith("damping")}, file)
        other = tiny.llama()
        other.load_adapter(str(tmp_path))
    else:
        state = {k: v for k, v in tiny.snapshot(model).items() if not k.endswith("damping")}
        other.load_state_dict(state, assign=way == "assign")
    torch.testing.assert_close(tiny.logits(other), tiny.logits(model))


@pytest.mark.parametrize("names", [(".left", ".right"), (".left", ".right", ".checksum")])
def test_an_anchored_core_is_not_taken_without_its_anchor(names):
    """As from a file whose L and S were left out: Ũ would be read as U."""
    model, plain = anchored(), tiny.adapted(core="u", norm="none")
    state = {k: v for k, v in tiny.snapshot(model).items() if not k.endswith(names)}
    before = tiny.snapshot(plain)
    with pytest.raises(ValueError, match="its L and S are not there"):
        plain.load_state_dict(state, strict=False)
    tiny.assert_same(tiny.snapshot(plain), before)
    unanchor(model)
    assert {float(part.damping) for part in tiny.parts(model)} == {0.0}
    plain.load_state_dict(model.state_dict())


def test_two_models_of_one_config_are_anchored_each_for_itself():
    config = tiny.config(core="u", norm="none")
    one, other = (get_peft_model(tiny.llama(), config) for _ in range(2))
    anchor(one, [torch.arange(3, 25)], damping=0.5)
    for untouched in (config, other.peft_config["default"]):
        assert not untouched.anchored and untouched.anchor_damping == 1e-2
    assert one.peft_config["default"].anchored and one.peft_config["default"].anchor_damping == 0.5


def test_damping_comes_back_with_the_anchor():
    """Into an adapter that was never anchored: statistics add up as in the run that was saved."""
    model, other = (tiny.adapted(core="u", norm="none") for _ in range(2))
    anchor(model, [torch.arange(5, 30)], damping=0.03)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert other.peft_config["default"].anchor_damping == 0.03
    for one in (model, other):
        anchor(one, [torch.arange(3, 25)], add=True)
    tiny.assert_same(tiny.snapshot(other), tiny.snapshot(model))


def test_a_file_without_damping_takes_the_configs():
    model = anchored()
    state = get_peft_model_state_dict(model)
    state = {k: v for k, v in state.items() if not k.endswith(("damping", "checksum"))}
    for other in (tiny.adapted(core="u", norm="none"), anchored()):
        set_peft_model_state_dict(other, state)
        assert {float(part.damping) for part in tiny.parts(other)} == {float(torch.tensor(1e-2))}


@pytest.mark.parametrize("name", ["U", "left", "right", "damping"])
def test_values_that_are_no_numbers(name):
    state = get_peft_model_state_dict(anchored())
    state = {k: v.clone() for k, v in state.items() if not k.endswith("checksum")}
    next(v for k, v in state.items() if k.endswith(name)).view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=rf"q_proj.*{name} holds NaN or inf"):
        set_peft_model_state_dict(tiny.adapted(core="u", norm="none"), state)
