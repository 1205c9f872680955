"""Layers that an adapter would do nothing for are refused by name.

Quantised ones that nothing here dequantises or that PEFT passes over, and such as are not called.
"""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import tiny
import torch
from peft import get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
    ReformerConfig,
    ReformerModelWithLMHead,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers.models.llama4.modeling_llama4 import Llama4Router

import secura
from secura import SecuraConfig


class QuantLinear(nn.Module):
    """A layer as GPTQ and AWQ have it: packed integers, no weight, not of torch.nn.Linear."""

    def __init__(self, linear):
        super().__init__()
        k, n = self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.ones(k // 8, n, dtype=torch.int32))
        self.register_buffer("qzeros", torch.ones(k // 32, n // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(k // 32, n, dtype=torch.float16))


class Blocks(nn.Module):
    """A layer that can be dequantised, but is not of torch.nn.Linear (HQQ's say)."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.block_size = (tiny.WIDE, tiny.WIDE)
        weight = linear.weight.data.to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(torch.ones(1, 1), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float())


def partly(kind):
    """A dense Llama with one projection of another kind, and its modules."""
    model = tiny.wide()
    attention = model.model.layers[1].self_attn
    attention.q_proj = kind(attention.q_proj)
    return model, kinds(model)


def kinds(model):
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "q_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("known", [False, True])
def test_a_layer_that_cannot_be_dequantised_is_refused_and_nothing_changed(
    targets, known, monkeypatch
):
    error, reason = TypeError, "is a quantised layer that cannot be.*precision.*exclude_modules"
    if known:  # to PEFT, where its package is installed
        error, reason = ValueError, r"\(QuantLinear\) cannot be dequantised.*gptq.*precision"
        backend = ForwardOnlyQuantizationBackend("gptq")
        monkeypatch.setattr("peft.utils.resolve_quantization_backend", lambda base: backend)
    model, before = partly(QuantLinear)
    with pytest.raises(error, match=rf"^model\.layers\.1\.self_attn\.q_proj: QuantLinear {reason}"):
        get_peft_model(model, tiny.config(target_modules=targets))
    assert kinds(model) == before and not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_all_linear_leaves_no_quantised_layer_out_unless_told_to():
    model, before = partly(Blocks)
    config = {"target_modules": "all-linear"}
    with pytest.raises(ValueError, match=r"q_proj: target_modules='all-linear' passes over Blocks"):
        get_peft_model(model, tiny.config(**config))
    assert kinds(model) == before
    named = get_peft_model(model, tiny.config())
    assert len(tiny.layers(named)) == 4
    named.add_adapter("more", tiny.config(**config))  # its layers are adapted already
    for kind in (QuantLinear, Blocks):
        left_out = tiny.config(**config, exclude_modules=["layers.1.self_attn.q_proj"])
        assert len(tiny.layers(get_peft_model(partly(kind)[0], left_out))) == 13
    headless = tiny.wide()
    headless.lm_head = QuantLinear(headless.lm_head)
    assert len(tiny.layers(get_peft_model(headless, tiny.config(**config)))) == 14


class MultiheadAttention(nn.Module):
    """Of that name, and calls its layers, as remote code does."""

    def __init__(self):
        super().__init__()
        self.out_proj = nn.Linear(16, 16)

    def forward(self, x):
        return self.out_proj(x)


def test_a_module_of_ones_own_may_have_such_a_name():
    config = SecuraConfig(r=4, target_modules=["out_proj"])
    model = get_peft_model(nn.ModuleDict({"block": MultiheadAttention()}), config)
    assert len(tiny.layers(model)) == 1


FAST = ["out_proj", "linear1", "linear2"]


def encoder():
    """Reads its out_proj, and in eval its linears too."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.ModuleDict({"block": layer, "head": nn.Linear(16, 8)})


def mamba():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    return MambaForCausalLM(MambaConfig(vocab_size=tiny.VOCAB, **sizes))


def mobilebert():
    return MobileBertForMaskedLM(MobileBertConfig(vocab_size=60, num_hidden_layers=1))


def reformer():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8}
    sizes |= {"feed_forward_size": 16, "attn_layers": ["lsh"], "axial_pos_embds": False}
    return ReformerModelWithLMHead(ReformerConfig(vocab_size=60, is_decoder=True, **sizes))


def rwkv(rescale_every=1):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
    return RwkvForCausalLM(RwkvConfig(vocab_size=60, rescale_every=rescale_every, **sizes))


@pytest.mark.parametrize(
    ("make", "targets", "unread", "message"),
    [
        (encoder, ["out_proj"], FAST, "block.self_attn.out_proj: MultiheadAttention reads"),
        (encoder, ["head", "linear2"], FAST, "block.linear2: TransformerEncoderLayer reads"),
        (
            mobilebert,
            ["query", "predictions.dense"],
            ["predictions.dense"],
            r"predictions\.dense: MobileBertLMPredictionHead reads"
            r".*exclude_modules=\['cls\.predictions\.dense'\]",
        ),
        (
            mamba,
            ["x_proj", "dt_proj", "out_proj"],
            ["x_proj", "dt_proj", "out_proj"],
            r"x_proj: MambaMixer reads .*exclude_modules=\['backbone\.layers\.0\.mixer\.x_proj'\]",
        ),
        (
            reformer,
            ["query_key"],
            ["query_key", "value"],
            "query_key: LSHSelfAttention reads",
        ),
        (rwkv, "all-linear", ["output", "value"], "output: the model rescales the weight"),
        (rwkv, ["value"], ["output", "value"], "value: .*rescale_every=0 in its config"),
    ],
)
def test_a_layer_that_is_read_and_not_called_is_refused(make, targets, unread, message):
    model = make()
    before = kinds(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, SecuraConfig(r=4, target_modules=targets))
    assert kinds(model) == before
    config = SecuraConfig(r=4, target_modules="all-linear", exclude_modules=unread)
    assert tiny.layers(get_peft_model(model, config))


@pytest.mark.parametrize(
    ("make", "count"), [(mobilebert, 1), (mamba, 3), (reformer, 2), (encoder, 3)]
)
def test_all_linear_leaves_out_what_is_read_and_says_so(make, count, tmp_path):
    """Many of them lie beside layers of the same name, which a suffix would leave out too."""
    torch.manual_seed(0)
    model = make()
    config = SecuraConfig(r=4, target_modules="all-linear", init_weights=False)
    linears = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    with pytest.warns(UserWarning, match=rf"leaves out {count} layer\(s\), .*does not call"):
        adapted = get_peft_model(model, config)
    heads = 0 if head is None else 1
    assert len(tiny.layers(adapted)) == len(linears) - count - heads
    adapted.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = secura.from_pretrained(make(), tmp_path)
    assert tiny.layers(again).keys() == tiny.layers(adapted).keys()


def test_what_is_given_to_exclude_stays_excluded():
    given = SecuraConfig(r=4, target_modules="ALL-linear", exclude_modules=["x_proj"])
    with pytest.warns(UserWarning, match=r"leaves out 2 layer\(s\), such as .*dt_proj"):
        model = get_peft_model(mamba(), given)
    assert len(tiny.layers(model)) == 1
    assert given.exclude_modules == {"x_proj"}, "it may be of another model next"
    pattern = SecuraConfig(r=4, target_modules="all-linear", exclude_modules=".*x_proj")
    with pytest.raises(ValueError, match="dt_proj: MambaMixer reads"):
        get_peft_model(mamba(), pattern)


def test_a_layer_whose_name_ends_another_layers_is_not_left_out_by_it():
    """PEFT excludes by the end of a name, and the other one would be lost."""
    inner = nn.ModuleDict({"attn": nn.ModuleDict({"out_proj": nn.Linear(16, 16)})})
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2), "decoder": inner})
    before = kinds(model)
    with pytest.raises(ValueError, match=r"attn\.out_proj: MultiheadAttention reads"):
        get_peft_model(model, SecuraConfig(r=4, target_modules="all-linear"))
    assert kinds(model) == before


