"""C kept beside the weight: the same numbers, read elsewhere."""

import pytest
import torch
from tiny import adapted, assert_same, gradients, llama, logits, parts
from torch import nn

from secura import SECURALinear

SPACES = ("none", "channel", "activation", "weight")


@pytest.mark.parametrize("norm", SPACES)
def test_a_model_is_the_same(norm):
    plain, kept = (adapted(llama(), norm=norm, keep_columns=keeps) for keeps in (False, True))
    torch.testing.assert_close(logits(kept), logits(plain), rtol=0, atol=0)
    found, expected = gradients(kept), gradients(plain)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7)
    assert all(part.columns.shape == (part.out_features, 4) for part in parts(kept))
    assert all(part.columns is None for part in parts(plain))
    assert_same(dict(kept.state_dict()), dict(plain.state_dict()))  # it is not saved
    if norm != "activation":
        merged = [model.merge_and_unload() for model in (kept, plain)]
        assert_same(*(dict(model.state_dict()) for model in merged))


def test_it_follows_the_weight():
    """To another dtype, and where another base weight is loaded."""
    torch.manual_seed(0)
    layer = SECURALinear.from_linear(nn.Linear(24, 16), r=4, norm="channel", keep_columns=True)
    nn.init.normal_(layer.B)
    x = torch.randn(3, 24)
    layer(x)
    other = SECURALinear.from_linear(nn.Linear(24, 16), r=4, norm="channel", keep_columns=True)
    nn.init.normal_(other.B)
    expected = other(x)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(layer.columns, layer.base.weight[:, layer.cols], rtol=0, atol=0)
    layer.to(torch.bfloat16)
    assert layer.columns.dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.bfloat16()).float(), expected, rtol=5e-2, atol=5e-2)


def test_columns_that_were_kept_for_a_forward_are_those_of_the_weight_that_is_loaded():
    """As of a weight that is whole within its layer's forward alone."""
    layers = [SECURALinear.from_linear(nn.Linear(24, 16), r=4, norm="none") for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.B)
    x = torch.randn(3, 24)
    layers[0]._keep_columns(layers[0].base)
    layers[0].load_state_dict(layers[1].state_dict())
    torch.testing.assert_close(layers[0](x), layers[1](x), rtol=0, atol=0)
