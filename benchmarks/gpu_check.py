"""One command for a machine with a GPU: are the kernels right there, and how fast.

    python -m benchmarks.gpu_check --out DIR

runs the tests marked ``gpu`` (split over processes), times whole layers against the frozen ones and
every op against the bytes it must move, and runs compute-sanitizer where that program exists. Each
step has processes of its own, so that what breaks one leaves the others. It writes
``gpu_check.json``, ``gpu_check.log`` and its processes' ``gpu_check_output.log`` to DIR as it goes,
within its time budget. It needs torch, triton and pytest: no network, no installation, no plugin.
Exit status: 0 all well, 1 something failed or was not reached, 2 no GPU. ``--dry_run`` goes through
the same steps on a CPU with tiny shapes and plain torch, to try the script itself; its figures mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import torch

from . import gpu_ops, gpu_rows, machine, measure
from .children import ROOT, Child, exit_when_asked, last_line

TESTS = "tests/kernels/test_gpu.py"
# A process of tests needs a context and a few tensors, these up to 24 GiB: one process has them all
TEST_GIB, MOST_PROCESSES = 11, 12
LARGE_TEST = "test_more_elements_than_32_bits_count"
# Shares of the time budget after which each step stops, whatever it has not reached
TESTS_UNTIL, LAYERS_UNTIL, KERNELS_UNTIL = 0.5, 0.75, 0.9
SANITIZER_S = 20.0
STARTS = 3
"""How often a step's process is started before the rows that it has not reached are given up."""
_POLL_S = 0.2
# [passed, failed, skipped] by pytest's -v lines
_OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", re.MULTILINE)


