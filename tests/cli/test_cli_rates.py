"""`secura train` without `--learning_rate`: the rate by the weights, printed, kept, resumed."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from cli_fixtures import fails, train_flags
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import secura
from secura.cli import main, steps
from secura.cli.callbacks import recorded_settings
from secura.cli.errors import UserError


def without(argv: list[str], flag: str) -> list[str]:
    at = argv.index(flag)
    return argv[:at] + argv[at + 2 :]


def unrated(base, data, output, *more):
    """The flags of a run that leaves the rate open."""
    return without(train_flags(base, data, output, *more), "--learning_rate")


def state(folder) -> dict:
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))


def expected(base, count, **settings) -> float:
    model = AutoModelForCausalLM.from_pretrained(base)
    config = secura.SecuraConfig(r=4, seed=42, target_modules="all-linear", **settings)
    return secura.learning_rate(get_peft_model(model, config), count)


def test_a_run_takes_the_rate_of_its_weights_and_goes_on_with_it(base, data, tmp_path, capfd):
    output = tmp_path / "out"
    flags = ("--save_steps", 2, "--logging_steps", 1, "--lr_scheduler_type", "constant")
    assert main(unrated(base, data, output, *flags)) == 0
    rate = expected(base, 8)
    line = f"secura: learning rate {rate:g}, by the weights that are adapted"
    assert line in capfd.readouterr().out
    assert {log["learning_rate"] for log in state(output)["log_history"][:4]} == {rate}
    assert rate == expected(base, 8) != expected(base, 4)  # a constant one counts twice
    assert recorded_settings(state(output))["learning_rate"] == rate
    assert expected(base, 80) < rate
    longer = without(unrated(base, data, output, *flags), "--max_steps")
    assert main([*longer, "--max_steps", "40", "--resume_from_checkpoint"]) == 0
    assert "learning rate" not in capfd.readouterr().out  # it is the run's own
    assert {log["learning_rate"] for log in state(output)["log_history"][:40]} == {rate}
    other = train_flags(base, data, output, *flags, "--resume_from_checkpoint")
    fails(other, capfd, f"learning_rate was {rate!r} and is now 0.05")


def test_of_epochs_the_steps_are_counted(base, data, tmp_path, capfd):
    argv = unrated(base, data, tmp_path / "out", "--num_train_epochs", 3, "--save_strategy", "no")
    argv = without(argv, "--max_steps")
    assert main([*argv, "--gradient_accumulation_steps", "2"]) == 0  # 16 rows by 8, three times
    assert f"learning rate {expected(base, 6):g}," in capfd.readouterr().out


def test_an_anchored_core_has_its_own(base, data, tmp_path, capfd, monkeypatch):
    flags = ("--anchor", "--anchor_tokens", 64, "--target_modules", "all-linear")
    argv = unrated(base, data, tmp_path / "out", *flags, "--save_strategy", "no")
    assert main(argv) == 0
    rate = expected(base, 4, core="u", norm="none")
    assert f"learning rate {rate:g}," in capfd.readouterr().out
    monkeypatch.setattr("secura.cli.anchoring.anchor", None)  # to be called is an error
    too_much = f"anchor_decay={1e9:g} at a learning rate of {rate:g}"
    fails([*argv, "--anchor_decay", 1e9, "--overwrite_output_dir"], capfd, too_much)


def test_whole_weights_beside_an_adapter_keep_a_low_one(base, data, tmp_path, capfd):
    argv = unrated(base, data, tmp_path / "out", "--modules_to_save", "lm_head", "--norm", "none")
    assert main([*argv, "--target_modules", "q_proj", "--save_strategy", "no"]) == 0
    said = "secura: learning rate 0.0002, since not adapters alone are trained"
    assert said in capfd.readouterr().out


def test_a_rate_that_is_given_is_taken(base, data, tmp_path, capfd):
    flags = ("--logging_steps", 1, "--lr_scheduler_type", "constant", "--save_strategy", "no")
    output = tmp_path / "out"
    assert main(train_flags(base, data, output, *flags)) == 0
    assert "learning rate" not in capfd.readouterr().out
    assert recorded_settings(state(output))["learning_rate"] == 0.05


def test_weights_that_say_none_are_told(base, data, tmp_path, capfd, monkeypatch):
    def no_rate(*_):
        raise ValueError("the base weight is on the meta device: load the weights first")

    monkeypatch.setattr("secura.rates.learning_rate", no_rate)
    argv = unrated(base, data, tmp_path / "out")
    fails(argv, capfd, "load the weights first; or give --learning_rate")


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("place", ["optimizer.params.lr", "scheduler.params.warmup_max_lr"])
def test_a_deepspeed_file_that_asks_for_the_rate_gets_it_from_a_flag(place, resumes):
    found = {place: None}  # "auto", as transformers fills it in
    read = SimpleNamespace(get_value=lambda name, default=None: found.get(name, default))
    training = SimpleNamespace(hf_deepspeed_config=read, optim="adamw_torch")
    for value in (None, 1e-3):  # beside which transformers wants the same of the flag
        found[place] = value
        with pytest.raises(UserError, match=f"{place} wants the rate .* give --learning_rate"):
            steps.check_rate_asked(training, resumes=resumes)
    found.clear()
    steps.check_rate_asked(training, resumes=resumes)
    training.hf_deepspeed_config = None
    steps.check_rate_asked(training, resumes=resumes)


@pytest.mark.parametrize("name", ["sgd", "adafactor", "rmsprop", "schedule_free_sgd"])
def test_an_optimizer_of_another_kind_is_given_its_rate(name, base, data, tmp_path, capfd):
    argv = unrated(base, data, tmp_path / "out", "--optim", name)
    fails(argv, capfd, f"--optim {name}: the rate that the weights give is for Adam")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_says_no_rate_asks_for_it(trained, base, data, tmp_path, capfd):
    output = tmp_path / "out"
    shutil.copytree(trained / "checkpoint-2", output / "checkpoint-2")
    path = output / "checkpoint-2" / "trainer_state.json"
    kept = state(path.parent)
    del kept["stateful_callbacks"]["SettingsCallback"]
    path.write_text(json.dumps(kept))
    (path.parent / "checksums.json").unlink()
    argv = unrated(base, data, output, "--resume_from_checkpoint")
    fails(argv, capfd, "does not say its rate: give --learning_rate")
    rated = train_flags(base, data, output, "--resume_from_checkpoint", "--logging_steps", 1)
    assert main(rated) == 0
    assert recorded_settings(state(output))["learning_rate"] == 0.05


def test_a_resumed_run_of_another_optimizer_has_its_own_rate(base, data, tmp_path):
    output, flags = tmp_path / "out", ("--optim", "sgd", "--save_steps", 2, "--logging_steps", 1)
    assert main(train_flags(base, data, output, *flags)) == 0
    argv = without(unrated(base, data, output, *flags), "--max_steps")
    assert main([*argv, "--max_steps", "6", "--resume_from_checkpoint"]) == 0
    assert recorded_settings(state(output))["learning_rate"] == 0.05
