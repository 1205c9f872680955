"""What a layer costs the host: calls of Python, which a GPU waits for where batches are small."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from secura import SECURALinear


def python_calls(run) -> int:
    """How many Python functions one call of ``run`` enters; on a CPU backward is on this thread."""
    found = []

    def note(frame, event, argument):
        if event == "call":
            found.append(frame.f_code)

    for _ in range(3):
        run()
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return len(found)


@pytest.mark.parametrize(
    ("norm", "most"), [("none", 100), ("channel", 120), ("activation", 130), ("weight", 150)]
)
def test_python_calls_of_a_layer_and_step(norm, most):
    """Forward and backward, module and autograd function included; the target is 150."""
    layer = SECURALinear.from_linear(nn.Linear(64, 64, bias=False), r=16, norm=norm)
    nn.init.normal_(layer.B)
    x, g = torch.randn(16, 64, requires_grad=True), torch.randn(16, 64)
    leaves = [x, layer.A, layer.B]
    autograds_own = python_calls(lambda: torch.autograd.grad(x * 2, [x], g))
    calls = python_calls(lambda: torch.autograd.grad(layer(x), leaves, g)) - autograds_own
    assert calls <= most