def test_layers_that_are_not_rescaled_are_adapted():
    config = SecuraConfig(r=4, target_modules=["output"])
    for every in (0, 2):
        assert len(tiny.layers(get_peft_model(rwkv(every), config))) == 2
    within = nn.ModuleDict({"model": rwkv(1)})
    with pytest.raises(ValueError, match=r"model\.rwkv\.blocks\.1\.attention\.output: .*rescales"):
        get_peft_model(within, config)


def experts(**settings):
    config = SecuraConfig(r=4, target_modules="all-linear", **settings)
    return get_peft_model(tiny.mixtral(), config)


def test_all_linear_tells_of_fused_experts():
    names = ["experts.down_proj", "experts.gate_up_proj"]
    told = rf"2 stacked weights of experts.*\d% of .*target_parameters={re.escape(str(names))}"
    with pytest.warns(UserWarning, match=told):
        assert len(tiny.layers(experts())) == 4
    convolution = nn.ModuleDict({"c": nn.Conv1d(4, 4, 3), "l": nn.Linear(8, 8)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(tiny.layers(experts(exclude_modules=["experts"]))) == 4
        model = experts(target_parameters=names)
        assert len(tiny.layers(model)) > 4
        model.add_adapter("more", SecuraConfig(r=4, target_modules="all-linear"))
        for plain in (tiny.llama(), convolution, tiny.vit()):
            get_peft_model(plain, SecuraConfig(r=4, target_modules="all-linear"))


def test_an_own_linear_layer_of_another_function_is_refused_when_it_is_named():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_local_experts": 2, "head_dim": 8}
    router = Llama4Router(Llama4TextConfig(**sizes, num_attention_heads=2, num_hidden_layers=1))
    model = nn.ModuleDict({"router": router, "plain": nn.Linear(16, 8)})
    before = kinds(model)
    with pytest.raises(TypeError, match=r"^router: the forward of Llama4Router takes or gives"):
        get_peft_model(model, SecuraConfig(r=2, target_modules="all-linear", inner_r=4))
    assert kinds(model) == before


class OfGroups(nn.Linear):
    """As DeepSeek-V4's: its inputs have a dimension of groups."""

    def forward(self, x):
        return x.unflatten(-1, (2, 2, -1)) @ self.weight.T


class InGroups(nn.Linear):
    """Its outputs have one."""

    def forward(self, x):
        return super().forward(x).unflatten(-1, (2, -1))


@pytest.mark.parametrize("kind", [OfGroups, InGroups])
def test_an_own_linear_layer_of_another_shape_is_refused(kind, monkeypatch):
    model = nn.ModuleDict({"grouped": kind(8, 8)})
    config = SecuraConfig(r=2, target_modules=["grouped"])
    assert tiny.layers(get_peft_model(copy.deepcopy(model), config)), "not transformers': untried"
    monkeypatch.setattr(kind, "__module__", "transformers.models.grouped.modeling_grouped")
    with pytest.raises(TypeError, match=f"the forward of {kind.__name__} takes or gives"):
        get_peft_model(model, config)


class FalconLinear(nn.Linear):
    """Of that name, and of another function, as remote code's may be."""

    def forward(self, x):
        return super().forward(x) * 2


def test_a_linear_layer_of_ones_own_by_falcons_name_is_no_product():
    model = nn.ModuleDict({"one": FalconLinear(8, 8)})
    adapted = get_peft_model(model, SecuraConfig(r=2, target_modules=["one"], norm="none"))
    layer, x = next(iter(tiny.layers(adapted).values())), torch.randn(3, 8)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    with pytest.raises(ValueError, match="computes something else than x Wᵀ"):
        adapted.merge_and_unload()


def test_layers_with_an_own_forward_are_adapted_on_the_meta_device():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        base = FalconForCausalLM(FalconConfig(vocab_size=60, **sizes))
    config = SecuraConfig(r=4, norm="none", target_modules=["query_key_value"])
    assert len(tiny.layers(get_peft_model(base, config, low_cpu_mem_usage=True))) == 1


@pytest.mark.parametrize("norm", ["none", "channel", "weight", "activation"])
def test_falcons_own_linear_layer_is_a_product(norm):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = FalconForCausalLM(FalconConfig(vocab_size=60, **sizes)).eval()
    before = tiny.logits(base)
    settings = {"norm": norm, "init_weights": False, "allow_inexact_merge": True}
    config = SecuraConfig(r=4, target_modules=["query_key_value", "dense"], **settings)
    model = get_peft_model(base, config)
    adapted = tiny.logits(model)
    assert not torch.allclose(adapted, before)
    if norm != "activation":
        torch.testing.assert_close(tiny.logits(model.merge_and_unload()), adapted)
