"""Where B or U is made of other tensors, nothing that would write to it does half of its work."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import secura
from secura import SECURALinear


class Halved(nn.Module):
    def forward(self, value):
        return value / 2


WAYS = {
    "weight_norm": parametrizations.weight_norm,
    "pruned": lambda layer, name: prune.l1_unstructured(layer, name, 0.3),
    "parametrised": lambda layer, name: parametrize.register_parametrization(layer, name, Halved()),
}


def computed(way, core):
    torch.manual_seed(0)
    layer = SECURALinear.from_linear(nn.Linear(20, 24), r=4, norm="none", core=core)
    name = "U" if core == "u" else "B"
    nn.init.normal_(getattr(layer, name))
    WAYS[way](layer, name)
    return layer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("core", ["ab", "u"])
@pytest.mark.parametrize("whole", [False, True], ids=["layer", "model"])
def test_a_fold_is_refused_and_moves_nothing(way, core, whole):
    layer, x = computed(way, core), torch.randn(3, 20)
    before = layer(x)
    other = SECURALinear.from_linear(nn.Linear(20, 24), r=4, norm="none")
    nn.init.normal_(other.B)
    with pytest.raises(RuntimeError, match="made of other tensors"):
        secura.fold(nn.ModuleList([other, layer])) if whole else layer.fold()
    assert torch.equal(layer(x), before) and not layer.core.any() and not other.core.any()
    change = layer.delta_weight()
    if way == "weight_norm":
        parametrize.remove_parametrizations(layer, "U" if core == "u" else "B")
        layer.fold()
        torch.testing.assert_close(layer.delta_weight(), change)


def test_a_computed_a_folds_as_it_is():
    layer = SECURALinear.from_linear(nn.Linear(20, 24), r=4, norm="none")
    nn.init.normal_(layer.B)
    parametrizations.weight_norm(layer, "A")
    change = layer.delta_weight()
    layer.fold()
    torch.testing.assert_close(layer.delta_weight(), change)


def test_an_anchor_comes_and_goes_on_a_core_of_its_own_alone():
    model = tiny.cored()
    part = tiny.parts(model)[-1]
    parametrize.register_parametrization(part, "U", Halved())
    with pytest.raises(RuntimeError, match="made of other tensors"):
        secura.anchor(model, tiny.TEXTS)
    assert tiny.anchors(model)[0] == (None, None)
    parametrize.remove_parametrizations(part, "U", leave_parametrized=False)
    secura.anchor(model, tiny.TEXTS)
    before = tiny.logits(model)
    parametrize.register_parametrization(part, "U", nn.Identity())
    with pytest.raises(RuntimeError, match="made of other tensors"):
        secura.unanchor(model)
    assert torch.equal(tiny.logits(model), before) and tiny.anchors(model)[0][0] is not None
