"""The first session on a GPU, in one command and within one time budget.

    python -m benchmarks.first_gpu --out DIR [--budget_s 600]

runs ``gpu_check`` (are the kernels right, and how far from their floors), ``layer`` (SECURA against
its rivals on Llama-3-8B's projections) and, if time is left, one case of ``model``; each in a
process of its own, which has a share of the time and whose failure leaves the others. Every step
leaves ``NAME.json`` as far as it came and ``NAME_output.log`` in DIR. Last it prints what failed
and the ratios furthest from ``benchmarks.targets``. Exit status: 0 all well, 1 something failed or
was not reached.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .children import GRACE_S, Child, exit_when_asked, last_line
from .schema import Result
from .targets import VERDICTS, Verdict

LAYER_PROVIDERS = (
    "frozen",
    "secura none triton",
    "secura channel triton",
    "secura activation triton",
    "secura weight triton",
    "strong lora",
    "strong dora",
    "peft lora bf16",
    "peft dora bf16",
    "released way",
)
MODEL_PROVIDERS = ("secura channel", "secura activation", "peft lora bf16", "strong lora")
SUMMARY_S = 5.0
"""Seconds kept for the summary."""
SHOWN = 10
"""Lines of each part of the summary."""


@dataclass(frozen=True)
class Step:
    """A command with a share of the time.

    Attributes:
        name: of its ``.json`` and ``_output.log``.
        command: to which the time flag and its seconds are added.
        time_flag: how the command is told its own budget.
        most_s: seconds it has at most.
        least_s: seconds without which it is not begun.
        beyond_s: of its seconds, those that its own clock does not see: imports, the last case.
        again: flags to start it with once more after it broke, or None not to.
    """

    name: str
    command: Sequence[str]
    time_flag: str
    most_s: float
    least_s: float
    beyond_s: float
    again: Sequence[str] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a step: a word on it, and whether that is well."""

    name: str
    text: str
    well: bool


def steps(out: Path, commit: str | None) -> list[Step]:
    """The session's steps, the most important first."""

    def module(name: str, *flags: str) -> list[str]:
        command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
        return command + (["--commit", commit] if commit else [])

    def benchmark(name: str, providers: Sequence[str], *flags: str) -> list[str]:
        shared = ["--preset", "llama3-8b", "--device", "cuda", "--out", str(out / f"{name}.json")]
        return module(name, *shared, "--providers", ",".join(providers), *flags)

    layer = benchmark("layer", LAYER_PROVIDERS, "--no-compile")
    model = benchmark("model", MODEL_PROVIDERS, "--cases", "1", "--steps", "3")
    return [
        Step("gpu_check", module("gpu_check", "--out", str(out)), "--budget_s", 300, 60, 10),
        Step("layer", layer, "--max_seconds", 170, 60, 25, again=["--resume"]),
        Step("model", model, "--max_seconds", 170, 90, 25),
    ]


def run(
    todo: Sequence[Step], out: Path, budget_s: float, say: Callable[[str], None]
) -> list[Outcome]:
    """Run the steps one after the other; none outlives the budget.

    Args:
        todo: the steps.
        out: the folder for their logs.
        budget_s: seconds for all.
        say: is told what begins and what came of it.
    """
    end = time.monotonic() + budget_s - SUMMARY_S
    outcomes = []
    for step in todo:
        outcome = _run_step(step, out / f"{step.name}_output.log", end, say)
        say(f"{step.name}: {outcome.text}")
        outcomes.append(outcome)
    return outcomes


def _run_step(step: Step, log: Path, end: float, say: Callable[[str], None]) -> Outcome:
    log.write_text("", encoding="utf-8")
    # Ending a process that does not heed takes a while itself.
    end = min(end, time.monotonic() + step.most_s) - GRACE_S
    if end - time.monotonic() < step.least_s:
        left = f"{max(0.0, end - time.monotonic()):.0f} s left"
        return Outcome(step.name, f"not begun: {left}, it takes {step.least_s:g} s", False)
    status = _attempt(step, step.command, log, end, say)
    breaks = status not in (0, None)
    if breaks and step.again is not None and end - time.monotonic() >= step.least_s:
        say(f"{step.name}: ended with status {status}, {last_line(log)}; once more")
        status = _attempt(step, [*step.command, *step.again], log, end, say)
    if status == 0:
        return Outcome(step.name, "done", True)
    what = "stopped when its time was spent" if status is None else f"ended with status {status}"
    return Outcome(step.name, f"{what}; last it said: {last_line(log)}", False)