class Check:
    """The run: its clock, its log and what it found."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.start, self.scratch = args, time.monotonic(), scratch
        self.device = "cpu" if args.dry_run else "cuda"
        self.out: Path = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.log_path, self.output_path = (
            self.out / f"gpu_check{end}.log" for end in ("", "_output")
        )
        for path in (self.log_path, self.output_path):
            path.write_text("", encoding="utf-8")
        self.bad: list[str] = []
        self.result: dict[str, Any] = {
            "schema": 1,
            "benchmark": "gpu_check",
            "preset": "dry_run" if args.dry_run else "full",
            "command": shlex.join(["python", "-m", "benchmarks.gpu_check", *sys.argv[1:]]),
            "commit": args.commit or machine.commit(),
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
            "dtype": "bf16",
            "machine": machine.describe(torch.device(self.device)),
            "versions": machine.versions(),
            "settings": {"t": gpu_rows.TOKENS, "m": gpu_rows.RANK, "budget_s": args.budget_s},
            "ceilings": {},
            "rows": [],
            "tests": {},
            "sanitizer": {},
            "complete": False,
        }

    def left_s(self, share: float = 1.0) -> float:
        """Seconds until ``share`` of the budget is spent."""
        return share * self.args.budget_s - (time.monotonic() - self.start)

    def say(self, text: str) -> None:
        """Print a line and add it to the log."""
        line = f"[{time.monotonic() - self.start:6.1f} s] {text}"
        print(line, flush=True)
        with self.log_path.open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def fail(self, text: str) -> None:
        """Keep what makes the run fail, and say it."""
        self.bad.append(text)
        self.say(f"FAILED: {text}")

    def save(self) -> None:
        """Write the JSON as it stands, so that a run cut short leaves what it found."""
        text = json.dumps(self.result | {"failures": self.bad}, indent=1, ensure_ascii=False)
        partial = self.out / ".gpu_check.json"
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, self.out / "gpu_check.json")

    def keep_output(self, log: Path) -> str:
        """What a process wrote; it is added to the output that the run leaves."""
        text = log.read_text(encoding="utf-8", errors="replace")
        with self.output_path.open("a", encoding="utf-8") as kept:
            kept.write(f"==== {log.stem} ====\n{text}\n")
        return text

    def add(self, row: dict[str, Any]) -> None:
        """Keep one row; a status of "wrong" or "failed" fails the run."""
        if row["provider"] == gpu_rows.CEILINGS and row["status"] == "ok":
            measure.keep_higher(self.result["ceilings"], row["figures"])
            self.say(f"ceilings: {self.result['ceilings']}")
            return
        if "flop" in row["figures"]:
            row = gpu_rows.with_floor(row, self.result["ceilings"])
        if row["case"]["kind"] == "layer":
            row = gpu_rows.with_ratio(row, self.result["rows"])
        self.result["rows"].append(row)
        if row["status"] in ("wrong", "failed"):
            self.fail(f"{row['provider']} {row['case']}: {row['status']}: {row['note']}")
        elif row["status"] == "ok":
            self.say(shown(row))
        self.save()


def shown(row: dict[str, Any]) -> str:
    """A row of times on one line."""
    figures = row["figures"]
    parts = [f"{row['case'].get('projection', ''):8s}{row['provider']:44s}"]
    if "time_ms" in figures:
        parts.append(f"{figures['time_ms']['median']:8.4f} ms")
    if "floor_ms" in figures:
        parts.append(f"floor {figures['floor_ms']:7.4f} ms ({figures['floor_share']:4.0%})")
    if "ratio" in figures:
        parts.append(f"{figures['ratio']:6.3f} of the frozen layer")
    return "  ".join([*parts, row["note"]])


def run_tests(check: Check) -> None:
    """The gpu-marked tests, round robin over processes; what was not reached counts as failed."""
    # No configuration file: its options may ask for plugins that a bare machine lacks.
    pytest = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT)]
    pytest += ["--confcutdir", "tests/kernels", "-p", "no:cacheprovider", "-p", "no:warnings"]
    environment = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    listed = subprocess.run(
        [*pytest, "--collect-only", "-q", TESTS],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if listed.returncode or not names:
        check.fail(f"no test collected: {(listed.stdout + listed.stderr)[-2000:]}")
        return
    memory_mib = check.result["machine"].get("memory_mib", 0)
    parts = shared_out(names, processes(os.cpu_count() or 2, memory_mib))
    if check.args.dry_run:
        parts = [names[:20]]
    check.say(f"{sum(map(len, parts))} tests in {len(parts)} processes")
    logs = [check.scratch / f"tests_{index}.log" for index in range(len(parts))]
    with ExitStack() as stack:
        running = [
            stack.enter_context(Child([*pytest, "-v", "--tb=short", *part], log, environment))
            for part, log in zip(parts, logs, strict=True)
        ]
        statuses = [child.wait(check.left_s(TESTS_UNTIL)) for child in running]
        for child in running:
            child.ask_to_end()
    counts = {"passed": 0, "failed": 0, "skipped": 0, "error": 0}
    failed = []
    for status, log in zip(statuses, logs, strict=True):
        text = check.keep_output(log)
        for name, outcome in _OUTCOME.findall(text):
            counts[outcome.lower()] += 1
            if outcome in ("FAILED", "ERROR"):
                failed.append(name)
        if status and "FAILED" not in text:
            check.say(f"process {log.stem} ended with status {status}: {last_line(log)}")
    total = sum(map(len, parts))
    counts["not reached"] = max(0, total - sum(counts.values()))
    check.result["tests"] = counts | {"total": total, "failures": failed}
    check.say(f"tests: {counts}")
    for name in failed:
        check.fail(name)
    if counts["not reached"]:
        check.fail(f"{counts['not reached']} tests not reached (see gpu_check_output.log)")


def processes(cpus: int, memory_mib: int) -> int:
    """How many processes of tests a machine takes: 12 on an H200 with 16 cores."""
    return max(1, min(MOST_PROCESSES, cpus * 3 // 4, memory_mib // 1024 // TEST_GIB))


def shared_out(names: list[str], processes: int) -> list[list[str]]:
    """The tests of each process, round robin but for the large ones, which take turns."""
    large = [name for name in names if LARGE_TEST in name]
    small = [name for name in names if LARGE_TEST not in name]
    parts = [small[index::processes] for index in range(processes)]
    return [part for part in (parts[0] + large, *parts[1:]) if part]


def rows_command(step: str, path: Path, skip: int, dry_run: bool) -> list[str]:
    """What measures a step's rows from the ``skip``-th on into a file."""
    command = [sys.executable, "-m", "benchmarks.gpu_rows", step, "--rows", str(path)]
    return [*command, "--skip", str(skip), *["--dry_run"] * dry_run]


def run_rows(check: Check, step: str, until: float) -> None:
    """A step's rows, in a process that is started again after a row that ends it.

    Args:
        check: the run.
        step: ``"layers"`` or ``"kernels"``.
        until: the share of the budget after which nothing more is begun.
    """
    plan = gpu_rows.plan(step, check.args.dry_run)
    if not plan:
        check.say(f"{step}: no kernel runs on this CPU without TRITON_INTERPRET=1")
        return
    done, starts, note = 0, 0, "the time budget ended"
    while done < len(plan) and check.left_s(until) > 0:
        if starts == STARTS:
            note = f"lost: its process has broken {STARTS} times"
            check.fail(f"{step}: {len(plan) - done} rows {note}")
            break
        starts += 1
        path, log = (check.scratch / f"{step}_{starts}.{end}" for end in ("jsonl", "log"))
        path.touch()
        command = rows_command(step, path, done, check.args.dry_run)
        with Child(command, log) as child, path.open(encoding="utf-8") as rows:
            status = None
            while status is None and check.left_s(until) > 0:
                status = child.wait(_POLL_S)
                for row in new_rows(rows):
                    check.add(row)
                    done += 1
        check.keep_output(log)
        if status is None and done < len(plan):
            check.say(f"{step}: the time budget ended in {plan[done].provider}")
        if status not in (0, None, gpu_rows.LOST) and done < len(plan):
            reason = f"its process ended with status {status}: {last_line(log)}"
            check.add(plan[done].row(gpu_rows.Found("failed", reason, {})))
            done += 1
    for planned in plan[done:]:
        check.add(planned.row(gpu_rows.Found("skipped", note, {})))


