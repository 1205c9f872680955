"""Readers of packaged files, on a few rows of each kind; the stages; the command line."""

from __future__ import annotations

import gzip
import importlib
import json

import pytest

from benchmarks.retention import data
from benchmarks.retention.__main__ import main
from benchmarks.retention.cells import Settings
from benchmarks.retention.grid import STAGES
from benchmarks.retention.methods import get_method
from benchmarks.retention.train import needs


@pytest.fixture
def real(monkeypatch):
    """The module as it is, not its made-up data."""
    spec = importlib.util.find_spec("benchmarks.retention.data")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(importlib.sys.modules, "real_data", module)
    spec.loader.exec_module(module)
    return module


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_gsm8k_and_xsum(tmp_path):
    path = lines(tmp_path / "g", [{"question": " 1 + 1? ", "answer": "two\n#### 2"}])
    (example,) = data.read_gsm8k(path)
    assert example == data.Example("Question: 1 + 1?\nAnswer:", " two\n#### 2")
    rows = [{"document": "w " * 400, "summary": "s."}, {"document": " ", "summary": "none"}]
    (example,) = data.read_xsum(lines(tmp_path / "x", rows))
    assert example.prompt == f"Article: {' '.join(['w'] * data.ARTICLE_WORDS)}\nSummary:"


def test_olmes_asks_each_question_once_and_drops_repeated_choices(tmp_path):
    docs = [
        {"query": "Q\nA:", "choices": ["x", "y"], "gold": 1},
        {"query": "R\nA:", "choices": ["x", "x"], "gold": 0},
    ]
    path = tmp_path / "o.gz"
    with gzip.open(path, "wt") as file:
        for number, doc in enumerate(docs):
            for index in (0, 1):
                row = {"doc_id": number, "idx": index, "task_name": "t", "doc": doc}
                file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"doc_id": 1_000_000, "idx": 0, "task_name": "t", "doc": docs[0]}))
    (example,) = data.read_olmes(path)
    assert example == data.Example("Q\nA:", " y", (" x", " y"))


def test_lettered_and_chat_questions(tmp_path):
    row = {"passage": "P", "question": "Q?", "options": "A. one\nB. two", "answer": "B. two"}
    (example,) = data.read_lettered(lines(tmp_path / "l", [row]))
    assert example == data.Example("Passage: P\nQuestion: Q?\nAnswer:", " two", (" one", " two"))
    content = "Passage: P\nQuestion: Q?\nA. A. one\nB. two\nC. three\nD. four\nAnswer:"
    (example,) = data.read_chat(
        lines(tmp_path / "c", [{"input": [{"content": content}], "ideal": "A"}])
    )
    assert example.completion == " one" and len(example.choices) == 4


def test_splits_share_no_passage_and_are_the_same_every_time(tmp_path, real, monkeypatch):
    rows = [{"question": f"{n % 9}?", "answer": f"#### {n}"} for n in range(20)]
    train = lines(tmp_path / "train", rows[:12])
    test = lines(tmp_path / "test", rows)
    monkeypatch.setattr(real, "fetch", {"gsm8k-train": train, "gsm8k-test": test}.get)
    found = real.load_task("gsm8k")
    assert not {e.prompt for e in found.train} & {e.prompt for e in found.held_out}
    real.load_task.cache_clear()
    assert real.load_task("gsm8k") == found
    with pytest.raises(ValueError, match="unknown task 'gsm9k'"):
        real.load_task("gsm9k")


def test_old_texts_are_long_and_apart_from_the_anchors(tmp_path, real, monkeypatch):
    po = "".join(f'msgid "{"a word or " * 3}{n}"\nmsgstr "x"\n\n' for n in range(40))
    code = "\n".join(f"def f{n}():\n    return {'1 + ' * 40}1\n" for n in range(9))
    files = {"en-de-messages": po, "code": code}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(real, "fetch", lambda name: tmp_path / name)
    monkeypatch.setattr(real, "_articles", lambda: [f"article {n}" for n in range(50)])
    for kind in ("help", "code"):
        texts = real.load_texts(kind)
        assert texts and all(len(text) >= 150 for text in texts)
    assert "msgid" not in "".join(real.load_texts("help"))
    assert not set(real.load_texts("news")) & set(real.anchor_texts())
    assert len(real.load_texts("news")) + len(real.anchor_texts()) == 50


@pytest.mark.parametrize("name", STAGES)
def test_a_stages_cells_exist_and_have_their_starts(name):
    stage = STAGES[name]
    cells = set(stage.cells)
    assert len(cells) == len(stage.cells)
    for cell in stage.cells:
        assert set(cell.tasks) <= set(stage.settings.tasks)
        get_method(cell.method).make_config(cell.targets, cell.seed)
        assert needs(cell) is None or needs(cell) in cells, cell


def test_the_command_line_lists_a_product_or_a_stage(capsys):
    flags = ["run", "try", "--out", "x", "--list", "--rates", "1e-3,3e-3", "--seeds", "0,1"]
    assert main([*flags, "--methods", "lora,anchored-self@damping=0.1,decay=0.3,dora"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 12 and sum("damping=0.1,decay=0.3" in line for line in said) == 4
    assert main(["run", "confirm", "--out", "x", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(STAGES["confirm"].cells)


def test_settings_out_of_range_are_refused():
    for wrong in ({"part": 0.0}, {"held_out": 0}, {"tasks": ()}):
        with pytest.raises(ValueError, match=r"must be|needs"):
            Settings(**wrong)
