"""The report of a folder of stages: what is kept where LoRA's best is learned, as Markdown."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.retention.grid import BEST
from benchmarks.retention.methods import get_method
from benchmarks.retention.plots import write_front
from benchmarks.retention.record import Record, read_all
from benchmarks.retention.summary import (
    LEVELS,
    MAIN,
    REFERENCE,
    Estimate,
    Front,
    estimate,
    learned,
    sequences,
)

ROWS = 8
REPORT = "report.md"
_PREFERRED = (
    "lora",
    BEST,
    "lora-whitened",
    "ewc-self",
    "full",
    "replay-self",
    "lora@rank=8",
    "anchored-self",
    "core-u",
)
_NOTHING = "–"


def write_report(folder: Path) -> Path:
    """Writes report.md and a picture for each stage and place from the records in a folder.

    Raises:
        ValueError: there are none.
    """
    stages: dict[str, list[Record]] = defaultdict(list)
    for record in read_all(folder):
        stages[record.stage].append(record)
    parts = ["# What fine-tuning keeps", ""]
    for stage, records in sorted(stages.items()):
        parts += [f"## {stage}", "", *_about(records), ""]
        for targets in sorted({r.cell.targets for r in records} - {"all"}):
            front = Front(records, targets)
            if REFERENCE in front.runs:
                picture = f"{stage}-{targets}.png"
                write_front(front, folder / picture, f"{stage}: adapters on {targets}")
                parts += [f"![Learned and drifted, {targets}]({picture})", ""]
                parts += [main_table(front), "", *_levels(front), ""]
        if in_turn := sequence_table(records):
            parts += [in_turn, ""]
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


def main_table(front: Front, *, brief: bool = False) -> str:
    """The methods of most interest, each where it learned nearly what LoRA does at its best rate.

    Args:
        front: of one stage and place.
        brief: the KL on each kind of old text alone.
    """
    rows = [name for name in dict.fromkeys([*_PREFERRED, *front.methods]) if name in front.runs]
    level = front.levels()[MAIN]
    kinds = front.some(REFERENCE).settings.texts
    head = ["method", "trained", "learned at best", *(f"KL, {kind}" for kind in kinds)]
    more = ["KL, all kinds", "KL, the task", "rise of loss", "probes kept", "seconds"]
    table = []
    for name in rows[:ROWS]:
        some = front.some(name)
        cells = [get_method(name).title, f"{some.trained / 1e3:,.0f}k"]
        cells.append(_plain(estimate(list(front.best(name).values()))))
        cells += [_ratio(front, name, level, kind) for kind in kinds]
        table.append(cells if brief else [*cells, *_costs(front, name, level, some.task)])
    caption = (
        f"KL(base ‖ tuned) where a method has learned {level:.3f} nats a token of the task's "
        f"held-out loss, {LEVELS[MAIN]:.0%} of what LoRA reaches at its best rate on every seed, "
        "as a multiple of what LoRA pays for that, paired by seed, with the 95% interval; below 1 "
        f"drifts less. {_NOTHING}: it does not learn as much at any rate."
    )
    if not brief:
        caption += (
            " Rise of loss: mean over the kinds of old text; this, the probes (accuracy as a share "
            "of the base model's) and the seconds are of the run that ends nearest above that "
            "level. An anchor by given news has seen the source of the kind news, which its column "
            "of all kinds leaves out."
        )
    return f"{_table(head if brief else [*head, *more], table)}\n\n{caption}"


def _costs(front: Front, name: str, level: float, task: str) -> list[str]:
    kept = [value for value in front.ends(name, level, _kept) if not math.isnan(value)]
    return [
        _ratio(front, name, level),
        _ratio(front, name, level, task),
        _plain(estimate(front.ends(name, level, _rise)), sign=True),
        f"{fmean(kept):.0%}" if kept else _NOTHING,
        f"{fmean(front.ends(name, level, lambda r: r.seconds['total'])):.0f}",
    ]


def sequence_table(records: Iterable[Record]) -> str:
    """What became of tasks learned in turn; empty where no sequence was run."""
    found = sequences(records)
    rows = [
        [
            get_method(name).title,
            *(
                _plain(estimate(list(values.values())), sign=place == 1)
                for place, values in enumerate((run.loss, run.forgetting, run.kl))
            ),
        ]
        for name, run in sorted(found.items())
    ]
    if not rows:
        return ""
    caption = (
        "After the last task: mean held-out loss of all of them; rise of the earlier ones' loss "
        "above the least it was; KL on old texts, geometric mean over the kinds."
    )
    return f"{_table(['method', 'loss', 'forgetting', 'KL'], rows)}\n\n{caption}"


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
    return _table([*head, "KL of the kinds", "rises", "probes"], rows)


def _about(records: Sequence[Record]) -> list[str]:
    """Where a stage's figures were made, and what they are of."""
    environments = [record.environment for record in records]
    seeds = sorted({record.cell.seed for record in records})
    failed = sum(record.status == "failed" for record in records)
    hours = sum(record.seconds.get("total", 0.0) for record in records) / 3600
    facts = {
        key: ", ".join(sorted({str(_dig(e, key)) for e in environments}))
        for key in ("model", "machine.name", "commit", "torch", "bf16")
    }
    settings = records[0].settings
    return [
        f"{len(records)} cells, {failed} of them failed; seeds {', '.join(map(str, seeds))}; "
        f"{facts['model']}; batches of {settings.batch_size}, at most {settings.max_tokens} tokens "
        f"an example; scored on {settings.held_out} held-out examples, {settings.text_count} "
        f"texts of each kind and {settings.probe_questions} questions of each probe. "
        f"{facts['machine.name']}, torch {facts['torch']}, bf16 autocast: {facts['bf16']}; commit "
        f"{facts['commit']}; {hours:.1f} hours of one core or GPU share."
    ]


