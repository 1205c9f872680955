"""Cells end to end on a tiny model: every method, resuming, sequences, failures, the record."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import retention_models
import torch

import secura
from benchmarks.graphs import NotCapturableError
from benchmarks.retention import gradients, strategies, train
from benchmarks.retention import record as records
from benchmarks.retention.build import make_optimizer
from benchmarks.retention.cells import Cell
from benchmarks.retention.methods import METHODS, get_method
from benchmarks.retention.record import Record
from secura.layers import secura_layers

RANKS = {"secura": "rank=4", "lora": "rank=2", "dora": "rank=2"}


def short(name: str) -> str:
    """The method at a rank that the tiny model has room for."""
    base = name.partition("@")[0]
    rank = "rank=4,inner_r=4" if "released" in base else RANKS.get(METHODS[base].adapter)
    return name if rank is None else f"{name}{',' if '@' in name else '@'}{rank}"


def read(runner, cell: Cell) -> Record:
    found = records.read(runner.root / "try" / cell.path)
    assert found is not None
    return found


def figures(record: Record) -> dict:
    """What was measured, without clock and machine."""
    content = record.to_json()
    return {k: v for k, v in content.items() if k not in ("seconds", "environment", "stage")}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_is_scored(runner, name):
    rate = 1e-3 if name == "full" else 1e-2
    targets = "all" if name == "full" else "qv"
    cell = retention_models.cell(short(name), targets, rate, steps=8)
    one = runner()
    one.run([cell])
    record = read(one, cell)
    assert record.status == "done", record.error
    assert [measure.step for measure in record.measures] == [2, 4, 6, 8, 8]
    assert [measure.part for measure in record.measures] == [True, True, True, True, False]
    assert set(record.end.tasks) == {"sums", "colours"}
    assert set(record.end.texts) == {"news", "code"}
    assert len(record.losses) == 8 and record.trained > 0
    if name not in ("released-m1", "released-m2"):
        assert record.end.tasks["sums"].learned > 0
    assert all(score.kl > 0 for score in record.end.texts.values())
    assert record.probes["letters"].n == 4
    kinds = {"q_proj", "v_proj"} if targets == "qv" else {"q_proj", "down_proj"}
    assert kinds <= set(record.gradient_norms)
    assert all(len(norms) == 8 for norms in record.gradient_norms.values())


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


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_under_autocast(runner, name):
    cell = retention_models.cell(short(name), "all" if name == "full" else "qv", 1e-3, steps=2)
    one = runner(bf16=True)
    one.run([cell])
    record = read(one, cell)
    assert record.status == "done", record.error
    assert len(record.losses) == 2


@pytest.mark.parametrize(
    "name",
    [
        "anchored-self@damping=0.1,decay=0.3",
        "anchored-self@sides=in",
        "anchored-self@sides=out",
        "anchored-self@optimizer=muon",
        "lora@optimizer=muon",
    ],
)
def test_variations_are_other_runs(runner, name):
    plain, varied = (
        retention_models.cell(short(name.partition("@")[0])),
        retention_models.cell(short(name)),
    )
    one = runner()
    one.run([plain, varied])
    ours, theirs = read(one, varied), read(one, plain)
    assert ours.status == "done", ours.error
    assert ours.trained == theirs.trained
    assert ours.losses[0] == theirs.losses[0] and ours.losses[-1] != theirs.losses[-1]


def test_every_control_is_another_run_than_lora(runner):
    names = ("lora", "replay-self", "ewc-self", "lora-whitened", "i-lora", "dora")
    cells = [retention_models.cell(short(name)) for name in names]
    one = runner()
    one.run(cells)
    losses = {cell.method: read(one, cell).losses[-1] for cell in cells}
    changed = {name: loss for name, loss in losses.items() if loss != losses[short("lora")]}
    assert len(changed) == len(names) - 1 == len(set(changed.values())), losses


def test_a_stage_is_of_one_kind(runner):
    runner().run([retention_models.cell(short("lora"))])
    with pytest.raises(ValueError, match="made with another held_out:"):
        runner(held_out=5).run([retention_models.cell(short("lora"))])


def test_a_part_of_what_was_trained_moves_less(runner):
    whole = retention_models.cell(short("lora"), steps=8)
    parts = [retention_models.cell(short(f"lora@scale={scale}"), steps=8) for scale in (0.5, 0.0)]
    one = runner()
    one.run([*parts, whole])  # the whole one is run first all the same
    full, half, nothing = (read(one, cell) for cell in (whole, *parts))
    assert full.end.texts["news"].kl > half.end.texts["news"].kl > 0
    assert nothing.end.texts["news"].kl == pytest.approx(0, abs=1e-9)
    assert nothing.end.texts["news"].rise == pytest.approx(0, abs=1e-6)
    assert not half.losses and half.trained == full.trained


@contextmanager
def stopping(monkeypatch, at: int):
    """Within it, a cell is interrupted before the step after ``at``."""
    take = train._Run._take

    def stop(run, rows):
        if run.step == at:
            raise KeyboardInterrupt
        take(run, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train._Run, "_take", stop)
        yield


@pytest.mark.parametrize(
    "name",
    ["lora", "anchored-self", "secura-weight", "released-m1", "replay-self", "ewc-self", "i-lora"],
)
def test_a_stopped_cell_goes_on_bit_equal(runner, tmp_path, monkeypatch, name):
    cell = retention_models.cell(short(name), steps=6)
    straight = runner()
    straight.run([cell])
    wanted = read(straight, cell)
    assert wanted.status == "done", wanted.error

    other = runner(out=tmp_path / "other")
    with stopping(monkeypatch, 3):
        other.run([cell])
    assert (other.root / "try" / cell.path).with_suffix("").joinpath(train.CHECKPOINT).is_file()
    other.run([cell])
    assert figures(read(other, cell)) == figures(wanted)
    seconds = read(other, cell).seconds  # those before the stop among them
    assert seconds["total"] >= seconds["training"] + seconds["scoring"] + seconds["building"]


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


@pytest.mark.parametrize("name", ["lora", "core-u", "replay-self", "full"])
def test_recorded_steps_are_those_taken_eagerly(runner, tmp_path, monkeypatch, name):
    """A recording is played here by a call whose gradients are written where the first were."""
    cell = Cell(short(name), "all" if name == "full" else "qv", 1e-3, 0, ("sums",), 6)
    eager, recorded = runner(tmp_path / "eager"), runner(tmp_path / "recorded")
    eager.run([cell])
    calls = []

    def graphed(call):
        call()
        calls.append(call)
        trained = call.__self__.trained
        kept = [value.grad for value in trained]

        def replay():
            call()
            for own, value in zip(kept, trained, strict=True):
                own.copy_(value.grad)
                value.grad = None  # who reads gradients must be given those of the recording

        return replay

    monkeypatch.setattr(gradients, "supported", lambda device: True)
    monkeypatch.setattr(gradients, "graphed", graphed)
    recorded.run([cell])
    assert len(calls) == 1
    found, wanted = read(recorded, cell), read(eager, cell)
    assert found.losses == pytest.approx(wanted.losses, rel=1e-4)
    for kind, norms in wanted.gradient_norms.items():
        assert found.gradient_norms[kind] == pytest.approx(norms, rel=1e-3)


def test_steps_that_cannot_be_recorded_run_eagerly(runner, monkeypatch):
    cell, one = Cell("lora@rank=2", "qv", 1e-3, 0, ("sums",), 2), runner()

    def graphed(call):
        raise NotCapturableError("it waits")

    monkeypatch.setattr(gradients, "supported", lambda device: True)
    monkeypatch.setattr(gradients, "graphed", graphed)
    with pytest.warns(UserWarning, match="steps run eagerly: it waits"):
        one.run([cell])
    assert read(one, cell).status == "done"


def test_every_method_of_a_seed_is_given_the_same_batches(runner):
    material = runner().material
    batches = material.batches("sums", 3, 20)
    assert batches == runner().material.batches("sums", 3, 20)
    assert batches != material.batches("sums", 4, 20)
    assert len(batches) == 20 and all(len(batch) == 2 for batch in batches)
    spread = [max(r.length for r in batch) - min(r.length for r in batch) for batch in batches]
    lengths = [row.length for batch in batches for row in batch]
    assert sum(spread) <= max(lengths) - min(lengths)  # those of a batch are neighbours
    assert max(lengths) < material.settings.max_tokens


def test_a_diverged_cell_is_recorded_and_the_others_go_on(runner, monkeypatch):
    bad, good = (
        retention_models.cell(short("lora"), rate=1e30),
        retention_models.cell(short("lora")),
    )
    one = runner()
    one.run([bad, good])
    assert read(one, bad).status == "failed" and "step" in read(one, bad).error
    assert read(one, good).status == "done"
    assert one.counts == {"done": 1, "failed": 1, "left": 0}
    again = runner()
    again.run([bad, good])
    assert again.counts == {"done": 0, "failed": 0, "left": 0}
    retried = runner(retry=True)
    retried.run([bad])
    assert retried.counts["failed"] == 1


def test_no_cell_is_started_past_the_deadline_or_without_its_start(runner):
    one = runner(deadline=-math.inf)
    one.run([retention_models.cell(short("lora"))])
    assert one.counts["left"] == 1
    one = runner()
    one.run([retention_models.cell(short("lora"), tasks=("sums", "colours"))])
    assert one.counts == {"done": 0, "failed": 0, "left": 1}


def test_a_cell_that_another_process_is_at_is_left_to_it(runner):
    from filelock import FileLock

    one, cell = runner(), retention_models.cell(short("lora"))
    folder = (one.root / "try" / cell.path).with_suffix("")
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        one.run([cell])
    assert one.counts["left"] == 1
    one.run([cell])
    assert one.counts["done"] == 1


def test_a_record_reads_back_as_it_was_written(runner, tmp_path):
    one, cell = runner(), retention_models.cell(short("lora"))
    one.run([cell])
    record = read(one, cell)
    records.write(tmp_path / "copy.json", record)
    assert records.read(tmp_path / "copy.json") == record
    assert record.cell == cell and record.settings == one.settings
    content = json.loads((one.root / "try" / cell.path).read_text())
    assert content["format"] == 2
    (tmp_path / "copy.json").write_text(json.dumps(content | {"format": 1}))
    assert records.read(tmp_path / "copy.json") is None


def test_loras_alpha_is_twice_its_rank():
    for name, rank in (("lora", 4), ("dora@rank=6", 6)):
        config = get_method(name).make_config("mlp", 0)
        assert (config.r, config.lora_alpha) == (rank, 2 * rank)


def test_ewc_learns_what_mattered_from_the_last_task_alone():
    cell = Cell("ewc", "mlp", 1e-3, 0, ("sums", "colours", "words"), 2)
    material = SimpleNamespace(batches=lambda task, seed, steps: [[task]] * steps)
    context = SimpleNamespace(cell=cell, material=material)
    assert strategies.EWC.old_rows(SimpleNamespace(context=context)) == ["colours"] * 2


def test_a_wrong_method_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean anchored-self"):
        get_method("anchored-slf")
    varied = get_method("anchored-self@damping=0.1,selection=inverse_sampling")
    assert varied.damping == 0.1 and varied.make_config("qv", 0).selection == "inverse_sampling"
    assert get_method("lora@rank=2,scale=0.5").trained_as == "lora@rank=2"
    assert get_method("ewc@strength=9,rank=2").first_as == "lora@rank=2"
    assert get_method("er").first_as == "lora"
    for same in ("ewc-self", "i-lora", "anchored-self@rank=128,decay=59"):
        assert get_method(same).first_as == same
    growing = get_method("anchored-self@rank=128,decay=59,grows=True")
    assert growing.first_as == "anchored-self@rank=128,decay=59"


@pytest.mark.parametrize(("grows", "decays"), [(False, (3, 3)), (True, (3, 6))])
def test_a_decay_that_grows_counts_once_for_each_task(grows, decays):
    method = get_method(f"anchored-self@decay=3,grows={grows}")
    for tasks, decay in zip((("sums",), ("sums", "words")), decays, strict=True):
        cell = Cell(method.name, "mlp", 1e-3, 0, tasks, 2)
        group = make_optimizer(torch.nn.Linear(2, 2), cell, method).param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (1e-3, decay)


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


@pytest.mark.parametrize("kappa", ["layer", "model"])
def test_an_anchors_scale_is_the_layers_own_or_the_models(kappa, runner):
    """``layer``: a step moves C κL and S R as far as C and R; ``model``: only in the mean."""
    from benchmarks.retention.build import build

    method = get_method(f"anchored-self@rank=4,kappa={kappa}")
    cell = Cell(method.name, "mlp", 1e-3, 0, ("sums",), 2)
    model, _ = build(cell, method, runner().material, {}, None)
    moved = []
    for layer in secura_layers(model).values():
        weight, part = layer.get_base_layer().weight, layer.secura_adapter["default"]
        c, r = weight[:, part.cols], weight[part.rows]
        moved.append((c @ part.left).norm() * (part.right @ r).norm() / (c.norm() * r.norm()))
    found = torch.stack(moved).detach()
    torch.testing.assert_close(found.log().mean().exp(), torch.ones(()))
    assert torch.allclose(found, torch.ones(()), atol=1e-3) is (kappa == "layer")
