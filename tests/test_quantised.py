"""SECURA on quantised bases: training, merging by dequantising, and what is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import PeftModel
from quantised_models import (
    KINDS,
    ROUNDS_INPUTS,
    bitsandbytes,
    dense_twin,
    four_bits,
    fp8_product,
    projections,
    torchao,
)
from torch import nn
from transformers import CompressedTensorsConfig, LlamaForCausalLM
from transformers.integrations import finegrained_fp8

from secura import AdapterConfig, SECURALinear, bases, cabr, export_lora
from secura.cli.generate import settle
from secura_kernels import naive


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny.wide().save_pretrained(path)
    return path


@pytest.fixture(params=KINDS)
def load(request, folder, monkeypatch):
    """Loads the quantised model anew; skips where its package is not installed."""
    package = request.param.partition(" ")[0]
    if package == "finegrained":  # whose product needs a kernel for GPUs
        monkeypatch.setattr(finegrained_fp8, "fp8_linear", fp8_product)
    else:
        pytest.importorskip(package, reason=f"{package} is not installed")
    load = lambda: KINDS[request.param](folder)  # noqa: E731
    load.rounds_inputs = request.param in ROUNDS_INPUTS
    return load


@pytest.mark.parametrize(
    ("load", "training"),
    [(kind, True) for kind in KINDS] + [(kind, False) for kind in ROUNDS_INPUTS],
    indirect=["load"],
)
@pytest.mark.parametrize("norm", tiny.NORMS)
def test_equals_the_adapter_on_the_dequantised_weight(load, norm, training):
    """Outputs and gradients, before and after a fold; in evaluation too where that is another y0.

    A base that rounds its inputs has another y0, in every layer: the bounds are then of what that
    does to this model, and the test below holds each layer against its base's own y0.
    """
    rounds = load.rounds_inputs and not training
    quantised = load()
    twin = dense_twin(quantised)
    noise = (tiny.logits(load().train(training)) - tiny.logits(twin)).abs().max()
    assert (noise > 1e-2) if rounds else (noise < 1e-5)
    model, exact = tiny.adapted(quantised, norm=norm), tiny.adapted(twin, norm=norm)
    change = (tiny.logits(exact) - tiny.logits(load())).abs().max()
    for _ in range(2):
        model.train(training)
        error = (tiny.logits(model) - tiny.logits(exact)).abs().max()
        assert error <= (2 * noise if rounds else 2e-5) < change
        grads, expected = tiny.gradients(model), tiny.gradients(exact)
        assert grads.keys() == expected.keys()
        for name, value in grads.items():
            assert gap(value, expected[name]) <= (0.1 if rounds else 1e-5)
        for one in (model, exact):
            for layer in tiny.layers(one.eval()).values():
                layer.fold()
            tiny.perturb(one, 1)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("norm", tiny.NORMS)
def test_a_layer_is_exact_given_what_its_base_makes(load, norm, training):
    """Out and ∂x, ∂A, ∂B, ∂δb beside fp64's of the base's own y0, before and after a fold.

    ∂x is ∂y0 times the dequantised weight: none of these bases rounds in its backward pass.
    ``weight`` never asks the base: the oracle there is the product with the dequantised weight.
    """
    base = load().model.layers[0].self_attn.q_proj
    settings = {"norm": norm, "restrain": norm != "none", "train_bias": True}
    layer = SECURALinear(base, AdapterConfig(r=4, **settings)).train(training)
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, 5, tiny.WIDE, generator=generator) for _ in range(2))
    x[0, 0, 3] = 7.5  # above LLM.int8's threshold: that column is not rounded
    weight = bases.weight(base).double()
    with torch.no_grad():
        rounding = gap(base(x), x.double() @ weight.T)
    assert (rounding > 1e-3) if load.rounds_inputs and not training else (rounding < 1e-6)
    for folds in range(2):
        for value in (layer.B, layer.bias):
            value.data.normal_(std=0.5, generator=generator)
        frozen = layer.kernel_layer(base, weight)._replace(columns=None)
        if folds:
            frozen = frozen._replace(core=layer.core.double())
        given = [x.requires_grad_(), layer.A, layer.B, layer.bias]
        wide = [value.detach().double().requires_grad_() for value in given]
        found, expected = results(layer(x), given, g), results(oracle(base, frozen, *wide), wide, g)
        for value, right in zip(found, expected, strict=True):
            assert gap(value, right) < 1e-6
        layer.fold()


def oracle(base, frozen, x, a, b, delta_bias):
    """The adapted layer in the dtype of x, on the y0 that ``base`` makes in fp32."""
    if frozen.options.norm == "weight":
        return naive.secura_linear(x, frozen, a, b, delta_bias=delta_bias)
    y0 = x @ frozen.weight.T
    rounding = base(x.detach().float()).to(x.dtype) - y0.detach()
    return naive.secura_add(y0 + rounding, frozen, a, b, delta_bias=delta_bias)


def results(out, inputs, g):
    """``out`` and its gradients to ``inputs``."""
    return [out.detach(), *torch.autograd.grad(out, inputs, g.to(out.dtype))]


def gap(found, expected):
    """The norm of the difference, relative to the norm of what is expected."""
    return (found - expected).norm() / expected.norm()


def test_two_adapters_add_up_as_on_the_dequantised_weight(load):
    quantised = load()
    twin = dense_twin(quantised)
    model, exact = (tiny.adapted(one, norm="none").train() for one in (quantised, twin))
    for one in (model, exact):
        one.add_adapter("second", tiny.config(norm="none", seed=1, r=6))
        tiny.perturb(one, 1, "second")
        one.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(tiny.logits(model), tiny.logits(exact), rtol=0, atol=2e-5)


def test_the_gather_route_never_dequantises_in_forward(load, monkeypatch):
    model = tiny.adapted(load(), norm="channel")

    def fail(*_):
        raise AssertionError("dequantised")

    monkeypatch.setattr(bases, "weight", fail)
    monkeypatch.setattr(cabr, "secura_linear", fail)
    model.train()
    assert len(tiny.gradients(model)) == 2 * len(tiny.layers(model))


def test_a_merge_that_nobody_asked_to_dequantise_is_refused(load):
    model = tiny.adapted(load(), norm="weight")
    before = tiny.logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"q_proj: a quantised weight.*merge_dequantized=True"):
            merge()
    assert settle(model) is model
    assert torch.equal(tiny.logits(model), before)
    layer = next(iter(tiny.layers(model).values()))
    with pytest.raises(ValueError, match=r"^a quantised weight.*merge_dequantized=True"):
        SECURALinear(layer.base_layer, tiny.config(r=3)).merge()


@pytest.mark.parametrize("norm", ["none", "channel", "weight"])
def test_a_merge_dequantises_where_it_is_asked_to(load, norm):
    """It writes what a merge on the dequantised weight writes, in a plain layer, and back."""
    quantised = load()
    twin = tiny.adapted(dense_twin(quantised), norm=norm)
    model = tiny.adapted(quantised, norm=norm)
    model.peft_config["default"].merge_dequantized = True
    for one in (model, twin):
        tiny.perturb(one, 2)
    before = {name: layer.base_layer for name, layer in tiny.layers(model).items()}
    unmerged = tiny.logits(model)
    model.merge_adapter()
    twin.merge_adapter()
    for name, layer in tiny.layers(model).items():
        merged = layer.base_layer
        assert type(merged) is nn.Linear
        assert torch.equal(merged.weight, tiny.layers(twin)[name].base_layer.weight)
    after = tiny.logits(model)
    model.unmerge_adapter()
    assert {name: layer.base_layer for name, layer in tiny.layers(model).items()} == before
    assert torch.equal(tiny.logits(model), unmerged)
    assert torch.equal(tiny.logits(model.merge_and_unload()), after)


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="bitsandbytes packs nothing for this CPU"
)
@pytest.mark.parametrize("norm", ["none", "weight"])
def test_training_goes_on_after_an_evaluation_that_packed_the_base(folder, norm):
    pytest.importorskip("bitsandbytes")

    def evaluated():
        base = bitsandbytes(folder, load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        tiny.logits(base)
        return base

    def base_of(model):
        return model.base_model.model.model.layers[1].mlp.down_proj.base_layer  # K of two blocks

    settings = {"norm": norm, "target_modules": "all-linear"}
    fresh = tiny.adapted(four_bits(folder), **settings)
    late, early = tiny.adapted(evaluated(), **settings), tiny.adapted(four_bits(folder), **settings)
    for module in early.modules():
        module.support_avx512bf16_for_cpu = True
    expected = tiny.gradients(fresh.train())
    tiny.logits(early)  # the adapter is there when it packs
    for name, found in tiny.gradients(early.train()).items():
        assert gap(found, expected[name]) < 0.1, name
    for model in (late, early):
        before = tiny.gradients(model.train())
        tiny.logits(model.eval())
        state = base_of(model).weight.quant_state
        assert not getattr(state, "packing_format_for_cpu", False)  # it is not packed again
        tiny.assert_same(tiny.gradients(model.train()), before)
        assert gap(bases.weight(base_of(model)), bases.weight(base_of(fresh))) < 0.005


def test_a_merged_model_is_loaded_again_as_it_was(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = bitsandbytes(folder, torch.bfloat16, load_in_4bit=True)
    model = tiny.adapted(model, norm="channel", merge_dequantized=True).merge_and_unload()
    assert model.model.layers[1].self_attn.q_proj.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert type(again.model.layers[1].self_attn.q_proj) is nn.Linear
    assert type(again.model.layers[1].self_attn.k_proj) is not nn.Linear
    assert torch.equal(tiny.logits(again.eval()), tiny.logits(model))
    model = bitsandbytes(folder, torch.bfloat16, load_in_8bit=True)  # which dequantises to fp32
    model = tiny.adapted(model, norm="none", merge_dequantized=True)
    model.merge_adapter()
    dtypes = {layer.base_layer.weight.dtype for layer in tiny.layers(model).values()}
    assert dtypes == {torch.bfloat16}


@pytest.fixture(params=["Int8Dynamic", "Float8Dynamic"])
def dynamic(request, monkeypatch):
    """A Llama whose layers round their inputs too, with ops that have no derivative."""
    quantization = pytest.importorskip("torchao.quantization")
    if request.param == "Int8Dynamic":
        return torchao(None, "Int8DynamicActivationInt8WeightConfig")
    # which asks for a GPU, but multiplies on a CPU as well
    monkeypatch.setattr(quantization.quant_api, "_check_hardware_support", lambda _: None)
    return torchao(None, "Float8DynamicActivationFloat8WeightConfig")


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_a_base_that_loses_the_gradient_of_its_input_is_refused(dynamic, norm):
    """In training; it computes and merges."""
    twin, everywhere = dense_twin(dynamic), {"norm": norm, "target_modules": "all-linear"}
    everywhere["merge_dequantized"] = True
    model, twin = (tiny.adapted(one, **everywhere).train() for one in (dynamic, twin))
    if norm == "weight":
        grads, expected = tiny.gradients(model), tiny.gradients(twin)
        for name, value in grads.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    else:
        reason = r"proj: the base layer \((Int|Float)8Tensor.*no gradient"
        with pytest.raises(ValueError, match=reason):
            tiny.gradients(model)
        assert tiny.logits(model).isfinite().all()
    if norm != "activation":
        merged, expected = (one.merge_and_unload().state_dict() for one in (model, twin))
        tiny.assert_same(merged, expected)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """The folder of a Llama that compressed-tensors has packed into 8 bits."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model, path = tiny.wide(), tmp_path_factory.mktemp("compressed")
    weights = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
    scheme = QuantizationScheme(targets=["re:.*proj"], weights=weights)
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}))
    for name, module in model.named_modules():
        if projections(module, name):
            module.weight_scale.data = module.weight.abs().amax(1, keepdim=True) / 127
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)
    return path


