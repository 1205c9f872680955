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
        ("--label_smoothing_factor 2", ["--label_smoothing_factor 2.0 must be from 0 to"]),
        ('--model_init_kwargs {"dtype":"float16"}', ["would be ignored", "--dtype"]),
        ('--accelerator_config {"bogus":true}', ["AcceleratorConfig", "'bogus'"]),
    ],
)
def test_numbers_that_would_fail_late_or_teach_nothing(flags, parts, base, data, tmp_path, capfd):
    output = tmp_path / "out"
    fails(_flags(base, data, output, flags), capfd, *parts)
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ('--lr_scheduler_kwargs {"bogus":1}', ["--lr_scheduler_type linear", "'bogus'"]),
        ("--lr_scheduler_type cosine_with_min_lr", ["--lr_scheduler_type cosine", "min_lr_rate"]),
        ("--adam_beta1 2", ["--optim adamw_torch", "beta"]),
        ("--optim lomo", ["--optim lomo", "lomo_optim"]),
    ],
)
def test_an_optimizer_is_not_missed_after_an_anchor(flags, parts, base, data, tmp_path, capfd):
    argv = _flags(base, data, tmp_path / "out", f"--anchor self {flags}")
    assert main([*map(str, argv)]) == 2
    out, err = capfd.readouterr()
    last = err.rstrip("\n").splitlines()[-1]
    assert last.startswith("secura: error: ") and all(part in last for part in parts)
    assert "anchoring by" not in out


@pytest.mark.parametrize("schedule", ["linear", "cosine", "reduce_lr_on_plateau", "greedy"])
def test_schedules_that_can_be_built_are_taken(schedule, base, data, tmp_path):
    flags = f"--lr_scheduler_type {schedule} --save_strategy no --eval_strategy steps"
    flags += " --eval_steps 1 --dataset_test_split train[:4] --max_steps 1"
    assert main(_flags(base, data, tmp_path / "out", flags)) == 0


def test_a_measure_that_is_none_is_told(base, data, tmp_path, capfd):
    flags = "--metric_for_best_model bogus --load_best_model_at_end --eval_strategy steps"
    flags += " --eval_steps 1 --save_steps 1 --dataset_test_split train[:4]"
    fails(_flags(base, data, tmp_path / "out", flags), capfd, "metric_for_best_model", "eval_loss")


def test_a_text_too_short_to_anchor_by_is_quoted(base, data, tmp_path, capfd):
    texts = tmp_path / "old.txt"
    texts.write_text("now how many apples\n\nhow\n")
    argv = _flags(base, data, tmp_path / "out", f"--anchor {texts}")
    fails(argv, capfd, "text 1 ('how') has 1 token(s)")


def _flags(base, data, output, more):
    """`train_flags`, of which `more` replaces what it names."""
    argv, words = train_flags(base, data, output), more.split()
    for word in words:
        if word in argv:
            place = argv.index(word)
            del argv[place : place + 2]
    return [*argv, *words]
