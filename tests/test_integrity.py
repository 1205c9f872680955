"""The fingerprint measures how far two weights are apart; the checksum sees every bit."""

from __future__ import annotations

import pytest
import torch

from secura.integrity import checksum, distance, fingerprint


def test_fingerprint_measures_the_distance_of_weights():
    torch.manual_seed(0)
    weight = torch.randn(300, 200)
    own = fingerprint(weight)
    for relative in (0.001, 0.03, 0.3):
        noise = torch.randn_like(weight)
        noise *= relative * weight.norm() / noise.norm()
        assert distance(fingerprint(weight + noise), own) == pytest.approx(relative, rel=0.5)
    assert distance(fingerprint(weight.bfloat16()), own) < 0.005
    assert distance(fingerprint(weight.half()), own) < 0.005
    assert distance(fingerprint(weight[torch.randperm(300)]), own) > 0.5
    assert distance(fingerprint(torch.zeros(3, 4)), fingerprint(torch.zeros(3, 4))) == 0


def test_checksum_sees_every_bit():
    state = {"A": torch.randn(5, 7), "rows": torch.arange(4)}
    whole = checksum(state)
    assert checksum({name: tensor.clone() for name, tensor in reversed(state.items())}) == whole
    for index in range(35):
        flipped = state["A"].clone()
        flipped.view(torch.int32).view(-1)[index] ^= 1
        assert checksum(state | {"A": flipped}) != whole
    assert checksum({"A": state["A"].t(), "rows": state["rows"]}) != whole
