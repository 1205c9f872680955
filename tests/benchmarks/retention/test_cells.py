"""Cells end to end on a tiny model: every method, resuming, sequences, failures, the record."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import retention_models
import torch
from retention_cells import figures, read, short, stopping

from benchmarks.graphs import NotCapturableError
from benchmarks.retention import gradients, strategies, train
from benchmarks.retention import record as records
from benchmarks.retention.build import make_optimizer
from benchmarks.retention.cells import Cell
from benchmarks.retention.methods import METHODS, get_method
from secura.layers import secura_layers


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
