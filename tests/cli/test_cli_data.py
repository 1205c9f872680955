"""The data `secura train` reads, and the columns it makes of it."""

from __future__ import annotations

import json
import shutil

import pytest
from cli_fixtures import fails, train_flags
from transformers import PreTrainedTokenizerFast

from secura.cli import main
from secura.cli.data import load_split, to_training_columns
from secura.cli.errors import UserError

CHAT = (
    "{% for turn in messages %}{{ turn['role'] }} {{ turn['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


TURN = '{"messages": [{"role": "user", "content": "hi"}]}\n'


def rows_of(path, name="train", **kwargs):
    options = {"text_field": "text", "chat": False} | kwargs
    return to_training_columns(load_split(str(path), None, name), str(path), **options)[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files_are_read(suffix, tmp_path):
    from datasets import Dataset

    path = tmp_path / f"rows{suffix}"
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"], "id": [1, 2]})
    {
        ".jsonl": rows.to_json,
        ".json": rows.to_json,
        ".csv": rows.to_csv,
        ".parquet": rows.to_parquet,
    }[suffix](path)
    assert rows_of(path)[1] == {"prompt": "b", "completion": "d"}
    assert len(rows_of(path, "train[:1]")) == 1


def test_folders_are_read(tmp_path):
    from datasets import Dataset, DatasetDict

    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": split}) + "\n")
    assert rows_of(tmp_path, "test")[0] == {"text": "test"}
    saved = tmp_path / "saved"
    DatasetDict(train=Dataset.from_dict({"text": ["kept"]})).save_to_disk(saved)
    assert rows_of(saved)[0] == {"text": "kept"}
    with pytest.raises(UserError, match="the splits train"):
        rows_of(saved, "test")


def test_columns(tmp_path, data):
    question = {"prompt": "how many apples are left if ann has 1 and eats 1\n", "completion": "0"}
    assert rows_of(data)[0] == question
    assert rows_of(data, chat=True)[0] == {
        "prompt": [{"role": "user", "content": question["prompt"].rstrip()}],
        "completion": [{"role": "assistant", "content": "0"}],
    }
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path.write_text(json.dumps({"messages": turns, "body": "b"}) + "\n")
    assert rows_of(path)[0] == {"messages": turns}
    assert rows_of(path, text_field="body")[0] == {"body": "b"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"body": "a", "id": 1}\n', ["'body', 'id'", "'question' and 'answer'"]),
        ('{"text": "a"}\n{"text": null}\n', ["1 of 2 rows have no 'text' (row 2)"]),
        ('{"text": 3}\n', ["rows.jsonl", "column 'text', row 1", "found 3", "quotes"]),
        ('{"prompt": "a", "completion": 1.5}\n', ["column 'completion', row 1", "1.5"]),
        ('{"question": ["a"], "answer": "b"}\n', ["column 'question', row 1", "wanted text"]),
        ('{"messages": "hi"}\n', ["column 'messages', row 1", "list of messages", "'hi'"]),
        (TURN + '{"messages": []}\n', ["column 'messages', row 2", "no message"]),
        (TURN.replace("content", "text"), ["row 1", "'role', 'text'", "'content'"]),
        (TURN.replace('"user"', "null"), ["row 1", "message 1", "role None"]),
        (TURN.replace('"hi"', "null"), ["row 1", "message 1", "content None"]),
        (TURN.replace('"hi"', "7"), ["row 1", "message 1", "content 7"]),
        ('{"messages": [["user", "hi"]]}\n', ["row 1", "message 1"]),
        ('{"messages": [1]}\n', ["row 1", "message 1 has 1"]),
        ('{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n', ["both"]),
        ('{"text": "2024-01-02"}\n', ["column 'text', row 1", "where all are dates", ".csv"]),
        (TURN.replace("hi", "2024-01-02"), ["row 1: message 1", "where all are dates"]),
        ('{"text": "a"\n', ["rows.jsonl"]),
        ("", ["rows.jsonl"]),
    ],
)
def test_bad_data(text, parts, base, tmp_path, capfd):
    path, output = tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_text(text)
    fails(train_flags(base, path, output), capfd, *parts)
    assert not output.exists()


