"""Runs that were stopped, resumed, moved, of no step or out of disk: what they publish and say."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import tiny
from cli_fixtures import base, data, fails, main, train_flags, trained, tree  # noqa: F401
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerState
from trl import SFTConfig

from secura.cli import resume, train
from secura.cli.callbacks import SettingsCallback
from secura.cli.errors import UserError
from secura.cli.folders import SUMS, checkpoints, record_sums, why_incomplete
from secura.cli.resume import resume_point


def test_resuming_another_runs_checkpoint(trained, base, data, tmp_path, capfd):  # noqa: F811
    """Not over other work; of a finished one, its adapter is published in the folder asked for."""
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(trained / name, tmp_path / "old" / name)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "adapter_config.json").write_text("{}")
    last = tmp_path / "old" / "checkpoint-4"
    resumed = ("--save_steps", 2, "--logging_steps", 1, "--resume_from_checkpoint", last)
    fails(train_flags(base, data, taken, *resumed), capfd, "taken is not empty")
    fresh = tmp_path / "fresh"
    assert main(train_flags(base, data, fresh, *resumed)) == 0
    published, saved = (load_file(at / "adapter_model.safetensors") for at in (fresh, last))
    assert published.keys() == saved.keys()
    assert all(value.equal(saved[name]) for name, value in published.items())
    for name in ("checkpoint-2", "checkpoint-4"):  # over another run's, which has got as far
        shutil.copytree(trained / name, taken / name)
    shutil.copy(trained / "trainer_state.json", taken)
    again = train_flags(base, data, taken, *resumed, "--overwrite_output_dir")
    assert main(again) == 0
    assert "stays as it is" not in capfd.readouterr().out
    assert load_file(taken / "adapter_model.safetensors").keys() == saved.keys()
    assert not list(taken.glob("checkpoint-*"))


def test_over_a_run_as_long(trained, base, data, tmp_path, monkeypatch, capfd):  # noqa: F811
    """The adapter of the former run, as many steps long, is not taken for what this one made."""
    output = tmp_path / "out"
    shutil.copytree(trained, output)
    argv = train_flags(base, data, output, "--learning_rate", 0.01, "--overwrite_output_dir")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save", Mock(side_effect=KeyboardInterrupt))
        train.main(argv[1:])
    former = load_file(output / "adapter_model.safetensors")
    assert main([*argv, "--resume_from_checkpoint"]) == 0
    assert "stays as it is" not in capfd.readouterr().out
    published, saved = (
        load_file(at / "adapter_model.safetensors") for at in (output, output / "checkpoint-4")
    )
    assert all(value.equal(saved[name]) for name, value in published.items())
    assert not all(value.equal(former[name]) for name, value in published.items())


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ({"num_train_epochs": 0, "max_steps": -1}, "--num_train_epochs 0 must be above 0"),
        ({"num_train_epochs": -1, "max_steps": -1}, "--num_train_epochs -1 must be above 0"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0 must be 1 or more"),
        ({"gradient_accumulation_steps": -2}, "--gradient_accumulation_steps -2 must be 1"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 17},
            "16 rows make no whole batch",
        ),
    ],
)
def test_a_run_of_no_step_is_refused(flags, part, trained, base, data, tmp_path, capfd):  # noqa: F811
    output = tmp_path / "out"
    shutil.copytree(trained, output)
    before = tree(output)
    argv = train_flags(base, data, output, "--overwrite_output_dir")
    for name, value in flags.items():
        if (flag := f"--{name}") in argv:
            argv[argv.index(flag) + 1] = str(value)
        else:
            argv += [flag, str(value)]
    fails(argv, capfd, part)
    assert tree(output) == before


def test_a_trainer_that_takes_no_step_publishes_nothing(monkeypatch):
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir="out", load_best_model_at_end=False),
        callback_handler=SimpleNamespace(callbacks=[]),
        state=SimpleNamespace(global_step=0), train=lambda **kwargs: SimpleNamespace(metrics={}),
    )  # fmt: skip
    monkeypatch.setattr(train, "save", Mock(side_effect=AssertionError))
    with pytest.raises(UserError, match="no step was taken"):
        train.train(trainer, None)


@pytest.mark.parametrize(
    ("name", "part"),
    [("scheduler.pt", "scheduler.pt is missing"), ("optimizer.pt", "optimizer.pt is damaged"),
     ("rng_state.pth", "rng_state.pth is damaged")],
)  # fmt: skip
def test_a_checkpoint_whose_state_is_not_whole_is_passed_over(name, part, trained, tmp_path):  # noqa: F811
    """Without its schedule a trainer goes on with a fresh optimizer too, and says nothing."""
    for step in (2, 4):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    file = tmp_path / "checkpoint-4" / name
    if "missing" in part:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-200])
    assert why_incomplete(tmp_path / "checkpoint-2") is None
    assert part in why_incomplete(tmp_path / "checkpoint-4")
    training = SimpleNamespace(output_dir=tmp_path, resume_from_checkpoint="true")
    assert resume_point(training, overwrite=False) == str(tmp_path / "checkpoint-2")


def test_a_checkpoint_that_is_saved_again_has_sums_of_what_it_holds(tmp_path):
    """As transformers' own saving before it is preempted does, between two steps."""
    folder, written = tmp_path / "checkpoint-4", iter("ab")

    def save(model, trial):
        assert not (folder / SUMS).exists()
        folder.mkdir(exist_ok=True)
        (folder / "trainer_state.json").write_text(next(written))

    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=tmp_path), state=SimpleNamespace(global_step=4),
        is_world_process_zero=lambda: True, _save_checkpoint=save,
    )  # fmt: skip
    train.sum_checkpoints(trainer)
    sums = []
    for _ in range(2):
        trainer._save_checkpoint(None, trial=None)
        sums.append((folder / SUMS).read_text())
    assert sums[0] != sums[1] and "trainer_state.json" in sums[1]


