"""Curves read off, ratios with their intervals, sequences, the report: on made-up records."""

from __future__ import annotations

import math

import pytest

from benchmarks.retention import record as records
from benchmarks.retention import report
from benchmarks.retention.cells import Cell, Settings
from benchmarks.retention.record import Measure, Probe, Record, Score
from benchmarks.retention.summary import Front, estimate, kl_of, least, ratio, sequences

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


def test_the_least_on_a_line_is_interpolated_and_grows_with_the_level():
    line = [(0.0, 0.0), (0.4, 0.2), (0.6, 0.1), (0.8, 0.5)]
    assert least([line], 0.2) == pytest.approx(0.1)
    assert least([line], 0.4) == pytest.approx(0.1)
    assert least([line], 0.7) == pytest.approx(0.3)
    assert least([line], 0.9) is None
    values = [least([line], level / 100) for level in range(1, 80)]
    assert values == sorted(values)


def test_a_front_joins_quarters_and_the_ends_of_rates():
    front = Front([made(), made(rate=3e-3, path=((0.6, 0.5), (0.8, 0.08)))], "mlp")
    paid = front.paid("lora", 0.7, kl_of("news"))
    assert paid == {0: pytest.approx(0.06)}  # between the two ends, not along the second's quarter
    assert front.paid("lora", 0.15, kl_of("news")) == {0: pytest.approx(0.005)}
    assert front.paid("lora", 0.9, kl_of("news")) == {}
    assert front.levels() == pytest.approx([0.72, 0.784, 0.8])


def test_quarters_are_scaled_as_the_ends_part_is_to_its_whole():
    record = made(path=((0.2, 0.02), (0.4, 0.04)))
    whole = record.measures.pop()
    part = Measure(2, True, {"gsm8k": score(0.2, 0.02)}, {"news": score(0, 0.01)})
    record.measures += [part, whole]
    front = Front([record], "mlp")
    line = front.lines("lora", 0, kl_of("news"))[0]
    assert [x for x, _ in line] == pytest.approx([0.0, 0.4, 0.4])
    assert [y for _, y in line] == pytest.approx([0.0, 0.08, 0.04])


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


def test_forgetting_is_the_rise_above_the_least_loss():
    def cell(count, first, second):
        record = made("er")
        tasks = ("gsm8k", "csqa")[:count]
        record.cell = Cell("er", "mlp", 1e-3, 0, tasks, 2)
        end = record.measures[-1]
        scores = {"gsm8k": score(2 - first, 0.1), "csqa": score(2 - second, 0.1)}
        record.measures[-1] = Measure(2, False, scores, end.texts)
        return record

    found = sequences([cell(1, 1.0, 1.9), cell(2, 1.3, 0.7)])["er"]
    assert found.forgetting == {0: pytest.approx(0.3)} and found.loss == {0: pytest.approx(1.0)}
    assert sequences([cell(1, 1.0, 1.9)]) == {}


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
    row = next(line for line in text.splitlines() if line.startswith("| anchored, no data |"))
    assert "**0." in row and "[0." in row
    assert "| U alone | 1k | 0.500 ± 0.000 | – |" in text
    assert "1 of them failed" in text and "the loss became nan" in text
    assert (tmp_path / "screen-mlp.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "screen-mlp.png").read_bytes()
    report.write_report(tmp_path)
    assert (tmp_path / "screen-mlp.png").read_bytes() == first


def test_an_empty_folder_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        report.write_report(tmp_path)