def test_a_file_has_no_configuration(base, data, tmp_path, capfd):
    flags = train_flags(base, data, tmp_path / "out", "--dataset_config", "main")
    fails(flags, capfd, "apples.jsonl", "no configuration, such as 'main'")


def test_an_unknown_kind_of_file(base, tmp_path, capfd):
    path = tmp_path / "rows.xlsx"
    path.write_text("")
    fails(train_flags(base, path, tmp_path / "out"), capfd, "rows.xlsx", ".jsonl")


def test_a_file_that_is_not_utf8_is_named(base, tmp_path, capfd):
    for name, text in (("a.jsonl", '{"text": "caf\xe9"}\n'), ("b.csv", "text\ncaf\xe9\n")):
        path = tmp_path / name
        path.write_bytes(text.encode("latin-1") * 3)
        fails(train_flags(base, path, tmp_path / "out"), capfd, name, "is not UTF-8 text")


def test_suffixes_in_capitals_and_numbers_in_csv_files(tmp_path):
    path = tmp_path / "ROWS.JSONL"
    path.write_text('{"text": "a"}\n')
    assert rows_of(path)[0] == {"text": "a"}
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nhow many,007\nhow much,2.50\n")
    assert [row["completion"] for row in rows_of(path)] == ["007", "2.50"]
    path.write_text("question,answer\nhow many,007\n", encoding="utf-8-sig")  # as Excel writes it
    assert rows_of(path)[0]["completion"] == "007"


def test_a_chat_template_that_refuses_a_row(base, tmp_path, capfd):
    model, path = tmp_path / "chat", tmp_path / "rows.jsonl"
    shutil.copytree(base, model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    tokenizer.save_pretrained(model)
    path.write_text(TURN)
    fails(train_flags(model, path, tmp_path / "out"), capfd, "roles must alternate")


def test_chat_messages_train(base, tmp_path):
    model, path = tmp_path / "chat", tmp_path / "rows.jsonl"
    shutil.copytree(base, model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    turns = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "3"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 4)
    assert main(train_flags(model, path, tmp_path / "out", "--max_steps", 1)) == 0


QUESTION, ANSWER = {"role": "user", "content": "how many"}, {"role": "assistant", "content": "3"}
TOOLS = [{"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}]
ROWS = {
    "messages": {"messages": [QUESTION, ANSWER]},
    "prompt": {"prompt": [QUESTION], "completion": [ANSWER]},
    "question": {"question": "how many", "answer": "3"},
}


@pytest.mark.parametrize("shape", ROWS)
def test_a_chat_template_is_given_tools_and_settings(shape, base, tmp_path, capfd):
    model, path = tmp_path / "chat", tmp_path / "rows.jsonl"
    shutil.copytree(base, model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.chat_template = (
        "{% if not tools or not apples %}{{ raise_exception('not given') }}{% endif %}" + CHAT
    )
    tokenizer.save_pretrained(model)
    row = ROWS[shape] | {"tools": TOOLS, "chat_template_kwargs": {"apples": True}, "id": 1}
    path.write_text((json.dumps(row) + "\n") * 4)
    assert main(train_flags(model, path, tmp_path / "out", "--max_steps", 1)) == 0
    notes = [line for line in capfd.readouterr().out.splitlines() if "note: training" in line]
    read = ", ".join(map(repr, [*ROWS[shape], "tools", "chat_template_kwargs"]))
    assert notes == [f"secura: note: training reads {read}; not read: 'id'"]
    path.write_text(json.dumps(row) + "\n" + json.dumps(ROWS[shape]) + "\n")
    argv = train_flags(model, path, tmp_path / "again")
    fails(argv, capfd, "1 of 2 rows have no 'chat_template_kwargs' (row 2)")


def test_a_text_is_given_no_tools(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a", "tools": TOOLS, "chat_template_kwargs": None}) + "\n")
    assert rows_of(path, chat=True)[0] == {"text": "a"}
