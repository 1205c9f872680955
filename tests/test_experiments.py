"""The retention suite: its grid, its results folder, and whole runs of the smoke preset."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from cli_fixtures import fails
from safetensors.torch import load_file

from secura.cli import main
from secura.cli.folders import ADAPTER_WEIGHTS
from secura.experiments import stage
from secura.experiments.grid import BASE_CELL, EXPERIMENTS, Cell, cells, rate_search, split
from secura.experiments.material import Material, to_features
from secura.experiments.methods import METHODS, get_methods
from secura.experiments.presets import PRESETS
from secura.experiments.run import Runner
from secura.experiments.store import BusyError, Store, read_records

SMOKE = PRESETS["smoke"][0]
TASKS = ("sums", "colours")


def run(out, *words) -> int:
    return main(["experiment", *map(str, words), "--preset", "smoke", "--out", str(out)])


def figures(out) -> dict[tuple, dict]:
    """What each cell measured, without its clock and machine."""
    found = {}
    for record in read_records(out):
        cell = record["cell"]
        for key in ("seconds", "environment"):
            del record[key]
        found[cell["method"], cell["learning_rate"], *cell["tasks"]] = record
    return found


def test_a_run_with_several_names_is_one_cell():
    first = {name: Cell(0, ("sums",), name, 1e-3).canonical.method for name in METHODS}
    assert first["er"] == first["ewc"] == "lora" and first["i-lora"] == "i-lora"
    assert first["secura-channel-m2"] == first["secura-channel-m1"] == "secura-channel-m1"
    second = Cell(0, TASKS, "ewc", 1e-3)
    assert second.canonical == second and second.parent == Cell(0, ("sums",), "lora", 1e-3)
    assert second.parent.parent is None


def test_experiments_share_their_cells():
    chosen = [EXPERIMENTS[name] for name in ("exp0", "exp3", "exp4")]
    together = cells([*chosen, EXPERIMENTS["exp5"]], list(METHODS), TASKS, (0, 1), 1e-3)
    assert together == cells([EXPERIMENTS["exp5"]], list(METHODS), TASKS, (0, 1), 1e-3)
    assert len(set(together)) == len(together) and together[0] == BASE_CELL
    done: set[Cell] = set()
    for cell in together:
        assert cell.parent is None or cell.parent in done
        done.add(cell)
    one_each = cells([EXPERIMENTS["exp2"]], ["lora"], TASKS, (0,), 1e-3)
    assert [cell.tasks for cell in one_each] == [(), ("sums",), ("colours",)]


def test_the_parts_of_a_grid_make_it_up_and_keep_parents():
    whole = cells([EXPERIMENTS["exp5"]], list(METHODS), TASKS, (0, 1), 1e-3)
    parts = [split(whole, index, 3) for index in range(3)]
    assert set().union(*parts) == set(whole)
    assert sum(len(part) - 1 for part in parts) == len(whole) - 1
    for part in parts:
        assert all(cell.parent is None or cell.parent in part for cell in part)


def test_rates_are_searched_once_for_methods_that_share_a_run():
    found = list(rate_search(["lora", "er", "full"], "sums", 0))
    assert {cell.method for cell in found} == {"lora", "full"}
    assert [cell.learning_rate for cell in found if cell.method == "full"] == [1e-5, 3e-5, 1e-4]


def test_every_rate_is_run_on_every_seed_where_asked(tmp_path, monkeypatch):
    asked = []

    def keep(self, cells):
        asked.extend(cells)

    monkeypatch.setattr(Runner, "run", keep)
    assert run(tmp_path, "exp4", "--rates", "all", "--methods", "cabr,er", "--seeds", "0,1") == 0
    rates = {(cell.seed, cell.method, cell.learning_rate) for cell in asked if cell.tasks}
    one = {(seed, name, 2e-2) for seed in (0, 1) for name in ("lora", "cabr")}
    grids = {
        (seed, name, rate)
        for seed in (0, 1)
        for name in ("lora", "cabr")
        for rate in METHODS[name].rates
    }
    assert rates == one | grids


def test_the_norms_other_forms_are_methods_too():
    forms = get_methods(["forms"])
    settings = {m.name: m.make_config(SMOKE, 0) for m in forms}
    assert len(forms) == 15 and not {m.name for m in forms} & set(METHODS)
    for name, config in settings.items():
        space, form, combine = name.removeprefix("secura-").split("-")
        assert (config.norm, config.norm_form, config.norm_combine) == (space, form, combine)
    assert get_methods(["forms", "lora"])[0].name == "lora"
    every = [*EXPERIMENTS.values()]
    found = cells(every, ["lora", "secura-weight-paper-gated"], TASKS, (0,), 1e-3)
    tasks = {name: [c.tasks for c in found if c.method == name] for name in ("lora", *settings)}
    assert len(tasks["lora"]) == 3 and tasks["secura-weight-paper-gated"] == [TASKS[:1]]
    assert "secura-weight-paper-averaged" not in settings, "secura-weight-m1 is that"


def test_an_unknown_method_is_told_with_the_nearest():
    with pytest.raises(
        ValueError, match="unknown method 'secura-chanel-m1': did you mean secura-c"
    ):
        get_methods(["secura-chanel-m1"])
    assert [method.name for method in get_methods(["full", "seq", "lora"])] == ["lora", "full"]


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"tasks": ("sums", "sums")}, "each may stand there once"),
        ({"steps": 0}, "steps=0 must be above 0"),
        ({"dtype": "fp16"}, "'bf16' or 'fp32'"),
        ({"replay_share": 1.0}, "below 1"),
        ({"tasks": ()}, "at least one task"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        replace(SMOKE, **setting)


def test_what_is_trained_is_no_more_than_seen_and_held_apart():
    material = Material(SMOKE)
    features, validation = material.train_features("sums", 0)
    assert len(features) == SMOKE.steps * SMOKE.batch_size
    held = to_features([*validation, *material.task("sums", 0).test], material.tokenizer, 500)
    assert len(held) == SMOKE.validation_examples + SMOKE.test_examples
    assert not [feature for feature in held if feature in features]


def test_a_results_folder_is_of_one_kind(tmp_path):
    Store(tmp_path / "out", SMOKE)
    Store(tmp_path / "out", SMOKE)
    with pytest.raises(ValueError, match=r"other settings \(rank, steps\)"):
        Store(tmp_path / "out", replace(SMOKE, rank=3, steps=5))
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="no results folder"):
        Store(tmp_path, SMOKE)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_cell_is_claimed_once(tmp_path):
    store, cell = Store(tmp_path / "out", SMOKE), Cell(0, ("sums",), "lora", 1e-3)
    with (
        store.claim(cell),
        pytest.raises(BusyError, match="another process"),
        Store(tmp_path / "out", SMOKE).claim(cell),
    ):
        pass
    with store.claim(cell):
        pass


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every experiment with every method."""
    out = tmp_path_factory.mktemp("retention") / "out"
    assert run(out, "exp0", "exp2", "exp3", "exp4", "exp5") == 0
    return out


