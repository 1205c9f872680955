"""The experiments' tasks: what is read from each kind of file, and which examples are used."""

from __future__ import annotations

import gzip
import json

import pytest

from secura.cli.errors import UserError
from secura.experiments import sources, tasks
from secura.experiments.examples import Example, TaskData, checksum
from secura.experiments.tasks import TASKS, load_task, load_text


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A function that puts rows (or text) in place of an asset."""
    files = {}

    def put(name, content):
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            write_rows(path, content)
        files[name] = path

    monkeypatch.setattr(tasks, "fetch", files.__getitem__)
    return put


def sums(count, start=0):
    return [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(start, count)]


# --- which examples are used


def test_the_seed_draws_the_training_examples_alone(packaged):
    packaged("gsm8k-train", sums(40))
    packaged("gsm8k-test", sums(80, start=40))
    first, again, other = (load_task("gsm8k", 10, 20, seed) for seed in (1, 1, 2))
    assert first == again and first.checksum == again.checksum
    assert set(first.train) != set(other.train) and len(other.train) == 10
    assert first.test == other.test
    assert load_task("gsm8k", 4, 5, 1) == TaskData(first.train[:4], first.test[:5])
    assert len(load_task("gsm8k", 99, 0).train) == 40


def test_an_example_stands_once_and_in_one_split(packaged):
    twice = {"question": " 1 +  1?", "answer": "#### 2"}
    packaged("gsm8k-train", [*sums(3), twice])
    packaged("gsm8k-test", [*sums(5), {"question": "4 + 1?", "answer": "#### 5"}, twice])
    data = load_task("gsm8k", 9, 9)
    assert len(data.train) == 3
    assert {example.completion for example in data.test} == {" #### 4", " #### 5"}


def test_a_passage_stands_in_one_split(packaged):
    def row(passage, question):
        return {"passage": passage, "question": question, "options": OPTIONS, "answer": "B. a cat"}

    packaged("logiqa-train", [row("All cats purr.", "Who?"), row("All cats purr.", "What?")])
    chats = [chat("All cats  purr", "Which?"), chat("No dog purrs.", "Who?")]
    packaged("logiqa-test", [chats[0], chats[1], chats[1]])
    data = load_task("logiqa", 9, 9)
    assert len(data.train) == 2
    assert [example.prompt.split("\n")[0] for example in data.test] == ["Passage: No dog purrs."]


def test_long_prompts_are_left_out(packaged):
    packaged("gsm8k-train", [*sums(1), {"question": "1 " * 300, "answer": "#### 300"}])
    packaged("gsm8k-test", sums(5, start=1))
    assert len(load_task("gsm8k", 9, 9).train) == 1


def test_general_text_is_not_trained_on(packaged, monkeypatch):
    articles = [f"Article number {n}." for n in range(50)]
    packaged("xsum-test", [{"document": text, "summary": text[-3:]} for text in ["", *articles]])
    monkeypatch.setattr(tasks, "load_news", lambda: articles)
    data = load_task("xsum", 99, 99)
    assert (len(data.train), len(data.test)) == (35, 15)
    texts = load_text(15)
    assert load_text(3) == texts[:3]
    assert set(texts) not in (set(articles[:15]), set(articles[-15:]))
    assert {f"Article: {text}\nSummary:" for text in texts} == {e.prompt for e in data.test}
    with pytest.raises(ValueError, match="from 1 to 15 articles can be had, not 16"):
        load_text(16)


# --- what is read

OPTIONS = "A. a dog\nB. a cat\nC. an ant\nD. an eel"
CHOICES = (" a dog", " a cat", " an ant", " an eel")


def chat(passage, question, options=OPTIONS):
    doubled = options.replace(". ", ". A.")
    asked = f"\nPassage: {passage}Question: {question}\n{doubled}\nAnswer:"
    turns = [{"role": "system", "content": "Choose."}, {"role": "user", "content": asked}]
    return {"input": turns, "ideal": "B"}


def test_lettered_options_become_texts(tmp_path):
    row = {"question": "Who purrs?\n", "options": OPTIONS, "answer": "B. a cat"}
    same = row | {"options": "A. .\nB. a cat\nC. .\nD. .\n"}
    passage = row | {"passage": "One animal purrs."}
    path = write_rows(tmp_path / "rows", [row, same, passage])
    found = list(sources.read_lettered(path))
    assert found == [
        Example("Question: Who purrs?\nAnswer:", " a cat", CHOICES),
        Example("Passage: One animal purrs.\nQuestion: Who purrs?\nAnswer:", " a cat", CHOICES),
    ]
    assert found[0].answer == 1


def test_chats_are_read_back(tmp_path):
    path = write_rows(tmp_path / "rows", [chat("One animal purrs.", "Who purrs?")])
    asked = "Passage: One animal purrs.\nQuestion: Who purrs?\nAnswer:"
    assert list(sources.read_chat(path)) == [Example(asked, " a cat", CHOICES)]
    with pytest.raises(ValueError, match="not a passage with a question"):
        list(sources.read_chat(write_rows(path, [{"input": [{"content": "Hi"}], "ideal": "A"}])))


def test_each_question_of_a_request_file_is_read_once(tmp_path):
    def requests(doc, number):
        return [
            {
                "doc": doc,
                "request": {"context": context, "continuation": " x"},
                "idx": idx,
                "task_name": "task",
                "doc_id": number + offset,
            }
            for offset, context in ((0, "Question: other\nAnswer: y\n\nQ"), (1_000_000, "Answer:"))
            for idx in range(2)
        ]

    first = {"query": "Question: Who purrs?\nAnswer:", "choices": ["a dog", "a cat "], "gold": 1}
    gap = "Tom fed Tim as _ was hungry."
    second = {"sentence": gap, "option1": "Tom", "option2": "Tim", "answer": "2"}
    path = tmp_path / "requests.jsonl.gz"
    with gzip.open(path, "wt") as out:
        for row in (*requests(first, 0), *requests(second, 1)):
            out.write(f"{json.dumps(row)}\n")
    cats, tim = sources.read_olmes(path)
    assert cats == Example("Question: Who purrs?\nAnswer:", " a cat", (" a dog", " a cat"))
    assert tim.prompt == "Tom fed Tim as"
    assert tim.choices == (" Tom was hungry.", " Tim was hungry.") and tim.answer == 1


def test_aliases_are_references(tmp_path):
    from datasets import Dataset

    answer = {"value": "Ada", "aliases": ["Ada L.", "Ada"]}
    Dataset.from_list([{"question": "Who?", "answer": answer}]).save_to_disk(tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    asked = Example("Question: Who?\nAnswer:", " Ada", references=("Ada", "Ada L."))
    assert list(sources.read_triviaqa(path)) == [asked]


CATALOGUE = r"""msgid ""
msgstr "Language: de\n"

