"""`secura train`: what a step is made of is checked before anything is paid for."""

from __future__ import annotations

import pytest
from cli_fixtures import fails, train_flags

from secura.cli import main


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--max_steps 0", ["--max_steps 0 must be 1 or more"]),
        ("--learning_rate 0", ["--learning_rate 0.0 must be above 0"]),
        ("--learning_rate nan", ["--learning_rate nan must be above 0"]),
        ("--weight_decay -1", ["--weight_decay -1.0 must be 0 or more"]),
        ("--per_device_train_batch_size 0", ["--per_device_train_batch_size 0 must be 1 or more"]),
        ("--gradient_accumulation_steps 0", ["--gradient_accumulation_steps 0 must be 1 or more"]),
        ("--per_device_eval_batch_size 0", ["--per_device_eval_batch_size 0 must be 1 or more"]),
        ("--neftune_noise_alpha -1", ["--neftune_noise_alpha -1.0 must be 0 or more"]),
        ("--num_train_epochs 0 --max_steps -1", ["--num_train_epochs 0 must be above 0"]),
        ("--label_smoothing_factor 2", ["--label_smoothing_factor 2.0 must be from 0 to"]),
        ('--model_init_kwargs {"dtype":"float16"}', ["would be ignored", "--dtype"]),
        ('--accelerator_config {"bogus":true}', ["AcceleratorConfig", "'bogus'"]),
    ],
)
def test_numbers_that_would_fail_late_or_teach_nothing(flags, parts, base, data, tmp_path, capfd):
    output = tmp_path / "out"
    fails(train_flags(base, data, output, *flags.split()), capfd, *parts)
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ('--lr_scheduler_kwargs {"bogus":1}', ["--lr_scheduler_type linear", "'bogus'"]),
        ("--lr_scheduler_type cosine_with_min_lr", ["--lr_scheduler_type cosine", "min_lr_rate"]),
        ("--adam_beta1 2", ["--optim adamw_torch", "beta"]),
        ("--optim lomo", ["--optim lomo", "lomo_optim"]),
        ("--optim galore_adamw_layerwise", ["--optim galore_adamw_layerwise", "galore_torch"]),
    ],
)
def test_nothing_is_anchored_for_an_optimizer_that_cannot_be_built(
    flags, parts, base, data, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr("secura.cli.anchoring.anchor", None)  # to be called is an error
    argv = train_flags(base, data, tmp_path / "out", "--anchor", *flags.split())
    fails(argv, capfd, *parts)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "reduce_lr_on_plateau", "greedy"])
def test_schedules_that_can_be_built_are_taken(schedule, base, data, tmp_path):
    flags = f"--lr_scheduler_type {schedule} --save_strategy no --eval_strategy steps"
    flags += " --eval_steps 1 --dataset_test_split train[:4] --max_steps 1"
    assert main(train_flags(base, data, tmp_path / "out", *flags.split())) == 0


def test_a_measure_that_is_none_is_told(base, data, tmp_path, capfd):
    flags = "--metric_for_best_model bogus --load_best_model_at_end --eval_strategy steps"
    flags += " --eval_steps 1 --save_steps 1 --dataset_test_split train[:4]"
    argv = train_flags(base, data, tmp_path / "out", *flags.split())
    fails(argv, capfd, "metric_for_best_model", "eval_loss")


def test_a_text_too_short_to_anchor_by_is_quoted(base, data, tmp_path, capfd):
    texts = tmp_path / "old.txt"
    texts.write_text("now how many apples\n\nhow\n")
    argv = train_flags(base, data, tmp_path / "out", "--anchor", texts)
    fails(argv, capfd, "text 1 ('how') has 1 token(s)")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--optim rmsprop --optim_args beta1=0.8,momentum=0.5", ["--optim_args beta1=0.8"]),
        ("--optim adamw_torch --optim_args eps=1", ["--optim_args eps=1"]),
        ("--optim_target_modules all-linear", ["--optim_target_modules"]),
    ],
)
def test_settings_that_an_optimizer_does_not_read_are_told(
    flags, told, base, data, tmp_path, capfd
):
    assert main(train_flags(base, data, tmp_path / "out", *flags.split())) == 0
    notes = [line for line in capfd.readouterr().out.splitlines() if "changes nothing" in line]
    assert len(notes) == len(told)
    for note, part in zip(notes, told, strict=True):
        assert note.startswith(f"secura: note: {part} changes nothing of --optim ")
