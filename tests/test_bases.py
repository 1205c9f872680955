"""What the frozen layer adds to its product is run, or refused; weights that are elsewhere are."""

from __future__ import annotations

import pytest
import tiny
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from secura import SECURALinear, products, quantised

N, K = 12, 16

ROUNDED = {"stochastic_rounding": True}


class Named(nn.Linear):
    """A subclass that computes what nn.Linear does."""


class NamedConv1D(Conv1D):
    """A subclass that computes what Conv1D does."""


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledWeight(nn.Module):
    def forward(self, weight):
        return 2 * weight


def frozen(base):
    return base.requires_grad_(False)


def doubled_on_the_instance(base):
    product = base.forward
    base.forward = lambda x: 2 * product(x)
    return base


def hooked(register):
    def change(base):
        getattr(base, register)(lambda *_: None)
        return base

    return change


def another_layers_forward(base):
    base.forward = frozen(nn.Linear(K, N)).forward
    return base


def parametrized(base):
    parametrize.register_parametrization(base, "weight", DoubledWeight())
    return frozen(base)


def after_accelerate(base):
    return remove_hook_from_module(add_hook_to_module(base, AlignDevicesHook("cpu")))


SKIPPED = [
    (lambda base: frozen(Doubled(K, N)), "its own forward"),
    (doubled_on_the_instance, "its own forward"),
    (another_layers_forward, "its own forward"),
    (hooked("register_forward_hook"), "its hooks"),
    (hooked("register_forward_pre_hook"), "its hooks"),
    (hooked("register_full_backward_hook"), "its hooks"),
    (hooked("register_full_backward_pre_hook"), "its hooks"),
    (parametrized, "the modules in it"),
    (lambda base: base.requires_grad_(True), "the training of its weight"),
]


@pytest.mark.parametrize(("change", "reason"), SKIPPED)
def test_the_space_weight_refuses_what_its_product_would_skip(change, reason):
    base = change(frozen(nn.Linear(K, N)))
    assert products.why_not_product(base) == reason
    settings = {"r": 3, "norm_combine": "gated"}
    trained = reason.startswith("the training")
    layer = SECURALinear.from_linear(base, norm="weight", **settings)
    base.requires_grad_(trained)
    with pytest.raises(ValueError, match=rf"layer: norm='weight'.*so {reason} .*norm='channel'"):
        layer(torch.ones(2, K))
    for norm in ("none", "channel", "activation"):
        layer = SECURALinear.from_linear(base, norm=norm, **settings)
        base.requires_grad_(trained)
        x = torch.randn(5, K, requires_grad=True)
        out = layer(x)
        torch.testing.assert_close(out, base(x))
        out.sum().backward()
        assert (base.bias.grad is not None) == trained
        base.zero_grad()


def test_the_refusal_names_the_layer_of_a_model():
    model = tiny.adapted(norm="weight")
    tiny.layers(model)["base_model.model.model.layers.1.self_attn.v_proj"].base_layer.forward = sum
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.self_attn\.v_proj: norm='weight'"):
        tiny.logits(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(K, N),
        lambda: Named(K, N),
        lambda: Conv1D(N, K),
        lambda: NamedConv1D(N, K),
        lambda: after_accelerate(nn.Linear(K, N)),
    ],
    ids=["Linear", "subclass", "Conv1D", "Conv1D subclass", "hook removed"],
)
@pytest.mark.parametrize("norm", tiny.NORMS)
def test_a_plain_product_is_taken_over(make, norm, monkeypatch):
    base = frozen(make())
    assert products.why_not_product(base) is None
    layer = SECURALinear.from_linear(base, r=3, norm=norm)
    nn.init.normal_(layer.B)
    x = torch.randn(5, K)
    out = layer(x)
    if norm != "activation":
        torch.testing.assert_close(out, x @ layer.effective_weight().t() + base.bias)
    monkeypatch.setattr(type(base), "__call__", None)
    assert torch.equal(layer(x), out)


