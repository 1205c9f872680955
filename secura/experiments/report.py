"""The Markdown report on a results folder: every figure in it comes from the records."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secura.experiments import sections
from secura.experiments.grid import Cell
from secura.experiments.markdown import NOTHING, Section, table
from secura.experiments.methods import METHODS
from secura.experiments.summary import SHARES, Record, Run, is_done

REPORT = "report.md"
SECTIONS: dict[str, Callable[[Run], Section]] = {
    "exp4": sections.retention,
    "exp5": sections.sequence,
    "exp2": sections.one_task_each,
    "exp3": sections.gradients,
    "exp0": sections.singular_values,
}
"""What each experiment shows, in the report's order."""

_NO_VERSION = ("commit", "machine", "model", "finished")


def write_report(
    records: Sequence[Record],
    out: Path,
    experiments: Sequence[str],
    methods: Sequence[str] | None = None,
) -> Path:
    """Writes ``report.md`` and its pictures into `out`, over those that are there.

    The same records give the same bytes, in whichever order they come. Each file is replaced whole,
    the report last.

    Args:
        records: the cells' records; some may be missing or failed, which the report then says.
        out: a folder; made where it is missing.
        experiments: names in `EXPERIMENTS`.
        methods: names asked for; None takes every method that any record is of.

    Returns:
        Where the report is.

    Raises:
        ValueError: no records, unknown names, or records of different settings.
    """
    run = Run(records, experiments, methods)
    parts = _parts(run)
    lines = [line for part in parts for line in part.lines]
    files = {name: content for part in parts for name, content in part.pictures.items()}
    files[REPORT] = ("\n".join(lines).rstrip() + "\n").encode()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as scratch:
        for name, content in files.items():
            (Path(scratch) / name).write_bytes(content)
        for name in files:
            os.replace(Path(scratch) / name, out / name)
    return out / REPORT


def _parts(run: Run) -> list[Section]:
    found = [_head(run)]
    chosen = {experiment.name: experiment for experiment in run.experiments}
    if any(experiment.own_rate for experiment in run.experiments):
        found += [Section(["## What was found", ""]), sections.found(run)]
    for name, make in SECTIONS.items():
        if name in chosen:
            found += [Section([f"## {chosen[name].title} ({name})", ""]), make(run)]
    return [*found, _reading(run), _making(run)]


def _head(run: Run) -> Section:
    done = sum(is_done(record) for record in run.records.values())
    seconds = sum(record["seconds"]["total"] for record in run.records.values())
    settings = run.settings
    seeds = ", ".join(map(str, run.seeds)) or "none"
    lines = [
        f"# What fine-tuning keeps: {settings['model']}",
        "",
        f"{_listed(_environment(run, 'model'))}. {settings['steps']} steps of "
        f"{settings['batch_size']} examples a task, {settings['dtype']}; seeds {seeds}; "
        f"{_listed(_machines(run))}; {seconds:,.0f} s of computing in all.",
        "",
        f"**Cells: {done} done, {len(run.failed)} failed, {len(run.missing)} missing.**",
        "",
        *_named({cell: f"failed ({error})" for cell, error in run.failed.items()}),
        *_named(dict.fromkeys(run.missing, "missing")),
    ]
    absent = [f"{experiment.name} ({experiment.title})" for experiment in run.not_run]
    absent += [method.title for method in METHODS.values() if method not in run.methods]
    absent += [] if run.is_searched else ["other learning rates than the one"]
    if absent:
        lines.append(f"- not run: {', '.join(absent)}")
    return Section([*lines, ""])


def _named(cells: Mapping[Cell, str]) -> list[str]:
    """What happened to cells, a line for each method and reason."""
    lines: dict[str, list[str]] = {}
    for cell, what in cells.items():
        method, _, rest = cell.title.partition(", ")
        lines.setdefault(f"- {what}: {method}", []).append(rest)
    return [head + f": {'; '.join(rest)}" * any(rest) for head, rest in lines.items()]


