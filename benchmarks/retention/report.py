"""The report of a folder of stages: what is kept where LoRA's best is learned, as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

from benchmarks.markdown import table
from benchmarks.plots import write_png
from benchmarks.retention.front_report import ends_table, levels_table, main_table, multiples_table
from benchmarks.retention.grid import STAGES
from benchmarks.retention.plots import draw_front, draw_sequence
from benchmarks.retention.record import Record, provenance, read_all
from benchmarks.retention.sequence_report import sequence_table
from benchmarks.retention.summary import REFERENCE, Front, learned, sequences

REPORT = "report.md"


def write_report(folder: Path) -> Path:
    """Writes report.md, and a picture for each stage of one task and place, from the records.

    A stage of one method alone, which has nothing beside it, has its cells and no more.

    Raises:
        ValueError: there are none.
    """
    stages: dict[str, list[Record]] = defaultdict(list)
    for record in read_all(folder):
        known = STAGES.get(record.stage)
        stages[known.shown_in if known and known.shown_in else record.stage].append(record)
    parts = ["# What fine-tuning keeps", ""]
    for stage, records in sorted(stages.items()):
        parts += [f"## {stage}", "", *_about(records), ""]
        if any(len(record.cell.tasks) > 1 for record in records):
            parts += _sequences(stage, records, folder)
        elif len({record.cell.method for record in records}) > 1:
            parts += _fronts(stage, records, folder)
        parts += [
            "<details><summary>Every cell</summary>",
            "",
            every_cell(records),
            "",
            "</details>",
        ]
        parts.append("")
    path = folder / REPORT
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _sequences(stage: str, records: Sequence[Record], folder: Path) -> list[str]:
    """A picture and the tables of a stage of tasks in turn; the tables alone where one was run."""
    parts, runs = [], sequences(records)
    if len(runs) > 1:
        write_png(draw_sequence(runs, f"{stage}: tasks in turn"), folder / f"{stage}.png")
        parts += [f"![Learned and drifted, tasks in turn]({stage}.png)", ""]
    return [*parts, sequence_table(records), ""]


def _fronts(stage: str, records: Sequence[Record], folder: Path) -> list[str]:
    """A picture and the tables of each place of a stage of one task."""
    parts = []
    alike: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        if record.status == "done":
            alike[record.task, record.cell.steps].append(record)
    places = sorted({record.cell.targets for record in records} - {"all"})
    for ((task, steps), some), targets in product(sorted(alike.items()), places):
        front = Front(some, targets)
        if REFERENCE in front.runs:
            picture = f"{stage}-{targets}{f'-{task}-{steps}' * (len(alike) > 1)}.png"
            write_png(draw_front(front, f"{stage}: adapters on {targets}"), folder / picture)
            parts += [f"![Learned and drifted, {targets}]({picture})", ""]
            parts += [main_table(front), "", *levels_table(front), "", *ends_table(front), ""]
            parts += [*multiples_table(front), ""]
    return parts


def every_cell(records: Iterable[Record]) -> str:
    """A line a cell."""
    rows = []
    for record in sorted(records, key=lambda r: (r.cell.targets, r.cell)):
        cell = record.cell
        row = [cell.method, cell.targets, f"{cell.rate:g}", str(cell.seed), " → ".join(cell.tasks)]
        if record.status == "failed":
            rows.append([*row, str(cell.steps), record.error, "", "", "", ""])
            continue
        own = record.end.tasks[record.task]
        texts = record.end.texts.values()
        probes = ", ".join(f"{name} {p.accuracy_norm:.2f}" for name, p in record.probes.items())
        rows.append(
            [
                *row,
                str(cell.steps),
                f"{learned(record.end, record.task):.3f}",
                f"{own.accuracy:.3f}",
                " / ".join(f"{score.kl:.3f}" for score in texts),
                " / ".join(f"{score.rise:+.3f}" for score in texts),
                probes,
            ]
        )
    head = ["method", "on", "rate", "seed", "tasks", "steps", "learned", "token accuracy"]
    return table([*head, "KL of the kinds", "rises", "probes"], rows)


def _about(records: Sequence[Record]) -> list[str]:
    """Where a stage's figures were made, and what they are of."""
    seeds = sorted({record.cell.seed for record in records})
    failed = sum(record.status == "failed" for record in records)
    hours = sum(record.seconds.get("total", 0.0) for record in records) / 3600
    facts, settings = provenance(records), records[0].settings
    asked = {record.settings.probe_questions for record in records}
    questions = f"{max(asked)} questions of each probe{', not in every cell' * (len(asked) > 1)}"
    return [
        f"{len(records)} cells, {failed} of them failed; seeds {', '.join(map(str, seeds))}; "
        f"{facts['model']}; batches of {settings.batch_size}, at most {settings.max_tokens} tokens "
        f"an example; scored on {settings.held_out} held-out examples, {settings.text_count} "
        f"texts of each kind and {questions}. "
        f"{facts['machine.name']}, torch {facts['torch']}, bf16 autocast: {facts['bf16']}; commit "
        f"{facts['commit']}; {hours:.1f} hours of one core or GPU share."
    ]


__all__ = ["REPORT", "every_cell", "write_report"]
