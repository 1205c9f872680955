"""Merges that would be lost, or leave a layer that cannot go on, and what goes wrong within one."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from secura import AdapterConfig, SecuraConfig, SECURALinear, fold, merging


def pruned(linear):
    prune.l1_unstructured(linear, "weight", 0.3)
    return linear


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("make", [pruned, weight_norm, parametrizations.weight_norm])
def test_a_weight_that_is_made_anew_in_each_forward(make):
    torch.manual_seed(0)
    config = AdapterConfig(r=4, norm="none", init_weights=False)
    layer, x = SECURALinear(make(nn.Linear(8, 8)), config), torch.randn(3, 8)
    adapted = layer(x)
    with pytest.raises(ValueError, match=r"computed anew in each forward.*make it plain first"):
        layer.merge()
    torch.testing.assert_close(layer(x), adapted)


def test_a_pruned_weight_in_a_model():
    config = SecuraConfig(r=4, norm="none", target_modules=["0"], init_weights=False)
    model = get_peft_model(nn.Sequential(pruned(nn.Linear(8, 8))), config)
    with pytest.raises(ValueError, match=r"0: .*computed anew in each forward"):
        model.merge_and_unload()


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, torch.nan), (torch.float16, 1e6)])
def test_a_bias_with_nan_or_inf_is_not_merged(dtype, value):
    config = AdapterConfig(r=4, norm="none", train_bias=True)
    layer = SECURALinear(nn.Linear(8, 8, dtype=dtype), config)
    layer.bias = nn.Parameter(layer.bias.detach().float())
    with torch.no_grad():
        layer.bias[2] = value
    before = tiny.snapshot(layer.base)
    with pytest.raises(ValueError, match="weight or bias would hold NaN or inf"):
        layer.merge()
    tiny.assert_same(tiny.snapshot(layer.base), before)
    model = tiny.adapted(norm="none", train_bias=True)
    with torch.no_grad():
        tiny.parts(model)[-1].bias[0] = torch.nan
    before = tiny.base_weights(model)
    with pytest.raises(ValueError, match=r"v_proj: .*weight or bias would hold NaN"):
        model.merge_adapter()
    tiny.assert_same(tiny.base_weights(model), before)


def test_a_merge_in_inference_mode_leaves_a_model_that_can_be_trained():
    model = tiny.adapted(norm="channel")
    with torch.inference_mode():
        plain = model.merge_and_unload()
    assert not any(value.is_inference() for value in plain.parameters())
    again = tiny.adapted(plain, norm="channel")
    assert all(value.isfinite().all() for value in tiny.gradients(again).values())


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_a_merge_keeps_the_kind_of_tensor_that_the_base_has(made, merged):
    with torch.inference_mode(made):
        model = tiny.adapted(norm="channel")
        adapted = tiny.logits(model)
    with torch.inference_mode(merged):
        model.merge_adapter()
    with torch.inference_mode(made):
        torch.testing.assert_close(tiny.logits(model), adapted, rtol=0, atol=1e-5)
        plain = model.unload()
    assert all(value.is_inference() == made for value in plain.parameters())


def test_a_quantised_base_comes_back_in_the_mode_that_the_model_is_in():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    config = SecuraConfig(r=8, norm="none", target_modules=["0"], merge_dequantized=True)
    model = get_peft_model(model, config).eval()
    model.merge_adapter()
    model.train()
    model.unmerge_adapter()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("seen", ["merge", "run"])
def test_a_failure_in_a_second_merge_leaves_the_first(seen, monkeypatch):
    model = tiny.adapted(norm="none")
    model.add_adapter("second", tiny.config(norm="none", init_weights=False))
    model.merge_adapter()
    merged = tiny.logits(model)

    def fails(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(merging, "MergedState", fails)
    with pytest.raises(torch.OutOfMemoryError):
        model.merge_adapter(adapter_names=["second"])
    monkeypatch.undo()
    torch.testing.assert_close(tiny.logits(model), merged)
    if seen == "merge":
        model.unmerge_adapter()
        assert not any(layer.merged for layer in tiny.layers(model).values())


def test_a_layer_that_is_chosen_late_in_inference_mode_can_be_trained():
    with torch.device("meta"):
        layer = SECURALinear(nn.Linear(8, 8), AdapterConfig(r=4, norm="none"))
    with torch.inference_mode():
        layer.base.to_empty(device="cpu")
        layer.base.load_state_dict(nn.Linear(8, 8).state_dict())
        layer(torch.randn(2, 8))
    own = [value for name, value in layer.state_dict().items() if not name.startswith("base")]
    assert not any(value.is_inference() for value in own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_that_were_cast_come_back_wide(dtype):
    layer = SECURALinear(nn.Linear(8, 8), AdapterConfig(r=4, norm="none"))
    state = {n: v.to(dtype) if v.is_floating_point() else v for n, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.core.dtype == layer.fingerprint.dtype == torch.float32
    layer.core.data = layer.core.to(dtype)  # as FSDP1's mixed precision does it
    with pytest.raises(RuntimeError, match=r"buffer_dtype=torch\.float32"):
        layer.fold()


class Shaped(nn.Linear):
    """Takes ``[B, T, K]`` alone, counts its calls, and drops out while it trains."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        b, t, _ = x.shape
        out = (x.reshape(b * t, -1) @ self.weight.T + self.bias).view(b, t, -1)
        return nn.functional.dropout(out, 0.9, self.training)


