"""The fingerprint measures how far two weights are apart; the checksum sees every bit."""

from __future__ import annotations

import pytest
import torch

from secura.integrity import _signs, checksum, distance, file_checksum, fingerprint


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


@pytest.mark.parametrize("n", [1, 1024, 2500])
def test_a_fingerprint_is_of_every_row(n):
    weight = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    left, right = _signs(n, 2, weight.device), _signs(6, 1, weight.device)
    torch.testing.assert_close(fingerprint(weight), left.t() @ weight @ right, rtol=1e-4, atol=1e-3)


def test_the_same_values_in_a_wider_dtype_sum_up_alike():
    narrow = torch.randn(5, 7).bfloat16()
    whole = {"A": narrow, "rows": torch.arange(4, dtype=torch.int32)}
    assert checksum({"A": narrow.double(), "rows": torch.arange(4)}) == checksum(whole)


def test_files_that_were_saved_before_are_still_known():
    """Other numbers here refuse every adapter there is: they take another format version."""
    weight = torch.arange(12.0).view(3, 4)
    assert fingerprint(weight)[0].int().tolist() == [-12, 4, 0, 4, -14, 0, 22, -2]
    sums = checksum({"A": weight, "rows": torch.arange(3)}, "settings")
    assert int(sums) == -5836690203750889740
    assert file_checksum([weight, torch.arange(3)]) == "1154d7b1941c53488f8281708cb3b5d4"
