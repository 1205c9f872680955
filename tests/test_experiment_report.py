"""The experiments' report: its figures against hand-worked ones, and what it says is missing."""

from __future__ import annotations

from itertools import chain

import pytest
from experiment_records import BASE_CELL, SETTINGS, failed, grid, record
from matplotlib.image import imread

from secura.experiments import plots
from secura.experiments.estimates import Estimate, estimate, paired, rise_at, transfer
from secura.experiments.grid import EXPERIMENTS, Cell
from secura.experiments.methods import METHODS
from secura.experiments.report import write_report
from secura.experiments.summary import Run, at_equal_learning

TASKS = SETTINGS.tasks
RATE = SETTINGS.learning_rate


@pytest.fixture(scope="module")
def records():
    """Of every method and three seeds, but for one that is missing and those of a failed method."""
    lost = Cell(2, TASKS[:1], "dora", RATE)
    cells = [cell for cell in grid() if cell != lost]
    return [
        failed(cell) if (cell.method, cell.learning_rate) == ("full", RATE) else record(cell)
        for cell in cells
    ]


@pytest.fixture(scope="module")
def report(records, tmp_path_factory):
    """The report on all experiments, and its folder."""
    path = write_report(records, tmp_path_factory.mktemp("report"), list(EXPERIMENTS))
    return path.read_text(encoding="utf-8"), path.parent


