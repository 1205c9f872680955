"""What follows from a base weight is renewed where it was written to, in every path there is."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import tiny
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import prune

from secura import AdapterConfig, SecuraConfig, SECURALinear, bases, cabr
from secura.core import WeightVersion

RESTRAIN = {"restrain": True, "restrain_percent": 0.1, "restrain_edge": 1.9, "restrain_decay": 0.5}
DERIVED = {
    "channel": {"norm": "channel"},
    "channel, columns": {"norm": "channel", "keep_columns": True},
    "none, columns": {"norm": "none", "keep_columns": True},
    "weight, restrained": {"norm": "weight", **RESTRAIN},
    "activation, restrained": {"norm": "activation", **RESTRAIN},
}


def written(settings, hooked=False):
    """A layer that ran and whose base was written to then, and one made on that base."""
    torch.manual_seed(0)
    config = AdapterConfig(r=8, init_weights=False, **settings)
    layer, x = SECURALinear(nn.Linear(40, 48), config).eval(), torch.randn(3, 40)
    if hooked:
        layer.base.register_forward_hook(lambda module, args, out: out * 1.0)
    layer(x)
    rows, cols = layer.rows.clone(), layer.cols.clone()
    with torch.no_grad():
        layer.base.weight.mul_(1.7)
        layer.base.weight[3] += 1
    fresh = SECURALinear(nn.Linear(40, 48), config).eval()
    fresh.base.load_state_dict(layer.base.state_dict())
    for name in ("A", "B", "core"):
        getattr(fresh, name).data.copy_(getattr(layer, name))
    fresh.rows, fresh.cols = rows, cols
    fresh.fingerprint = layer.fingerprint
    fresh._note_loaded()
    return layer, fresh, x


@pytest.mark.parametrize("name", [name for name in DERIVED if "activation" not in name])
def test_a_merge_is_into_the_weight_as_it_is(name):
    layer, fresh, _ = written(DERIVED[name])
    torch.testing.assert_close(
        layer.effective_weight(), fresh(torch.eye(40)).T - fresh.base.bias[:, None]
    )
    if "weight" not in name:
        for got, expected in zip(
            layer.additive_product(layer.base), fresh.additive_product(fresh.base), strict=True
        ):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", [name for name in DERIVED if "weight" not in name])
def test_a_hooked_base_is_looked_at_too(name):
    layer, fresh, x = written(DERIVED[name], hooked=True)
    torch.testing.assert_close(layer(x), fresh(x))


@pytest.mark.parametrize("settings", [DERIVED["channel"], DERIVED["none, columns"]], ids=str)
def test_a_base_that_was_loaded_again_is_merged_into_as_it_is(settings):
    model = tiny.adapted(**settings)
    tiny.logits(model)
    state = {name: value + 0.1 for name, value in tiny.llama(3).state_dict().items()}
    own = {n.replace(".base_layer", ""): v for n, v in model.base_model.model.state_dict().items()}
    renamed = {n: n.replace(".base_layer", "") for n in model.base_model.model.state_dict()}
    base = {n: state[plain] for n, plain in renamed.items() if plain in state and plain in own}
    model.base_model.model.load_state_dict(base, strict=False)
    model.merge_adapter()
    merged = tiny.logits(model)
    model.unmerge_adapter()
    torch.testing.assert_close(merged, tiny.logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("assign", [False, True])
def test_columns_of_a_quantised_weight_that_was_replaced(assign):
    torchao = pytest.importorskip("torchao.quantization")

    def quantised(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        return model

    config = SecuraConfig(r=8, norm="none", target_modules=["0"], init_weights=False)
    model, x = get_peft_model(quantised(0), config).eval(), torch.randn(3, 64)
    model(x)
    layer = model.base_model.model[0]
    assert bases.mark(layer.base_layer)[2], "its number alone, another's later"
    state = {"weight": quantised(1)[0].weight}
    layer.base_layer.load_state_dict(state, assign=assign)
    weight = layer.base_layer.weight.dequantize()
    part = tiny.parts(model)[0]
    delta = weight[:, part.cols] @ (part.A @ part.B) @ weight[part.rows]
    torch.testing.assert_close(model(x), layer.base_layer(x) + x @ delta.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_weight_that_each_forward_gathers_has_no_mark(made_anew):
    """Under FSDP2 it lies elsewhere each time: what follows from it would be formed each time."""
    base = nn.Linear(4, 4)
    base._is_fsdp_managed_module = made_anew
    before = bases.mark(base)
    assert (before is None) == made_anew
    with torch.no_grad():
        base.weight.mul_(2)
    assert (bases.mark(base) == before) == made_anew


def beside(layer, x):
    """What the layer computes, from its base's weight as it is."""
    weight = layer.base.weight.detach()
    change = weight[:, layer.cols] @ (layer.A @ layer.B) @ weight[layer.rows]
    return layer.base(x) + x @ change.T


