"""What a run of the command line must not destroy, pass over or train in silence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from cli_fixtures import base, data, fails, main, train_flags, trained, tree  # noqa: F401
from datasets import Dataset
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from secura.cli.data import load_split

NO_CHECKPOINTS = ("--save_strategy", "no")
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("flag", ["--dataset", "--anchor"])
def test_data_in_a_checkpoint_is_not_overwritten(flag, base, data, tmp_path, capfd):  # noqa: F811
    own = tmp_path / "out" / "checkpoint-1" / data.name
    own.parent.mkdir(parents=True)
    shutil.copy(data, own)
    given = own if flag == "--dataset" else data
    more = ("--anchor", own) if flag == "--anchor" else ()
    argv = train_flags(base, given, tmp_path / "out", "--overwrite_output_dir", *more)
    fails(argv, capfd, f"{flag} {own} lies where the run writes")
    assert own.is_file()


@pytest.mark.parametrize("place", ["own", "own/checkpoint-100"])
def test_a_base_is_not_overwritten(place, base, data, tmp_path, capfd):  # noqa: F811
    model, output = tmp_path / place, tmp_path / "own"
    shutil.copytree(base, model)
    before = tree(output)
    argv = train_flags(model, data, output, "--overwrite_output_dir", *NO_CHECKPOINTS)
    fails(argv, capfd, f"--model {model} lies where the run writes", "another --output_dir")
    assert tree(output) == before


def test_a_file_of_the_same_place_and_time_is_read_by_its_content(tmp_path):
    """As what copies a file with its time leaves it; what was prepared is kept by that alone."""
    path, found = tmp_path / "rows.jsonl", []
    for text in ("ann has 1", "now she eats"):
        jsonl(path, {"text": text})
        os.utime(path, (1e9, 1e9))
        found.append(load_split(str(path), None, "train")["text"][0])
    assert found == ["ann has 1", "now she eats"]


def test_a_folder_of_two_kinds_of_files_is_refused(base, data, tmp_path, capfd):  # noqa: F811
    folder = tmp_path / "rows"
    folder.mkdir()
    shutil.copy(data, folder / "a.jsonl")
    (folder / "b.csv").write_text("question,answer\nhow many,1\n")
    argv = train_flags(base, folder, tmp_path / "out", *NO_CHECKPOINTS)
    fails(argv, capfd, "files of the kinds csv and json, of which one would be read")
    (folder / "b.csv").unlink()
    assert len(load_split(str(folder), None, "train")) == 16


def test_a_row_with_more_fields_than_its_header(base, tmp_path, capfd):  # noqa: F811
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nhow many apples are left, if ann has 1,1\n")
    argv = train_flags(base, path, tmp_path / "out", *NO_CHECKPOINTS)
    fails(argv, capfd, "line 2 has 3 fields, and the header 2", "double quotes")


def test_csv_files_that_are_as_they_should_be(tmp_path):
    """A long text, a row without its last field, quoted lines, a last line of spaces."""
    path, long = tmp_path / "rows.csv", "x" * 200_000
    path.write_text(f'prompt,completion,notes\n{long},b,c\na,"b\n, b"\n   \n', encoding="utf-8-sig")
    rows = load_split(str(path), None, "train")
    assert rows["prompt"][0] == long and rows["completion"][1] == "b\n, b"
    assert rows["notes"][1] is None


def test_words_of_a_csv_file_that_readers_take_for_nothing(base, tmp_path):  # noqa: F811
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\nwho,"None"\nwhich,NA\n')
    assert load_split(str(path), None, "train")["answer"] == ["None", "NA"]


def test_a_file_is_no_pattern(tmp_path):
    folder = tmp_path / "dir [x] y"
    folder.mkdir()
    path = jsonl(folder / "rows[1].jsonl", {"text": "right"})
    jsonl(folder / "rows1.jsonl", {"text": "wrong"})
    assert load_split(str(path), None, "train")["text"] == ["right"]


def test_a_template_that_is_given_is_used_and_its_end_looked_at(base, data, tmp_path, capfd):  # noqa: F811
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    flags = ("--chat_template_path", tmp_path / "chat.jinja", *NO_CHECKPOINTS)
    assert main(train_flags(base, data, tmp_path / "a", *flags)) == 0
    assert "note: no row holds '</s>'" in capfd.readouterr().out
    assert main(train_flags(base, data, tmp_path / "b", *NO_CHECKPOINTS)) == 0
    assert "no row holds" not in capfd.readouterr().out
    again = train_flags(base, data, tmp_path / "a", "--overwrite_output_dir", *NO_CHECKPOINTS)
    assert (tmp_path / "a" / "chat_template.jinja").is_file()
    assert main(again) == 0
    assert not (tmp_path / "a" / "chat_template.jinja").exists()  # the former run's


def test_an_end_that_the_settings_of_generation_name_is_one():
    from secura.cli.checks import never_ends

    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 7]))
    args = SimpleNamespace(packing=False, max_length=4)
    tokenizer = SimpleNamespace(eos_token="</s>", eos_token_id=2)
    for labels, told in (([5, 7], False), ([5, 6], True), ([5, 6, 5, 6], False)):  # the last is cut
        rows = Dataset.from_dict({"input_ids": [labels], "labels": [labels]})
        own = {"train_dataset": rows, "processing_class": tokenizer, "model": model, "args": args}
        assert (never_ends(SimpleNamespace(**own)) is not None) == told


def test_a_terminal_without_greek_is_written_to():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "secura.cli", "train", "--help"]
    run = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert run.returncode == 0 and b"--anchor_decay" in run.stdout


def test_rows_that_are_cut_are_told_and_packed_ones_without_an_answer_refused(
    base,  # noqa: F811
    data,  # noqa: F811
    tmp_path,
    capfd,
):
    flags = ("--max_length", 13, *NO_CHECKPOINTS)
    assert main(train_flags(base, data, tmp_path / "a", *flags)) == 0
    assert "note: 16 of 16 rows are as long as --max_length 13 allows" in capfd.readouterr().out
    flags = ("--packing", "--max_length", 6, *NO_CHECKPOINTS)
    fails(train_flags(base, data, tmp_path / "b", *flags), capfd, "none of the 16 rows has")
    assert not (tmp_path / "b").exists()


def test_evaluation_rows_that_are_left_out_are_told(base, data, tmp_path, capfd):  # noqa: F811
    short, long = ({"question": "how many" + " apples" * n, "answer": "1"} for n in (1, 30))
    flags = ("--eval_strategy", "steps", "--eval_steps", 2, "--max_length", 20, *NO_CHECKPOINTS)
    for rows, status in (((short, long), 0), ((long,), 2)):
        path = jsonl(tmp_path / f"{status}.jsonl", *(4 * (short,)), *rows)
        split = ("--dataset_train_split", "train[:4]", "--dataset_test_split", "train[4:]")
        argv = train_flags(base, path, tmp_path / f"out{status}", *flags, *split)
        assert main(argv) == status
        said = capfd.readouterr()
        told = "1 of 2 evaluation rows have nothing left to learn"
        assert (told in said.out) if status == 0 else ("none of the 1 evaluation rows" in said.err)


def test_evaluating_never_is_told(base, data, tmp_path, capfd):  # noqa: F811
    argv = train_flags(base, data, tmp_path / "out", "--eval_steps", 2, *NO_CHECKPOINTS)
    assert main(argv) == 0
    assert "--eval_steps evaluates nothing without --eval_strategy" in capfd.readouterr().out
    more = ("--load_best_model_at_end", *NO_CHECKPOINTS)
    assert main(train_flags(base, data, tmp_path / "best", *more)) == 0
    assert "--load_best_model_at_end has no best without" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": " "}, "no row has any 'text'"),
        ({"question": "how many", "answer": ""}, "1 of 1 rows have no 'answer' (row 1)"),
    ],
)
def test_rows_of_nothing_are_refused(row, said, base, tmp_path, capfd):  # noqa: F811
    path = jsonl(tmp_path / "rows.jsonl", row)
    argv = train_flags(base, path, tmp_path / "out", *NO_CHECKPOINTS)
    fails(argv, capfd, said)


def test_blank_lines_of_a_text_are_left_out_and_told(base, tmp_path, capfd):  # noqa: F811
    rows = [{"text": text} for text in ("", "how many apples", " \n", "ann has 1")]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    assert main(train_flags(base, path, tmp_path / "out", *NO_CHECKPOINTS)) == 0
    said = capfd.readouterr().out
    assert "2 of 4 rows have no 'text' and are left out (rows 1, 3)" in said and "; 2 rows)" in said


def test_messages_want_a_template(base, tmp_path, capfd):  # noqa: F811
    path = jsonl(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": "how many"}]})
    argv = train_flags(base, path, tmp_path / "out", *NO_CHECKPOINTS)
    fails(argv, capfd, "holds messages", "--chat_template_path")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("no_check_base: true\n", "unknown key 'no_check_base'"),
        ("help: true\n", "unknown key 'help'"),
        ("dtype: float8\n", "'float8' is none of"),
        ("modules_to_save: head\n", "'head' matches no layer"),
    ],
)
def test_yaml_is_taken_at_its_word(text, part, base, data, tmp_path, capfd):  # noqa: F811
    (tmp_path / "run.yaml").write_text(text)
    argv = train_flags(base, data, tmp_path / "out", *NO_CHECKPOINTS)
    fails([*argv, "--config", tmp_path / "run.yaml"], capfd, part)


def test_a_base_whose_settings_of_generation_cannot_be_saved(base, data, tmp_path, capfd):  # noqa: F811
    own = tmp_path / "own"
    shutil.copytree(base, own)
    (own / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    assert main(train_flags(own, data, tmp_path / "adapter", *NO_CHECKPOINTS)) == 0
    argv = ["merge", "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged"]
    fails(argv, capfd, "generation_config.json cannot be saved again", "do_sample: true")
    assert not (tmp_path / "merged").exists()


def test_a_base_that_reads_images_is_merged_as_what_it_is(tmp_path):
    """Its class is none of transformers' causal language models."""
    text = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    text["rope_parameters"] = {
        "rope_type": "default",
        "mrope_section": [2, 3, 3],
        "rope_theta": 1e4,
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    tokens = {"image_token_id": 20, "video_token_id": 21, "vision_start_token_id": 22}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **tokens, vision_end_token_id=23)
    model = Qwen2VLForConditionalGeneration(config)
    own, adapter, merged = (tmp_path / name for name in ("own", "adapter", "merged"))
    model.save_pretrained(own)
    tiny.tokenizer().save_pretrained(own)
    model = tiny.adapted(model, norm="channel", target_modules=["q_proj"], task_type="CAUSAL_LM")
    tiny.perturb(model)
    model.peft_config["default"].base_model_name_or_path = str(own)
    model.save_pretrained(adapter)
    assert main(["merge", "--adapter", str(adapter), "--output_dir", str(merged)]) == 0
    found = Qwen2VLForConditionalGeneration.from_pretrained(merged)
    torch.testing.assert_close(tiny.logits(found), tiny.logits(model))