@pytest.mark.parametrize("norm", tiny.NORMS)
@pytest.mark.parametrize("how", ["dequantize", "run once"])
def test_compressed_tensors_train_once_they_are_dense(compressed, norm, how):
    settings = CompressedTensorsConfig(dequantize=True) if how == "dequantize" else None
    model = LlamaForCausalLM.from_pretrained(compressed, quantization_config=settings).eval()
    if how == "run once":
        with pytest.raises(ValueError, match=r"q_proj: the weight is not dense yet.*dequantize"):
            tiny.adapted(model, norm=norm)
        tiny.logits(model)
    assert (tiny.wide().model.layers[0].mlp.up_proj.weight
            - model.model.layers[0].mlp.up_proj.weight).abs().max() > 1e-5  # fmt: skip
    twin = tiny.adapted(dense_twin(model), norm=norm).train()
    model = tiny.adapted(model, norm=norm).train()
    if how == "run once" and norm == "weight":
        with pytest.raises(ValueError, match=r"q_proj: norm='weight'.*its own forward"):
            tiny.gradients(model)
        return
    grads, expected = tiny.gradients(model), tiny.gradients(twin)
    for name, value in grads.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    if norm == "activation":
        return
    before = tiny.logits(model.eval())
    model.merge_adapter()
    torch.testing.assert_close(tiny.logits(model), before, rtol=1e-4, atol=1e-5)


def test_an_exported_lora_computes_the_same_on_the_quantised_base(load, tmp_path):
    noise = (tiny.logits(load()) - tiny.logits(dense_twin(load()))).abs().max()
    model = tiny.adapted(load(), norm="channel")
    adapted = tiny.logits(model)
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(load(), tmp_path / "lora")
    error = (tiny.logits(lora) - adapted).abs().max()
    assert error <= 2 * noise + 1e-4 < (tiny.logits(load()) - adapted).abs().max()