def test_every_experiment_and_method_runs(everything):
    found = figures(everything)
    assert all(record["status"] == "done" for record in found.values())
    wanted = cells(list(EXPERIMENTS.values()), list(METHODS), TASKS, (0,), SMOKE.learning_rate)
    assert {(c.method, c.learning_rate, *c.tasks) for c in wanted} <= set(found)
    for key, record in found.items():
        assert set(record["scores"]) == {*TASKS, "letters"}
        if key[2:]:
            assert len(record["training"]["gradient_norm"]) == SMOKE.steps
        assert ("spectra" in record) == (len(key[2:]) == 1)


def test_a_method_differs_from_the_others(everything):
    """Each name does something of its own: no two of them end with the same losses."""
    ends = [
        (record["text"]["loss"], *(score["loss"] for score in record["scores"].values()))
        for key, record in figures(everything).items()
        if key[2:] == TASKS
    ]
    assert len(ends) == len(METHODS)
    assert len(set(ends)) == len(ends)


def test_a_report_is_made_of_the_results_alone(everything, capsys):
    assert main(["experiment", "report", "--out", str(everything)]) == 0
    report = (everything / "report.md").read_text()
    assert str(everything / "report.md") in capsys.readouterr().out
    for method in METHODS.values():
        assert method.title.removesuffix(" (SEQ)") in report