@pytest.mark.parametrize("settings", [{"norm": "weight"}, {"norm": "none", **ROUNDED}], ids=str)
def test_a_hook_that_only_moves_inputs_is_no_obstacle(settings):
    plain, model = tiny.adapted(**settings), tiny.adapted(**settings)
    for layer in tiny.layers(model).values():
        add_hook_to_module(layer.base_layer, AlignDevicesHook("cpu"))
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    tiny.layers(model).popitem()[1].base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="its own forward would be skipped"):
        tiny.logits(model)


class Quantised(nn.Module):
    """Whole hundredths, and a product of its own: what bases take for a quantised layer here."""

    def __init__(self):
        super().__init__()
        weight = (torch.randn(N, K) * 100).round().to(torch.int16)
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), None

    def dequantize(self):
        return self.weight / 100

    def forward(self, x):
        return x @ self.dequantize().t()


def test_a_quantised_base_may_have_hooks_with_the_space_weight(monkeypatch):
    base = Quantised()
    monkeypatch.setattr(
        quantised, "dequantizer", lambda one: base.dequantize if one is base else None
    )
    layer = SECURALinear.from_linear(base, r=3, norm="weight", norm_combine="gated")
    base.register_forward_hook(lambda *_: None)
    x = torch.randn(5, K)
    torch.testing.assert_close(layer(x), base(x))


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_a_loaded_adapter_may_be_asked_in_inference_mode_and_then_trained(norm, monkeypatch):
    base = Quantised()
    monkeypatch.setattr(
        quantised, "dequantizer", lambda one: base.dequantize if one is base else None
    )
    layer = SECURALinear.from_linear(base, r=3, norm=norm)
    layer.load_state_dict(layer.state_dict())
    x = torch.randn(5, K)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.B.grad.any()


OFFLOADED = r"the base weight is offloaded.*without offloading to cpu or disk.*FSDP2"


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_offloaded_weights_are_one_clear_error(norm):
    base = tiny.llama()
    cpu_offload(base, execution_device="cpu")
    with pytest.raises(ValueError, match=rf"^model\.layers\.0\.self_attn\.q_proj: {OFFLOADED}"):
        get_peft_model(base, tiny.config(norm=norm))
    model = tiny.adapted(norm=norm)
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=OFFLOADED):
        tiny.logits(model)
    layer = SECURALinear.from_linear(nn.Linear(K, N), r=3, norm=norm)
    cpu_offload(layer, execution_device="cpu")
    with pytest.raises(ValueError, match=OFFLOADED):
        layer(torch.ones(2, K))


def test_what_fsdp1_leaves_of_a_weight_is_one_clear_error():
    """A part of its flat parameter, on a process that holds the first half."""
    message = r"q_proj: the base weight is a part of FSDP1's.*decoder layer with FSDP2$"
    base, model = tiny.llama(), tiny.adapted(norm="none")
    for module in (*base.modules(), *model.modules()):
        if isinstance(module, nn.Linear):
            weight = module.weight
            weight.data = weight.detach().flatten()[: weight.numel() // 2]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, tiny.config())
    with pytest.raises(ValueError, match=message):
        model.merge_adapter()


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_shapes_can_be_told_on_the_meta_device(norm):
    layer = SECURALinear.from_linear(nn.Linear(K, N), r=3, norm=norm).to("meta")
    assert layer(torch.empty(2, K, device="meta")).shape == (2, N)


@pytest.mark.parametrize("norm", ["none", "channel", "activation"])
def test_a_base_that_casts_itself_takes_inputs_of_another_dtype(norm):
    """As diffusers' layerwise casting puts it: stored in bf16, computed in fp32."""
    torch.manual_seed(0)
    base = nn.Linear(20, 24).bfloat16()
    plain = nn.Linear(20, 24)
    plain.load_state_dict(base.state_dict())
    layer, exact = (SECURALinear.from_linear(one, r=4, norm=norm) for one in (base, plain))
    for one in (layer, exact):
        nn.init.constant_(one.B, 0.1)
    base.forward = lambda x: nn.functional.linear(x, base.weight.float(), base.bias.float())
    x = torch.randn(3, 20)
    torch.testing.assert_close(layer(x), exact(x), rtol=0, atol=1e-5)
    del base.forward
    base.register_forward_hook(lambda module, given, out: None)  # which comes too late to cast
    with pytest.raises(TypeError, match="cast one of them"):
        layer(x)
