"""Layers that an adapter would do nothing for are refused by name.

Quantised ones that nothing here dequantises or that PEFT passes over, and such as are not called.
"""

from __future__ import annotations

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
    MixtralConfig,
    MixtralForCausalLM,
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
        (rwkv, ["value"], ["output", "value"], r"value: .*config\.rescale_every = 0"),
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
    with pytest.warns(UserWarning, match=f"leaves out {count} layers, .*does not call"):
        adapted = get_peft_model(model, config)
    heads = 0 if head is None else 1
    assert len(tiny.layers(adapted)) == len(linears) - count - heads
    adapted.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = secura.from_pretrained(make(), tmp_path)
    assert tiny.layers(again).keys() == tiny.layers(adapted).keys()


def test_layers_that_are_not_rescaled_are_adapted():
    for every in (0, 2):
        config = SecuraConfig(r=4, target_modules=["output"])
        assert len(tiny.layers(get_peft_model(rwkv(every), config))) == 2


def experts(**settings):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=60, **sizes))
    return get_peft_model(model, SecuraConfig(r=4, target_modules="all-linear", **settings))


def test_all_linear_tells_of_fused_experts():
    names = ["experts.down_proj", "experts.gate_up_proj"]
    with pytest.warns(UserWarning, match=r"leaves out the fused experts: .*experts\.down_proj"):
        assert len(tiny.layers(experts())) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(tiny.layers(experts(target_parameters=names))) > 4
        get_peft_model(tiny.llama(), SecuraConfig(r=4, target_modules="all-linear"))


def test_an_own_linear_layer_of_another_function_is_refused_when_it_is_named():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_local_experts": 2, "head_dim": 8}
    router = Llama4Router(Llama4TextConfig(**sizes, num_attention_heads=2, num_hidden_layers=1))
    model = nn.ModuleDict({"router": router, "plain": nn.Linear(16, 8)})
    before = kinds(model)
    with pytest.raises(TypeError, match=r"^router: the forward of Llama4Router takes or gives"):
        get_peft_model(model, SecuraConfig(r=2, target_modules="all-linear", inner_r=4))
    assert kinds(model) == before


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