def test_the_same_seed_gives_the_same_figures(everything, tmp_path):
    names = "lora,secura-weight-m2,i-lora,er,ewc"
    assert run(tmp_path / "again", "exp5", "--methods", names) == 0
    again, before = figures(tmp_path / "again"), figures(everything)
    assert again == {key: before[key] for key in again}
    assert len(again) == 1 + 3 + 5


@pytest.mark.parametrize("method", ["secura-weight-m1", "i-lora", "full"])
def test_a_cell_goes_on_from_its_checkpoint(everything, tmp_path, monkeypatch, method):
    out = tmp_path / "out"
    steps = stage.Steps.on_step_end

    def interrupt(*args):
        raise KeyboardInterrupt

    def stop(self, args, state, control, **kwargs):
        steps(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stage.Steps, "on_step_end", stop)
        assert run(out, "exp5", "--methods", method) == 130
    (left,) = out.rglob("checkpoint-*")
    assert left.name == "checkpoint-2" and len(read_records(out)) == 1
    with monkeypatch.context() as patched:
        patched.setattr(stage, "score", interrupt)
        assert run(out, "exp5", "--methods", method) == 130
    assert len(read_records(out)) == 1
    assert run(out, "exp5", "--methods", method) == 0
    again, before = figures(out), figures(everything)
    assert again == {key: before[key] for key in again}
    assert not list(out.rglob("checkpoint-*"))


def test_a_parent_is_scored_as_trained_and_folded_for_its_child(everything):
    """M1 holds what was folded for the base, M2 does not: the child's config is its own."""
    for kind, reference in (("m1", "folded"), ("m2", "pretrained")):
        folder = everything / f"secura-channel-{kind}/lr0.02/seed0/sums+colours/model"
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["norm_reference"] == reference
    first = everything / "secura-channel-m1/lr0.02/seed0/sums/model/adapter_model.safetensors"
    kept = load_file(first)
    assert not any(value.any() for name, value in kept.items() if name.endswith("core"))
    assert any(value.any() for name, value in kept.items() if name.endswith("B"))


def test_seeds_reach_adapters_and_data(tmp_path):
    assert run(tmp_path / "out", "exp3", "--methods", "cur-lora,lora", "--seeds", "0,1") == 0
    for method, kind in (("cur-lora", "rows"), ("lora", "lora_A.weight")):
        drawn = [
            load_file(tmp_path / f"out/{method}/lr0.02/seed{seed}/sums/model/{ADAPTER_WEIGHTS}")
            for seed in (0, 1)
        ]
        names = [name for name in drawn[0] if name.endswith(kind)]
        assert names
        assert all(not torch.equal(drawn[0][name], drawn[1][name]) for name in names)
    data = [
        json.loads((tmp_path / f"out/data-seed{seed}.json").read_text())["sums"] for seed in (0, 1)
    ]
    assert data[0] != data[1]