def _attempt(
    step: Step, command: Sequence[str], log: Path, end: float, say: Callable[[str], None]
) -> int | None:
    """The exit status of a step's command, or None where it was stopped."""
    seconds = end - time.monotonic()
    say(f"{step.name}: begins, {seconds:.0f} s at most")
    with Child([*command, step.time_flag, f"{seconds - step.beyond_s:.0f}"], log) as child:
        return child.wait(seconds)


def summary(outcomes: Sequence[Outcome], out: Path) -> tuple[list[str], bool]:
    """What became of the steps, what failed in them, the ratios furthest from their targets.

    Args:
        outcomes: of the steps.
        out: the folder of their results.

    Returns:
        Lines to print, and whether all is well.
    """
    failures, sums = _of_check(out / "gpu_check.json")
    verdicts: list[Verdict] = []
    judged_on = []
    for name, judged in VERDICTS.items():
        path = out / f"{name}.json"
        if not path.exists():
            failures.append(f"{name}: left no result")
            continue
        result = Result.load(path)
        failures += _at_most(
            [
                f"{name}: {row.provider} {row.case.get('projection', '')}: {row.status}, {row.note}"
                for row in result.rows
                if row.status != "ok"
            ]
        )
        if not result.complete:
            failures.append(f"{name}: incomplete")
        for title, found in judged(result).items():
            judged_on.append(f"{name}: {title}")
            verdicts += found
    worst = sorted((one for one in verdicts if one.ratio), key=lambda one: -one.excess)
    lines = ["", "== steps =="]
    lines += [f"{'ok ' if one.well else 'BAD'} {one.name}: {one.text}" for one in outcomes]
    lines += ["", "== failures ==", *failures]
    lines += ["", "== gpu_check: tests, and a block's layers over the frozen ones ==", *sums]
    lines += ["", "== furthest from benchmarks.targets ==", *judged_on]
    lines += [one.line() for one in worst[:SHOWN]]
    return lines, not failures and all(one.well for one in outcomes)


def _of_check(path: Path) -> tuple[list[str], list[str]]:
    """What failed in ``gpu_check``, and its sums against their targets."""
    if not path.exists():
        return ["gpu_check: left no result"], []
    result = json.loads(path.read_text(encoding="utf-8"))
    failures = _at_most([f"gpu_check: {failure}"[:400] for failure in result["failures"]])
    skipped = [row["provider"] for row in result["rows"] if row["status"] == "skipped"]
    if skipped:
        failures.append(f"gpu_check: {len(skipped)} rows not reached: {', '.join(skipped)[:300]}")
    if not result["complete"]:
        failures.append("gpu_check: incomplete")
    sums = [
        f"{row['provider']}: {row['figures']['ratio']:.3f}, {row['note']}"
        for row in result["rows"]
        if row["case"]["kind"] == "sum"
    ]
    counts = {name: value for name, value in result["tests"].items() if name != "failures"}
    return failures, [f"tests: {counts}", f"sanitizer: {result['sanitizer']}", *sums]


def _at_most(lines: list[str]) -> list[str]:
    more = len(lines) - SHOWN
    return lines[:SHOWN] + ([f"… and {more} more"] if more > 0 else [])


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; see the module's docstring for the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.first_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--budget_s", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--commit", help="what to record where there is no git")
    options = parser.parse_args(arguments)
    exit_when_asked()
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)

    todo = steps(options.out.resolve(), options.commit)
    for step in todo:
        (options.out / f"{step.name}.json").unlink(missing_ok=True)
    outcomes = run(todo, options.out, options.budget_s, say)
    lines, well = summary(outcomes, options.out)
    print("\n".join(lines))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