@torch.no_grad()
def test_another_weight_at_the_same_address_is_another():
    """The allocator gives an address again as soon as it is free."""
    config = AdapterConfig(r=8, norm="none", keep_columns=True, init_weights=False)
    layer, x = SECURALinear(nn.Linear(64, 64), config).eval(), torch.randn(3, 64)
    layer(x)
    places = set()
    for _ in range(12):
        places.add(layer.base.weight.data_ptr())
        del layer.base.weight
        layer.base.weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        torch.testing.assert_close(layer(x), beside(layer, x), rtol=1e-4, atol=1e-3)
    assert len(places) < 12, "no address was used twice, so nothing was tried"


def test_a_mark_keeps_the_number_of_what_it_was_of():
    """Of a storage that is freed, so that no other is taken for it; its memory goes."""
    base = nn.Linear(64, 64)
    mark = WeightVersion.of(base)
    assert not mark._storage.expired()
    del base.weight
    assert mark._storage.expired() and not mark.is_gone()
    others = [torch.empty(64, 64) for _ in range(2000)]
    assert mark[2] not in {other.untyped_storage()._cdata for other in others}
    base.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    mark = WeightVersion.of(base)
    assert not mark.is_gone()
    del base.weight
    assert mark.is_gone()
    assert copy.deepcopy(mark) != mark and pickle.loads(pickle.dumps(mark)) != mark


@pytest.mark.parametrize("made", ["parametrized", "pruned", "spectral"])
@pytest.mark.parametrize("keep_columns", [False, True])
def test_a_weight_that_is_made_of_others_is_read_anew(keep_columns, made):
    torch.manual_seed(0)
    base = nn.Linear(24, 20).requires_grad_(False)
    if made == "parametrized":
        nn.utils.parametrizations.weight_norm(base)
    elif made == "spectral":
        nn.utils.spectral_norm(base)
    config = AdapterConfig(r=4, norm="none", keep_columns=keep_columns, init_weights=False)
    layer, x = SECURALinear(base, config), torch.randn(3, 24)
    layer(x)
    if made == "parametrized":
        base.parametrizations.weight.original1.mul_(torch.rand(20, 24))
    elif made == "pruned":
        prune.l1_unstructured(base, "weight", 0.5)
    layer.train()
    out = layer(x)  # in training spectral_norm goes a step on before it multiplies
    layer.eval()
    torch.testing.assert_close(out, beside(layer, x), rtol=1e-4, atol=1e-4)
    if made == "parametrized":
        config = AdapterConfig(r=4, norm="channel", init_weights=False)
        other = SECURALinear(base, config)
        before = other(x)
        base.parametrizations.weight.original1.mul_(torch.rand(20, 24))
        gains = copy.deepcopy(other)
        gains.stale = True
        merged = other.effective_weight()  # before another forward pass
        assert not torch.equal(before, other(x))
        torch.testing.assert_close(merged, gains.effective_weight())
        torch.testing.assert_close(other(x), gains(x))


@torch.no_grad()
@pytest.mark.parametrize("settings", ["channel", "channel, columns"])
def test_a_thread_waits_for_no_other_and_takes_nothing_that_is_old(settings, monkeypatch):
    """A server's threads after ``load_state_dict``: one is still at the norms, another goes on."""
    layer, fresh, x = written(DERIVED[settings])
    at_norms, go_on, make = threading.Event(), threading.Event(), cabr.with_norms
    expected = fresh(x)

    def slowly(given):
        if threading.current_thread() is not threading.main_thread():
            at_norms.set()
            assert go_on.wait(60)
        return make(given)

    monkeypatch.setattr(cabr, "with_norms", slowly)
    outs = []
    other = threading.Thread(target=lambda: outs.append(layer(x)))
    other.start()
    assert at_norms.wait(60)
    outs.append(layer(x))
    go_on.set()
    other.join()
    for out in (*outs, layer(x)):
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("name", "hooked"),
    [(name, hooked) for name in DERIVED for hooked in {False, "weight" not in name}],
)
def test_a_weight_that_stands_in_for_a_call_is_the_calls_alone(name, hooked):
    """``torch.func.functional_call`` with one weight and with another, and then the layer's own."""
    layer, fresh, x = written(DERIVED[name], hooked)
    expected = fresh(x)
    for scale, view in ((1.7, False), (0.3, True), (0.5, True)):
        other = layer.base.weight.detach() * scale
        other = other.flatten().view(other.shape) if view else other
        with torch.no_grad():
            fresh.base.weight.copy_(other)
        got = torch.func.functional_call(layer, {"base.weight": other}, (x,))
        torch.testing.assert_close(got, fresh(x))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", DERIVED)
def test_a_compiled_first_pass_hides_no_later_write(name):
    layer, fresh, x = written(DERIVED[name])
    layer.stale = True
    torch.compile(layer, backend="eager")(x)
    with torch.no_grad():
        for one in (layer, fresh):
            one.base.weight.mul_(0.6)
    torch.testing.assert_close(layer(x), fresh(x))
