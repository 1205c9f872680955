"""Curves read off, ratios with their intervals, sequences, the report: on made-up records."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.retention import plots, report
from benchmarks.retention import record as records
from benchmarks.retention.cells import Cell, Settings
from benchmarks.retention.grid import STAGES
from benchmarks.retention.record import Measure, Probe, Record, Score
from benchmarks.retention.summary import (
    SCALED,
    Front,
    InTurn,
    difference,
    estimate,
    kl_of,
    least,
    ratio,
    sequences,
)

SETTINGS = Settings(texts=("news", "code"))


def score(learned: float, kl: float) -> Score:
    return Score(10, 2.0, 2.0 - learned, kl, 0.5, 0.4)


def made(method="lora", rate=1e-3, seed=0, path=((0.3, 0.01), (0.6, 0.04)), **more) -> Record:
    """A cell whose measures are (learned, KL on news); on code it is twice that."""
    cell = Cell(method, "mlp", rate, seed, ("gsm8k",), len(path))
    measures = [
        Measure(
            step,
            step < len(path),
            {"gsm8k": score(learned, 2 * kl)},
            {"news": score(-kl, kl), "code": score(0.0, 2 * kl)},
        )
        for step, (learned, kl) in enumerate(path, start=1)
    ]
    fields = {"trained": 1000, "seconds": {"total": 9.0}, "environment": {"model": "a model"}}
    probes = {"arc-easy": Probe(10, 0.5, 0.5, 0.4, 0.4)}
    return Record("screen", cell, SETTINGS, measures=measures, probes=probes, **(fields | more))


def test_the_least_on_a_line_is_interpolated_in_logarithms_and_grows_with_the_level():
    line = [(0.2, 0.1), (0.4, 0.4), (0.6, 0.1), (0.8, 0.9)]
    assert least([line], 0.2) == pytest.approx(0.1)
    assert least([line], 0.4) == pytest.approx(0.1)
    assert least([line], 0.7) == pytest.approx(0.3)
    assert least([line[:2]], 0.3) == pytest.approx(0.2)
    assert least([line], 0.9) is None
    values = [least([line], level / 100) for level in range(1, 80)]
    assert values == sorted(values)


def test_a_front_joins_the_ends_of_rates_and_no_run_that_has_not_ended():
    front = Front([made(), made(rate=3e-3, path=((0.7, 0.001), (0.8, 0.16)))], "mlp")
    assert front.paid("lora", 0.7, kl_of("news")) == {0: pytest.approx(0.08)}
    assert front.paid("lora", 0.15, kl_of("news")) == {0: pytest.approx(0.04)}
    assert front.paid("lora", 0.9, kl_of("news")) == {}
    assert front.levels() == pytest.approx([0.768, 0.784, 0.8])
    less = made(seed=1, path=((0.3, 0.01), (0.5, 0.04)))
    assert Front([made(), less], "mlp").levels() == pytest.approx([0.48, 0.49, 0.5])
    assert front.above("lora", 0.55) and not front.above("lora", 0.65)


def test_the_scales_of_a_rate_are_one_curve_that_ends_in_the_whole():
    records = [
        made(path=((0.5, 0.05),)),
        made(rate=3e-3, path=((0.8, 0.16),)),
        made("lora@scale=0.5", rate=3e-3, path=((0.4, 0.04),)),
        made("lora@scale=0.25", rate=3e-3, path=((0.2, 0.03),)),
    ]
    front = Front(records, "mlp")
    scaled = "lora" + SCALED
    assert front.methods == ["lora", scaled] and front.title(scaled) == "LoRA" + SCALED
    (line,) = front.lines(scaled, 0, kl_of("news"))
    assert [y for _, y in line] == pytest.approx([0.03, 0.04, 0.16])
    assert front.paid(scaled, 0.6, kl_of("news")) == {0: pytest.approx(0.08)}
    assert [len(line) for line in front.lines("lora", 0, kl_of("news"))] == [2]


def test_ends_are_of_seeds_that_reach_the_level_alone():
    runs = [made(), made(seed=1), made(seed=1, rate=3e-3, path=((0.4, 0.1), (0.9, 0.2)))]
    runs.append(made(seed=1, rate=1e-2, path=((0.4, 0.1), (0.95, 0.3))))
    ends = Front(runs, "mlp").ends("lora", 0.7)
    assert {seed: end.cell.rate for seed, end in ends.items()} == {1: 3e-3}


def test_kl_over_kinds_is_the_geometric_mean_of_unseen_ones():
    measure = made(path=((0.5, 0.02),)).end
    assert kl_of()(measure) == pytest.approx(0.02 * math.sqrt(2))
    assert kl_of("gsm8k")(measure) == pytest.approx(0.04)
    lora, text = made(path=((0.5, 0.02),)), made("anchored-text", path=((0.5, 0.01),))
    front = Front([lora, text], "mlp")
    assert front.ratio("anchored-text", 0.5).mean == pytest.approx(0.5)  # on code alone
    assert front.paid("anchored-text", 0.5, kl_of("code")) == {0: pytest.approx(0.02)}


def test_intervals_are_students():
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high - 2 == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(estimate([1.0]).low)
    pairs = ratio({0: 1.0, 1: 2.0, 2: 9.0}, {0: 2.0, 1: 4.0})
    assert (pairs.mean, pairs.low, pairs.high, pairs.count) == (0.5, 0.5, 0.5, 2)
    assert ratio({0: 1.0}, {1: 1.0}) is None
    assert ratio({0: 0.0, 1: 2.0, 2: 1.0}, {0: 1.0, 1: 4.0, 2: 0.0}).count == 1
    assert difference({0: 1.0, 1: 4.0}, {0: 2.0, 1: 3.0, 2: 9.0}).mean == 0
    assert difference({0: 1.0}, {1: 1.0}) is None


def in_turn(count, first=1.0, second=1.0, method="er", seed=0, rate=1e-3, tasks=("gsm8k", "xsum")):
    """The cell after `count` tasks, whose losses are given; KL is 0.04 on news, 0.08 on code."""
    record = made(method)
    record.cell = Cell(method, "mlp", rate, seed, tasks[:count], 2)
    scores = {tasks[0]: score(2 - first, 0.1), tasks[1]: score(2 - second, 0.1)}
    record.measures[-1] = Measure(2, False, scores, record.end.texts)
    return record


def test_forgetting_is_the_rise_above_the_least_loss():
    (found,) = sequences([in_turn(1, 1.0, 1.9), in_turn(2, 1.3, 0.7)])
    assert found.forgetting == {0: pytest.approx(0.3)} and found.loss == {0: pytest.approx(1.0)}
    assert sequences([in_turn(1)]) == []


def test_a_task_is_forgotten_from_when_it_was_learned():
    tasks = ("gsm8k", "csqa", "logiqa")
    losses = ((1.0, 0.5, 2.0), (1.1, 0.9, 2.0), (1.2, 1.1, 1.0))
    runs = []
    for count, found in enumerate(losses, start=1):
        record = in_turn(count, tasks=tasks)
        scores = {task: score(2 - loss, 0.1) for task, loss in zip(tasks, found, strict=True)}
        runs.append(replace(record, measures=[replace(record.end, tasks=scores)]))
    (found,) = sequences(runs)
    assert found.forgetting == {0: pytest.approx(0.2)}


def test_news_are_not_old_text_where_their_source_is_trained_on():
    (found,) = sequences([in_turn(1), in_turn(2)])
    assert found.kl == found.kls[1] == {0: pytest.approx(0.08)}
    (found,) = sequences([in_turn(n, tasks=("gsm8k", "csqa")) for n in (1, 2)])
    assert found.kl == {0: pytest.approx(0.04 * math.sqrt(2))}


def test_sequences_of_several_rates_are_apart():
    found = sequences([in_turn(n, n, rate=rate) for n in (1, 2) for rate in (1e-3, 3e-3)])
    assert [(run.method, run.rate, len(run.loss)) for run in found] == [
        ("er", 1e-3, 1),
        ("er", 3e-3, 1),
    ]


def test_sequences_of_several_lengths_are_apart():
    runs = [replace(in_turn(n, n), cell=replace(in_turn(n, n).cell, steps=64)) for n in (1, 2)]
    assert [run.steps for run in sequences([*runs, *(in_turn(n, n) for n in (1, 2))])] == [2, 64]


def test_a_sequence_has_its_paired_difference_from_two_seeds_on():
    def records(method, seeds, loss):
        return [in_turn(n, loss + seed, loss, method, seed) for seed in seeds for n in (1, 2)]

    plain, kept = records("lora", (0, 1, 2), 1.0), records("er", (0, 1), 0.5)
    row = report.sequence_table([*plain, *kept]).splitlines()[3]
    assert row.startswith("| LoRA + replay of earlier tasks | mlp | 0.001 | 2 | 2 | 0.750")
    assert "| -0.50 [-0.50, -0.50] |" in row
    row = report.sequence_table([*plain, *kept[:2]]).splitlines()[3]
    assert row == (
        "| LoRA + replay of earlier tasks | mlp | 0.001 | 2 | 1 | 0.500 | – | 0.000 | – | 0.080 "
        "| – |"
    )


def test_a_sequence_is_compared_with_replay_and_ewc_too():
    def records(method, loss):
        rises = ((1, loss), (2, loss + 0.1 * loss))
        return [in_turn(n, rise + seed, loss, method, seed) for seed in (0, 1) for n, rise in rises]

    both = [*records("er", 0.5), *records("ewc", 0.7)]
    table = report.sequence_table([*records("lora", 1.0), *both])
    loss, forgetting = "0.21 [0.21, 0.21]", "0.02 [0.02, 0.02]"
    row = "| LoRA + EWC of earlier tasks | mlp | 0.001 | 2 |"
    assert f"{row} {loss} | {forgetting} | 1.00 [1.00, 1.00] |" in table.splitlines()
    row, forgetting = row.replace("EWC", "replay"), "-0.02 [-0.02, -0.02]"
    assert f"{row} -{loss.replace('[', '[-').replace(', ', ', -')} | {forgetting} | 1.00" in table
    alone = report.sequence_table(records("ewc", 0.7))
    assert "Against replay" in table and "Against EWC" in table and "Against" not in alone


def test_a_sequence_says_what_it_drifted_after_each_task():
    """Twice as far as LoRA after the first, half as far after the second."""
    drifts = {("lora", 1): 0.1, ("lora", 2): 0.4, ("er", 1): 0.2, ("er", 2): 0.2}
    runs = []
    for (method, count), kl in drifts.items():
        for seed in (0, 1):
            record = in_turn(count, 1.0, 1.0, method, seed)
            texts = {name: replace(of, kl=kl) for name, of in record.end.texts.items()}
            runs.append(replace(record, measures=[replace(record.end, texts=texts)]))
    table = report.sequence_table(runs)
    assert "KL over that of LoRA after each task" in table
    row = "| LoRA + replay of earlier tasks | mlp | 0.001 | 2 |"
    assert f"{row} 2.00 [2.00, 2.00] | 0.50 [0.50, 0.50] |" in table.splitlines()


def test_the_report_has_a_row_a_method_and_a_picture(tmp_path):
    for seed in (0, 1, 2):
        for record in (
            made(seed=seed, path=((0.3, 0.01), (0.6, 0.04 + 0.001 * seed))),
            made("anchored-self", seed=seed, path=((0.3, 0.01), (0.7, 0.02 + 0.001 * seed))),
            made("core-u", seed=seed, path=((0.2, 0.1), (0.5, 0.3))),
        ):
            records.write(tmp_path / record.stage / record.cell.path, record)
    failed = made("cabr", path=((0.1, 0.1),), status="failed", error="the loss became nan")
    records.write(tmp_path / failed.stage / failed.cell.path, failed)
    text = report.write_report(tmp_path).read_text()
    row = next(line for line in text.splitlines() if line.startswith("| anchored core |"))
    assert "**0." in row and "[0." in row
    assert "| U alone | 1k | 0.500 ± 0.000 | – |" in text and "125% ± 0%" in text
    assert "1 of them failed" in text and "the loss became nan" in text
    assert (tmp_path / "screen-mlp.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "screen-mlp.png").read_bytes()
    report.write_report(tmp_path)
    assert (tmp_path / "screen-mlp.png").read_bytes() == first


def test_runs_of_several_lengths_are_several_pictures(tmp_path):
    short = [made(name, path=((0.6, 0.04),)) for name in ("lora", "anchored-self")]
    long = [made(name) for name in ("lora", "anchored-self")]
    with pytest.raises(ValueError, match="several tasks or lengths"):
        Front([*short, *long], "mlp")
    for record in (*short, *long):
        records.write(tmp_path / record.stage / record.cell.path, record)
    text = report.write_report(tmp_path).read_text()
    for steps in (1, 2):
        assert f"(screen-mlp-gsm8k-{steps}.png)" in text
        assert (tmp_path / f"screen-mlp-gsm8k-{steps}.png").exists()


def test_what_is_read_off_a_run_that_learned_more_is_marked():
    """One seed of the core ends above the level at every rate; the other is read between two."""
    plain = [made(seed=seed, path=((0.3, 0.01), (0.6, 0.04))) for seed in (0, 1)]
    ours = [made("anchored-self", seed=seed, path=((0.3, 0.01), (0.7, 0.02))) for seed in (0, 1)]
    low = made("anchored-self", rate=1e-4, seed=1, path=((0.1, 0.01), (0.2, 0.01)))
    for some, marked in (([*ours, low], True), ([*ours, low, replace_seed(low, 0)], False)):
        table = report.main_table(Front([*plain, *some], "mlp"))
        row = next(line for line in table.splitlines() if line.startswith("| anchored core |"))
        assert ("†" in row) is marked and ("all its runs of a seed end above" in table) is marked


def replace_seed(record, seed):
    return replace(record, cell=replace(record.cell, seed=seed))


def test_a_picture_joins_rates_in_their_order_over_kinds_that_none_has_seen():
    """The curve turns back at its highest rate; news are out where they were an anchor's."""
    ends = {2.5e-4: (0.5, 0.01), 5e-4: (0.7, 0.02), 1e-3: (0.6, 0.04)}
    core = [made("anchored-self", rate=rate, path=((0.1, 0.1), end)) for rate, end in ends.items()]
    front = Front([made(), *core], "mlp")
    (line,) = front.lines("anchored-self", 0, kl_of("news"))
    drawn = plots._points(front, "anchored-self", ["news"])
    for got, joined, end in zip(drawn, line, ends.values(), strict=True):
        assert got == joined == pytest.approx(end)
    for more, shown in (([], "news, code"), ([made("anchored-text")], "code")):
        figure = plots.draw_front(Front([made(), *core, *more], "mlp"), "a title")
        assert f"on {shown}, nats" in figure.axes[0].get_ylabel()
        assert figure.axes[1].get_xlim()[1] > 0.7  # the most that was learned, at the middle rate


