"""Curves read off, ratios with their intervals, sequences: on made-up records."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from retention_records import made, score

from benchmarks.retention.cells import Cell
from benchmarks.retention.record import Measure
from benchmarks.retention.sequence_report import sequence_table
from benchmarks.retention.summary import (
    SCALED,
    Front,
    difference,
    estimate,
    kl_of,
    least,
    ratio,
    sequences,
)


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
    assert front.kl_at("lora", 0.7, kl_of("news")) == {0: pytest.approx(0.08)}
    assert front.kl_at("lora", 0.15, kl_of("news")) == {0: pytest.approx(0.04)}
    assert front.kl_at("lora", 0.9, kl_of("news")) == {}
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
    assert front.kl_at(scaled, 0.6, kl_of("news")) == {0: pytest.approx(0.08)}
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
    assert front.kl_at("anchored-text", 0.5, kl_of("code")) == {0: pytest.approx(0.02)}


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
    row = sequence_table([*plain, *kept]).splitlines()[3]
    assert row.startswith("| LoRA + replay of earlier tasks | mlp | 0.001 | 2 | 2 | 0.750")
    assert "| -0.50 [-0.50, -0.50] |" in row
    row = sequence_table([*plain, *kept[:2]]).splitlines()[3]
    assert row == (
        "| LoRA + replay of earlier tasks | mlp | 0.001 | 2 | 1 | 0.500 | – | 0.000 | – | 0.080 "
        "| – |"
    )


def test_a_sequence_is_compared_with_replay_and_ewc_too():
    def records(method, loss):
        rises = ((1, loss), (2, loss + 0.1 * loss))
        return [in_turn(n, rise + seed, loss, method, seed) for seed in (0, 1) for n, rise in rises]

    both = [*records("er", 0.5), *records("ewc", 0.7)]
    table = sequence_table([*records("lora", 1.0), *both])
    loss, forgetting = "0.21 [0.21, 0.21]", "0.02 [0.02, 0.02]"
    row = "| LoRA + EWC of earlier tasks | mlp | 0.001 | 2 |"
    assert f"{row} {loss} | {forgetting} | 1.00 [1.00, 1.00] |" in table.splitlines()
    row, forgetting = row.replace("EWC", "replay"), "-0.02 [-0.02, -0.02]"
    assert f"{row} -{loss.replace('[', '[-').replace(', ', ', -')} | {forgetting} | 1.00" in table
    alone = sequence_table(records("ewc", 0.7))
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
    table = sequence_table(runs)
    assert "KL over that of LoRA after each task" in table
    row = "| LoRA + replay of earlier tasks | mlp | 0.001 | 2 |"
    assert f"{row} 2.00 [2.00, 2.00] | 0.50 [0.50, 0.50] |" in table.splitlines()
