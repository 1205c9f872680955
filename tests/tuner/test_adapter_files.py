"""Adapter files: what is in them, and that a wrong or damaged one is one clear error."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from adapter_files import CONFIG, FIRST, LAYER, WEIGHTS, edit, rewrite
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import secura
from secura import SecuraConfig, choosing, state
from secura.integrity import checksum, file_checksum


@pytest.fixture
def folder(tmp_path):
    """A saved adapter."""
    tiny.adapted(norm="channel", train_bias=True).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite_with_checksums(folder, change) -> None:
    """Change the tensors of a saved adapter, and its checksums with them."""

    def changed(state):
        change(state)
        own = {n.removeprefix(FIRST): t for n, t in state.items() if n.startswith(FIRST)}
        own.pop("checksum")
        settings = SecuraConfig.from_pretrained(folder).checksum_settings(bool(own["core"].any()))
        settings += f" of {list(tiny.llama().get_submodule(LAYER).weight.shape)}"
        state[FIRST + "checksum"] = checksum(own, settings)
        edit(folder, checksum=file_checksum(state.values()))

    rewrite(folder, changed)


def refused(folder, message: str, *, error: type[Exception] = ValueError) -> None:
    """Loading fails on a new base, whose weights stay, and into an existing adapter alike."""
    base = tiny.llama()
    before = tiny.snapshot(base)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(base, folder)
    tiny.assert_same(tiny.base_weights(base), before)
    base = tiny.llama()
    with pytest.raises(error, match=message):
        secura.from_pretrained(base, folder)
    tiny.assert_same(base.state_dict(), before)
    assert not hasattr(base, "peft_config")
    model = tiny.adapted(norm="channel", train_bias=True, seed=5)
    before = tiny.snapshot(model)
    with pytest.raises(error, match=message):
        model.load_adapter(folder, "default")
    tiny.assert_same(tiny.snapshot(model), before)


def test_contents(folder):
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, "README.md"}
    state = load_file(folder / WEIGHTS)
    layers = [f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ("q_proj", "v_proj")]
    names = ("A", "B", "bias", "rows", "cols", "core", "fingerprint", "checksum")
    assert state.keys() == {
        f"base_model.model.{layer}.secura_adapter.{name}" for layer in layers for name in names
    }
    shapes = {name: tuple(state[FIRST + name].shape) for name in names}
    assert shapes == {
        "A": (4, 8), "B": (8, 4), "bias": (24,), "rows": (4,), "cols": (4,), "core": (4, 4),
        "fingerprint": (8, 8), "checksum": (),
    }  # fmt: skip
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["format_version"]) == ("SECURA", 4)


def test_another_base_is_an_error_that_names_the_layer_and_the_override(folder):
    base = tiny.llama(1)
    before = tiny.snapshot(base)
    for low_cpu_mem_usage in (False, True):
        with pytest.raises(
            ValueError,
            match=r"layers\.0\.self_attn\.q_proj.*another base weight.*check_base=False in the "
            r"config \(--no_check_base on the command line\)",
        ):
            PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
        tiny.assert_same(tiny.base_weights(base), before)
    model = get_peft_model(base, tiny.config(norm="channel", train_bias=True))
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match="another base weight"):
        model.load_adapter(folder, "default")
    tiny.assert_same(tiny.snapshot(model), before)


def test_one_other_layer_is_enough_and_nothing_is_loaded(folder):
    base = tiny.llama()
    with torch.no_grad():
        base.model.layers[1].self_attn.v_proj.weight.mul_(1.02)
    model = get_peft_model(base, tiny.config(norm="channel", train_bias=True))
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj.*about 2\.0%"):
        model.load_adapter(folder, "default")
    tiny.assert_same(tiny.snapshot(model), before)


def test_check_base_false_overrides(folder, tmp_path):
    base = tiny.llama(1)
    first = PeftModel.from_pretrained(base, folder, check_base=False)
    config = SecuraConfig.from_pretrained(folder, check_base=False)
    assert not config.check_base
    second = PeftModel.from_pretrained(tiny.llama(1), folder, config=config)
    assert torch.equal(tiny.logits(first), tiny.logits(second))
    state = load_file(folder / WEIGHTS)
    assert torch.equal(tiny.parts(first)[0].A, state[FIRST + "A"])
    assert SecuraConfig.from_pretrained(folder).check_base
    for no in ("no", None):
        with pytest.raises(ValueError, match=f"check_base={no!r} must be True or False"):
            SecuraConfig.from_pretrained(folder, check_base=no)
    first.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["check_base"] is True


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_refusal_leaves_modes_and_flags_and_adapters(folder, wrapped):
    model = (tiny.adapted(tiny.llama(1)) if wrapped else tiny.llama(1)).train()
    model.get_input_embeddings().eval()
    before = [module.training for module in model.modules()]
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match="another base weight"):
        secura.from_pretrained(model, folder, adapter_name="second")
    assert [module.training for module in model.modules()] == before
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert not wrapped or list(model.peft_config) == ["default"]


def test_after_a_refusal_the_same_model_takes_the_override(folder):
    base = tiny.llama(1)
    with pytest.raises(ValueError, match="another base weight"):
        PeftModel.from_pretrained(base, folder)
    model = PeftModel.from_pretrained(base, folder, check_base=False)
    fresh = PeftModel.from_pretrained(tiny.llama(1), folder, check_base=False)
    assert torch.equal(tiny.logits(model), tiny.logits(fresh))


def test_an_adapter_keeps_the_fingerprint_of_the_weight_it_sits_on(folder, tmp_path):
    model = PeftModel.from_pretrained(tiny.llama(1), folder, check_base=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(1), tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    with pytest.raises(ValueError, match="another base weight"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_accepted(folder, dtype):
    loaded = PeftModel.from_pretrained(tiny.llama(dtype=dtype), folder)
    exact = tiny.logits(PeftModel.from_pretrained(tiny.llama(), folder))
    torch.testing.assert_close(tiny.logits(loaded).float(), exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("keep", [0.9, 0.02, 0.0], ids=["tensors", "header", "empty"])
def test_truncated(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(len(data) * keep)])
    refused(folder, "header|file", error=Exception)
    with pytest.raises(ValueError, match=r"cut short or is no safetensors file.*download it again"):
        PeftModel.from_pretrained(tiny.llama(), folder)


def test_every_bit_of_the_tensors_is_guarded(folder):
    data = (folder / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    base = tiny.adapted(norm="channel", train_bias=True)
    before = tiny.snapshot(base)
    positions = torch.randint(start, len(data), (60,), generator=torch.Generator().manual_seed(0))
    for position in positions.tolist():
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"do not match their checksum|with other settings"):
            base.load_adapter(folder, "default")
    tiny.assert_same(tiny.snapshot(base), before)


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", ["core", "fingerprint"])
def test_a_dtype_that_was_changed_is_no_cast(name, place, folder):
    """Of as many bits, so that it is a whole file, and a number of another size."""
    model = tiny.adapted(norm="channel", train_bias=True)
    secura.fold(model)
    model.save_pretrained(folder)
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    key = sorted(key for key in header if key.endswith(f".{name}"))[place]
    header[key]["dtype"] = "I32"
    made = json.dumps(header).encode()
    made += b" " * (-len(made) % 8)
    (folder / WEIGHTS).write_bytes(len(made).to_bytes(8, "little") + made + content[8 + length :])
    refused(folder, "checksum")


def test_a_flipped_bit_is_named_with_its_layer(folder):
    def flip(state):
        state[FIRST + "A"].view(torch.int32)[1, 2] ^= 1

    rewrite(folder, flip)
    refused(folder, r"layers\.0\.self_attn\.q_proj.*do not match their checksum")


@pytest.mark.parametrize("name", ["A", "core", "fingerprint", "bias"])
def test_a_missing_tensor(folder, name):
    rewrite(folder, lambda state: state.pop(FIRST + name))
    refused(folder, r"layers\.0\.self_attn\.q_proj.*checksum")
    rewrite(folder, lambda state: state.pop(FIRST + "checksum"))
    refused(folder, rf"layers\.0\.self_attn\.q_proj.*the file has {name} None, this layer takes")


def test_a_checksum_of_zero_stands_for_none(folder):
    expected = tiny.logits(PeftModel.from_pretrained(tiny.llama(), folder))
    rewrite(folder, lambda state: state[FIRST + "checksum"].zero_())
    with pytest.raises(ValueError, match=r"do not match the checksum in its adapter_config\.json"):
        PeftModel.from_pretrained(tiny.llama(), folder)
    edit(folder, checksum="")
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.llama(), folder)), expected)


def test_a_file_without_tensors(folder):
    rewrite(folder, lambda state: state.clear())
    refused(folder, "no tensors were given for adapter 'default': its file is empty, or accelerate")


def test_a_file_of_something_else(folder):
    def rename(state):
        first = next(iter(state.values()))
        state.clear()
        state["base_model.model.lora_A.weight"] = first

    rewrite(folder, rename)
    refused(folder, "adapter 'default' holds no tensor of SECURA's")


def test_a_missing_layer(folder):
    def drop(state):
        for name in [name for name in state if "layers.1.self_attn.v_proj" in name]:
            del state[name]

    rewrite(folder, drop)
    refused(folder, r"layers\.1\.self_attn\.v_proj: the file has nothing for this layer \(1 such")


@pytest.mark.parametrize("name", ["rows", "cols"])
@pytest.mark.parametrize("value", [24, -1, "repeated"])
def test_indices_out_of_range_or_repeated(folder, name, value):
    def change(state):
        index = state[FIRST + name]
        index[1] = index[0] if value == "repeated" else value

    rewrite_with_checksums(folder, change)
    refused(folder, rf"q_proj.*{name} must be distinct integers in \[0, 24\)")


@pytest.mark.parametrize("name", ["A", "B", "core", "bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers(folder, name, value):
    def change(state):
        state[FIRST + name].view(-1)[0] = value

    rewrite_with_checksums(folder, change)
    refused(folder, rf"q_proj.*{name} holds NaN or inf")


def test_another_shape(folder):
    def change(state):
        state[FIRST + "A"] = state[FIRST + "A"][:, :-1].clone()

    rewrite_with_checksums(folder, change)
    refused(folder, r"the file has A \[4, 7\], this layer takes A \[4, 8\]: .*inner_r")


@pytest.mark.parametrize("check_base", [True, False])
def test_a_base_of_another_shape(check_base, tmp_path):
    """Into which the rows and columns would fit, so that nothing else tells."""
    tiny.adapted(norm="none").save_pretrained(tmp_path)
    edit(tmp_path, check_base=check_base)
    with pytest.raises(ValueError, match=r"q_proj.*: .* for a weight of another shape than this"):
        PeftModel.from_pretrained(tiny.llama(hidden=48), tmp_path)


@pytest.mark.parametrize(("version", "advice"), [(5, "get a newer secura"), (3, "train it again")])
def test_another_format(version, advice, folder):
    edit(folder, format_version=version, gate="a setting this version does not know")
    with pytest.raises(ValueError, match=rf"format {version}.*reads 4: {advice}"):
        PeftModel.from_pretrained(tiny.llama(), folder)
    with pytest.raises(ValueError, match=f"format {version}"):
        SecuraConfig.from_pretrained(folder)


@pytest.mark.parametrize("value", ["1", None, 1.5, True, 0])
def test_a_format_that_is_no_version(folder, value):
    edit(folder, format_version=value)
    with pytest.raises(ValueError, match="format"):
        SecuraConfig.from_pretrained(folder)


def test_a_setting_that_was_tampered_with(folder):
    edit(folder, norm="nosuch")
    with pytest.raises(ValueError, match="nosuch"):
        PeftModel.from_pretrained(tiny.llama(), folder)


def test_another_rank_in_the_config(folder):
    edit(folder, r=5)
    with pytest.raises(ValueError, match=r"q_proj.*A \[4, 8\].*this layer takes A \[5, 10\]"):
        PeftModel.from_pretrained(tiny.llama(), folder)


def test_a_bias_the_config_does_not_mention(folder):
    edit(folder, train_bias=False)
    with pytest.raises(ValueError, match=r"q_proj.*adapter_config\.json"):
        PeftModel.from_pretrained(tiny.llama(), folder)


def test_a_saved_adapter_is_put_beside_another(tmp_path):
    model = tiny.adapted(norm="none")
    tiny.perturb(model)
    model.save_pretrained(tmp_path)
    other = tiny.adapted(norm="channel")
    assert secura.from_pretrained(other, tmp_path, adapter_name="saved") is other
    other.set_adapter("saved")
    assert torch.equal(tiny.logits(other), tiny.logits(model))
    with pytest.raises(ValueError, match="has an adapter 'default' already: give another"):
        secura.from_pretrained(other, tmp_path)


def test_a_file_is_compared_with_its_base_once(folder, monkeypatch):
    """A pass over every adapted weight: once to make the adapter, once to load it."""
    seen, sums = [], []
    for module in (choosing, state):
        made = module.fingerprint
        monkeypatch.setattr(
            module, "fingerprint", lambda weight, made=made: seen.append(weight) or made(weight)
        )
    checked = state.verify_checksum
    monkeypatch.setattr(state, "verify_checksum", lambda *of: sums.append(of) or checked(*of))
    model = PeftModel.from_pretrained(tiny.llama(), folder)
    layers = len(tiny.layers(model))
    assert (len(seen), len(sums)) == (2 * layers, layers)
    loaded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = next(name for name in loaded if name.endswith(".B"))
    model.load_state_dict(loaded)
    for name, layer in tiny.layers(model).items():
        layer.check_loadable(loaded, f"{name}.")
    loaded[first].add_(1.0)  # after it was found fit
    with pytest.raises(ValueError, match="do not match their checksum"):
        model.load_state_dict(loaded)


def test_what_passed_one_check_is_not_excused_from_a_stricter_one():
    model = tiny.adapted(norm="none")
    (name, layer), *_ = tiny.layers(model).items()
    tensors, own = tiny.snapshot(model), f"{name}.secura_adapter.default."
    lacking = {key: value for key, value in tensors.items() if key != f"{own}B"}
    part, other = layer.secura_adapter["default"], nn.Linear(24, 24, bias=True)
    lacking.pop(f"{own}checksum")
    part.check_loadable(lacking, own)
    with pytest.raises(ValueError, match="the file has B None"):
        part.check_loadable(lacking, own, whole=True)
    part.check_loadable(tensors, own)
    with pytest.raises(ValueError, match="trained on another base weight"):
        part.check_loadable(tensors, own, other)


@pytest.mark.parametrize("config", [{"r": 8}, [1], "SECURA"])
def test_a_config_of_no_adapter_is_told(config, tmp_path):
    tiny.adapted().save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"adapter_config\.json names no peft_type"):
        secura.from_pretrained(tiny.llama(), tmp_path)