def test_the_committed_cells_are_of_their_stages():
    folder = Path(__file__).parents[3] / "benchmarks/results/retention"
    for record in records.read_all(folder):
        assert record.cell in STAGES[record.stage].cells, record.cell.title


def test_ends_stand_beside_the_references_next_below_and_above():
    """Paired by seed; of three of LoRA's ends the one far below is not named."""
    ends = {1e-4: (0.2, 0.01), 1e-3: (0.5, 0.02), 3e-3: (0.8, 0.08)}
    plain = [
        made(rate=rate, seed=seed, path=((learned + 0.01 * seed, kl),))
        for rate, (learned, kl) in ends.items()
        for seed in (0, 1, 2)
    ]
    ours = [
        made("anchored-self", rate=5e-4, seed=seed, path=((0.51 + 0.01 * seed, 0.01),))
        for seed in (0, 1, 2)
    ]
    found = Front([*plain, *ours, made("dora", path=((0.6, 0.01),))], "mlp")
    below, above = found.around("anchored-self")
    assert below[:2] == (5e-4, 1e-3) and above[:2] == (5e-4, 3e-3)
    for beside, more, kl in ((below, 0.01, 0.5), (above, -0.29, 0.125)):
        for got, expected in zip(beside[2:], (more, kl), strict=True):
            assert got.count == 3
            assert (got.mean, got.low, got.high) == pytest.approx((expected,) * 3)
    assert found.around("dora") == []  # of one seed
    ewc = [made("ewc-self", seed=seed, path=((0.5 + 0.01 * seed, 0.02),)) for seed in (0, 1, 2)]
    found = Front([*plain, *ours, *ewc], "mlp")
    ((rate, other, more, kl),) = found.around("anchored-self", "ewc-self")
    assert (rate, other) == (5e-4, 1e-3) and (more.mean, kl.mean) == pytest.approx((0.01, 0.5))
    rows = [row for row in report._ends(found)[0].splitlines() if row.startswith("| anchored")]
    assert [row.split(" | ")[2] for row in rows] == ["LoRA", "LoRA", "LoRA + EWC of own samples"]


