"""The rate that weights give (``secura.learning_rate``) beside what was learned at those tried.

    python -m benchmarks.rates --out benchmarks/results/rates.json

``quick`` adapts the packaged models as the committed cells of the retention experiment did (one
task, 128 steps), and sets the rate of each beside what they learned at theirs; ``tiny`` a random
model, for tests.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean, geometric_mean
from typing import Any

import torch
from peft import get_peft_model

import secura
from secura.rates import SHARE

from .assets import load_model
from .machine import ROOT
from .markdown import table
from .retention.cells import Cell
from .retention.methods import CUR_RANK, METHODS, get_method
from .retention.record import read_all
from .retention.summary import kl_of, learned
from .schema import Result, Row
from .session import Session, command, parser
from .shapes import MLP
from .tables import provenance
from .training import packaged_or_tiny

CELLS = ROOT / "benchmarks" / "results" / "retention"
STEPS = 128
_ADAPTERS = ("anchored-self", "core-u", "cabr", "secura-weight")
_HELD = {"decay", "kappa"}
"""Variations that a rate does not go by; of theirs the one counts that learned most."""

Found = dict[tuple[str, str, str], dict[str, list[float]]]
"""Nats learned and the drift (KL) at each rate, by model, place and adapter."""


def tried() -> Found:
    """What the committed cells learned, the mean over seeds, and how far they drifted."""
    runs: dict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)
    for record in read_all(CELLS):
        cell = record.cell
        if record.status == "done" and _counts(cell):
            key = (record.settings.model, cell.targets, _plain(cell.method), cell.rate, cell.method)
            drift = kl_of()(record.end)
            runs[key].append((learned(record.end, record.task), drift))
    found: Found = defaultdict(dict)
    for (model, targets, adapter, rate, _), ends in sorted(runs.items()):
        nats, drifts = zip(*ends, strict=True)
        at, own = found[model, targets, adapter], [fmean(nats), geometric_mean(drifts)]
        at[f"{rate:g}"] = max(at.get(f"{rate:g}", own), own)
    return found


def _counts(cell: Cell) -> bool:
    """Whether a cell is of one task, and of an adapter that the rate is compared for."""
    base, _, text = cell.method.partition("@")
    changed = {part.partition("=")[0] for part in text.split(",") if part}
    plain = base in _ADAPTERS and changed <= _HELD | {"rank"}
    return plain and len(cell.tasks) == 1 and cell.steps == STEPS


def _plain(method: str) -> str:
    """A method without how it is held."""
    base, _, text = method.partition("@")
    kept = [part for part in text.split(",") if part.partition("=")[0] == "rank"]
    return "@".join([base, *kept])


def run(options: Any) -> Result:
    """Everything the command line asked for."""
    session = Session("rates", options, {"steps": STEPS, "share": SHARE})
    if options.preset == "tiny":
        model = packaged_or_tiny("tiny", torch.float32)
        config = secura.SecuraConfig(core="u", norm="none", r=8, target_modules=list(MLP))
        session.recorder.add([_row(("tiny", "mlp", "core-u@rank=8"), model, config, {})])
        session.recorder.close()
        return session.result
    loaded: dict[str, Any] = {}
    for place, at in tried().items():
        name, targets, method = place
        if name not in loaded:
            loaded = {name: load_model(name, torch.float32)[0]}
        config = get_method(method).make_config(targets, options.seed)
        session.recorder.add([_row(place, loaded[name], config, at)])
    session.recorder.close()
    return session.result


def _row(place: tuple[str, str, str], model: Any, config: Any, at: dict[str, list[float]]) -> Row:
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    rate = secura.learning_rate(adapted, STEPS)
    adapted.unload()
    case = dict(zip(("model", "targets", "method"), place, strict=True))
    return Row(case, "weights", figures={"rate": rate, "tried": at})


def rates_table(result: Result) -> str:
    """The rates of the weights, and what was learned at those that were tried."""
    lines = []
    for row in result.rows:
        base, _, text = row.case["method"].partition("@rank=")
        adapter = f"{METHODS[base].title}, r = {text or CUR_RANK}"
        at = row.figures["tried"]
        best = max((nats for nats, _ in at.values()), default=0.0)
        shown = [
            f"{rate}: {'**' * (nats == best)}{nats:.3f}{'**' * (nats == best)} at {drift:.3f}"
            for rate, (nats, drift) in sorted(at.items(), key=lambda pair: float(pair[0]))
        ]
        where = [row.case["model"], adapter, row.case["targets"]]
        lines.append([*where, f"{row.figures['rate']:g}", ", ".join(shown)])
    head = ["model", "adapter", "on", "rate of the weights", "learned, at a drift of, by rate run"]
    caption = (
        f"Nats a token of GSM8K's held-out loss after {STEPS} steps, and KL on old text (geometric "
        "mean over its kinds), means over the seeds of the retention experiment's cells, of "
        f"several decays the one that learned most; bold: the most of a row. {provenance(result)}."
    )
    return f"{table(head, lines, 3)}\n\n{caption}\n"


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    flags = parser(__doc__ or "", ("quick", "tiny"))
    return command(flags, arguments, run, rates_table)


if __name__ == "__main__":
    raise SystemExit(main())
