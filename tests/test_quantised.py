"""SECURA on a quantised base: the gather route, training, and no merge."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from secura import adapter, bases, export_lora
from secura.cli.generate import settle

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra quant")

KINDS = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny.llama(hidden=64, bias=False).save_pretrained(path)
    return path


@pytest.fixture(params=KINDS)
def load(request, folder):
    """Loads the quantised model anew; skips where this machine cannot run it."""

    def load():
        return LlamaForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**KINDS[request.param]),
            device_map="cpu", dtype=torch.float32,
        ).eval()  # fmt: skip

    try:
        tiny.logits(load())
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes does not run {request.param} here: {error}")
    return load


def dense_twin(model):
    """A plain Llama with the weights that the quantised one stands for."""
    plain = tiny.llama(hidden=64, bias=False)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            module.weight.data = bases.weight(model.get_submodule(name)).float().clone()
    return plain


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_equals_the_adapter_on_the_dequantised_weight(load, norm):
    quantised = load()
    twin = dense_twin(quantised)
    noise = (tiny.logits(load()) - tiny.logits(twin)).abs().max()
    model, exact = tiny.adapted(quantised, norm=norm), tiny.adapted(twin, norm=norm)
    change = (tiny.logits(exact) - tiny.logits(load())).abs().max()
    for _ in range(2):
        error = (tiny.logits(model) - tiny.logits(exact)).abs().max()
        assert error <= 2 * noise + 1e-4 < change
        for one in (model, exact):
            for layer in tiny.layers(one).values():
                layer.fold()
            tiny.perturb(one, 1)


@pytest.mark.parametrize("norm", ["none", "channel", "activation"])
def test_the_gather_route_never_dequantises_in_forward(load, norm, monkeypatch):
    model = tiny.adapted(load(), norm=norm)

    def fail(base):
        raise AssertionError("dequantised")

    monkeypatch.setattr(bases, "weight", fail)
    monkeypatch.setattr(adapter, "lowrank_linear", fail)
    model.train()
    assert len(tiny.gradients(model)) == 2 * len(tiny.layers(model))


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_trains(load, norm):
    model = tiny.adapted(load(), norm=norm).train()
    twin = tiny.adapted(dense_twin(load()), norm=norm).train()
    grads, expected = tiny.gradients(model), tiny.gradients(twin)
    assert grads.keys() == expected.keys()
    for name, value in grads.items():
        assert (value - expected[name]).norm() <= 0.25 * expected[name].norm()


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merge_is_refused(load, merge):
    model = tiny.adapted(load(), norm="none")
    before = tiny.logits(model)
    with pytest.raises(ValueError, match=r"q_proj: a quantised weight.*full precision"):
        getattr(model, merge)()
    assert torch.equal(tiny.logits(model), before)


def test_answering_with_the_space_weight_goes_on_unmerged(load):
    model = tiny.adapted(load(), norm="weight")
    before = tiny.logits(model)
    assert settle(model) is model
    assert torch.equal(tiny.logits(model), before)


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_an_exported_lora_computes_the_same_on_the_quantised_base(load, norm, tmp_path):
    noise = (tiny.logits(load()) - tiny.logits(dense_twin(load()))).abs().max()
    model = tiny.adapted(load(), norm=norm)
    adapted = tiny.logits(model)
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(load(), tmp_path / "lora")
    error = (tiny.logits(lora) - adapted).abs().max()
    assert error <= 2 * noise + 1e-4 < (tiny.logits(load()) - adapted).abs().max()