def new_rows(rows: TextIO) -> Iterator[dict[str, Any]]:
    """The whole lines that a file has gained since it was last read."""
    while True:
        start = rows.tell()
        line = rows.readline()
        if not line.endswith("\n"):
            rows.seek(start)
            return
        yield json.loads(line)


def sum_up(check: Check) -> None:
    """A decoder block's layers under each norm against the frozen ones, and the targets."""
    for name, target in gpu_ops.TARGETS.items():
        times = {
            (row["provider"], row["case"]["projection"]): row["figures"]["time_ms"]["median"]
            for row in check.result["rows"]
            if row["case"]["kind"] == "layer" and row["status"] == "ok"
        }
        counts = {label: count for label, _, _, count in gpu_ops.PROJECTIONS}
        ours, frozen = (
            [count * times.get((provider, label), math.nan) for label, count in counts.items()]
            for provider in (name, gpu_ops.LAYERS[0])
        )
        ratio = sum(ours) / sum(frozen)
        if not math.isnan(ratio):
            verdict = f"to reach {target}: {'reached' if ratio <= target else 'NOT reached'}"
            found = gpu_rows.Found("ok", verdict, {"ratio": ratio, "target": target})
            check.add({"case": {"kind": "sum"}, "provider": name} | found._asdict())


def sanitize(check: Check) -> None:
    """memcheck and racecheck of every op on small shapes, side by side."""
    candidates = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
    tool = next((path for path in candidates if path and Path(path).exists()), None)
    if tool is None or check.left_s() < SANITIZER_S:
        missing = "missing" if tool is None else "not reached"
        check.result["sanitizer"] = {"status": missing}
        check.say(f"compute-sanitizer: {missing}")
        return
    small = [sys.executable, "-m", "benchmarks.gpu_rows", "small"]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    logs = {name: check.scratch / f"{name}.log" for name in ("memcheck", "racecheck")}
    with ExitStack() as stack:
        running = {}
        for name, log in logs.items():
            command = [tool, "--tool", name, "--error-exitcode", "99", *small]
            running[name] = stack.enter_context(Child(command, log, environment))
        statuses = {name: child.wait(check.left_s() - 10) for name, child in running.items()}
    for name, status in statuses.items():
        text = check.keep_output(logs[name])
        summary = [line for line in text.splitlines() if "SUMMARY" in line][-1:] or ["no summary"]
        found = {"status": status, "summary": summary[0].strip("= ")}
        check.result["sanitizer"][name] = found
        check.say(f"{name}: {found}")
        if status == 99:
            check.fail(f"{name}: {summary[0]}")
        elif status != 0:
            check.say(f"{name} could not be run to its end here: see gpu_check_output.log")


def go_through(check: Check) -> None:
    """Every step, in the order of what matters most."""
    if check.args.dry_run:
        check.say("dry run on a CPU: the times below mean nothing")
    check.say(f"{check.result['machine']} {check.result['versions']} {check.result['commit']}")
    run_tests(check)
    check.save()
    run_rows(check, "layers", LAYERS_UNTIL)
    sum_up(check)
    run_rows(check, "kernels", KERNELS_UNTIL)
    if check.args.dry_run:
        gpu_ops.every_op_once("cpu", "reference")
    else:
        sanitize(check)
    reached = all(row["status"] != "skipped" for row in check.result["rows"])
    check.result["complete"] = reached and not check.result["tests"].get("not reached")
    check.say(f"{'all well' if not check.bad else f'{len(check.bad)} failures'}: {check.out}")
    check.save()


def main(argv: list[str] | None = None) -> int:
    """Run the check; see the module's docstring for the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for what it writes")
    parser.add_argument("--budget_s", type=float, default=470.0, help="seconds for everything")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--dry_run", action="store_true", help="on a CPU, to try the script")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.dry_run:
        print("no GPU: torch sees no CUDA device, so there is nothing to check (try --dry_run)")
        return 2
    exit_when_asked()
    with tempfile.TemporaryDirectory() as scratch:
        check = Check(args, Path(scratch))
        go_through(check)
    return 1 if check.bad or not check.result["complete"] else 0


if __name__ == "__main__":
    sys.exit(main())
