"""The rate that weights give (``secura.learning_rate``) beside what was learned at those tried.

    python -m benchmarks.rates --out benchmarks/results/rates.json

``quick`` adapts the packaged models as the committed cells of the retention experiment did (one
task, 128 steps), and sets the rate of each beside what they learned at theirs; ``tiny`` a random
model, for tests.
"""

from __future__ import annotations

from statistics import fmean, geometric_mean
from typing import Any

import torch
from peft import get_peft_model

import secura
from secura.layers import secura_layers
from secura.rates import SHARE

from .assets import load_model
from .machine import ROOT
from .markdown import table
from .retention.cells import Cell
from .retention.methods import CUR_RANK, get_method
from .retention.record import read_all
from .retention.summary import kl_of, learned
from .schema import Result, Row
from .session import Session, command, parser
from .shapes import MLP
from .tables import provenance
from .training import packaged_or_tiny

CELLS = ROOT / "benchmarks" / "results" / "retention"
STEPS, FIRST = 128, "smollm2-135m"
_ADAPTERS = ("anchored-self", "core-u", "cabr", "secura-weight")
_VARIED = {"rank", "decay", "kappa"}

Place = tuple[str, str, str, str]
"""Stage, model, place and method."""
Found = dict[Place, dict[str, list[float]]]
"""Nats learned and the drift (KL) at each rate, and how many seeds they are the mean of."""


def tried() -> Found:
    """What the committed cells learned at each rate, and how far they drifted.

    Of each adapter in the stage that ran it most; the mean over the seeds that ran at all rates.
    What the first model ran at one rate alone tells nothing, and is left out.
    """
    runs: dict[Place, dict[str, dict[int, tuple[float, float]]]] = {}
    for record in read_all(CELLS):
        cell = record.cell
        if record.status == "done" and _counts(cell):
            place = record.stage, record.settings.model, cell.targets, cell.method
            ends = runs.setdefault(place, {}).setdefault(f"{cell.rate:g}", {})
            ends[cell.seed] = learned(record.end, record.task), kl_of()(record.end)
    most: dict[tuple[str, ...], Place] = {}
    for place in sorted(runs):
        before = most.setdefault(place[1:], place)
        if sum(map(len, runs[place].values())) > sum(map(len, runs[before].values())):
            most[place[1:]] = place
    found: Found = {}
    for place in most.values():
        rates = runs[place]
        seeds = set.intersection(*map(set, rates.values()))
        if seeds and (len(rates) > 1 or place[1] != FIRST):
            found[place] = {}
            for rate in sorted(rates, key=float):
                nats, drifts = zip(*(rates[rate][seed] for seed in seeds), strict=True)
                found[place][rate] = [fmean(nats), geometric_mean(drifts), len(seeds)]
    return found


def _counts(cell: Cell) -> bool:
    """Whether a cell is of one task, and of an adapter that the rate is compared for."""
    base, _, text = cell.method.partition("@")
    changed = {part.partition("=")[0] for part in text.split(",") if part}
    plain = base in _ADAPTERS and changed <= _VARIED and changed != {"decay"}
    return plain and len(cell.tasks) == 1 and cell.steps == STEPS


def run(options: Any) -> Result:
    """Everything the command line asked for."""
    session = Session("rates", options, {"steps": STEPS, "share": SHARE})
    if options.preset == "tiny":
        model = packaged_or_tiny("tiny", torch.float32)
        config = secura.SecuraConfig(core="u", norm="none", r=8, target_modules=list(MLP))
        session.recorder.add([_row(("", "tiny", "mlp", "core-u@rank=8"), model, config, {})])
        session.recorder.close()
        return session.result
    loaded: dict[str, Any] = {}
    for place, at in sorted(tried().items(), key=lambda pair: pair[0][1:]):
        _, name, targets, method = place
        if name not in loaded:
            loaded = {name: load_model(name, torch.float32)[0]}
        config = get_method(method).make_config(targets, options.seed)
        session.recorder.add([_row(place, loaded[name], config, at)])
    session.recorder.close()
    return session.result


def _row(place: Place, model: Any, config: Any, at: dict[str, list[float]]) -> Row:
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    rate, sigmas = secura.learning_rate(adapted, STEPS), _sigmas(adapted)
    adapted.unload()
    case = dict(zip(("stage", "model", "targets", "method"), place, strict=True))
    return Row(case, "weights", figures={"rate": rate, "sigma": sigmas, "tried": at})


def _sigmas(adapted: Any) -> dict[str, float]:
    """The root mean square of the weights' entries, by the layers' last names."""
    found: dict[str, list[float]] = {}
    for name, layer in secura_layers(adapted).items():
        square = layer.get_base_layer().weight.detach().square().mean()
        found.setdefault(name.rpartition(".")[2], []).append(float(square.sqrt()))
    return {kind: round(fmean(values), 4) for kind, values in found.items()}


def rates_table(result: Result) -> str:
    """The rates of the weights, and what was learned at those that were tried."""
    lines = []
    for row in result.rows:
        at, title = row.figures["tried"], get_method(row.case["method"]).title
        title += "" if "rank=" in title else f", rank={CUR_RANK}"
        best = max(nats for nats, *_ in at.values()) if len(at) > 1 else None
        shown = [
            f"{rate}: {'**' * (nats == best)}{nats:.3f}{'**' * (nats == best)} at {drift:.3f}"
            for rate, (nats, drift, _) in at.items()
        ]
        seeds = {str(count) for *_, count in at.values()}
        where = [row.case["model"], title, row.case["targets"]]
        ends = {f"{of(row.figures['sigma'].values()):.2g}": None for of in (min, max)}
        own = [" to ".join(ends), f"{row.figures['rate']:g}", ", ".join(shown), "".join(seeds)]
        lines.append([*where, *own])
    head = ["model", "adapter", "on", "σ", "rate of the weights"]
    head += ["learned, at a drift of, by rate run", "seeds"]
    caption = (
        f"Nats a token of GSM8K's held-out loss after {STEPS} steps, and KL on old text (geometric "
        "mean over its kinds), means over the seeds that ran at all rates of a row; bold: the most "
        "of it. σ: root mean square of the weights' entries, over the kinds of layers. "
        f"{provenance(result)}."
    )
    return f"{table(head, lines, 3)}\n\n{caption}\n"


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    flags = parser(__doc__ or "", ("quick", "tiny"))
    return command(flags, arguments, run, rates_table)


if __name__ == "__main__":
    raise SystemExit(main())
