"""Two processes train, save and merge as one does: every set-up of docs/scale.md in every space."""

from __future__ import annotations

import importlib.util

import pytest
import tiny
import torch
import two_processes
from sharded_runs import DEEPSPEED, MERGED, REFUSED, SET_UPS, TEXTS

from secura import anchor


def wrong(found):
    """The cells that are not what docs/scale.md says."""
    bad = {}
    for name, cell in found.items():
        set_up, _, norm = name.rpartition(", ")
        if isinstance(cell, str):  # what was raised
            bad[name] = cell
            continue
        right = cell["error"] < 2e-6 and cell["saved"] < 2e-6 and cell["moved"] > 1e-3
        if set_up in REFUSED or (set_up in MERGED and norm == "activation"):
            right &= cell.get("refused") == 1
        elif set_up in MERGED:
            right &= cell.get("written") == 0 == cell["restored"] and cell["merged"] < 2e-6
        if not right:
            bad[name] = cell
    return bad


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return two_processes.run("sharded_runs:cases", tmp_path_factory.mktemp("two"))


def test_every_set_up_is_equal_to_one_process(found):
    cells = {name: cell for name, cell in found.items() if ", " in name}
    assert len(cells) == 4 * len(SET_UPS) and not wrong(cells)


def test_a_lora_is_left_unequal_by_fsdp_size(found):
    """What that leaves undone is no fault of ours."""
    assert found["LoRA by itself"] is True


def test_processes_share_the_texts_of_an_anchor_and_add_up_what_they_find(found):
    """Three texts on two: the second reads one more, which does not count, beside the third."""
    assert not isinstance(found["anchor"], str), found["anchor"]
    model = tiny.adapted(core="u", norm="none")
    anchor(model, TEXTS, batch_size=1)
    tokens, right = found["anchor"]
    assert tokens == sum(map(len, TEXTS))
    expected = tiny.parts(model)[1].right  # left depends on the labels that each one draws
    torch.testing.assert_close(torch.tensor(right), expected, rtol=1e-4, atol=1e-5)


def test_the_texts_of_a_task_are_those_of_all_processes(found):
    """Of which each has read its share: one of each in turn, the same list for both."""
    assert found["texts of all"] == [[*range(3, 9)], [*range(13, 19)], [*range(5)]]


def test_a_sharded_checkpoint_without_room_for_its_anchor_is_refused(found):
    """Torch loads what there is room for: without L and S another core would be trained on."""
    assert len(found["anchor in shards"]) == 2, found["anchor in shards"]
    said, gap = found["anchor in shards"]
    assert len(said) == 2 and all("call secura.anchor(model) before" in one for one in said)
    assert gap < 2e-6


def test_a_base_that_is_trained_too_has_the_gradients_of_one_process(found):
    gaps = found["trained base"]
    assert not isinstance(gaps, str), gaps
    assert len(gaps) == 6 and max(gaps.values()) < 1e-5


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed")
def test_zero_is_equal_to_one_process(tmp_path):
    found = two_processes.run("sharded_runs:deepspeed_cases", tmp_path)
    assert len(found) == 4 * len(DEEPSPEED) and not wrong(found)