#: a.py:3
msgid "The \"first\" file was"
" saved."
msgstr ""
"Die „erste“ Datei "
"wurde gesichert."

#, fuzzy
msgid "The other file was lost."
msgstr "Die Datei wurde gesichert."

msgid "The file {name} was lost."
msgstr "Die Datei {name} ging verloren."

msgid "Save all"
msgstr "Alles sichern"

msgid "Nobody has translated this yet."
msgstr ""
"""


def test_sentences_of_a_catalogue(tmp_path):
    path = tmp_path / "messages.po"
    path.write_text(CATALOGUE, encoding="utf-8")
    asked = 'English: The "first" file was saved.\nGerman:'
    told = " Die „erste“ Datei wurde gesichert."
    assert list(sources.read_messages(path)) == [Example(asked, told)]


def test_articles_are_cut(packaged):
    packaged("xsum-test", [{"document": "a b\nc " * 200, "summary": "Letters."}] * 2)
    for example in sources.read_xsum(tasks.fetch("xsum-test")):
        assert len(example.prompt.split()) == sources.ARTICLE_WORDS + 2
        assert example.completion == " Letters."


# --- the user's own data


def test_a_local_file_is_cut_in_two(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", sums(10))
    data = load_task("gsm8k", 99, 99, hub=str(path))
    assert (len(data.train), len(data.test)) == (7, 3)
    assert data == load_task("gsm8k", 99, 99, hub=str(path))
    assert Example("Question: 4 + 1?\nAnswer:", " #### 5") in {*data.train, *data.test}


@pytest.mark.parametrize("test", ["test", "validation"])
def test_a_folder_has_both_splits(test, tmp_path):
    for split, rows in (("train", sums(4)), (test, sums(9, start=4))):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    data = load_task("gsm8k", 99, 99, hub=str(tmp_path))
    assert (len(data.train), len(data.test)) == (4, 5)


@pytest.mark.parametrize(
    ("name", "row", "example"),
    [
        ("gsm8k", {"prompt": "Add. ", "completion": "3"}, Example("Add.", " 3")),
        ("xsum", {"document": "a\nb", "summary": "c"}, Example("Article: a b\nSummary:", " c")),
        (
            "en-de",
            {"translation": {"de": "Ja.", "en": "Yes."}},
            Example("English: Yes.\nGerman:", " Ja."),
        ),
        (
            "mmlu",
            {"question": "Q?", "choices": ["a", "b"], "answer": 1},
            Example("Question: Q?\nAnswer:", " b", (" a", " b")),
        ),
        (
            "csqa",
            {"prompt": "Q?", "choices": ["a", "b"], "completion": "a"},
            Example("Q?", " a", (" a", " b")),
        ),
    ],
)
def test_columns_say_what_a_row_is(name, row, example, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [row])
    assert load_task(name, 1, 0, hub=str(path)).train == (example,)


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("gsm8k", {"text": "1"}, r"row 0 of .* has the columns text and makes no example"),
        ("gsm8k", {"prompt": "1", "completion": None}, "makes no example"),
        ("csqa", {"prompt": "1", "completion": "2"}, "no column choices"),
        ("gsm8k", {"prompt": "1", "choices": ["2", "3"], "completion": "2"}, "has choices, but"),
        ("csqa", {"prompt": "1", "choices": ["2", "3"], "completion": "4"}, "makes no example"),
        ("csqa", {"question": "1", "choices": ["2", "3"], "answer": -1}, "-1 is no index"),
        ("csqa", {"question": "1", "choices": ["2", "3"], "answer": 2}, "makes no example"),
        ("en-de", {"translation": None}, "makes no example"),
    ],
)
def test_rows_that_do_not_suit_the_task_are_one_error(name, row, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        load_task(name, 1, 0, hub=str(write_rows(tmp_path / "rows.jsonl", [row])))


def test_data_sets_are_named_by_task(tmp_path):
    named = ["gsm8k=openai/gsm8k:main", "en-de=pairs.jsonl"]
    assert tasks.parse_datasets(named) == {"gsm8k": "openai/gsm8k:main", "en-de": "pairs.jsonl"}
    for wrong, told in (("gsm8k", "names no data"), ("gsm=x", "did you mean gsm8k")):
        with pytest.raises(ValueError, match=told):
            tasks.parse_datasets([wrong])


def test_the_configuration_follows_a_colon(monkeypatch):
    asked = []

    def load_split(name, config, split):
        asked.append((name, config, split))
        if split == "test":
            raise UserError("no such split")
        return sums(3) if split == "train" else sums(6, start=3)

    monkeypatch.setattr(tasks, "load_split", load_split)
    assert len(load_task("gsm8k", 9, 9, hub="openai/gsm8k:main").test) == 3
    names = [("openai/gsm8k", "main", split) for split in ("train", "test", "validation")]
    assert asked == names


# --- errors and the table


def test_what_cannot_be_loaded_is_one_error(packaged):
    with pytest.raises(ValueError, match="unknown task 'gsmk'; did you mean gsm8k"):
        load_task("gsmk", 1, 1)
    packaged("mmlu-test", [{"question": "Q?", "options": OPTIONS, "answer": "A. a dog"}])
    assert len(load_task("mmlu", 0, 1).test) == 1
    with pytest.raises(ValueError, match="'mmlu' has no training examples"):
        load_task("mmlu", 1, 1)
    with pytest.raises(ValueError, match="-1 test examples make no sense"):
        load_task("mmlu", 0, -1)


def test_the_table_is_complete():
    for name, task in TASKS.items():
        row = tasks.describe(name)
        assert task.name == name and task.assets
        assert all(row[column] for column in ("title", "source", "licence", "metric"))
        assert (task.max_new_tokens == 0) == (task.metric == "accuracy")
    assert "BBC" in tasks.describe("xsum")["note"]
    own = tasks.describe("xsum", "mine.jsonl")
    assert (own["source"], own["licence"], own["note"]) == ("mine.jsonl", "", "")


def test_the_checksum_tells_examples_apart():
    plain = Example("a", " b")
    assert checksum([plain]) != checksum([Example("a", " b", references=("b",))])
