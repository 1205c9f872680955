"""A base whose own weight or bias is trained beside its adapter: exact gradients, nothing stale."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import tiny
import torch
from peft import get_peft_model
from test_bases import DoubledWeight
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from secura import AdapterConfig, SecuraConfig, SECURALinear, bases, tensor_parallel
from secura_kernels import Layer, NormOptions, naive, secura_add, secura_linear, with_norms
from secura_kernels.cur import important_channels

N, K, T = 20, 24, 7
ADDING = ("none", "channel", "activation")


def parametrized():
    base = nn.Linear(K, N)
    parametrize.register_parametrization(base, "weight", DoubledWeight())
    return base


BASES = {"Linear": lambda: nn.Linear(K, N), "Conv1D": lambda: Conv1D(N, K), "made": parametrized}
SETTINGS = (
    {},
    {"keep_columns": True, "core": "u", "train_bias": True},
    {"restrain": True, "restrain_percent": 0.0, "norm_form": "paper"},
)


def adapted(base, **settings):
    layer = SECURALinear(base.double(), AdapterConfig(r=4, **settings)).double()
    for value in (layer.trained, layer.bias):
        if value is not None:
            nn.init.normal_(value)
    return layer


def expected(layer, x):
    """What the layer computes of ``x``, by its equations from its tensors as they are now."""
    base, config = layer.base, layer.config
    weight = base.weight.mT if isinstance(base, Conv1D) else base.weight
    plain = layer.kernel_layer(base, weight)._replace(bias=base.bias, columns=None)
    if config.restrain:
        now = important_channels(weight.detach(), config.r)
        plain = plain._replace(restrain=plain.restrain._replace(important=now))
    return naive.secura_linear(x, plain, *layer.factors(), delta_bias=layer.bias)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("norm", ADDING)
def test_every_gradient_is_that_of_the_equations(norm, base, settings):
    if norm == "none" and "restrain" in settings:
        pytest.skip("no gain to restrain by")
    torch.manual_seed(0)
    layer = adapted(BASES[base](), norm=norm, **settings)
    x, g = torch.randn(T, K).double().requires_grad_(), torch.randn(T, N).double()
    for trained in ("weight", "bias"):
        layer.base.requires_grad_(False)
        for name, value in layer.base.named_parameters():
            value.requires_grad_("bias" in name if trained == "bias" else "bias" not in name)
        leaves = [x, *(value for value in layer.parameters() if value.requires_grad)]
        found = torch.autograd.grad((layer(x) * g).sum(), leaves)
        for ours, theirs in zip(
            found, torch.autograd.grad((expected(layer, x) * g).sum(), leaves), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
@pytest.mark.parametrize("norm", ADDING[1:])
def test_what_follows_from_the_weight_is_of_the_weight_as_it_is(norm, settings):
    torch.manual_seed(0)
    layer = adapted(nn.Linear(K, N), norm=norm, **settings)
    layer.base.requires_grad_(True)
    optimizer, x = torch.optim.SGD(layer.parameters(), lr=0.05), torch.randn(T, K).double()
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected(layer, x))
    layer(x).sum().backward()
    optimizer.step()
    layer.base.requires_grad_(False)
    torch.testing.assert_close(layer(x), expected(layer, x))
    loaded = adapted(copy.deepcopy(layer.base), norm=norm, **settings)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(x), layer(x))


def test_a_sum_of_adapters_trains_its_base_exactly():
    model = tiny.adapted(norm="none")
    model.add_adapter("second", tiny.config(norm="none", r=6))
    tiny.perturb(model, 1, "second")
    model.base_model.set_adapter(["default", "second"])
    layer = next(iter(tiny.layers(model).values())).double()
    base = layer.base_layer.requires_grad_(True)
    x = torch.randn(T, base.in_features).double()
    layer(x).square().sum().backward()
    found, base.weight.grad = base.weight.grad, None
    w = base.weight
    for adapter in layer.secura_adapter.values():
        w = w + base.weight[:, adapter.cols] @ adapter.update().double() @ base.weight[adapter.rows]
    (x @ w.T + base.bias).square().sum().backward()
    torch.testing.assert_close(found, base.weight.grad)


@pytest.mark.parametrize("norm", ADDING)
def test_a_base_trains_in_16_bits_and_under_autocast(norm):
    torch.manual_seed(0)
    layer = adapted(nn.Linear(K, N), norm=norm)
    layer.base.requires_grad_(True)
    x = torch.randn(T, K)
    (exact,) = torch.autograd.grad(expected(layer, x.double()).square().sum(), layer.base.weight)
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        layer.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x.to(dtype))
        assert out.dtype == torch.bfloat16
        (found,) = torch.autograd.grad(out.float().square().sum(), layer.base.weight)
        assert (found.double() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("form", ["paper", "released", "calibrated"])
def test_a_trained_base_is_compiled_whole(form):
    layer = adapted(nn.Linear(K, N), norm="activation", norm_form=form)
    layer.base.requires_grad_(True)
    x = torch.randn(T, K).double()
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("how", ["looked at before the step", "under another", "switched off"])
def test_a_weight_that_was_trained_meanwhile_is_seen(how):
    """Also where the adapter that follows from it had no pass, or one too many."""
    model = tiny.adapted(norm="channel", keep_columns=True)
    model.add_adapter("other", tiny.config(norm="channel"))
    tiny.perturb(model, 1, "other")
    tiny.logits(model)
    base, ids = next(iter(tiny.layers(model).values())).base_layer, tiny.tokens()
    base.requires_grad_(True)
    looked = how.startswith("looked")
    optimizer = torch.optim.AdamW(
        base.parameters(), lr=0.1, fused=looked
    )  # fused: no version tells
    if how == "under another":
        model.set_adapter("other")
    with model.disable_adapter() if how == "switched off" else nullcontext():
        model(input_ids=ids, labels=ids).loss.backward()
        if looked:
            tiny.logits(model)
        optimizer.step()
    base.requires_grad_(False)
    model.set_adapter("default")
    found = tiny.logits(model)
    for one in tiny.parts(model):
        one.stale = True
    assert torch.equal(tiny.logits(model), found)


def test_norms_of_a_trained_weight_need_the_weight():
    layer = adapted(nn.Linear(K, N), norm="channel")
    columns = layer.base.weight[:, layer.cols].detach().requires_grad_()
    given = layer.kernel_layer(layer.base, None)._replace(columns=columns)
    with pytest.raises(ValueError, match="norms of a weight that is trained: give it"):
        secura_add(torch.randn(T, N).double(), given, *layer.factors())


def test_where_no_gradient_would_come_it_is_refused():
    layer = adapted(nn.Linear(K, N), norm="none")
    x, weight = torch.randn(T, K).double(), layer.base.weight.detach().requires_grad_()
    with pytest.raises(ValueError, match="require a gradient, of which they would get none"):
        secura_linear(x, layer.kernel_layer(layer.base, weight), *layer.factors())
    with torch.no_grad():
        secura_linear(x, layer.kernel_layer(layer.base, weight), *layer.factors())


def test_a_sharded_base_that_is_trained_is_refused(monkeypatch):
    layer = adapted(nn.Linear(K, N), norm="none")
    layer.base.requires_grad_(True)
    monkeypatch.setattr(bases, "is_elsewhere", lambda base: True)
    with pytest.raises(ValueError, match="layer: its own weight is trained, and sharded again"):
        layer(torch.randn(T, K).double())


def test_a_base_that_tensor_parallelism_split_is_refused():
    layer = adapted(nn.Linear(K, N), norm="none")
    layer.base.requires_grad_(True)
    with pytest.raises(ValueError, match="layer: its own weight is trained, of which tensor"):
        tensor_parallel.forward(layer, layer.base, torch.randn(T, K).double())


def test_experts_that_are_trained_themselves_are_refused():
    config = SecuraConfig(r=4, target_parameters=["experts.down_proj"])
    model = get_peft_model(tiny.mixtral(), config)
    for name, value in model.named_parameters():
        value.requires_grad_("down_proj" in name)
    with pytest.raises(ValueError, match="experts' weights are trained themselves"):
        model(input_ids=tiny.tokens())
    tiny.logits(model)


def test_frozen_experts_are_not_taken_for_trained_where_fsdp1_shows_views(monkeypatch):
    config = SecuraConfig(r=4, target_parameters=["experts.down_proj"])
    model = get_peft_model(tiny.mixtral(), config)
    stored = bases.Stack.weight.fget
    view = property(lambda self: stored(self).detach().requires_grad_() * 1)
    monkeypatch.setattr(bases.Stack, "weight", view)
    assert model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.requires_grad


@pytest.mark.parametrize("norm", ADDING)
def test_a_layer_of_rank_0_is_its_base(norm):
    weight, x = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4)
    none = torch.zeros(0, dtype=torch.int64)
    layer = Layer(weight, None, none, none, NormOptions(norm))
    y0 = x @ weight.t()
    out = secura_add(y0, with_norms(layer), torch.zeros(0, 2), torch.zeros(2, 0))
    assert torch.equal(out, y0)