def _flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _is_a_list(file):
    file.write_text("[]")


def _of_another_step(file):
    shutil.copy(file.parents[1] / "checkpoint-2" / file.name, file)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        *((name, _flip, "not the one") for name in ("optimizer.pt", "scheduler.pt")),
        *((name, _of_another_step, "not the one") for name in ("optimizer.pt", "scheduler.pt")),
        ("adapter_model.safetensors", _of_another_step, "not the one that was saved there"),
        ("trainer_state.json", _of_another_step, "not the one that was saved there"),
        ("trainer_state.json", _is_a_list, "damaged (it holds a list)"),
        (SUMS, _is_a_list, "damaged (it holds a list)"),
    ],
)
def test_a_file_that_was_not_saved_there_is_told(name, damage, reason, trained, tmp_path):  # noqa: F811
    """Whole files, of which torch and transformers would take each."""
    for step in (2, 4):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    folder = tmp_path / "checkpoint-4"
    assert why_incomplete(folder) is None
    damage(folder / name)
    found = why_incomplete(folder)
    assert found.startswith(f"{name} is ") and reason in found
    (folder / SUMS).unlink()  # as before there was one
    assert "not the one" not in (why_incomplete(folder) or "")


@pytest.mark.parametrize("there", [True, False])
def test_the_best_checkpoint_of_a_run_that_was_moved(there, base, data, tmp_path, capfd):  # noqa: F811
    """It is recorded by a path, which another folder or working directory does not have."""
    output = tmp_path / "out"
    argv = train_flags(
        base, data, output, "--save_steps", 2, "--eval_strategy", "steps", "--eval_steps", 2,
        "--dataset_test_split", "train[:4]", "--load_best_model_at_end",
    )  # fmt: skip
    assert main(argv) == 0
    state = output / "checkpoint-4" / "trainer_state.json"
    content = json.loads(state.read_text())
    content |= {"best_model_checkpoint": "elsewhere/checkpoint-2", "best_global_step": 2}
    state.write_text(json.dumps(content))
    record_sums(state.parent)
    (output / "adapter_config.json").unlink()
    if not there:
        shutil.rmtree(output / "checkpoint-2")
    assert main([*argv, "--resume_from_checkpoint"]) == 0
    said, taken = capfd.readouterr().out, output / f"checkpoint-{2 if there else 4}"
    assert f"the adapter of {taken}" in said
    assert ("of step 2, the best, there is no checkpoint" in said) != there
    published, best = (load_file(at / "adapter_model.safetensors") for at in (output, taken))
    assert all(value.equal(best[name]) for name, value in published.items())


@pytest.mark.parametrize("recorded", [None, "elsewhere/checkpoint-2", "here"])
@pytest.mark.parametrize("there", [True, False])
def test_a_best_checkpoint_is_looked_for_in_the_runs_folder(recorded, there, tmp_path):
    """Newer transformers forget a path that is not there, 5.8 keeps it."""
    best = tmp_path / "checkpoint-2"
    if there:
        best.mkdir()
    state = TrainerState(best_global_step=2, best_model_checkpoint=recorded)
    if recorded == "here":
        state.best_model_checkpoint = str(tmp_path)
    numbers = {"logging_steps": 1, "eval_steps": 1, "save_steps": 1, "learning_rate": 1e-3}
    args = SimpleNamespace(output_dir=tmp_path, **numbers)
    SettingsCallback().on_train_begin(args, state, None)
    expected = str(tmp_path) if recorded == "here" else str(best) if there else None
    assert state.best_model_checkpoint == expected


