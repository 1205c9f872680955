"""What PEFT's users count on: nothing loads in part, too much or in silence."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny
import torch
from adapter_files import CONFIG, FIRST, WEIGHTS, edit, rewrite
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn

import secura
from secura import SecuraConfig


@pytest.fixture
def folder(tmp_path):
    """A saved adapter."""
    tiny.adapted(norm="channel").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def transformers_way(folder):
    model = tiny.llama()
    model.load_adapter(str(folder))
    tiny.logits(model)
    return model


WAYS = {
    "from_pretrained": lambda path: PeftModel.from_pretrained(tiny.llama(), path),
    "low memory": lambda path: PeftModel.from_pretrained(
        tiny.llama(), path, low_cpu_mem_usage=True
    ),
    "config": lambda path: PeftModel.from_pretrained(
        tiny.llama(), path, config=PeftConfig.from_pretrained(path)
    ),
    "secura": lambda path: secura.from_pretrained(tiny.llama(), path),
    "transformers": transformers_way,
}


@pytest.fixture(params=WAYS)
def load(request):
    """A way to load a folder."""
    return WAYS[request.param]


# Files of another model, or with too much or too little in them


@pytest.mark.parametrize("compiled_later", [False, True])
def test_an_adapter_of_a_compiled_base_has_plain_names(compiled_later, tmp_path):
    model = tiny.adapted(
        torch.compile(tiny.llama(), backend="eager"), norm="channel", target_modules="all-linear"
    )
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / WEIGHTS) if "_orig_mod" in name]
    assert "_orig_mod" not in (tmp_path / CONFIG).read_text()
    base = torch.compile(tiny.llama(), backend="eager") if compiled_later else tiny.llama()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_names_that_compiling_gave_an_older_file_are_understood(folder):
    def rename(state):
        return {
            n.replace("base_model.model.", "base_model.model._orig_mod."): state[n] for n in state
        }

    want = tiny.logits(PeftModel.from_pretrained(tiny.llama(), folder))
    rewrite(folder, rename)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.llama(), folder)), want)


def test_an_adapter_of_a_wrapper_model_reaches_no_layer(folder, load):
    rewrite(folder, lambda state: {n.replace(".layers.", ".text.layers."): state[n] for n in state})
    with pytest.raises(ValueError, match=r"text\.layers|nothing of the adapter's file reached"):
        load(folder)


def test_a_config_that_names_fewer_layers_than_the_file_holds(folder):
    edit(folder, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"2 layer\(s\) that the model .*has not.*v_proj"):
        PeftModel.from_pretrained(tiny.llama(), folder)


@pytest.mark.parametrize(
    "tensor", ["lm_head.weight", "model.layers.0.self_attn.q_proj.base_layer.weight"]
)
def test_tensors_of_the_base_are_refused(folder, tensor):
    zeros = torch.zeros(tiny.VOCAB if "head" in tensor else 24, 24)
    rewrite(folder, lambda state: state | {f"base_model.model.{tensor}": zeros})
    for checksum in (json.loads((folder / CONFIG).read_text())["checksum"], ""):
        edit(folder, checksum=checksum)
        base = tiny.llama()
        before = tiny.snapshot(base)
        with pytest.raises(
            ValueError, match=r"1 tensor\(s\) that are no adapter's.*would overwrite"
        ):
            PeftModel.from_pretrained(base, folder)
        tiny.assert_same(tiny.base_weights(base), before)


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_resized_embeddings_come_along(settings, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    load = type(tiny.llama()).from_pretrained
    base = load(tmp_path / "base")
    base.resize_token_embeddings(tiny.VOCAB + 2)
    model = tiny.adapted(base, norm="channel", **settings)
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    extra = json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_tensors"]
    assert len(extra) == (4 if settings else 2)
    other = load(tmp_path / "base")
    other.resize_token_embeddings(tiny.VOCAB + 2)
    loaded = PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    again = load(tmp_path / "base")
    again.resize_token_embeddings(tiny.VOCAB + 2)
    again = tiny.adapted(again, norm="channel", seed=4, **settings)
    again.load_adapter(tmp_path / "adapter", "default")  # as a resumed run does
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_an_adapted_output_layer_comes_along(tmp_path):
    model = tiny.adapted(norm="channel", target_modules=["q_proj", "lm_head"])
    with pytest.warns(UserWarning, match="embedding layers found in `target_modules`"):
        model.save_pretrained(tmp_path)
    want = tiny.logits(model)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.llama(), tmp_path)), want)
    edit(tmp_path, checksum="", base_tensors=None)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.llama(), tmp_path)), want)


# Damage, by every way of loading


def test_sound_files_load(folder, load):
    assert torch.equal(tiny.logits(load(folder)), tiny.logits(tiny.adapted(norm="channel")))


@pytest.mark.parametrize("name", ["A", "B", "rows", "core"])
def test_a_damaged_tensor(folder, load, name):
    def change(state):
        state[FIRST + name].view(-1)[0] += 1

    rewrite(folder, change)
    with pytest.raises(ValueError, match="checksum"):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [{"scaling": 2.0}, {"norm": "none"}, {"norm_scale": 5.0}, {"norm_combine": "averaged"},
     {"norm_eps": 1e-6}, {"norm_eps_relative": True}, {"restrain": True}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_setting_edited_by_hand(folder, load, changes):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=r"q_proj.*saved with other settings.*scaling, the norm"):
        load(folder)


def test_what_folds_are_measured_against_is_a_setting_once_there_are_any(tmp_path, load):
    model = tiny.adapted(norm="channel")
    secura.fold(model)
    model.save_pretrained(tmp_path)
    edit(tmp_path, norm_reference="folded")
    with pytest.raises(ValueError, match=r"q_proj.*saved with other settings"):
        load(tmp_path)


def test_settings_that_change_no_result_may_be_edited(folder, load):
    edit(folder, norm_form="calibrated", dropout=0.1, base_model_name_or_path="x", fold_every=3)
    edit(folder, norm_reference="folded")
    assert torch.equal(tiny.logits(load(folder)), tiny.logits(tiny.adapted(norm="channel")))


def test_damaged_modules_to_save(tmp_path):
    tiny.adapted(norm="channel", modules_to_save=["lm_head"]).save_pretrained(tmp_path)

    def change(state):
        state["base_model.model.lm_head.weight"][3, 4] += 1

    PeftModel.from_pretrained(tiny.llama(), tmp_path)
    rewrite(tmp_path, change)
    for low in (False, True):
        with pytest.raises(
            ValueError, match=r"do not match the checksum in its adapter_config\.json"
        ):
            PeftModel.from_pretrained(tiny.llama(), tmp_path, low_cpu_mem_usage=low)


def test_a_file_cut_short_is_named(folder):
    data = (folder / WEIGHTS).read_bytes()
    for keep in (0, 20, len(data) - 100):
        (folder / WEIGHTS).write_bytes(data[:keep])
        for way in (secura.from_pretrained, PeftModel.from_pretrained):
            with pytest.raises(ValueError, match=rf"{WEIGHTS} was cut short"):
                way(tiny.llama(), folder)
    (folder / CONFIG).write_text("{")
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{CONFIG} is no JSON"):
        secura.from_pretrained(tiny.llama(), folder)


def test_transformers_load_adapter_for_training_and_casting(folder):
    model = tiny.llama()
    model.load_adapter(str(folder), adapter_kwargs={})
    assert not any(part.training for part in tiny.parts(model))
    want = tiny.logits(model)
    tiny.perturb(model, 4)
    assert not torch.equal(tiny.logits(model), want)
    trainable = tiny.llama()
    trainable.load_adapter(str(folder), is_trainable=True)
    trainable.to(torch.bfloat16)
    torch.testing.assert_close(tiny.logits(trainable.eval()).float(), want, rtol=0, atol=0.05)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_transformers_loads_onto_a_base_in_bf16(is_trainable, folder):
    """It casts what it loads to the dtype of what is there: A and B are saved in fp32."""

    def loaded():
        model = tiny.llama(dtype=torch.bfloat16)
        model.load_adapter(str(folder), is_trainable=is_trainable)
        return tiny.logits(model.eval())

    want = tiny.logits(secura.from_pretrained(tiny.llama(dtype=torch.bfloat16), folder))
    assert torch.equal(loaded(), want)
    edit(folder, scaling=0.5)
    with pytest.raises(ValueError, match="saved with other settings"):
        loaded()
    edit(folder, scaling=1.0)
    rewrite(
        folder, lambda state: {n: t * 1.001 if n.endswith("B") else t for n, t in state.items()}
    )
    with pytest.raises(ValueError, match="do not match their checksum"):
        loaded()


# Adapters on models


def test_init_weights_false_draws_b():
    bases = [tiny.llama(), tiny.llama()]
    config = tiny.config(norm="none", init_weights=False)
    first, second = (tiny.logits(get_peft_model(base, config).eval()) for base in bases)
    assert not torch.equal(first, tiny.logits(tiny.llama()))
    assert not torch.equal(first, second)
    assert torch.isfinite(first).all()


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_a_layer_with_one_output(norm):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.out = nn.Linear(9, 7), nn.Linear(7, 1)

        def forward(self, x):
            return self.out(self.fc(x))

    settings = {"norm": norm, "allow_inexact_merge": True, "init_weights": False}
    config = tiny.config(target_modules=["fc", "out"], rank_pattern={"out": 1}, **settings)
    model = get_peft_model(Model(), config).eval()
    x = torch.randn(5, 9)
    adapted = model(x).detach()
    assert not torch.equal(adapted, Model()(x))
    merged = model.merge_and_unload()
    if norm != "activation":
        torch.testing.assert_close(merged(x), adapted)
    with pytest.raises(ValueError, match=r"^out: r=4 .*for this layer alone set rank_pattern"):
        get_peft_model(Model(), tiny.config(target_modules=["fc", "out"], norm=norm))


def test_what_is_not_offered_is_refused_in_words(folder):
    model = tiny.adapted(norm="channel")
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but SECURA"):
        hotswap_adapter(model, str(folder), adapter_name="default")
    with pytest.raises(ValueError, match=r"does not repeat layers.*repeat them in the base"):
        SecuraConfig(layer_replication=[[0, 2], [1, 2]])


CODE = """
import sys
import {first}
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
PeftModel.from_pretrained(base, sys.argv[2])
"""


def test_the_folder_says_what_to_import(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    for _ in range(2):
        tiny.adapted(norm="channel").save_pretrained(adapter)
    card = (adapter / "README.md").read_text()
    assert card.count("import secura.tuner") == 1
    assert card.index("## How to Get Started") < card.index("import secura.tuner")
    assert "import secura.tuner first" in json.loads((adapter / CONFIG).read_text())["how_to_load"]
    command = [sys.executable, "-c", CODE.format(first="secura.tuner"), tmp_path / "base", adapter]
    subprocess.run(command, check=True, capture_output=True)


class Scaled(torch.nn.Linear):
    """A layer of its own, which its model calls with more than an input."""

    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


def scaled(**settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(Scaled(24, 16))
    return get_peft_model(model, SecuraConfig(r=4, target_modules=["0"], **settings))


@pytest.mark.parametrize("norm", ["none", "channel", "activation"])
def test_what_else_a_layer_is_called_with_reaches_the_base(norm):
    layer, x = scaled(norm=norm).base_model.model[0], torch.randn(3, 24)
    torch.testing.assert_close(layer(x, scale=3.0), 3 * layer.base_layer(x))
    torch.testing.assert_close(layer(x, 3.0), 3 * layer.base_layer(x))


@pytest.mark.parametrize("settings", [{"norm": "weight"}, {"stochastic_rounding": True}])
def test_it_is_an_error_where_the_base_makes_no_product(settings):
    layer = scaled(**{"norm": "none"} | settings).base_model.model[0]
    with pytest.raises(TypeError, match="called with more than its input"):
        layer(torch.randn(3, 24), scale=3.0)
