"""What changed from one result to another, or how far one is from what SECURA is to reach.

    python -m benchmarks.compare OLD.json NEW.json    # of one benchmark, e.g. of two commits
    python -m benchmarks.compare RESULT.json          # of layer or model: against its rivals

Between two results every provider's figures are compared in every setting that both have; a ratio
is new over old. The targets of one result are for an H200: the sum over Llama-3-8B's projections,
bf16, T=8192, m=128, r=16, and training steps with adapters on all linears; other results are shown
by the same ratios. Times are of CUDA graphs where both have one, so that no ratio is the host's,
else eager; the line says which.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .markdown import table
from .registry import SPACES
from .schema import Result, Row
from .tables import groups, headline_t, setting, sums

TIMES = {"graph time": "both_graph", "eager time": "both"}
"""The figures a time is judged by and the phases they are of, the one preferred first."""
Figures = dict[str, dict[str, float]]
"""By provider, then by what was measured."""


class Target(NamedTuple):
    """``figure(ours) / figure(rival)`` is to be at most ``limit`` (at least, if ``at_least``)."""

    figure: str
    ours: str
    rival: str
    limit: float
    at_least: bool = False


class Verdict(NamedTuple):
    """A target, the figure it was judged by, and the ratio; None where it was not measured."""

    target: Target
    figure: str
    ratio: float | None

    @property
    def excess(self) -> float:
        """How many times over its limit the ratio is (under it, where that is a least); ≤ 1 meets.

        0 where it was not measured.
        """
        if self.ratio is None:
            return 0.0
        limit = self.target.limit
        return limit / self.ratio if self.target.at_least else self.ratio / limit

    def cells(self) -> list[str]:
        """Its row of a table of :data:`HEADS`."""
        target = self.target
        limit = f"{'≥' if target.at_least else '≤'} {target.limit:g} ×"
        ratio = "" if self.ratio is None else f"{self.ratio:.3f} ×"
        word = "reached" if self.excess <= 1 else "missed"
        word = "not measured" if self.ratio is None else word
        return [self.figure, target.ours, target.rival, limit, ratio, word]


HEADS = ("figure", "SECURA", "against", "target", "ratio", "")


def targets(result: Result) -> list[Target]:
    """What SECURA is to reach in a result of ``layer`` or ``model``."""
    peft, dora = f"peft lora {result.dtype}", f"peft dora {result.dtype}"
    if result.benchmark == "model":
        return [Target("tokens/s", f"secura {space}", peft, 1.05, True) for space in SPACES]
    impl = "triton" if result.machine["device"] == "cuda" else "reference"
    channel, activation = (f"secura {space} {impl}" for space in ("channel", "activation"))
    found = [
        Target("time", channel, peft, 0.85),
        Target("time", activation, peft, 0.90),
        Target("time", channel, "strong lora", 0.95),
        Target("time", activation, "strong lora", 1.0),
        Target("saved", channel, peft, 0.1),
        Target("saved", activation, peft, 0.85),
    ]
    for rival, limit in ((dora, 0.7), ("strong dora", 0.9), ("released way", 0.4)):
        found += [Target("time", f"secura {space} {impl}", rival, limit) for space in SPACES]
    return found


def judge(target: Target, figures: Figures) -> Verdict:
    """A target by each provider's figures: ``graph time``, ``eager time``, ``saved``, …."""
    ours, rival = figures.get(target.ours, {}), figures.get(target.rival, {})
    for figure in TIMES if target.figure == "time" else (target.figure,):
        if figure in ours and figure in rival:
            return Verdict(target, figure, ours[figure] / rival[figure])
    return Verdict(target, target.figure, None)


def figures_of(result: Result) -> dict[str, Figures]:
    """The figures of what was reached in full, by setting; layers are summed over a block."""
    found: dict[str, Figures] = {}
    if result.benchmark == "layer":
        for (model, t, m, r), providers in groups(replace(result, rows=result.finished())).items():
            parts = ", ".join(row.case["projection"] for row in next(iter(providers.values())))
            found[f"{model}, T={t}, m={m}, r={r}: {parts}"] = {
                name: _of_layers(whole) for name, whole in sums(providers).items()
            }
        return found
    for row in result.rows:
        if row.status == "ok":
            title = setting(row.case) if result.benchmark == "model" else str(row.case)
            found.setdefault(title, {})[row.provider] = _of_row(row)
    return found


def _of_layers(whole: dict[str, Any]) -> dict[str, float]:
    times = {name: whole["time"].get(phase) for name, phase in TIMES.items()}
    found = {name: time["median"] for name, time in times.items() if time}
    return found | {"saved": whole["saved_mib"], "peak": whole["peak_mib"]}


def _of_row(row: Row) -> dict[str, float]:
    names = {"tokens_per_s": "tokens/s", "peak_mib": "peak", "saved_mib": "saved"}
    return {
        names.get(name, name): float(value["median"] if isinstance(value, dict) else value)
        for name, value in row.figures.items()
        if isinstance(value, int | float | dict)
    }


def judged(result: Result) -> dict[str, list[Verdict]]:
    """The targets by setting: of layers the first model's at the headline T."""
    found = figures_of(result)
    if result.benchmark == "layer":
        reached = replace(result, rows=result.finished())
        at = f", T={headline_t(reached)}, " if reached.rows else " "
        found = dict([(name, of) for name, of in found.items() if at in name][:1])
    return {name: [judge(one, of) for one in targets(result)] for name, of in found.items()}


def changes(old: Result, new: Result) -> str:
    """A table of every figure that both results have, and the ratio of new to old."""
    heads, lines = ["setting", "provider", "figure", old.commit, new.commit, "new / old"], []
    before = figures_of(old)
    for title, providers in figures_of(new).items():
        for provider, figures in providers.items():
            known = before.get(title, {}).get(provider, {})
            for name in figures.keys() & known.keys():
                ratio = f"{figures[name] / known[name]:.3f} ×" if known[name] else ""
                both = (f"{one[name]:.5g}" for one in (known, figures))
                lines.append([title, provider, name, *both, ratio])
    return table(heads, sorted(lines), 3)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="one or two files")
    paths = parser.parse_args(arguments).results
    try:
        results = [Result.load(path) for path in paths]
    except ValueError as error:
        parser.error(str(error))
    if len({result.benchmark for result in results}) > 1 or len(results) > 2:
        parser.error("give one result, or two of one benchmark")
    if len(results) == 2:
        print(changes(*results))
        return 0
    if results[0].benchmark not in ("layer", "model"):
        parser.error(f"no targets are set for {results[0].benchmark!r}")
    for title, verdicts in judged(results[0]).items():
        print(f"{title}\n\n{table(HEADS, [verdict.cells() for verdict in verdicts], 3)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
