"""Cells of tasks in turn on a tiny model: what one takes over from the task before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import retention_models
import torch
from retention_cells import figures, read, short, stopping

import secura
from benchmarks.retention import train
from benchmarks.retention.methods import get_method


@pytest.mark.parametrize("name", ["er", "ewc@strength=9"])
def test_a_first_task_with_nothing_to_keep_is_taken_from_lora(runner, tmp_path, monkeypatch, name):
    lora, own = (retention_models.cell(short(method), steps=2) for method in ("lora", name))
    trained = runner(tmp_path / "trained")
    trained.run([own])
    taken = runner(tmp_path / "taken")
    taken.run([lora, replace(lora, tasks=retention_models.TASKS)])
    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "train", None)
        taken.run([own])
    assert figures(read(taken, own)) == figures(read(trained, own))
    assert read(taken, own).seconds == {}
    after = replace(own, tasks=retention_models.TASKS)
    for one in (trained, taken):
        one.run([after])
    assert figures(read(taken, after)) == figures(read(trained, after))


@pytest.mark.parametrize(
    "name", ["lora", "anchored-self", "anchored-channel", "ewc", "er", "i-lora", "released-m1"]
)
def test_a_sequence_goes_on_from_the_task_before(runner, name):
    first = retention_models.cell(short(name))
    second = replace(first, tasks=("sums", "colours"))
    one = runner()
    one.run([second, first])
    before, after = read(one, first), read(one, second)
    assert after.status == "done", after.error
    sums = before.end.tasks["sums"].loss
    fresh = before.end.tasks["sums"].base_loss
    assert abs(after.measures[0].tasks["sums"].loss - sums) < abs(fresh - sums) or name == "i-lora"
    assert after.losses[0] < before.end.tasks["colours"].base_loss + 1
    if name.startswith("anchored"):  # the first task lies in the folded core, the second in U
        state, _ = train.read_state(
            (one.root / "try" / second.path).with_suffix("") / train.TRAINED
        )
        cores = [v for k, v in state["adapter"].items() if k.endswith(".core")]
        assert cores and all(bool(core.any()) for core in cores)
        assert after.trained == before.trained and after.anchor["tokens"] > 0


def test_a_finished_tasks_statistics_are_added_to_the_anchor(runner, monkeypatch):
    asked = []
    usual = secura.anchor

    def watched(model, texts, **flags):
        asked.append((flags.get("add", False), {len(text) for text in texts}))
        return usual(model, texts, **flags)

    monkeypatch.setattr(secura, "anchor", watched)
    first = retention_models.cell(short("anchored-self"))
    one = runner()
    one.run([first, replace(first, tasks=("sums", "colours"))])
    (sampled, own), (added, task) = asked
    assert (sampled, added) == (False, True)
    assert max(own) <= 16 < min(task)  # its own samples, then the task that was learned


def test_whitened_inputs_are_white(runner):
    from benchmarks.retention.build import Whitening

    x = torch.randn(400, 8) @ torch.diag(torch.logspace(-1, 1, 8))
    factor = Whitening(x.T @ x / 400).factor
    covariance = factor @ (x.T @ x / 400) @ factor
    values = torch.linalg.eigvalsh(covariance)
    assert values[-1] / values[len(values) // 2] < 1.1
    assert factor.norm() == pytest.approx(8**0.5, rel=1e-5)


def test_whitening_folds_and_counts_every_earlier_task(runner, tmp_path):
    """The second task starts where the first ended, B = 0; a stopped third goes on from there."""
    from benchmarks.retention import build as building

    tasks = (*retention_models.TASKS, "sums")
    cells = [
        replace(retention_models.cell(short("lora-whitened"), steps=4), tasks=tasks[:count])
        for count in (1, 2, 3)
    ]
    one, method = runner(save_every=2), get_method(cells[0].method)
    one.run(cells[:2])
    before = [
        train.read_state((one.root / "try" / cell.path).with_suffix("") / train.TRAINED)[0]
        for cell in cells[:2]
    ]
    first, _ = building.build(cells[0], method, one.material, {}, before[0]["adapter"])
    second, _ = building.build(cells[1], method, one.material, before[0]["adapter"])
    for ours, theirs in zip(*map(building._lora_layers, (second, first)), strict=True):
        whole = theirs.base_layer.weight + theirs.get_delta_weight("default")
        torch.testing.assert_close(ours.base_layer.weight, whole)
        assert not ours.lora_B["default"].weight.any()
        factors = [
            layer.lora_A["default"].parametrizations.weight[0].factor for layer in (ours, theirs)
        ]
        assert not torch.allclose(*factors, rtol=1e-3)
    ids = torch.arange(5, 15)[None]
    ended, _ = building.build(cells[1], method, one.material, {}, before[1]["adapter"])
    third, _ = building.build(cells[2], method, one.material, before[1]["adapter"])
    torch.testing.assert_close(third(input_ids=ids).logits, ended(input_ids=ids).logits)


def test_a_stopped_whitened_cell_goes_on_as_if_it_had_not(runner, tmp_path, monkeypatch):
    cell = retention_models.cell(short("lora-whitened"), steps=6)
    cells = [cell, replace(cell, tasks=retention_models.TASKS)]
    whole, parts = (
        runner(tmp_path / "whole", save_every=2),
        runner(tmp_path / "parts", save_every=2),
    )
    whole.run(cells)
    parts.run(cells[:1])
    with stopping(monkeypatch, 4):
        parts.run(cells[1:])
    parts.run(cells[1:])
    assert figures(read(parts, cells[1])) == figures(read(whole, cells[1]))