def test_data_that_changed_are_refused(everything, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(everything, out)
    kept = json.loads((out / "data-seed0.json").read_text())
    (out / "data-seed0.json").write_text(json.dumps(kept | {"sums": "0" * 64}))
    shutil.rmtree(out / "dora")
    words = ["exp3", "--methods", "dora", "--preset", "smoke", "--out", out]
    fails(["experiment", *words], capfd, "the data of sums are no longer those")
    assert not list(out.rglob("dora/**/cell.json"))


def test_a_grid_can_be_split_and_its_parts_laid_together(everything, tmp_path):
    words = ["exp5", "--methods", "lora,ewc,dora"]
    for part in ("0/2", "1/2"):
        assert run(tmp_path / part[0], *words, "--shard", part) == 0
    shutil.copytree(tmp_path / "1", tmp_path / "0", dirs_exist_ok=True)
    together, before = figures(tmp_path / "0"), figures(everything)
    assert together == {key: before[key] for key in together} and len(together) == 6


def test_two_processes_train_a_cell_together(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "secura.cli", "experiment", "exp3", "--methods=lora", "--preset=smoke"]
    done = subprocess.run([*command, f"--out={tmp_path / 'out'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (base, cell) = read_records(tmp_path / "out")
    assert base["environment"]["processes"] == cell["environment"]["processes"] == 2
    assert cell["training"]["steps"] == SMOKE.steps


def test_a_cell_file_cut_in_half_is_computed_again(everything, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(everything, out)
    path = out / "dora/lr0.02/seed0/sums/cell.json"
    whole = json.loads(path.read_text())
    path.write_text(path.read_text()[:500])
    assert run(out, "exp3") == 0
    assert json.loads(path.read_text())["scores"] == whole["scores"]


def test_a_failed_cell_stops_no_other(tmp_path, capfd):
    out = tmp_path / "out"
    words = ["exp5", "--methods", "lora,full", "--learning_rate", 1e30]
    assert run(out, *words) == 1
    found = figures(out)
    assert {record["status"] for key, record in found.items() if len(key) == 3} == {"failed"}
    assert not any(len(key) == 4 for key in found)
    assert "became" in capfd.readouterr().err
    assert run(out, *words) == 0
    assert "3 there before, 2 left" in capfd.readouterr().err
    assert run(out, *words, "--retry_failed") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["exp9"], "invalid choice: 'exp9'"),
        (["exp4", "--preset", "large"], "invalid choice: 'large'"),
        (["exp4", "--seeds", "1,2,1"], "each seed may stand there once"),
        (["exp4", "--seeds", "one"], "wanted integers"),
        (["exp4", "--shard", "2/2"], "from 0 to N-1"),
        (["exp4", "--methods", "lorra"], "did you mean lora?"),
        (["exp4", "--target_modules", "query"], "has no layer 'query'; its layers are"),
        (["exp4", "--tasks", "sum"], "unknown task 'sum'"),
        (["exp4", "--datasets", "sums"], "TASK=DATA"),
        (["exp5", "--rates", "own"], "is for exp4"),
        (["exp4", "--probes", "gsm8k"], "and a probe as well"),
        (["exp4", "--model", "./nowhere"], "no such folder"),
        (["report", "exp4"], "stands alone"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(tmp_path, capfd, words, message):
    fails(["experiment", *words, "--out", tmp_path / "out"], capfd, message)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told(tmp_path, capfd, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "secura.experiments.store.shutil.disk_usage", lambda _: usage._replace(free=9)
    )
    fails(
        ["experiment", "exp3", "--preset", "smoke", "--out", tmp_path / "out"], capfd, "make room"
    )


def test_a_report_needs_results(tmp_path, capfd):
    fails(["experiment", "report", "--out", tmp_path], capfd, "holds no results")


@pytest.mark.parametrize("norm", ["weight", "channel"])
def test_a_model_is_scored_merged_where_that_gives_the_same_bits(norm):
    model = tiny.adapted(tiny.llama(dtype=torch.bfloat16), norm=norm)
    before = tiny.base_weights(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        apart = tiny.logits(model)
        with stage.merged_where_exact(model):
            assert torch.equal(tiny.logits(model), apart)
            merged = [layer.merged for layer in tiny.layers(model).values()]
    assert all(merged) if norm == "weight" else not any(merged)
    tiny.assert_same(tiny.base_weights(model), before)