def test_how_a_base_reads_images_is_merged_along(trained, base, tmp_path):  # noqa: F811
    own, merged = tmp_path / "own", tmp_path / "merged"
    shutil.copytree(base, own)
    (own / "preprocessor_config.json").write_text('{"image_processor_type": "Any"}')
    argv = ["merge", "--adapter", trained, "--model", own, "--output_dir", merged]
    assert main(list(map(str, argv))) == 0
    assert (merged / "preprocessor_config.json").read_text() == '{"image_processor_type": "Any"}'
    assert not (merged / "processor_config.json").exists()


def test_fsdp1_casts_no_buffers():
    """In bf16 folds into U_acc would be lost; FSDP2's policy has no such setting."""
    from secura.cli.train import gather_to_save

    policy = MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    plugin = SimpleNamespace(mixed_precision_policy=policy, set_state_dict_type=print)
    state = SimpleNamespace(fsdp_plugin=plugin)
    gather_to_save(SimpleNamespace(accelerator=SimpleNamespace(state=state)))
    assert policy.buffer_dtype == torch.float32 and policy.param_dtype == torch.bfloat16
    plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16)
    gather_to_save(SimpleNamespace(accelerator=SimpleNamespace(state=state)))


def test_standard_input(trained, base, capfd, monkeypatch):  # noqa: F811
    from secura.cli.generate import read_stdin

    monkeypatch.setattr(sys, "stdin", None)
    fails(["generate", "--model", base, "--prompt", "-"], capfd, "standard input, which is closed")
    monkeypatch.setattr(sys, "stdin", (type("In", (), {"read": lambda self: "how many\n"}))())
    assert read_stdin() == "how many"
