"""The adapter's file is what docs/serving.md says: its own reader makes the same plain weight."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import secura

PAGE = Path(__file__).parent.parent / "docs" / "serving.md"


def reader():
    """``plain_weight`` as the page shows it."""
    section = PAGE.read_text(encoding="utf-8").partition("### The file")[2]
    code = re.search(r"```python\n(.*?)```", section, re.S)
    found = {}
    exec(code[1], found)
    return found["plain_weight"]


@pytest.mark.parametrize("norm", ["none", "channel", "weight"])
@pytest.mark.parametrize("core", ["ab", "u"])
@pytest.mark.parametrize("reference", ["folded", "pretrained"])
def test_the_pages_reader_makes_the_plain_weight(norm, core, reference, tmp_path):
    model = tiny.adapted(
        norm=norm, core=core, norm_reference=reference, scaling=0.5, train_bias=True
    )
    if core == "u":
        secura.anchor(model, tiny.TEXTS)
    secura.fold(model)
    tiny.perturb(model, 3)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    told = set(
        re.findall(r"`(\w+)`", PAGE.read_text().partition("### The file")[2].partition("<!--")[0])
    )
    layers = tiny.layers(model)
    assert {key.rpartition(".secura_adapter.")[0] for key in file} == set(layers)
    for name, layer in layers.items():
        prefix = f"{name}.secura_adapter."
        tensors = {key.removeprefix(prefix): file[key] for key in file if key.startswith(prefix)}
        assert tensors.keys() <= told
        weight = layer.base_layer.weight.detach()
        expected = layer.secura_adapter["default"].effective_of(layer.base_layer)
        torch.testing.assert_close(reader()(weight, tensors, config), expected)
