"""`secura train`, its flags, and what all commands share."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from cli_fixtures import fails, train_flags
from micro_batches import sums
from safetensors.torch import load_file

from secura.cli import arguments, main, train
from secura.cli.errors import UserError


def test_training_learns_and_leaves_an_adapter_and_nothing_pickled(trained):
    state = json.loads((trained / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    names = {path.name for path in trained.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".saving"))}


def test_resuming_equals_an_uninterrupted_run(trained, base, data, tmp_path, capfd):
    output = tmp_path / "resumed"
    shutil.copytree(trained / "checkpoint-2", output / "checkpoint-2")
    stopped_while_saving = output / "checkpoint-3"
    shutil.copytree(trained / "checkpoint-2", stopped_while_saving)
    (stopped_while_saving / "trainer_state.json").unlink()
    assert main(train_flags(base, data, output, "--resume_from_checkpoint")) == 0
    expected = load_file(trained / "adapter_model.safetensors")
    got = load_file(output / "adapter_model.safetensors")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def test_flags_that_change_nothing_are_named(base, data, tmp_path, capfd):
    more = ("--save_strategy", "no", "--hold_gradients", "--stochastic_rounding")
    assert main(train_flags(base, data, tmp_path / "out", *more, "--max_steps", 1)) == 0
    said = capfd.readouterr().out
    assert "--hold_gradients changes nothing with one backward pass" in said
    assert "--stochastic_rounding changes nothing in float32" in said


def test_micro_batches_whose_gradients_are_held(trained, base, data, tmp_path, monkeypatch):
    """The same rows a step, in two backward passes: the same adapter but for rounding."""
    given = sums(monkeypatch)
    output, micro = tmp_path / "held", ("--per_device_train_batch_size", 2)
    more = ("--gradient_accumulation_steps", 2, "--hold_gradients", "--share_inputs")
    assert main(train_flags(base, data, output, *micro, *more)) == 0
    assert given and [dp is None for dp in given].count(True) * 2 == len(given)
    found, expected = (load_file(at / "adapter_model.safetensors") for at in (output, trained))
    trains = [name for name in expected if name.endswith((".A", ".B"))]
    assert trains
    for name in trains:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-3)


def test_evaluation_folding_and_a_config_file(base, data, tmp_path):
    output, config = tmp_path / "out", tmp_path / "config.yaml"
    config.write_text(
        f"model: {base}\ndataset_name: {data}\noutput_dir: {output}\n"
        "learning_rate: 1e-2\nmax_steps: 9\nr: 4\nnorm: channel\nfold_every: 2\nseed: 3\n"
        "target_modules: [q_proj, v_proj]\nrank_pattern: {v_proj: 2}\n"
        "eval_strategy: steps\neval_steps: 2\ndataset_test_split: train[:4]\nreport_to: none\n"
    )
    assert main(["train", f"--config={config}", "--max_steps", "3", "--save_strategy", "no"]) == 0
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in log)
    saved = load_file(output / "adapter_model.safetensors")
    cores = {name: tensor for name, tensor in saved.items() if name.endswith("core")}
    assert {tensor.shape[0] for tensor in cores.values()} == {4, 2}
    assert all(tensor.abs().sum() > 0 for tensor in cores.values())
    written = json.loads((output / "adapter_config.json").read_text())
    settings = {"fold_every": 2, "norm": "channel", "seed": 3}
    assert {name: written[name] for name in settings} == settings


def test_overwriting_removes_the_checkpoints_of_the_run_before(trained, base, data, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(trained, output)
    (output / "notes.txt").write_text("mine")
    flags = ("--overwrite_output_dir", "--save_strategy", "no", "--max_steps", 1)
    assert main(train_flags(base, data, output, *flags)) == 0
    assert not list(output.glob("checkpoint-*"))
    assert (output / "notes.txt").read_text() == "mine"
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 1


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--lerning_rate 1", ["unknown flag --lerning_rate", "did you mean --learning_rate?"]),
        ("--learn 1", ["unknown flag --learn"]),
        ("stray", ["stray"]),
        ("--learning_rate quick", ["--learning_rate", "'quick'"]),
        ("--r 0", ["r=0", "positive integer"]),
        ("--r 4.5", ["--r", "'4.5'"]),
        ("--r 33", ["q_proj", "r=33"]),
        ("--norm layer", ["norm", "'layer'"]),
        ("--norm weight --dropout 0.1", ["dropout"]),
        ("--target_modules nothing", ["nothing"]),
        ("--target_modules embed_tokens", ["embed_tokens"]),
        ("--rank_pattern {", ["--rank_pattern", "JSON"]),
        ("--model nowhere/at-all", ["nowhere/at-all"]),
        ("--model ./nowhere", ["'./nowhere'", "no such folder"]),
        ("--dataset nowhere.jsonl", ["nowhere.jsonl", "no such file"]),
        ("--dataset nowhere/at-all", ["nowhere/at-all"]),
        ("--dataset_train_split tset", ["tset", "train"]),
        ("--eval_strategy epoch", ["'test'", "train"]),
        ("--resume_from_checkpoint", ["no complete checkpoint"]),
        ("--resume_from_checkpoint nowhere", ["nowhere", "no such folder"]),
        ("--config nowhere.yaml", ["nowhere.yaml"]),
        ("--config", ["--config needs"]),
        ("--bf16 --fp16", ["fp16", "bf16"]),
    ],
)
def test_bad_flags(flags, parts, base, data, tmp_path, capfd):
    output = tmp_path / "out"
    fails(train_flags(base, data, output, *flags.split()), capfd, *parts)
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lerning_rate: 1\n", ["'lerning_rate'", "did you mean learning_rate?"]),
        ("- 1\n", ["mapping"]),
        ("a: [\n", ["bad.yaml"]),
        ("max_steps: many\n", ["max_steps", "'many'"]),
        ("r: 0\n", ["r=0"]),
        ("dropout: 2026-01-01\n", ["--dropout", "'2026-01-01'"]),
        ("bf16: on\n", ["--bf16", "got on"]),
        ("r: 3\nr: 4\n", ["bad.yaml: 'r' is there twice"]),
        ("lr_scheduler_kwargs: {a: 2026-13-45}\n", ["bad.yaml: lr_scheduler_kwargs: month"]),
        ("rank_pattern: {a: !!nothing 1}\n", ["bad.yaml: rank_pattern: could not", "nothing"]),
        ("env: {A: [1]}\n", ["bad.yaml: 'env' must be a mapping of variables to values"]),
        ("env: {A: }\n", ["bad.yaml: 'env' must be"]),
        ("dropout: null\n", ["bad.yaml: dropout: None is no float"]),
        ("per_device_train_batch_size: null\n", ["per_device_train_batch_size: None is no int"]),
        ("warmup_steps: []\n", ["bad.yaml: warmup_steps: [] is no float"]),
        ("anchor: []\n", ["bad.yaml: anchor: [] is no", "str"]),
        ("norm: {a: 1}\n", ["unknown norm"]),
        ("target_modules: {a: 1}\n", ["bad.yaml: target_modules: {'a': 1} is no"]),
        ("target_modules: [q_proj, [v_proj]]\n", ["bad.yaml: target_modules: ['q_proj', ["]),
        ("layers_to_transform: [0, first]\n", ["layers_to_transform: [0, 'first'] is no"]),
    ],
)
def test_bad_config_files(text, parts, base, data, tmp_path, capfd):
    config, output = tmp_path / "bad.yaml", tmp_path / "out"
    config.write_text(text)
    argv = ["train", "--model", base, "--dataset", data, "--output_dir", output]
    fails([*argv, "--config", config], capfd, *parts)
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("", "float32"), ("--bf16 true", "bfloat16"), ("--bf16 true --dtype float32", "float32")],
)
def test_the_base_is_loaded_in_what_is_computed_in(
    flags, dtype, base, data, tmp_path, capfd, monkeypatch
):
    def load(name, *, dtype, **_):
        raise UserError(f"the base in {dtype}")

    monkeypatch.setattr(train, "load_model", load)
    fails(train_flags(base, data, tmp_path / "out", *flags.split()), capfd, f"the base in {dtype}")


@pytest.mark.parametrize(
    ("flags", "checkpointing", "bf16"),
    [
        ("", False, False),
        ("--gradient_checkpointing --bf16", True, True),
        ("--gradient_checkpointing False --bf16 False", False, False),
    ],
)
def test_what_a_cpu_does_unless_told(flags, checkpointing, bf16, tmp_path):
    argv = f"--model m --dataset d --output_dir {tmp_path} --use_cpu {flags}".split()
    training = arguments.parse(argv)[0]
    assert (training.gradient_checkpointing, training.bf16) == (checkpointing, bf16)
    assert training.learning_rate is None


def test_ddp_sends_no_buffers_each_step_unless_told(tmp_path):
    argv = f"--model m --dataset d --output_dir {tmp_path}".split()
    assert arguments.parse(argv)[0].ddp_broadcast_buffers is False
    assert arguments.parse([*argv, "--ddp_broadcast_buffers"])[0].ddp_broadcast_buffers is True


def test_required_flags(capfd):
    fails(["train", "--model", "m"], capfd, "--dataset_name, --output_dir missing")


def test_an_output_folder_that_is_not_empty(base, data, tmp_path, capfd, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("secura.cli.train.load_model", loaded)
    (tmp_path / "notes.txt").write_text("mine")
    fails(train_flags(base, data, tmp_path), capfd, "not empty", "--resume_from_checkpoint")
    fails(train_flags(base, data, tmp_path / "notes.txt"), capfd, "is a file")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_checkpoint_is_named(trained, base, data, tmp_path, capfd):
    broken = tmp_path / "out" / "checkpoint-2"
    shutil.copytree(trained / "checkpoint-2", broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    flags = train_flags(base, data, tmp_path / "out", "--resume_from_checkpoint")
    fails([*flags, broken], capfd, "checkpoint-2", "adapter_model.safetensors is damaged")
    fails(flags, capfd, "checkpoint-2", "damaged")
    fails([*flags, tmp_path / "out"], capfd, "output folder itself")


def test_help_and_unknown_commands(capfd, monkeypatch):
    assert main([]) == 2
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "doctor" in capfd.readouterr().out
    fails(["trian"], capfd, "'trian'")
    monkeypatch.setitem(sys.modules, "trl", None)
    assert main(["train", "--help"]) == 0
    listing = capfd.readouterr().out
    assert all(f"--{flag}" in listing for flag in ("inner_r", "norm_form", "learning_rate"))
    assert "`" not in listing and ":func:" not in listing


def test_a_missing_package_names_the_extra(base, data, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    fails(train_flags(base, data, tmp_path / "out"), capfd, "pip install '.[train]' in a clone")


def test_traceback_on_request(capfd, monkeypatch):
    with pytest.raises(UserError):
        main(["generate", "--traceback", "--prompt", "hi"])
    monkeypatch.setenv("SECURA_TRACEBACK", "0")
    fails(["generate", "--prompt", "hi"], capfd)
    monkeypatch.setenv("SECURA_TRACEBACK", "1")
    with pytest.raises(UserError):
        main(["generate", "--prompt", "hi"])


def test_an_interruption_is_no_error(capfd, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("secura.cli.generate.make_parser", stop)
    assert main(["generate"]) == 130