def test_a_stage_may_stand_in_the_section_of_another(tmp_path):
    """One curve of LoRA's through both; probes were asked in the first alone."""
    whole = made(path=((0.3, 0.01), (0.6, 0.04)))
    more = made("anchored-self", path=((0.3, 0.01), (0.7, 0.02)))
    fewer = replace(more.settings, probe_questions=0)
    for stage, record in (("gemma", whole), ("gemma-settings", replace(more, settings=fewer))):
        record = replace(record, stage=stage)
        records.write(tmp_path / stage / record.cell.path, record)
    text = report.write_report(tmp_path).read_text()
    assert "## gemma\n" in text and "## gemma-settings" not in text
    assert "questions of each probe, not in every cell" in text and "2 cells" in text
    commands = (f"`python -m benchmarks.retention run {name} --out DIR`" for name in STAGES)
    assert ", ".join(c for c in commands if "run gemma" in c) in text


def test_a_stage_of_one_method_has_its_cells_alone(tmp_path):
    record = made(seed=0, path=((0.3, 0.01), (0.6, 0.04)))
    records.write(tmp_path / record.stage / record.cell.path, record)
    text = report.write_report(tmp_path).read_text()
    assert "Every cell" in text and "learned at best" not in text
    assert not list(tmp_path.glob("*.png"))


