"""`secura train` where something goes wrong: nothing is lost in silence."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from cli_fixtures import fails, train_flags
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from secura.cli import arguments, main
from secura.cli.checks import check_lengths
from secura.cli.errors import UserError
from secura.cli.folders import record_sums, sole_use
from secura.cli.resume import digest, saved_step

NO_CHECKPOINTS = ("--save_strategy", "no", "--max_steps", 1)


@pytest.mark.parametrize("fold", [(), ("--norm", "channel", "--fold_every", 1)])
def test_a_run_that_diverges_publishes_nothing_and_keeps_the_checkpoint(
    fold, base, data, tmp_path, capfd
):
    output = tmp_path / "out"
    flags = ["--max_grad_norm", 0, "--lr_scheduler_type", "constant", *fold]
    assert main(train_flags(base, data, output, "--save_steps", 2, "--max_steps", 2, *flags)) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (output / name).unlink()
    state = output / "checkpoint-2" / "optimizer.pt"
    optimizer = torch.load(state)
    for group in optimizer["param_groups"]:
        group["lr"] = group["initial_lr"] = 1e36
    torch.save(optimizer, state)
    record_sums(state.parent)
    argv = train_flags(base, data, output, *flags, "--save_steps", 1, "--resume_from_checkpoint")
    parts = (
        "training diverged: after step",
        "nothing was published",
        "is the last checkpoint",
        "lower",
    )
    fails(argv, capfd, *parts)
    assert not (output / "adapter_config.json").exists()
    assert not (output / "adapter_model.safetensors").exists()
    for checkpoint in output.glob("checkpoint-*"):
        tensors = load_file(checkpoint / "adapter_model.safetensors")
        assert all(bool(torch.isfinite(value.float()).all()) for value in tensors.values())


@pytest.mark.parametrize("word", ["--target_modules", "--target-modules"])
def test_a_list_in_two_parts_is_no_list_of_the_last(word, base, data, tmp_path, capfd):
    """For argparse it would be."""
    output = tmp_path / "out"
    argv = train_flags(base, data, output, "--target_modules", "q_proj", word, "v_proj")
    fails(argv, capfd, "--target_modules is there twice: give all its values after one")
    fails([*argv[:-2], f"{word}=v_proj"], capfd, "--target_modules is there twice")
    assert not output.exists()


def test_training_on_an_adapter_is_refused(trained, data, tmp_path, capfd):
    output = tmp_path / "out"
    argv = train_flags(trained, data, output)
    fails(argv, capfd, "is an adapter, not a model", "secura merge", "--resume_from_checkpoint")
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--norm channel", ["norm was 'weight' and is now 'channel'"]),
        ("--scaling 2", ["scaling was 1.0 and is now 2.0"]),
        ("--r 3 --learning_rate 0.01", ["r was 4 and is now 3", "learning_rate was 0.05"]),
        ("--target_modules q_proj", ["target_modules was 'all-linear' and is now ['q_proj']"]),
        ("--per_device_train_batch_size 2", ["batch size was 4 and is now 2"]),
        ("--gradient_accumulation_steps 2", ["batch size was 4 and is now 8"]),
        ("--adam_beta2 0.9", ["adam_beta2 was 0.999 and is now 0.9"]),
        (
            "--shuffle_dataset --data_seed 3 --lr_scheduler_type constant",
            ["shuffle_dataset was", "data_seed was None", "lr_scheduler_type was 'linear'"],
        ),
        ('--accelerator_config {"split_batches":true}', ["split_batches=True"]),
        ("--dataset {other}", ["the data set was", "apples.jsonl (train, 16 rows)", "other.jsonl"]),
        ("--dataset_train_split train[:8]", ["is now", "(train[:8], 8 rows)"]),
    ],
)
def test_resuming_with_other_settings(flags, parts, trained, base, data, tmp_path, capfd):
    other, output = tmp_path / "other.jsonl", tmp_path / "out"
    other.write_text(data.read_text().replace("ann", "now"))
    shutil.copytree(trained / "checkpoint-2", output / "checkpoint-2")
    argv = train_flags(base, data, output, "--resume_from_checkpoint")
    argv += flags.replace("{other}", str(other)).split()
    fails(argv, capfd, "cannot resume from", "checkpoint-2", *parts)
    assert [path.name for path in output.iterdir()] == ["checkpoint-2"]


def test_the_digest_is_of_the_rows_alone():
    from datasets import Dataset

    rows = Dataset.from_dict({"text": [str(n) for n in range(2000)]})
    assert digest(rows) == digest(rows.flatten_indices()) == digest(rows.select(range(2000)))
    assert digest(rows) != digest(rows.select([1, 0, *range(2, 2000)]))


def test_a_finished_run_takes_no_further_step(trained, base, data, tmp_path, capfd):
    output = tmp_path / "out"
    shutil.copytree(trained, output)
    argv = train_flags(base, data, output, "--save_steps", 2, "--resume_from_checkpoint")
    assert main(argv) == 0
    assert "step 4 of 4 is done; the adapter in" in capfd.readouterr().out
    files = ("adapter_model.safetensors", "adapter_config.json", "trainer_state.json")
    for name in files:
        assert (output / name).read_bytes() == (trained / name).read_bytes()
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    for name in files:  # as where the run was killed between its last checkpoint and the end
        (output / name).unlink()
    assert main(argv) == 0
    assert "checkpoint-4 is in" in capfd.readouterr().out
    tiny.assert_same(load_file(output / files[0]), load_file(trained / files[0]))
    assert saved_step(output) == 4


def test_settings_of_speed_alone_may_change_in_a_resumed_run(trained, base, data, tmp_path, capfd):
    output = tmp_path / "out"
    shutil.copytree(trained / "checkpoint-2", output / "checkpoint-2")
    more = ["--share_inputs", "--keep_columns", "--resume_from_checkpoint"]
    more += ["--gradient_checkpointing", "--logging_steps", 3, "--dataset_num_proc", 1]
    assert main(train_flags(base, data, output, "--save_steps", 2, *more)) == 0
    assert "secura: 2 steps in" in capfd.readouterr().out
    found, expected = (load_file(at / "adapter_model.safetensors") for at in (output, trained))
    for name in (name for name in expected if name.endswith((".A", ".B"))):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
    fails(train_flags(base, data, output, "--norm", "none", *more), capfd, "norm was 'weight'")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--target_modules q_proj vproj", ["--target_modules: 'vproj'", "did you mean v_proj?"]),
        ("--target_modules qproj", ["--target_modules: 'qproj'", "did you mean q_proj?"]),
        (
            r"--target_modules .*\.qq_(proj|x)",
            ["matches no layer of this model", "down_proj", "name those to take"],
        ),
        ("--layers_to_transform 1", ["layers_to_transform needs names", "'all-linear' is a"]),
        ("--eval_strategy steps", ["Unknown split", "'train[90%:]'"]),
        ("--exclude_modules o_prj", ["--exclude_modules: 'o_prj'", "did you mean o_proj?"]),
        ("--target_parameters experts.down", ["'experts.down' matches no parameter"]),
        ("--target_modules q_proj --layers_to_transform 0 7", ["--layers_to_transform: 7"]),
        ("--modules_to_save lm_head norms", ["norms"]),
        ('--rank_pattern {"vproj":2}', ["--rank_pattern: 'vproj'"]),
        ("--target_modules q_proj,v_proj", ["separate names by spaces: q_proj v_proj"]),
        ("--layers_to_transform 0,1", ["--layers_to_transform", "separate values by spaces"]),
        ("--target_modules q_proj(", ["'q_proj('", "regular expression"]),
        ('--rank_pattern {"v_proj(":2}', ["'v_proj('", "regular expression"]),
        ("--rank_pattern [2]", ["wanted r by layer"]),
        ("--max_length 3", ["none of the 16 rows", "--max_length 3"]),
        ("--use_liger_kernel", ["liger"]),
    ],
)
def test_flags_that_ask_for_what_is_not_there(flags, parts, base, data, tmp_path, capfd):
    output = tmp_path / "out"
    fails(train_flags(base, data, output, *flags.split()), capfd, *parts)
    assert not output.exists()


def test_rows_with_nothing_left_to_learn_are_told(base, tmp_path, capfd):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "how many apples", "completion": " are left"}] * 6
    rows[1] = rows[4] = {"prompt": "how many apples are left if ann has 3 and", "completion": " 2"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = train_flags(base, path, tmp_path / "out", "--max_length", 6, *NO_CHECKPOINTS)
    assert main(argv) == 0
    assert "2 of 6 rows have nothing left to learn within --max_length 6 and are left out (rows " \
        "2, 5); raise it" in capfd.readouterr().out  # fmt: skip
    assert main([*argv, "--overwrite_output_dir", "--packing", "--max_length", "64"]) == 0
    assert "nothing left to learn" not in capfd.readouterr().out


def test_rows_to_evaluate_are_no_longer_than_the_positions_either():
    from datasets import Dataset

    rows = {n: Dataset.from_dict({"input_ids": [[3] * n, [3]]}) for n in (12, 13)}
    text = SimpleNamespace(max_position_embeddings=12)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    for train, evaluated in ((12, None), (12, 12), (13, 12), (12, 13)):
        sets = {"train_dataset": rows[train], "eval_dataset": rows.get(evaluated)}
        trainer = SimpleNamespace(model=model, **sets)
        if 13 in (train, evaluated):
            with pytest.raises(UserError, match="longest row has 13 tokens, and the model 12 pos"):
                check_lengths(trainer)
        else:
            check_lengths(trainer)


def test_rows_longer_than_the_model_has_positions(base, data, tmp_path, capfd):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=12, n_embd=24, n_layer=1, n_head=2)
    )
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    argv = train_flags(tmp_path / "base", data, tmp_path / "out", *NO_CHECKPOINTS)
    fails(argv, capfd, "longest row has", "12 positions", "--max_length 12")
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--max_length", "12", "--completion_only_loss", "False"]) == 0
    asked = ["generate", "--model", str(tmp_path / "base"), "--prompt", "apples"]
    fails([*asked, "--max_new_tokens", 20], capfd, "12 positions", "--max_new_tokens")


def test_experts_that_all_linear_cannot_reach_are_told(base, data, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, eos_token_id=2,
        )
    )  # fmt: skip
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    told = r"2 stacked weights of experts, such as .*mlp\.experts\..*%"
    with pytest.warns(UserWarning, match=told):
        assert main(train_flags(tmp_path / "base", data, tmp_path / "out", *NO_CHECKPOINTS)) == 0


def test_a_folder_that_another_run_holds(base, data, tmp_path, capfd, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("secura.cli.train.load_model", loaded)
    output = tmp_path / "deep" / "out"
    with sole_use(output):
        fails(train_flags(base, data, output), capfd, "another run is writing into", output)
        assert output.is_dir()
    assert not output.parent.exists()
    (output / "sub").mkdir(parents=True)
    (output / ".lock").touch()  # a killed run's
    with sole_use(output / "sub"):
        pass
    with sole_use(output):
        pass
    assert [path.name for path in output.iterdir()] == ["sub"]


@pytest.mark.parametrize("command", ["merge", "export_lora"])
def test_what_writes_a_model_has_its_folder_alone(command, trained, tmp_path, capfd):
    output = tmp_path / "out"
    words = [command, "--adapter", trained, "--output_dir", output]
    with sole_use(output):
        fails(words, capfd, "another run is writing into", output)
    assert not output.exists()
    (output / ".saving").mkdir(parents=True)  # a killed run's
    (output / ".saving" / "half").touch()
    (output / ".lock").touch()
    if command == "merge":
        assert main(list(map(str, words))) == 0
        assert {"config.json", "tokenizer.json"} <= {path.name for path in output.iterdir()}
        assert not (output / ".saving").exists() and not (output / ".lock").exists()


def test_a_lora_brings_the_tokenizer_along(base, data, tmp_path):
    adapter, output = tmp_path / "adapter", tmp_path / "lora"
    flags = [*NO_CHECKPOINTS, "--norm", "channel"]
    assert main(train_flags(base, data, adapter, *flags)) == 0
    assert main(["export_lora", "--adapter", str(adapter), "--output_dir", str(output)]) == 0
    assert (output / "tokenizer.json").read_text() == (adapter / "tokenizer.json").read_text()
    (adapter / "tokenizer_config.json").unlink()
    again = tmp_path / "again"
    assert main(["export_lora", "--adapter", str(adapter), "--output_dir", str(again)]) == 0
    assert not (again / "tokenizer.json").exists()


def test_a_link_in_place_of_the_scratch_folder_is_not_followed(base, data, tmp_path):
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for folder in (output, elsewhere):
        folder.mkdir()
    (elsewhere / "mine.txt").write_text("mine")
    (output / ".saving").symlink_to(elsewhere)
    assert main(train_flags(base, data, output, *NO_CHECKPOINTS)) == 0
    assert [path.name for path in elsewhere.iterdir()] == ["mine.txt"]
    assert (output / "adapter_config.json").is_file() and not (output / ".saving").exists()


def test_a_relative_base_is_found_from_anywhere(base, data, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    assert main(train_flags("./base", data, "out", "--save_steps", 1, "--max_steps", 1)) == 0
    monkeypatch.chdir(tmp_path)
    for folder in ("here/out", "here/out/checkpoint-1"):
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "here" / "base")
    assert main(["merge", "--adapter", "here/out", "--output_dir", "merged"]) == 0


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_a_published_adapter_has_the_modes_of_the_umask(base, data, tmp_path):
    before = os.umask(0o027)
    try:
        assert main(train_flags(base, data, tmp_path / "out", *NO_CHECKPOINTS)) == 0
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert modes == {0o640}


def test_yaml_words_and_the_flag_rank(base, data, tmp_path, capfd):
    config, output = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text("save_strategy: no\neval_strategy: no\nrank: 3\nmax_steps: 1\nuse_cpu: yes\n")
    argv = ["train", "--model", str(base), "--dataset", str(data), "--output_dir", str(output)]
    assert main([*argv, "--config", str(config)]) == 0
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 3
    assert main([*argv, "--config", str(config), "--rank", "2", "--overwrite_output_dir"]) == 0
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2
    for text, parts in (
        ("r: 4.5", ["r", "'4.5'"]),
        ("max_steps: no", ["max_steps", "'no'"]),
        ("eval_strategy: off", ["'off' is none of no, steps, epoch"]),
        ("rank: 3\nr: 4", ["'r' gives 'r' a second time"]),
        ("model: a\nmodel_name_or_path: b", ["'model_name_or_path' a second time"]),
    ):
        config.write_text(text)
        fails([*argv, "--config", config, "--overwrite_output_dir"], capfd, *parts)


def test_a_config_files_words_are_what_is_written(tmp_path):
    """YAML would read octal numbers, dates and booleans here."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: m\ndataset: 1.50\noutput_dir: 007\nmodel_revision: 0123456\nreport_to: off\n"
        "target_modules: [010, no]\nlayers_to_transform: [1, 2]\nenv: {WORDS: 0x1F}\n"
        "run_name: 'null'\nexclude_modules: ~\nhub_model_id:\nrank_pattern: {q: 2}\n"
        "lr_scheduler_kwargs: {num_cycles: 2, warm: yes}\nbf16: False\nuse_cpu: 1\n"
    )
    training, model, dataset, adapter, _ = arguments.parse(["--config", str(config)])
    assert (model.model_revision, dataset.dataset_name) == ("0123456", "1.50")
    assert (training.output_dir, training.report_to, training.run_name) == ("007", ["off"], "null")
    assert (adapter.target_modules, adapter.exclude_modules) == (["010", "no"], None)
    assert (adapter.layers_to_transform, adapter.rank_pattern) == ([1, 2], '{"q": 2}')
    assert training.lr_scheduler_kwargs == {"num_cycles": 2, "warm": True}
    assert (training.hub_model_id, training.bf16, training.use_cpu) == (None, False, True)
    assert os.environ.pop("WORDS") == "0x1F"