def rows(text, name):
    """Every table row of a method, cell by cell."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {name}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# Arithmetic


def test_the_interval_is_students():
    stats = pytest.importorskip("scipy.stats")
    values = (1.0, 2.5, 2.0, 4.0)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = Estimate(values)
    assert found.mean == pytest.approx(2.375)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        (low, high)
    )


def test_an_interval_that_says_nothing_excludes_nothing():
    assert Estimate((1.0,)).half_width is None
    assert not Estimate((1.0,)).excludes_zero
    assert not Estimate((0.5, 0.5, 0.5)).excludes_zero  # coarse scores that happen to agree
    assert not Estimate((-1.0, 1.0, 0.2)).excludes_zero
    assert Estimate((-1.0, -1.1, -1.2)).excludes_zero


def test_differences_are_taken_within_a_seed():
    ours, theirs = {0: 1.0, 1: 5.0, 3: 9.0}, {1: 4.0, 0: 0.5, 2: 7.0}
    assert paired(ours, theirs) == {0: 0.5, 1: 1.0}


@pytest.mark.parametrize(
    ("matrix", "lower", "average", "backward", "forgetting"),
    [
        ([[0.8, 0.1], [0.5, 0.7]], False, 0.6, -0.3, 0.3),
        # the first task is best after the second: forgotten since then, not since it was learned
        (
            [[0.5, 0.2, 0.0], [0.9, 0.6, 0.3], [0.6, 0.4, 0.8]],
            False,
            0.6,
            (0.1 - 0.2) / 2,
            (0.3 + 0.2) / 2,
        ),
        # better at the end than ever before: negative forgetting
        ([[0.5, 0.1], [0.6, 0.7]], False, 0.65, 0.1, -0.1),
        # losses: the same, counted up
        ([[1.0, 3.0], [1.5, 2.0]], True, 1.75, 0.5, 0.5),
    ],
)
def test_transfer(matrix, lower, average, backward, forgetting):
    found = transfer(matrix, lower_is_better=lower)
    assert found.average == pytest.approx(average)
    assert found.backward == pytest.approx(backward)
    assert found.forgetting == pytest.approx(forgetting)


@pytest.mark.parametrize("matrix", [[[0.5]], [[0.5, 0.1], [0.6]]])
def test_transfer_needs_a_square_of_two_tasks(matrix):
    with pytest.raises(ValueError, match="two tasks"):
        transfer(matrix)


def test_rise_at_equal_learning():
    line = [(0.2, 0.1), (0.6, 0.5), (0.4, 1.5)]  # the highest rate learned less again
    assert rise_at(line, 0.3) == pytest.approx(0.2)
    assert rise_at(line, 0.5) == pytest.approx(0.4), "the better of the two stretches"
    assert rise_at(line, 0.6) == 0.5
    assert rise_at(line, 0.7) is None
    assert rise_at([(0.3, 0.2)], 0.3) == 0.2


# From records to figures


def test_retention_is_the_share_of_the_base_models_score():
    base, cell = record(BASE_CELL), record(Cell(0, TASKS[:1], "lora", RATE))
    before = {"mmlu": 0.4, "arc-challenge": 0.5, "hellaswag": 0.25, "triviaqa": 0.0}
    after = {"mmlu": 0.3, "arc-challenge": 0.5, "hellaswag": 0.2, "triviaqa": 0.1}
    for made, scores in ((base, before), (cell, after)):
        for probe, score in scores.items():
            metric = "exact_match" if probe == "triviaqa" else "accuracy"
            made["scores"][probe][metric] = score
    run = Run([cell, base], ["exp4"])
    # of a probe the base model scores 0 on, no share can be kept
    assert run.retention(cell) == pytest.approx((0.75 + 1 + 0.8) / 3)
    assert run.retention(base) == 1


def test_learning_and_loss_are_counted_from_the_base_model():
    base, cell = record(BASE_CELL), record(Cell(0, TASKS[:1], "lora", RATE))
    base["scores"]["gsm8k"]["loss"], cell["scores"]["gsm8k"]["loss"] = 1.6, 1.0
    base["text"]["loss"], cell["text"]["loss"] = 3.0, 3.2
    run = Run([base, cell], ["exp4"])
    assert run.learned(cell, "gsm8k") == pytest.approx(0.6)
    assert run.text_rise(cell) == pytest.approx(0.2)


def test_one_run_goes_by_several_names_on_a_first_task_only(records):
    run = Run(records, ["exp5"])
    titles = {entry.name: entry.title for entry in run.entries()}
    assert titles["lora"] == "LoRA (SEQ) = ER = EWC"
    assert titles["secura-channel-m1"] == "SECURA channel M1 = M2"
    assert "er" not in titles
    assert run.record("er", TASKS[:1], RATE, 1) is run.record("lora", TASKS[:1], RATE, 1)
    assert run.record("seq", TASKS[:1], RATE, 1) is run.record("lora", TASKS[:1], RATE, 1)
    assert [entry.title for entry in run.entries(2)] == [m.title for m in METHODS.values()]
    assert run.record("er", TASKS[:2], RATE, 1) is not run.record("lora", TASKS[:2], RATE, 1)


def test_a_name_that_was_not_asked_for_is_not_shown(records):
    run = Run(records, ["exp4"], methods=["ewc", "dora"])
    assert [entry.title for entry in run.entries()] == ["DoRA", "EWC"]


def test_the_own_rate_is_that_of_least_validation_loss_on_the_search_seed(records):
    chosen = Cell(0, TASKS[:1], "cabr", 1e-4)
    changed = [dict(r) for r in records if r["cell"]["method"] in ("cabr", "base")]
    for made in changed:
        if made["cell"]["tasks"] == [TASKS[0]]:
            low = made["cell"]["learning_rate"] == chosen.learning_rate
            made["training"] = made["training"] | {"validation_loss": 0.5 if low else 0.9}
    run = Run(changed, ["exp4"])
    assert run.search_seed == 0
    assert run.best_rate("cabr") == 1e-4
    assert {cell.seed for cell in run.missing} == {1, 2}, "the other seeds at the chosen rate"


def test_equal_learning_is_read_off_each_seeds_own_line():
    base = record(BASE_CELL)
    points = {
        ("lora", 3e-4): (0.4, 0.01), ("lora", 1e-3): (0.6, 0.02), ("lora", 3e-3): (0.5, 0.3),
        ("cabr", 3e-4): (0.3, 0.10), ("cabr", 1e-3): (0.7, 0.20),
        ("dora", 3e-4): (0.2, 0.05), ("dora", 1e-3): (0.5, 0.06),
        ("full", 1e-5): (0.1, 0.01),
    }  # fmt: skip
    made = [base]
    for (method, rate), (learned, rise) in points.items():
        cell = record(Cell(0, TASKS[:1], method, rate))
        cell["scores"][TASKS[0]]["loss"] = base["scores"][TASKS[0]]["loss"] - learned
        cell["text"]["loss"] = base["text"]["loss"] + rise
        made.append(cell)
    found = {row.entry.name: row for row in at_equal_learning(Run(made, ["exp4"]))}
    assert list(found) == ["lora", "cabr", "full", "dora"], "compared at LoRA's learning first"
    assert found["cabr"].rise[0] == pytest.approx(0.175)
    assert (found["cabr"].reference[0], found["cabr"].direct) == (pytest.approx(0.02), True)
    # DoRA never learns that much: both where it comes nearest
    assert found["dora"].learned[0] == pytest.approx(0.5)
    assert found["dora"].rise[0] == pytest.approx(0.06)
    assert (found["dora"].reference[0], found["dora"].direct) == (pytest.approx(0.015), False)
    assert found["full"].reference[0] == pytest.approx(0.0025), "from the base model on"


def test_a_sequence_counts_only_where_it_is_whole(records):
    run = Run(records, ["exp5"])
    assert sorted(run.matrices("dora", run.score)) == [0, 1]  # seed 2 lacks its first cell
    assert sorted(run.matrices("er", run.score)) == [0, 1, 2]
    assert not run.matrices("full", run.score)


@pytest.mark.parametrize(
    ("made", "experiments", "message"),
    [
        ([], ["exp4"], "no records"),
        ([record(BASE_CELL)], ["exp1"], "exp1"),
        ([record(BASE_CELL), {**record(BASE_CELL), "settings": {}}], ["exp4"], "settings"),
    ],
)
def test_what_cannot_be_reported_on(made, experiments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_report(made, tmp_path / "out", experiments)
    assert not (tmp_path / "out").exists()


# The report


def test_every_method_and_everything_amiss_is_named(report):
    text, _ = report
    assert "15 failed" in text
    assert "missing: dora: gsm8k, lr 0.001, seed 2" in text
    assert "failed (the loss became nan at step 7): full: " in text
    for method in METHODS.values():
        assert rows(text, method.title), method.title
    assert text.count("¹ On a first task") == 1
    gaps = {row[2] for row in rows(text, "Full fine-tuning") if row[1] == "0.001"}
    assert gaps == {"–"}


def test_the_tables_show_the_records_figures(records, report):
    text, _ = report
    losses = {
        r["cell"]["seed"]: r["scores"]["gsm8k"]["loss"]
        for r in records
        if r["cell"]["method"] == "cabr" and r["cell"]["tasks"] == ["gsm8k"]
        and r["cell"]["learning_rate"] == RATE
    }  # fmt: skip
    found = estimate(losses)
    assert f"{found.mean:.3f} ± {found.half_width:.3f}" in chain(*rows(text, "CABR only"))
    assert any("(n=2)" in cell for cell in chain(*rows(text, "DoRA")))  # seed 2 is missing
    whole = [row for row in rows(text, "CUR-LoRA") if row[1] == "0.001"]
    assert whole and not any("(n=" in cell for cell in chain(*whole))


def test_data_and_settings_are_told(report):
    text, _ = report
    digest = record(BASE_CELL)["data"]["gsm8k"]["sha256"][:12]
    assert f"`{digest}` (seed 0)" in text
    assert "1c164a6" in text and "torch 2.13.0" in text
    assert "| `lora_rank` | 8 |" in text
    assert "mmlu 0.057 (n = 64)" in text, "the binomial standard error"


def test_the_same_records_give_the_same_bytes(tmp_path):
    made = [record(cell) for cell in grid(["lora", "er", "dora"], seeds=[0, 1])]
    folders = [tmp_path / "first", tmp_path / "second"]
    write_report(made, folders[0], list(EXPERIMENTS))
    shuffled = sorted(made[::-1], key=lambda one: -one["cell"]["seed"])
    write_report(shuffled, folders[1], list(EXPERIMENTS)[::-1])
    first, second = ({path.name: path.read_bytes() for path in f.iterdir()} for f in folders)
    assert first == second


def test_the_pictures_are_there_and_show_something(report):
    text, folder = report
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == 5
    for path in pictures:
        assert f"({path.name})" in text
        image = imread(path)
        assert image.shape[1] == 1800
        assert (image[..., :3] < 0.9).any(axis=-1).mean() > 0.01


def test_the_frontier_has_a_point_for_every_rate():
    far = Cell(0, TASKS[:1], "cabr", 1e-4)
    made = {cell: record(cell) for cell in grid(["lora", "cabr"])}
    made[far]["scores"]["gsm8k"]["loss"] = 9.0  # shown, it would squeeze all the others
    for axes in plots.frontier(Run([*made.values()], ["exp4"])).axes:
        assert len(axes.containers) == 5
        assert "CABR only at 0.0001" in axes.get_xlabel()
        assert {text.get_text() for text in axes.texts} == {"base", "LoRA", "CABR only"}


def test_what_was_never_begun_is_no_list_of_missing_cells(tmp_path):
    cells = [BASE_CELL, Cell(0, TASKS[:1], "lora", RATE), Cell(0, TASKS[:1], "cabr", RATE)]
    text = write_report([record(c) for c in cells], tmp_path, list(EXPERIMENTS)).read_text()
    assert "3 done, 0 failed, 0 missing" in text
    not_run = next(line for line in text.splitlines() if line.startswith("- not run: exp2"))
    assert "exp5" in not_run and "DoRA" in not_run and "other learning rates" in not_run
    assert "(exp0)" in text and "## One task each" not in text
    assert "own best rate" not in text


@pytest.mark.parametrize("kept", ["nothing done", "no base", "one seed"])
def test_a_report_is_made_of_what_there_is(kept, tmp_path):
    cells = [cell for cell in grid(["lora", "cabr"], seeds=[0]) if kept != "no base" or cell.tasks]
    make = failed if kept == "nothing done" else record
    text = write_report([make(cell) for cell in cells], tmp_path, list(EXPERIMENTS)).read_text()
    assert ("There is one seed" in text) == bool(cells)
    assert " ± 0" not in text
    assert ("0 done" in text) == (kept == "nothing done")
    assert ("- missing: base" in text) == (kept == "no base")
    assert "- not run: DoRA" in text
