"""The README's table of the retention experiments, out of made-up records."""

from __future__ import annotations

import re

import pytest
from experiment_records import SEEDS, SETTINGS, grid, record

from benchmarks.report import NOT_YET, table
from benchmarks.retention import COLUMNS, retention_table
from secura.experiments.grid import Cell
from secura.experiments.store import Store


@pytest.fixture
def results(tmp_path):
    """A folder of finished cells, of LoRA, EWC and one SECURA."""
    store = Store(tmp_path / "retention-made-up", SETTINGS)

    def fill(methods=("lora", "ewc", "secura-weight-m1"), longest=3):
        for cell in grid(methods):
            if len(cell.tasks) <= longest:
                with store.claim(cell):
                    store.write(cell, record(cell))
        return store.root

    return fill


def rows(text):
    return {
        cells[0]: dict(zip(COLUMNS, cells, strict=True))
        for line in text.splitlines()
        if line.startswith("| ") and "---" not in line
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }


def test_its_figures_are_the_records(results):
    found = rows(retention_table(results()))
    assert list(found)[1:] == ["LoRA (SEQ)", "SECURA weight M1", "EWC"]
    base = record(Cell(0, (), "base", 0.0))
    last = [record(Cell(seed, SETTINGS.tasks, "ewc", 1e-3)) for seed in SEEDS]
    rise = sum(r["text"]["loss"] - base["text"]["loss"] for r in last) / len(SEEDS)
    assert float(found["EWC"]["rise of text loss, last"].split(" ±")[0]) == pytest.approx(
        rise, abs=6e-4
    )
    alone = [record(Cell(seed, SETTINGS.tasks[:1], "lora", 1e-3)) for seed in SEEDS]
    fall = [base["scores"]["gsm8k"]["loss"] - r["scores"]["gsm8k"]["loss"] for r in alone]
    learned = float(found["LoRA (SEQ)"]["learned"].split(" ±")[0])
    assert learned == pytest.approx(sum(fall) / len(SEEDS), abs=6e-4)
    assert found["EWC"]["learned"] == "= lora"


def test_rows_without_figures_are_left_out(results):
    found = rows(retention_table(results(longest=1)))
    assert list(found)[1:] == ["LoRA (SEQ)", "SECURA weight M1"]


def test_the_caption_says_where_it_was_made(results):
    folder = results()
    caption = retention_table(folder).splitlines()[-1]
    for part in ("3 seeds", "12 steps", "commit 1c164a6;", "AMD EPYC", "GGUF Q4_1"):
        assert part in caption
    assert table(folder.name, folder.parent) == retention_table(folder)
    assert table("retention-none", folder.parent) == NOT_YET
    assert not re.search(r"\bnan\b", caption)
