"""The first minutes on a GPU: are the layers right, how far from frozen, and what to decide.

    python -m benchmarks.triage --out DIR [--budget_s 130] [--resume]

One process measures, after ``WARMERS`` others have compiled what it will run. It prints one JSON
line a question (:mod:`benchmarks.decisions`, :mod:`benchmarks.tiles`) and, while time lasts, one an
op beside its floor (:mod:`benchmarks.gpu_kernels`), keeps them in ``triage.json`` as they come, and
prints a table last. ``--resume`` asks only what has no answer there yet. ``--dry_run`` goes through
all of it on a CPU, in Triton's interpreter with tiny shapes: its figures mean nothing.
Exit status: 0 all asked
and answered, 1 not, 2 no GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import decisions, gpu_kernels, gpu_ops, tiles
from .asker import Asker, Question
from .children import Child, exit_when_asked
from .costs import allowed_ratio
from .machine import new_result
from .providers import excuse
from .schema import SPENT, Recorder, Row

WARMERS, WARM_S = 10, 50.0
LAYER = (8192, 4096, 4096, 128)
LOST = "the device does nothing more in this process"


def _op(kernel: gpu_kernels.Kernel, ceilings: dict[str, float], asker: Asker) -> dict[str, Any]:
    """An op's time, its floor by bytes and operations, and the share that is of it."""
    call = kernel.make()
    time_us = asker.us(call.run)
    if time_us is None:
        return {}
    floor_us = max(call.bytes / ceilings["copy_gb_s"] / 1e3, call.flop / ceilings[call.rate] / 1e6)
    return {"time_us": time_us, "floor_us": floor_us, "floor_share": floor_us / time_us}


def plan(asker: Asker, ceilings: dict[str, float], only: str = "") -> list[Question]:
    """Every question and every op, or those whose names begin with one of the parts of ``only``."""
    size = asker.size(*LAYER)
    ops = [
        Question(f"op: {kernel.name}", functools.partial(_op, kernel, ceilings))
        for kernel in gpu_kernels.kernels(size, str(asker.device), asker.dtype, "triton")
    ]
    parts = tuple(only.split(","))
    return [
        one
        for one in (*decisions.questions(), *tiles.questions(), *ops)
        if one.name.startswith(parts)
    ]


def warm(part: int, parts: int, only: str) -> None:
    """Run every ``parts``-th question once, so that its kernels are in Triton's cache."""
    asker = Asker("cuda", warming=True)
    for question in plan(asker, {}, only)[part::parts]:
        try:
            question.ask(asker)
        except Exception as error:  # it will be asked again, and its failure kept
            print(f"{question.name}: {error!r}"[:300], flush=True)


def warmed(out: Path, seconds: float, only: str) -> None:
    """Have other processes compile; none outlives its seconds."""
    end = time.monotonic() + seconds
    command = [sys.executable, "-m", "benchmarks.triage", "--out", str(out), "--only", only]
    children = [
        Child([*command, "--warm", f"{part}/{WARMERS}"], out / "warm.log")
        for part in range(WARMERS)
    ]
    try:
        for child in children:
            child.wait(end - time.monotonic())
    finally:
        for child in children:
            child.ask_to_end()
        for child in children:
            child.end()


def answer(question: Question, asker: Asker) -> Row:
    """A question's row."""
    row = Row({"question": question.name}, "triage")
    try:
        row.figures = question.ask(asker)
    except Exception as error:  # one question's failure must not end the others
        row.status, row.note = excuse(error)
        if is_lost(asker.device):
            row.note += f"; {LOST}"
    return row


def is_lost(device: torch.device) -> bool:
    """Whether an error has left the device useless to this process."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except Exception:
        return True
    return False


def begin_again(seconds: float) -> None:
    """Put a new process in the place of this one, whose device is lost, for the other questions."""
    kept = [word for word in sys.argv[1:] if word != "--resume"]
    again = ["-m", "benchmarks.triage", *kept, "--resume", "--budget_s", f"{seconds:.0f}"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *again])


def table(rows: list[Row], ceilings: dict[str, float]) -> list[str]:
    """The layers over the frozen one, beside what the ceilings allow, and what failed."""
    graphs = {
        row.case["question"].removeprefix("layer: "): row.figures
        for row in rows
        if row.case["question"].startswith("layer: ") and row.status == "ok"
    }
    frozen = graphs.get("frozen", {}).get("both_graph_us")
    lines = ["", f"{'layer at ' + str(LAYER):32s} graph µs  ratio  allowed  eager µs  saved MiB"]
    for name, figures in graphs.items():
        if not frozen or not figures.get("both_graph_us"):
            continue
        ratio = figures["both_graph_us"] / frozen
        allowed = allowed_ratio(name, LAYER, ceilings)
        lines.append(
            f"{name:32s} {figures['both_graph_us']:8.0f}  {ratio:5.3f}  "
            f"{'' if allowed is None else f'{allowed:.3f}':>7s}  "
            f"{figures['both_eager_us']:8.0f}  {figures['saved_mib']:9.1f}"
        )
    bad = [row for row in rows if row.status != "ok"]
    lines += [f"{row.status}: {row.case['question']}: {row.note}"[:300] for row in bad]
    return lines


def run(options: argparse.Namespace) -> int:
    """Ask; the exit status."""
    start = time.monotonic()
    asker = Asker("cpu" if options.dry_run else "cuda")
    preset = "dry_run" if options.dry_run else "full"
    result = new_result("triage", preset, asker.device, asker.dtype, {}, commit_name=options.commit)
    recorder = Recorder(result, options.out / "triage.json", resume=options.resume)
    result.rows = [row for row in result.rows if row.status == "ok" or LOST in row.note]
    print(json.dumps([result.machine, result.versions, result.commit]), flush=True)
    if not options.dry_run and not result.rows:
        warmed(options.out, min(WARM_S, options.budget_s / 2), options.only)
        print(f"compiled: {time.monotonic() - start:.0f} s", flush=True)
    result.ceilings = result.ceilings or gpu_ops.ceilings(asker.device.type, asker.dtype)
    print(json.dumps(result.ceilings), flush=True)
    known = {row.case["question"] for row in result.rows}
    for question in plan(asker, result.ceilings, options.only):
        if question.name in known:
            continue
        if time.monotonic() - start > options.budget_s:
            row = Row({"question": question.name}, "triage", "skipped", SPENT)
        else:
            row = answer(question, asker)
        recorder.add([row])
        if row.status != "skipped":
            shown = {key: _short(value) for key, value in row.figures.items()}
            at = f"{time.monotonic() - start:.0f} s"
            line = [question.name, row.status, row.note, at, shown]
            print(json.dumps(line, ensure_ascii=False), flush=True)
        if LOST in row.note:
            begin_again(options.budget_s - (time.monotonic() - start))
    recorder.close()
    print("\n".join(table(result.rows, result.ceilings)))
    return 0 if all(row.status == "ok" for row in result.rows) else 1


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; see the module's docstring for the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.triage", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for what it writes")
    parser.add_argument("--budget_s", type=float, default=130.0, help="nothing is begun later")
    parser.add_argument("--resume", action="store_true", help="ask what has no answer there yet")
    parser.add_argument("--only", default="", help="those that begin so: layer,host,tiles")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--dry_run", action="store_true", help="on a CPU, to try the script")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.dry_run:
        print("no GPU: torch sees no CUDA device, so there is nothing to measure (try --dry_run)")
        return 2
    exit_when_asked()
    if options.warm:
        part, _, parts = options.warm.partition("/")
        warm(int(part), int(parts), options.only)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