def _reading(run: Run) -> Section:
    """What every table's signs mean."""
    count = len(run.seeds)
    spread = (
        f"± is half the 95% interval (Student's t) of the mean over {count} seeds, which draw the "
        "training examples, their order, and what of an adapter is drawn; **bold** differences "
        "have an interval that excludes 0, as one in 20 has where there is no difference at all"
        if count > 1
        else "There is one seed, so there are no intervals: differences may be chance"
    )
    lines = [
        "## How to read the tables",
        "",
        f"- {spread}.",
        f"- (n=…): so many seeds have the figure, of {count}; {NOTHING}: none has.",
        "- Losses are cross-entropies in nats a token: lower is better. Scores go from 0 to 1.",
        f"- General text: the first {run.settings['text_tokens']} tokens of "
        f"{run.settings['text_examples']} news articles, held out of the task xsum"
        + (", which was trained on here." if "xsum" in run.tasks else "."),
        *_standard_errors(run),
    ]
    if shared := [entry.title for entry in run.entries() if entry.shared]:
        lines.append(
            f"- ¹ On a first task these are the same run, computed once: {'; '.join(shared)}. ER "
            "and EWC act on earlier tasks, and M1 and M2 differ from the first fold on. It comes "
            "before the next task; there M1, whose norm no longer holds back what was folded, "
            "jumps from what was trained and scored to the whole W + ΔW."
        )
    return Section([*lines, ""])


def _standard_errors(run: Run) -> list[str]:
    """How far chance moves a share of right answers on the test sets at hand."""
    if not run.base:
        return []
    found = [
        f"{name} {(share * (1 - share) / scores['n']) ** 0.5:.3f} (n = {scores['n']})"
        for name in (*run.tasks, *run.probes)
        if run.metric(name) in SHARES
        for scores in [run.base["scores"][name]]
        for share in [run.score(run.base, name)]
    ]
    if not found:
        return []
    return [
        "- Accuracy and exact match are shares of n questions, the same ones for every cell. Their "
        "binomial standard error √(p(1 − p)/n), which ± over seeds does not hold, is at the base "
        f"model's score p: {', '.join(found)}."
    ]


def _making(run: Run) -> Section:
    """Settings, data and versions."""
    settings = [[f"`{name}`", _setting(value)] for name, value in run.settings.items()]
    finished = sorted(_environment(run, "finished"))
    names = dict.fromkeys(name for r in run.records.values() for name in r["environment"])
    versions = [
        f"{name} {_listed(_environment(run, name))}" for name in names if name not in _NO_VERSION
    ]
    return Section(
        [
            "## How it was made",
            "",
            f"Commit {_listed(_environment(run, 'commit'))}; {', '.join(versions)}. The cells were "
            f"finished from {finished[0]} to {finished[-1]}.",
            "",
            *table(
                ["task", "source", "licence", "training and validation", "test", "SHA256"],
                _data(run),
                align="---",
            ),
            *table(["setting", "value"], settings, align="---"),
        ]
    )


def _data(run: Run) -> list[list[str]]:
    rows = []
    for name in dict.fromkeys((*run.tasks, *run.probes)):
        sums: dict[str, list[int]] = {}
        about: dict[str, Any] = {}
        for cell, record in sorted(run.records.items()):
            if name in record.get("data", {}):
                about = record["data"][name]
                seeds = sums.setdefault(about["sha256"][:12], [])
                seeds += [cell.seed] if cell.seed not in seeds else []
        shown = [f"`{digest}`" + f" (seed {_listed(map(str, seeds))})" * (len(sums) > 1)
                 for digest, seeds in sums.items()]  # fmt: skip
        note = f" ({about['note']})" if about.get("note") else ""
        title = about.get("title", name)
        sizes = [str(about.get(key, "")) for key in ("train", "test")]
        rows.append(
            [f"{title}{note}", about.get("source", ""), about.get("licence", ""), *sizes,
             ", ".join(shown)]
        )  # fmt: skip
    return rows


def _environment(run: Run, key: str) -> list[str]:
    """Every value the records have of it, each once."""
    values = (record["environment"].get(key) for _, record in sorted(run.records.items()))
    return list(dict.fromkeys(str(value) for value in values if value is not None))


def _machines(run: Run) -> list[str]:
    machines = (record["environment"]["machine"] for _, record in sorted(run.records.items()))
    return list(dict.fromkeys(f"{m['name']} (threads: {m['threads']})" for m in machines))


def _listed(values: Iterable[str]) -> str:
    return " and ".join(values)


def _setting(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


__all__ = ["REPORT", "SECTIONS", "write_report"]
