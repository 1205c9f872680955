"""What SECURA is to reach against its rivals, and how far a result is from it.

    python -m benchmarks.targets benchmarks/results/layer-h200.json

The targets are for an H200: the sum over Llama-3-8B's projections, bf16, T=8192, m=128, r=16, and
training steps with adapters on all linears. Other results are shown by the same ratios. Times are
of CUDA graphs where both have one, so that no ratio is the host's, else eager; the line says which.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from .report import groups, headline_t, summed
from .schema import Result, Row

SPACES = ("none", "channel", "activation", "weight")
TIMES = {"graph time": "both_graph", "eager time": "both"}
"""The figures a time is judged by and the phases they are of, the one preferred first."""


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

    def line(self) -> str:
        """A line of :data:`HEADER`'s table."""
        target = self.target
        sign = "≥" if target.at_least else "≤"
        start = f"| {self.figure} | {target.ours} | {target.rival} | {sign} {target.limit:g} × |"
        if self.ratio is None:
            return f"{start} | not measured |"
        return f"{start} {self.ratio:.3f} × | {'reached' if self.excess <= 1 else 'missed'} |"


HEADER = ["| figure | SECURA | against | target | ratio | |", "|---|---|---|---|---|---|"]


def layer_targets(dtype: str, impl: str) -> list[Target]:
    """Those of ``benchmarks.layer`` for SECURA's implementation ``impl``."""
    peft, dora = f"peft lora {dtype}", f"peft dora {dtype}"
    time = [
        Target("time", f"secura channel {impl}", peft, 0.85),
        Target("time", f"secura activation {impl}", peft, 0.90),
        Target("time", f"secura channel {impl}", "strong lora", 0.95),
        Target("time", f"secura activation {impl}", "strong lora", 1.0),
    ]
    for rival, limit in ((dora, 0.7), ("strong dora", 0.9), ("released way", 0.4)):
        time += [Target("time", f"secura {space} {impl}", rival, limit) for space in SPACES]
    saved = [
        Target("saved", f"secura channel {impl}", peft, 0.1),
        Target("saved", f"secura activation {impl}", peft, 0.85),
    ]
    return time + saved


def model_targets(dtype: str) -> list[Target]:
    """Those of ``benchmarks.model``."""
    peft = f"peft lora {dtype}"
    return [Target("tokens/s", f"secura {space}", peft, 1.05, True) for space in SPACES]


def judge(target: Target, figures: dict[str, dict[str, float]]) -> Verdict:
    """A target by each provider's figures: ``graph time``, ``eager time``, ``saved``, …."""
    ours, rival = figures.get(target.ours, {}), figures.get(target.rival, {})
    for figure in TIMES if target.figure == "time" else (target.figure,):
        if figure in ours and figure in rival:
            return Verdict(target, figure, ours[figure] / rival[figure])
    return Verdict(target, target.figure, None)


def of_layers(result: Result) -> dict[str, list[Verdict]]:
    """The first model's targets at the headline T, over the projections that were reached."""
    impl = "triton" if result.machine["device"] == "cuda" else "reference"
    reached = replace(result, rows=result.finished())
    for (model, t, _, _), providers in groups(reached).items():
        if t == headline_t(reached):
            figures = {
                name: _figures(rows)
                for name, rows in providers.items()
                if all(row.status == "ok" for row in rows)
            }
            projections = [row.case["projection"] for row in next(iter(providers.values()))]
            title = f"{model}, T={t}: {', '.join(projections)}"
            targets = layer_targets(result.dtype, impl)
            return {title: [judge(target, figures) for target in targets]}
    return {}


def _figures(rows: list[Row]) -> dict[str, float]:
    sums = summed(rows)
    times = {
        name: sums["time"][phase]["median"]
        for name, phase in TIMES.items()
        if phase in sums["time"]
    }
    return times | {"saved": sums["saved_mib"]}


def of_models(result: Result) -> dict[str, list[Verdict]]:
    """The targets of every setting."""
    verdicts = {}
    for case in {str(row.case): row.case for row in result.rows}.values():
        figures = {
            row.provider: {"tokens/s": row.figures["tokens_per_s"]}
            for row in result.rows
            if row.case == case and row.status == "ok"
        }
        title = f"{case['model']}, adapters on {case['targets']}, {case['sequence']} × "
        title += f"{case['batch']} × {case['accumulate']}"
        title += ", checkpointing" if case["checkpointing"] else ""
        verdicts[title] = [judge(target, figures) for target in model_targets(result.dtype)]
    return verdicts


VERDICTS = {"layer": of_layers, "model": of_models}


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="files of benchmarks.layer or .model")
    for path in parser.parse_args(arguments).results:
        result = Result.load(path)
        if result.benchmark not in VERDICTS:
            parser.error(f"{path}: no targets are set for {result.benchmark!r}")
        for title, verdicts in VERDICTS[result.benchmark](result).items():
            print("\n".join([title, "", *HEADER, *(verdict.line() for verdict in verdicts), ""]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