def _levels(front: Front) -> list[str]:
    """The KL over all kinds at three levels of learning."""
    levels = front.levels()
    head = ["method", *(f"{share:.0%} ({x:.3f})" for share, x in zip(LEVELS, levels, strict=True))]
    rows = [
        [get_method(name).title, *(_ratio(front, name, level) for level in levels)]
        for name in front.methods
        if name != REFERENCE and front.ratio(name, levels[0])
    ]
    note = "KL over all kinds as a multiple of LoRA's, at shares of what LoRA learns at its best."
    return ["", _table(head, rows), "", note]


def _ratio(front: Front, method: str, level: float, *kinds: str) -> str:
    if method == REFERENCE:
        return "1"
    found = front.ratio(method, level, *kinds)
    if found is None:
        return _NOTHING
    missing = len(front.runs[method]) - found.count
    note = f" ({found.count} of {found.count + missing})" if missing else ""
    if math.isnan(found.low):
        return f"{found.mean:.2f}{note}"
    mark = "**" if found.high < 1 or found.low > 1 else ""
    return f"{mark}{found.mean:.2f}{mark} [{found.low:.2f}, {found.high:.2f}]{note}"


def _plain(found: Estimate, *, sign: bool = False) -> str:
    mean = f"{found.mean:+.3f}" if sign else f"{found.mean:.3f}"
    return mean if math.isnan(found.low) else f"{mean} ± {found.high - found.mean:.3f}"


def _rise(record: Record) -> float:
    return fmean(score.rise for score in record.end.texts.values())


def _kept(record: Record) -> float:
    shares = [
        probe.accuracy_norm / probe.base_accuracy_norm
        for probe in record.probes.values()
        if probe.base_accuracy_norm
    ]
    return fmean(shares) if shares else math.nan


def _dig(content: dict, key: str) -> object:
    for part in key.split("."):
        content = content.get(part, {})
    return content


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


__all__ = ["REPORT", "every_cell", "main_table", "sequence_table", "write_report"]
