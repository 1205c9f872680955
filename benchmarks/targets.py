"""What SECURA is to reach against its rivals, and how far a result is from it.

    python -m benchmarks.targets benchmarks/results/layer-h200.json

The targets are for an H200: the sum over Llama-3-8B's projections, bf16, T=8192, m=128, r=16, and
training steps with adapters on all linears. Other results are shown by the same ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .report import groups, headline_t, summed
from .schema import Result

SPACES = ("none", "channel", "activation", "weight")


class Target(NamedTuple):
    """``figure(ours) / figure(rival)`` is to be at most ``limit`` (at least, if ``at_least``)."""

    figure: str
    ours: str
    rival: str
    limit: float
    at_least: bool = False

    def reached(self, ratio: float) -> bool:
        """Whether a ratio meets it."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit


def layer_targets(dtype: str, impl: str) -> list[Target]:
    """Those of ``benchmarks.layer`` for SECURA's implementation ``impl``."""
    peft, dora = f"peft lora {dtype}", f"peft dora {dtype}"
    time = [
        Target("time", f"secura channel {impl}", peft, 0.85),
        Target("time", f"secura activation {impl}", peft, 0.90),
        Target("time", f"secura channel {impl}", "strong lora", 1.0),
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


def compare(targets: list[Target], figures: dict[str, dict[str, float]]) -> list[str]:
    """Lines of a table: every target, its ratio, whether it is reached; what is absent too."""
    lines = ["| figure | SECURA | against | target | ratio | |", "|---|---|---|---|---|---|"]
    for target in targets:
        sign = "≥" if target.at_least else "≤"
        start = f"| {target.figure} | {target.ours} | {target.rival} | {sign} {target.limit:g} × |"
        ours, rival = figures.get(target.ours), figures.get(target.rival)
        if ours is None or rival is None:
            lines.append(f"{start} | not measured |")
            continue
        ratio = ours[target.figure] / rival[target.figure]
        lines.append(
            f"{start} {ratio:.3f} × | {'reached' if target.reached(ratio) else 'missed'} |"
        )
    return lines


def of_layers(result: Result) -> list[str]:
    """The first model's targets at the headline T."""
    impl = "triton" if result.machine["device"] == "cuda" else "reference"
    for (_, t, _, _), providers in groups(result).items():
        if t == headline_t(result):
            sums: dict[str, Any] = {
                name: summed(rows)
                for name, rows in providers.items()
                if all(row.status == "ok" for row in rows)
            }
            figures = {
                name: {"time": one["time"]["both"]["median"], "saved": one["saved_mib"]}
                for name, one in sums.items()
            }
            return compare(layer_targets(result.dtype, impl), figures)
    return []


def of_models(result: Result) -> list[str]:
    """The targets of every setting."""
    lines = []
    for case in {str(row.case): row.case for row in result.rows}.values():
        figures = {
            row.provider: {"tokens/s": row.figures["tokens_per_s"]}
            for row in result.rows
            if row.case == case and row.status == "ok"
        }
        title = f"{case['model']}, adapters on {case['targets']}, {case['sequence']} × "
        title += f"{case['batch']} × {case['accumulate']}"
        title += ", checkpointing" if case["checkpointing"] else ""
        lines += [title, "", *compare(model_targets(result.dtype), figures), ""]
    return lines


TABLES: dict[str, Callable[[Result], list[str]]] = {"layer": of_layers, "model": of_models}


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="files of benchmarks.layer or .model")
    for path in parser.parse_args(arguments).results:
        result = Result.load(path)
        if result.benchmark not in TABLES:
            parser.error(f"{path}: no targets are set for {result.benchmark!r}")
        print("\n".join(TABLES[result.benchmark](result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