def test_what_not_every_seed_reaches_says_so_and_is_never_bold():
    plain = [made(seed=seed, path=((0.6, 0.04 + 0.001 * seed),)) for seed in (0, 1, 2)]
    short = [made("er", seed=seed, path=((0.7, 0.02 + 0.001 * seed),)) for seed in (0, 1)]
    row = report.main_table(Front([*plain, *short], "mlp")).splitlines()[3]
    assert row.startswith("| LoRA + replay of earlier tasks | 1k | 0.700")
    assert row.count("(2 of 3)") == 7 and "**" not in row


def where(machine: str, commit: str) -> dict:
    own = {"model": "a model in 4 bits", "torch": "2.11", "bf16": True, "commit": commit}
    return own | {"machine": {"name": machine}}


def test_a_table_says_where_its_figures_were_made_and_what_lora_is():
    records = [
        made(environment=where("an H100", "abc")),
        made(seed=1, environment=where("an H200", "def")),
    ]
    table = report.main_table(Front(records, "mlp"))
    assert table.splitlines()[2].startswith("| LoRA, rank=4 | 1k |")
    assert "LoRA's is 4 (alpha 8)" in table and "an H100, an H200, torch 2.11" in table
    assert "a model in 4 bits; adapters on mlp, 2 steps of batch 4, bf16 autocast" in table
    assert "commit abc, def; `python -m benchmarks.retention run screen --out DIR`" in table