@pytest.mark.parametrize("kept", [True, False])
def test_a_disk_that_fills_while_training_is_named(kept, trained, tmp_path, monkeypatch):  # noqa: F811
    output, full = tmp_path / "out", RuntimeError("[enforce fail at inline_container.cc:672]")
    if kept:
        shutil.copytree(trained, output)
        (output / "checkpoint-4" / "optimizer.pt").unlink()  # of which it was saving this
    output.mkdir(exist_ok=True)
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=output), callback_handler=SimpleNamespace(callbacks=[]),
        train=Mock(side_effect=full),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="enforce fail"):
        train.train(trainer, None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    last = "checkpoint-2 is the last whole.*--resume_from_checkpoint" if kept else "begin again"
    with pytest.raises(UserError, match=f"out is full .*enforce fail.*{last}"):
        train.train(trainer, None)


def test_a_full_disk_is_told_in_a_line(monkeypatch, capfd):
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr("secura.cli.doctor.main", Mock(side_effect=full))
    fails(["doctor"], capfd, "No space left on device")


def test_resuming_a_checkpoint_without_a_record(trained, base, data, tmp_path, capfd):  # noqa: F811
    output = tmp_path / "out"
    shutil.copytree(trained / "checkpoint-2", output / "checkpoint-2")
    state = output / "checkpoint-2" / "trainer_state.json"
    content = json.loads(state.read_text())
    assert content["stateful_callbacks"].pop("SettingsCallback")
    state.write_text(json.dumps(content))
    record_sums(state.parent)
    argv = train_flags(base, data, output, "--resume_from_checkpoint", "--save_steps", 3)
    fails([*argv, "--norm", "none"], capfd, "norm was 'weight' and is now 'none'")
    copy = tmp_path / "copy.jsonl"
    shutil.copy(data, copy)  # the same rows by another name
    assert main([*argv, "--dataset", str(copy)]) == 0
    assert (output / "checkpoint-3").is_dir()


def test_a_setting_that_a_checkpoint_does_not_record_is_not_compared(trained, base, data, tmp_path):  # noqa: F811
    output = tmp_path / "out"
    shutil.copytree(trained / "checkpoint-2", output / "checkpoint-2")
    state = output / "checkpoint-2" / "trainer_state.json"
    content = json.loads(state.read_text())
    assert content["stateful_callbacks"]["SettingsCallback"]["args"].pop("adam_beta2") == 0.999
    state.write_text(json.dumps(content))
    record_sums(state.parent)
    more = ("--adam_beta2", 0.9, "--resume_from_checkpoint")
    assert main(train_flags(base, data, output, *more)) == 0


def test_what_a_resumed_run_may_change_is_a_setting():
    names = [entry.name for entry in fields(SFTConfig)]
    assert all(any(name.startswith(start) for name in names) for start in resume._FREE)


def test_a_steps_batch_is_that_of_all_processes(tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.setattr(SFTConfig, "world_size", 2)
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    training = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], **sizes)
    named = SimpleNamespace(dataset_name="rows", dataset_train_split="train")
    rows = Dataset.from_dict({"text": ["a"]})
    assert resume.settings(training, tiny.config(), rows, named)["batch size"] == 24


def test_a_checkpoint_without_its_optimizer(trained, base, data, tmp_path, capfd):  # noqa: F811
    output = tmp_path / "out"
    shutil.copytree(trained / "checkpoint-2", output / "checkpoint-2")
    (output / "checkpoint-2" / "optimizer.pt").unlink()
    argv = train_flags(base, data, output, "--resume_from_checkpoint")
    fails(argv, capfd, "checkpoint-2: optimizer.pt is missing")
    (output / "checkpoint-2" / "global_step2").mkdir()  # DeepSpeed's
    record_sums(output / "checkpoint-2")
    assert why_incomplete(output / "checkpoint-2") is None


def test_the_last_checkpoint_is_that_of_the_most_steps(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-9", "checkpoint-last"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").touch()
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-2",
        "checkpoint-9",
        "checkpoint-10",
    ]
