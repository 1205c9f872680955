"""The tests marked ``gpu`` within a time budget, the most telling first, then compute-sanitizer.

    python -m benchmarks.gpu_tests --out DIR [--budget_s 200] [--resume]

splits the tests over processes, each of which takes its share in the order of ``FIRST``; what was
not reached is listed, and counts as not passed. With seconds left, memcheck and racecheck run every
op on small shapes. ``gpu_tests.json`` holds a row a test, ``gpu_tests.log`` what pytest said.
``--resume`` runs what has not passed there yet. It needs torch, triton and pytest: no plugin.
``--dry_run`` goes through it on a CPU, where every test is skipped. Exit status: 0 all passed, 1
not, 2 no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from .children import Child, end_by, exit_when_asked, last_line
from .machine import ROOT
from .ops import every_op_once
from .schema import Recorder, Row, new_result
from .session import gpu_parser, lacks_gpu

TESTS = "tests/ops/test_gpu.py"
FIRST = (
    "test_layers_of_an_8b_model",
    "test_layer_op",
    "test_cuda_graph",
    "test_side_stream",
    "test_autocast",
    "test_compiles_whole",
    "test_same_bits_twice",
    "test_matches_oracle.*131, 67",
    "test_folded",
    "test_projection",
    "test_.*_memory",
)
LARGE = "test_more_elements_than_32_bits_count"
"""Takes up to 24 GiB of the GPU: run last, by one process alone."""
MOST_PROCESSES = 12
SANITIZER_S = 25.0
_OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", re.MULTILINE)
_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}


def pytest_command() -> list[str]:
    """pytest without a configuration file: its options may ask for plugins that are not there."""
    options = ["--confcutdir", "tests/ops", "-p", "no:cacheprovider", "-p", "no:warnings"]
    return [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), *options]


def collected() -> list[str]:
    """The names of the tests.

    Raises:
        RuntimeError: where pytest finds none.
    """
    found = subprocess.run(
        [*pytest_command(), "--collect-only", "-q", TESTS],
        cwd=ROOT,
        env=os.environ | _ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    names = [line for line in found.stdout.splitlines() if "::" in line]
    if found.returncode or not names:
        raise RuntimeError(f"no test collected: {(found.stdout + found.stderr)[-2000:]}")
    return names


def ordered(names: Sequence[str]) -> list[str]:
    """The tests in the order of ``FIRST``, the others behind, the large ones last."""

    def place(name: str) -> int:
        if LARGE in name:
            return len(FIRST) + 1
        found = (index for index, part in enumerate(FIRST) if re.search(part, name))
        return next(found, len(FIRST))

    return sorted(names, key=place)


def shared_out(names: Sequence[str], processes: int) -> list[list[str]]:
    """The tests of each process, dealt in turns."""
    parts = [list(names[index::processes]) for index in range(processes)]
    return [part for part in parts if part]


def run_tests(names: Sequence[str], processes: int, until: float, log: Path) -> list[Row]:
    """A row a test; those not reached by the ``time.monotonic()`` ``until`` are skipped.

    Args:
        names: the tests.
        processes: how many run side by side.
        until: when the processes are ended.
        log: the file that gains what they said.
    """
    parts = shared_out(names, processes)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        logs = [Path(folder) / f"{index}.log" for index in range(len(parts))]
        children = [
            stack.enter_context(
                Child([*pytest_command(), "-v", "--tb=short", *part], own, _ENVIRONMENT)
            )
            for part, own in zip(parts, logs, strict=True)
        ]
        end_by(children, until)
        texts = [own.read_text(encoding="utf-8", errors="replace") for own in logs]
        ends = {
            name: last_line(own) for part, own in zip(parts, logs, strict=True) for name in part
        }
    with log.open("a", encoding="utf-8") as kept:
        kept.write("\n".join(texts))
    outcomes = {name: what for text in texts for name, what in _OUTCOME.findall(text)}
    return [_row(name, outcomes.get(name), ends[name]) for name in names]


def _row(name: str, outcome: str | None, end: str) -> Row:
    test = name.partition("::")[2]
    if outcome is None:
        note = f"not reached; its process said last: {end}"
        return Row({"test": test}, "pytest", "skipped", note)
    status = {"PASSED": "ok", "SKIPPED": "missing"}.get(outcome, "failed")
    return Row({"test": test}, "pytest", status, "" if outcome == "PASSED" else outcome.lower())


def sanitized(seconds: float, log: Path) -> list[Row]:
    """memcheck and racecheck of every op on small shapes, side by side."""
    candidates = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
    tool = next((path for path in candidates if path and Path(path).exists()), None)
    cases = {name: {"sanitizer": name} for name in ("memcheck", "racecheck")}
    if tool is None or seconds < SANITIZER_S:
        status, why = ("missing", "no such program") if tool is None else ("skipped", "no time")
        return [Row(case, "compute-sanitizer", status, why) for case in cases.values()]
    small = [sys.executable, "-m", "benchmarks.gpu_tests", "--out", os.devnull, "--small"]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    end, rows = time.monotonic() + seconds, []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        running = {}
        for name in cases:
            command = [tool, "--tool", name, "--error-exitcode", "99", *small]
            child = stack.enter_context(Child(command, Path(folder) / name, environment))
            running[name] = child
        for name, child in running.items():
            code = child.wait(end - time.monotonic())
            text = (Path(folder) / name).read_text(encoding="utf-8", errors="replace")
            with log.open("a", encoding="utf-8") as kept:
                kept.write(f"==== {name} ====\n{text}\n")
            said = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
            word = "ok" if code == 0 else "skipped" if code is None else "failed"
            note = said[-1] if said else f"status {code}, no summary"
            rows.append(Row(cases[name], "compute-sanitizer", word, note))
    return rows


def run(options: argparse.Namespace) -> int:
    """Run; the exit status."""
    end = time.monotonic() + options.budget_s
    device = torch.device("cpu" if options.dry_run else "cuda")
    preset, log = "dry_run" if options.dry_run else "full", options.out / "gpu_tests.log"
    result = new_result("gpu_tests", preset, device, torch.bfloat16, {}, options.commit)
    recorder = Recorder(result, options.out / "gpu_tests.json", resume=options.resume)
    result.rows = [row for row in result.rows if row.status == "ok"]
    passed = {row.case.get("test") for row in result.rows}
    names = [name for name in ordered(collected()) if name.partition("::")[2] not in passed]
    if options.dry_run:
        names = names[:20]
    small, large = ([n for n in names if (LARGE in n) is wanted] for wanted in (False, True))
    processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) * 3 // 4))
    print(f"{len(names)} tests in {processes} processes", flush=True)
    recorder.add(run_tests(small, processes, end - SANITIZER_S, log))
    if large:
        recorder.add(run_tests(large, 1, end - SANITIZER_S, log))
    done = {row.case.get("sanitizer") for row in result.rows}
    if not options.dry_run and "memcheck" not in done:
        recorder.add(sanitized(end - time.monotonic(), log))
    recorder.close()
    counts: dict[str, int] = {}
    for row in result.rows:
        counts[row.status] = counts.get(row.status, 0) + 1
        if row.status not in ("ok", "missing") or "sanitizer" in row.case:
            print(f"{row.status}: {row.case} {row.note}"[:300])
    print(counts)
    return 0 if set(counts) <= {"ok", "missing"} else 1


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; see the module's docstring for the exit status."""
    flags = gpu_parser("gpu_tests", __doc__, 200.0)
    flags.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    options = flags.parse_args(arguments)
    if options.small:
        every_op_once()
        return 0
    if lacks_gpu(options):
        return 2
    exit_when_asked()
    options.out.mkdir(parents=True, exist_ok=True)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
