"""A layer, its micro-batches, and the gradients of plain accumulation."""

import torch
from torch import nn

from secura import SECURALinear
from secura_kernels.held import Held


def layer(norm="none", **settings):
    torch.manual_seed(0)
    made = SECURALinear.from_linear(nn.Linear(24, 16).double(), r=4, norm=norm, **settings)
    made = made.double()
    nn.init.normal_(made.B if made.U is None else made.U)
    return made


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 5, 24, dtype=torch.float64, generator=generator)


def plainly(model, micro):
    model.zero_grad()
    for x in micro:
        model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def check_equal(found, expected, rtol=1e-11):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=rtol, atol=rtol / 10)


def sums(monkeypatch):
    """What each `Held.add` gives from now on: None but for the last micro-batch of a step."""
    given, add = [], Held.add
    monkeypatch.setattr(Held, "add", lambda own, *dp: (given.append(add(own, *dp)), given[-1])[1])
    return given