def test_a_table_shows_every_method_and_explains_the_marks_it_uses_alone():
    def runs(method, learned, kl, seeds=(0, 1, 2)):
        return [made(method, seed=s, path=((learned, kl + 0.001 * s),)) for s in seeds]

    names = ("dora", "core-u", "cabr", "full", "er", "ewc", "cur-lora", "i-lora", "released-m1")
    records = runs("lora", 0.6, 0.04) + [each for name in names for each in runs(name, 0.6, 0.04)]
    table = report.main_table(Front(records, "mlp"))
    assert table.count("\n|") == len(names) + 2
    for note in ("Bold:", "–: it does", "on which the level is reached", "given news"):
        assert note not in table
    records += runs("anchored-self", 0.7, 0.01) + runs("ewc-self", 0.7, 0.01, (0, 1))
    records += runs("anchored-text", 0.2, 0.01)
    table = report.main_table(Front(records, "mlp"))
    assert "Bold: the interval excludes 1" in table and "–: it does not learn as much" in table
    assert "(2 of 3): of the seeds" in table and "given news has seen" in table
    brief = report.brief_table(Front(records, "mlp"))
    assert brief.count("\n|") == report.BRIEF + 1 and "drift at 98% | drift at 96%" in brief


def test_the_questions_own_error_stands_beside_the_seeds():
    assert "over its 50 questions, 39% to 39% of it, is not in it" in report.main_table(
        Front([made()], "mlp")
    )


def test_an_empty_folder_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        report.write_report(tmp_path)


def test_a_picture_of_tasks_in_turn_joins_the_strengths_of_one_method():
    held = {
        ("lora", 1e-3): (3.0, 0.5),
        ("ewc-self@strength=1e5", 1e-3): (2.5, 0.1),
        ("ewc-self", 1e-3): (2.0, 0.2),
        ("ewc-self", 3e-3): (1.0, 0.2),
        ("anchored-self@rank=128,decay=30", 1e-3): (1.5, 0.2),
    }
    runs = [
        InTurn(method, "mlp", rate, 64, {0: loss, 1: loss}, {}, {4: {0: kl, 1: kl}})
        for (method, rate), (loss, kl) in held.items()
    ]
    whole, near = plots.draw_sequence(runs, "a title").axes
    joined = [[1.0], [1.5], [2.0, 2.5]]
    for axes, shown in ((whole, [*joined, [3.0]]), (near, joined)):
        means = [line.get_ydata() for line in axes.lines if line.get_marker() != "."]
        assert sorted(map(list, means)) == shown
        assert len(axes.lines) == len(means) + len(runs) - (axes is near)
    assert [text.get_text() for text in near.texts] == ["strength 1e5"]
    labels = {line.get_label() for line in whole.lines}
    assert "anchored core, rank=128,decay=30" in labels, "its one strength is in its title"
    rates = {f"LoRA + EWC of own samples, rate {rate}" for rate in ("0.001", "0.003")}
    assert rates < labels and "LoRA" in labels, "of two, and not of one"
    assert near.get_title() and not plots.draw_sequence(runs[1:], "a title").axes[1].get_title()
