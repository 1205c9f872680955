"""The README's table of what methods learned, kept and forgot, from a folder of cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from secura.experiments.estimates import transfer
from secura.experiments.grid import EXPERIMENTS
from secura.experiments.markdown import NOTHING, show, table
from secura.experiments.store import read_records
from secura.experiments.summary import Run, loss

COLUMNS = (
    "method",
    "learned",
    "rise of text loss",
    "basic knowledge kept",
    "mean loss of the tasks",
    "forgetting of loss",
    "rise of text loss, last",
)


def is_there(folder: Path) -> bool:
    """Whether the folder holds results of the retention experiments."""
    return (folder / "settings.json").is_file()


def retention_table(folder: Path) -> str:
    """One row a method: after the first task alone, then after the whole sequence."""
    run = Run(read_records(folder), list(EXPERIMENTS))
    first, whole = run.tasks[:1], run.tasks
    alone: list[Callable[[Any], float | None]] = [
        lambda record: run.learned(record, run.tasks[0]),
        run.text_rise,
        run.retention,
    ]
    rows = []
    for method in run.methods:
        shared = method.first_as
        cells = [
            show(run, run.over_seeds(method.name, first, run.rate, figure)) for figure in alone
        ]
        if shared:
            cells = [f"= {shared}"] + [""] * (len(alone) - 1)
        matrices = run.matrices(method.name, loss)
        after = {s: transfer(matrix, lower_is_better=True) for s, matrix in matrices.items()}
        sequence = [
            show(run, {seed: figures.average for seed, figures in after.items()}),
            show(run, {seed: figures.forgetting for seed, figures in after.items()}),
            show(run, run.over_seeds(method.name, whole, run.rate, run.text_rise)),
        ]
        if any(cell != NOTHING for cell in ([] if shared else cells) + sequence):
            rows.append([method.title, *cells, *sequence])
    return "\n".join([*table(COLUMNS, rows), _caption(run)]) + "\n"


def _caption(run: Run) -> str:
    settings = run.settings
    environments = [record["environment"] for record in run.records.values()]
    model = environments[0]["model"]
    machines, commits = (
        ", ".join(dict.fromkeys(found))
        for found in (
            [environment["machine"]["name"] for environment in environments],
            [environment["commit"] for environment in environments],
        )
    )
    return (
        f"Nats a token, mean over {len(run.seeds)} seeds ± half a 95% interval; rate {run.rate:g} "
        f"for all. Columns 2 to 4 after {settings['steps']} steps of batch "
        f"{settings['batch_size']} on {run.tasks[0]}, the others after as many on each of "
        f"{', '.join(run.tasks)} in turn. *Learned*: fall of the held-out loss. *Kept*: mean over "
        f"{', '.join(run.telling_probes)} of accuracy as a share of the base model's, on "
        f"{settings['probe_examples']} questions each. {model}, adapters on "
        f"{' and '.join(settings['target_modules'])}, {settings['dtype']}; {machines}; "
        f"commit {commits}; `secura experiment exp0 exp2 exp3 exp4 exp5`. All of it: "
        "[the report](../benchmarks/results/retention-small/report.md)."
    )


__all__ = ["is_there", "retention_table"]