class Needing(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


@pytest.mark.parametrize("kind", [Shaped, Needing])
def test_a_forward_of_its_own_that_is_a_product_or_cannot_be_tried_is_merged_into(kind):
    config = AdapterConfig(r=4, norm="none", init_weights=False)
    layer = SECURALinear(kind(8, 8), config).train()
    state = torch.get_rng_state()
    layer.merge()
    assert layer.merged and layer.base.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm", ["none", "weight"])
def test_a_change_is_wide_under_autocast(norm):
    torch.manual_seed(0)
    layer = SECURALinear(nn.Linear(48, 40), AdapterConfig(r=8, norm=norm, init_weights=False))
    expected = layer.delta_weight()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.delta_weight()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [1e-3, 0.03])
@pytest.mark.parametrize("norm", ["none", "channel", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_refused_on_its_own_merged_model(norm, dtype, size, tmp_path):
    if dtype == torch.bfloat16 and size < 0.01:
        pytest.skip("a change below bf16's rounding is not in the merged weight")
    model = tiny.adapted(tiny.llama(dtype=dtype), norm=norm)
    with torch.no_grad():
        for part in tiny.parts(model):
            part.B.mul_(size)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny.llama(dtype=dtype), tmp_path)
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match=r"q_proj.*(it was merged into this model|another base)"):
        PeftModel.from_pretrained(merged, tmp_path)


@pytest.mark.parametrize("how", ["folded", "anchored"])
def test_what_was_folded_or_is_anchored_is_known_on_its_own_merged_model(how, tmp_path):
    model = tiny.adapted(norm="none", core="u" if how == "anchored" else "ab")
    with torch.no_grad():
        for part in tiny.parts(model):
            part.trained.mul_(1e-3)
            if how == "anchored":
                part.set_anchor(torch.eye(4).flip(0), torch.eye(4), part.U.clone(), 1e-2)
    if how == "folded":
        fold(model)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match=r"q_proj.*it was merged into this model"):
        PeftModel.from_pretrained(merged, tmp_path)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_a_weight_that_two_modules_share_is_not_merged_into(merge):
    def tied():
        base = tiny.llama()
        base.lm_head.weight = base.model.embed_tokens.weight
        return base

    model = tiny.adapted(tied(), target_modules=["q_proj", "lm_head"])
    before = tiny.snapshot(model)
    with pytest.raises(
        ValueError, match=r"lm_head: .*model\.embed_tokens.*weight of its own first"
    ):
        getattr(model, merge)()
    tiny.assert_same(tiny.snapshot(model), before)
    head = model.base_model.model.lm_head.base_layer
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for mergeable in (model, tiny.adapted(tied())):
        adapted = tiny.logits(mergeable)
        getattr(mergeable, merge)()
        torch.testing.assert_close(tiny.logits(mergeable), adapted, rtol=0, atol=1e-5)


class Twins(nn.Module):
    """One Linear under two names, and a parent of another under two."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = self.a
        self.one = nn.Sequential(nn.Linear(8, 8))
        self.other = self.one

    def forward(self, x):
        return self.other(self.one(self.b(self.a(x))))


def test_a_module_under_two_names_is_not_merged_into():
    torch.manual_seed(0)
    config = SecuraConfig(r=4, target_modules=["a"], init_weights=False)
    model = get_peft_model(Twins(), config)
    with pytest.raises(ValueError, match=r"a: its weight is also that of b"):
        model.merge_and_unload()
    model = get_peft_model(Twins(), SecuraConfig(r=4, target_modules=["0"], init_weights=False))
    x = torch.randn(3, 8)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Own(nn.Linear):
    """As Falcon's."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_a_layer_that_is_more_than_a_product_is_not_merged_into(norm):
    settings = {"r": 4, "norm": norm, "target_modules": ["0"], "init_weights": False}
    model = get_peft_model(nn.Sequential(Doubled(8, 8)), SecuraConfig(**settings))
    before = tiny.snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="0: Doubled computes something else"):
            merge()
    tiny.assert_same(tiny.snapshot(model), before)
    own = get_peft_model(nn.Sequential(Own(8, 8)), SecuraConfig(**settings))
    x = torch.randn(3, 8)
    expected = own(x)
    torch.testing.assert_close(own.merge_and_unload()(x), expected)
    config = SecuraConfig(**settings, allow_inexact_merge=True)
    get_peft_model(nn.Sequential(Doubled(8, 8)), config).merge_and_unload()
