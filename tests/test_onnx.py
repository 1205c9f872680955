"""Export of unmerged adapters to ONNX, run by ONNX Runtime."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secura import AdapterConfig, SECURALinear

SETTINGS = [
    {"norm": "none", "core": "u"},
    {"norm": "channel", "norm_form": "paper", "norm_combine": "averaged", "restrain": True},
    {"norm": "weight"},
    {"norm": "activation", "train_bias": True},
    {"norm": "activation", "norm_form": "paper", "norm_combine": "averaged", "restrain": True},
]


class Stack(nn.Module):
    """An adapted layer of each kind, of which every other one was folded, in turn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList()
        for number, settings in enumerate(SETTINGS):
            config = AdapterConfig(r=4, init_weights=False, **settings)
            self.layers.append(SECURALinear(nn.Linear(12, 12), config))
            if number % 2:
                self.layers[-1].fold()
                for parameter in self.layers[-1].parameters():
                    if parameter.requires_grad:
                        nn.init.normal_(parameter, std=0.5)

    def forward(self, x, adapted: bool = True):
        for layer in self.layers:
            x = (layer(x) if adapted else layer.base(x)).tanh() + x
        return x


@pytest.mark.filterwarnings("ignore")
def test_every_norm_runs_in_onnx_runtime():
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, dynamic = Stack().eval(), torch.export.Dim.DYNAMIC
    shapes = {"x": {0: dynamic, 1: dynamic}}
    program = torch.onnx.export(
        model, (torch.randn(2, 5, 12),), dynamo=True, dynamic_shapes=shapes, optimize=False,
        verbose=False,
    )  # fmt: skip
    assert {node.domain for node in program.model.graph} == {""}
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    x = torch.randn(3, 7, 12)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected, plain = model(x), model(x, adapted=False)
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 0.1
