"""The report and its pictures: on made-up records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from retention_records import made

from benchmarks.retention import front_report, plots, report
from benchmarks.retention import record as records
from benchmarks.retention.grid import STAGES
from benchmarks.retention.summary import (
    Front,
    InTurn,
    kl_of,
)


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
        table = front_report.main_table(Front([*plain, *some], "mlp"))
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
    rows = [
        row
        for row in front_report.ends_table(found)[0].splitlines()
        if row.startswith("| anchored")
    ]
    assert [row.split(" | ")[2] for row in rows] == ["LoRA", "LoRA", "LoRA + EWC of own samples"]


def test_a_multiple_is_read_where_the_reference_learned_as_much_and_nowhere_beyond_its_ends():
    """On its line in logarithms; of the rates that lie on it on every seed."""
    plain = [
        made(rate=rate, seed=seed, path=((learned, kl * (1 + seed)),))
        for rate, learned, kl in ((1e-3, 0.5, 0.02), (3e-3, 0.7, 0.08))
        for seed in (0, 1, 2)
    ]
    within = [made("anchored-self", seed=s, path=((0.6, 0.01 * (1 + s)),)) for s in (0, 1, 2)]
    beyond = [made("anchored-self", 2e-3, s, path=((0.69 + 0.01 * s, 0.02),)) for s in (0, 1, 2)]
    below = [made("lora-whitened", 2e-3, s, path=((0.51 - 0.01 * s, 0.01),)) for s in (0, 1, 2)]
    white = [made("lora-whitened", seed=s, path=((0.5, 0.005 * (1 + s)),)) for s in (0, 1, 2)]
    found = Front([*plain, *within, *beyond, *below, *white], "mlp")
    assert found.multiples("anchored-self") == {1e-3: pytest.approx(dict.fromkeys((0, 1, 2), 0.25))}
    assert found.multiples("lora-whitened") == {1e-3: pytest.approx(dict.fromkeys((0, 1, 2), 0.25))}
    rows = front_report.multiples_table(found)[0].splitlines()[2:]
    ends = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(row[0], row[2], row[5]) for row in ends] == [
        ("anchored core", "LoRA", "0.250 [0.250, 0.250]"),
        ("LoRA, A whitened", "LoRA", "0.250 [0.250, 0.250]"),
        ("anchored core", "LoRA, A whitened", "1.000 [1.000, 1.000]"),
    ]


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
    row = front_report.main_table(Front([*plain, *short], "mlp")).splitlines()[3]
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
    table = front_report.main_table(Front(records, "mlp"))
    assert table.splitlines()[2].startswith("| LoRA, rank=4 | 1k |")
    assert "LoRA's is 4 (alpha 8)" in table and "an H100, an H200, torch 2.11" in table
    assert "a model in 4 bits; adapters on mlp, 2 steps of batch 4, bf16 autocast" in table
    assert "commit abc, def; `python -m benchmarks.retention run screen --out DIR`" in table


def test_a_table_shows_every_method_and_explains_the_marks_it_uses_alone():
    def runs(method, learned, kl, seeds=(0, 1, 2)):
        return [made(method, seed=s, path=((learned, kl + 0.001 * s),)) for s in seeds]

    names = ("dora", "core-u", "cabr", "full", "er", "ewc", "cur-lora", "i-lora", "released-m1")
    records = runs("lora", 0.6, 0.04) + [each for name in names for each in runs(name, 0.6, 0.04)]
    table = front_report.main_table(Front(records, "mlp"))
    assert table.count("\n|") == len(names) + 2
    for note in ("Bold:", "–: it does", "on which the level is reached", "given news"):
        assert note not in table
    records += runs("anchored-self", 0.7, 0.01) + runs("ewc-self", 0.7, 0.01, (0, 1))
    records += runs("anchored-text", 0.2, 0.01)
    table = front_report.main_table(Front(records, "mlp"))
    assert "Bold: the interval excludes 1" in table and "–: it does not learn as much" in table
    assert "(2 of 3): of the seeds" in table and "given news has seen" in table
    brief = front_report.brief_table(Front(records, "mlp"))
    assert brief.count("\n|") == front_report.BRIEF + 1 and "drift at 98% | drift at 96%" in brief


def test_the_questions_own_error_stands_beside_the_seeds():
    assert "over its 50 questions, 39% to 39% of it, is not in it" in front_report.main_table(
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
