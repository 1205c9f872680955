"""The bytes of an adapter's files: of one state, in one order, and few."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from peft import get_peft_model
from torch import nn

import secura
from secura import SecuraConfig
from secura.integrity import checksum
from secura.tuner import saved


def test_what_is_written_is_what_was_summed_while_another_thread_trains(tmp_path, monkeypatch):
    """The sums of the layers, the file's sum and its bytes are made one after another."""
    model = tiny.adapted(norm="channel")
    expected = tiny.logits(model)
    plain = saved.warn_of_unsaved

    def step(*args):
        tiny.perturb(model, 5)
        plain(*args)

    monkeypatch.setattr(saved, "warn_of_unsaved", step)
    model.save_pretrained(tmp_path)
    assert not torch.equal(tiny.logits(model), expected)
    assert torch.equal(tiny.logits(secura.from_pretrained(tiny.llama(), tmp_path)), expected)


def test_names_are_written_in_one_order(tmp_path):
    names = [f"layers.{place}.self_attn.{name}_proj" for place in (1, 0) for name in "vqk"]
    model = tiny.adapted(target_modules=names, exclude_modules=["up_proj", "down_proj"])
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(written["target_modules"])
    assert written["exclude_modules"] == ["down_proj", "up_proj"]


@pytest.mark.parametrize("norm", ["channel", "activation"])
def test_a_layer_takes_at_most_350_kb(norm, tmp_path):
    class Model(nn.Sequential):
        config = None

    model = get_peft_model(
        Model(nn.Linear(512, 1024, bias=False)),
        SecuraConfig(r=128, inner_r=256, norm=norm, restrain=True, target_modules=["0"]),
    )
    model.base_model.model[0].fold()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 0.35e6


def test_the_checksum_counts_every_byte():
    zeros = torch.zeros(200_000, dtype=torch.uint8)
    plain = int(checksum({"A": zeros}))
    for position in (0, 65_520, 65_521, 131_041, 199_999):
        changed = zeros.clone()
        changed[position] = 1
        assert int(checksum({"A": changed})) != plain
    assert int(checksum({"B": zeros})) != plain
    assert int(checksum({"A": zeros.view(2, -1)})) != plain
