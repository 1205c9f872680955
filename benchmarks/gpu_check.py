"""One command for a machine with a GPU: are the kernels right there, and how fast.

    python -m benchmarks.gpu_check --out DIR

runs the tests marked ``gpu`` (split over processes), times every op against the bytes it must move
and whole layers against the frozen ones, runs compute-sanitizer where that program exists, and
writes ``gpu_check.json`` and ``gpu_check.log`` to DIR within its time budget. It needs torch,
triton and pytest: no network, no installation, no plugin. Exit status: 0 all well, 1 something
failed or was not reached, 2 no GPU. ``--dry_run`` goes through the same steps on a CPU with tiny
shapes and plain torch, to try the script itself; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import gpu_ops, machine

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/kernels/test_gpu.py"
TOKENS, RANK = 8192, 128
ERROR_LIMIT = 0.05
# Shares of the time budget after which each step stops, whatever it has not reached
TESTS_UNTIL, TIMES_UNTIL = 0.5, 0.75
# [passed, failed, skipped] by pytest's -v lines
_OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", re.MULTILINE)


class Check:
    """The run: its clock, its log and what it found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.monotonic()
        self.device = "cpu" if args.dry_run else "cuda"
        self.out: Path = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.log_path = self.out / "gpu_check.log"
        self.log_path.write_text("", encoding="utf-8")
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
            "settings": {"t": TOKENS, "m": RANK, "budget_s": args.budget_s},
            "ceilings": {},
            "rows": [],
            "tests": {},
            "sanitizer": {},
            "complete": False,
        }

    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def left_s(self, share: float = 1.0) -> float:
        """Seconds until ``share`` of the budget is spent."""
        return share * self.args.budget_s - self.elapsed_s()

    def say(self, text: str) -> None:
        """Print a line and add it to the log."""
        line = f"[{self.elapsed_s():6.1f} s] {text}"
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
        (self.out / "gpu_check.json").write_text(text + "\n", encoding="utf-8")

    def row(self, case: dict, provider: str, status: str, note: str = "", **figures: Any) -> None:
        """Keep one row of the result; a ``status`` of "wrong" or "failed" fails the run."""
        row = {"case": case, "provider": provider, "status": status, "note": note}
        self.result["rows"].append(row | {"figures": figures})
        if status in ("wrong", "failed"):
            self.fail(f"{provider} {case}: {status}: {note}")


def run_tests(check: Check) -> None:
    """The gpu-marked tests, round robin over processes; what was not reached counts as failed."""
    pytest = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT)]
    pytest += ["--confcutdir", "tests/kernels", "-p", "no:cacheprovider", "-p", "no:warnings"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    listed = subprocess.run(
        [*pytest, "--collect-only", "-q", TESTS],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if listed.returncode or not names:
        check.fail(f"no test collected: {(listed.stdout + listed.stderr)[-2000:]}")
        return
    memory_gib = check.result["machine"].get("memory_mib", 0) // 1024
    processes = max(1, min(8, (os.cpu_count() or 2) // 2, memory_gib // 16))
    if check.args.dry_run:
        names, processes = names[:20], 1
    check.say(f"{len(names)} tests in {processes} processes")
    running = []
    for index in range(processes):
        path = check.out / f"tests_{index}.log"
        with path.open("w", encoding="utf-8") as log:
            command = [*pytest, "-v", "--tb=short", *names[index::processes]]
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        running.append((child, path))
    counts = {"passed": 0, "failed": 0, "skipped": 0, "error": 0}
    failed = []
    for child, path in running:
        try:
            child.wait(timeout=max(1.0, check.left_s(TESTS_UNTIL)))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        text = path.read_text(encoding="utf-8", errors="replace")
        for name, outcome in _OUTCOME.findall(text):
            counts[outcome.lower()] += 1
            if outcome in ("FAILED", "ERROR"):
                failed.append(name)
        if child.returncode and "FAILED" not in text:
            tail = text.strip().splitlines()[-1:] or ["no output"]
            check.say(f"process {path.stem} ended with status {child.returncode}: {tail[0]}")
    counts["not reached"] = max(0, len(names) - sum(counts.values()))
    check.result["tests"] = counts | {"total": len(names), "failures": failed}
    check.say(f"tests: {counts}")
    for name in failed:
        check.fail(name)
    if counts["not reached"]:
        check.fail(f"{counts['not reached']} tests not reached (see {check.out}/tests_*.log)")


def time_kernels(check: Check, dtype: torch.dtype, impl: str) -> None:
    """Each op against its bytes over the copy bandwidth."""
    from secura_kernels.dispatch import interpreting

    if check.device == "cpu" and not interpreting():
        check.say("kernels: not timed, no kernel runs on this CPU without TRITON_INTERPRET=1")
        return
    size = gpu_ops.Size(TOKENS, 4096, 4096, RANK)
    if check.args.dry_run:
        size = gpu_ops.Size(16, 32, 32, 4)
    bandwidth = check.result["ceilings"]["copy_gb_s"]
    check.say(f"{'kernel':34s} {'ms':>8s} {'floor ms':>9s} {'of copy':>8s}  bytes")
    for kernel in gpu_ops.kernels(size, check.device, dtype, impl):
        case = {"kind": "kernel", **size._asdict()}
        if check.left_s(TIMES_UNTIL) < 0:
            check.row(case, kernel.name, "skipped", "the time budget ended")
            continue
        try:
            times = gpu_ops.time_ms(kernel.call, check.device)
        except Exception as reason:
            check.row(case, kernel.name, "failed", repr(reason)[:500])
            continue
        floor_ms = kernel.bytes_moved / bandwidth / 1e6
        share = floor_ms / times["median"]
        check.row(
            case, kernel.name, "ok", kernel.formula,
            time_ms=times, floor_ms=floor_ms, bytes=kernel.bytes_moved, copy_share=share,
        )  # fmt: skip
        check.say(
            f"{kernel.name:34s} {times['median']:8.4f} {floor_ms:9.4f} {share:8.1%}  "
            f"{kernel.formula}"
        )
    check.save()


def time_layers(check: Check, dtype: torch.dtype, impl: str) -> None:
    """Forward and backward of each projection under each norm, as ratios to the frozen layer."""
    totals: dict[str, float] = {}
    flops = check.result["ceilings"]["gemm_tflop_s"] * 1e9
    for label, n, k, count in gpu_ops.PROJECTIONS:
        size = gpu_ops.Size(TOKENS, n, k, RANK)
        if check.args.dry_run:
            size = gpu_ops.Size(16, n // 128, k // 128, 4)
        frozen_ms = None
        for name in gpu_ops.LAYERS:
            case = {"kind": "layer", "projection": label, **size._asdict()}
            if check.left_s(TIMES_UNTIL) < 0:
                check.row(case, name, "skipped", "the time budget ended")
                continue
            try:
                error = gpu_ops.worst_error(name, size, check.device, dtype, impl)
                if not error <= ERROR_LIMIT:
                    check.row(case, name, "wrong", f"relative error {error:.1e}", error=error)
                    continue
                data = gpu_ops.Tensors(size, check.device, dtype)
                step = gpu_ops.layer_step(name, data, impl)
                eager = gpu_ops.time_ms(step, check.device)
                replay = gpu_ops.graphed(step) if check.device == "cuda" else step
                times = gpu_ops.time_ms(replay, check.device)
            except Exception as reason:
                check.row(case, name, "failed", repr(reason)[:500])
                continue
            frozen_ms = times["median"] if name == "linear" else frozen_ms
            ratio = times["median"] / frozen_ms if frozen_ms else None
            totals[name] = totals.get(name, 0.0) + count * times["median"]
            check.row(
                case, name, "ok", "time_ms by CUDA graph replay" if check.device == "cuda" else "",
                time_ms=times, eager_ms=eager, error=error, ratio=ratio,
                floor_ms=4 * size.t * n * k / flops if not check.args.dry_run else None,
            )  # fmt: skip
            shown = "" if ratio is None else f"{ratio:6.3f} of the frozen layer"
            check.say(f"{label:8s} {name:16s} {times['median']:8.4f} ms {shown}")
            check.save()
    if check.device == "cuda" and totals.get("linear"):
        for name, target in gpu_ops.TARGETS.items():
            done = [
                row
                for row in check.result["rows"]
                if row["provider"] == name and row["status"] == "ok" and "projection" in row["case"]
            ]
            if len(done) == len(gpu_ops.PROJECTIONS):
                ratio = totals[name] / totals["linear"]
                verdict = "reached" if ratio <= target else "NOT reached"
                check.row({"kind": "sum"}, name, "ok", verdict, ratio=ratio, target=target)
                check.say(f"sum      {name:16s} {ratio:6.3f} (to reach: {target}): {verdict}")


def sanitize(check: Check) -> None:
    """memcheck and racecheck of every op on small shapes, side by side."""
    candidates = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
    tool = next((path for path in candidates if path and Path(path).exists()), None)
    if tool is None:
        check.result["sanitizer"] = {"status": "missing"}
        check.say("compute-sanitizer is not on this machine")
        return
    small = [sys.executable, "-m", "benchmarks.gpu_check", "--small"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {}
    for name in ("memcheck", "racecheck"):
        log = (check.out / f"{name}.log").open("w", encoding="utf-8")
        command = [tool, "--tool", name, "--error-exitcode", "99", *small]
        running[name] = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    for name, child in running.items():
        try:
            status = child.wait(timeout=max(1.0, check.left_s() - 10))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            status = None
        text = (check.out / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        summary = [line for line in text.splitlines() if "SUMMARY" in line][-1:] or ["no summary"]
        found = {"status": status, "summary": summary[0].strip("= ")}
        check.result["sanitizer"][name] = found
        check.say(f"{name}: {found}")
        if status == 99:
            check.fail(f"{name}: {summary[0]}")
        elif status != 0:
            check.say(f"{name} could not be run to its end here: see {name}.log")


def run_small(device: str = "cuda", impl: str = "triton") -> None:
    """Every op once, forward and backward, on shapes that fill no block."""
    for m in (5, 64):
        for dtype in (torch.bfloat16, torch.float32):
            data = gpu_ops.Tensors(gpu_ops.Size(67, 131, 77, m), device, dtype)
            for name in gpu_ops.LAYERS:
                gpu_ops.layer_step(name, data, impl)()
    if device == "cuda":
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    """Run the check; see the module's docstring for the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for gpu_check.json and gpu_check.log")
    parser.add_argument("--budget_s", type=float, default=470.0, help="seconds for everything")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--dry_run", action="store_true", help="on a CPU, to try the script")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.dry_run:
        print("no GPU: torch sees no CUDA device, so there is nothing to check (try --dry_run)")
        return 2
    if args.small:
        run_small()
        return 0
    if args.out is None:
        parser.error("--out is needed: the folder for the results")
    check = Check(args)
    impl = "reference" if args.dry_run else "triton"
    if args.dry_run:
        check.say("dry run on a CPU: the times below mean nothing")
    check.say(f"{check.result['machine']} {check.result['versions']} {check.result['commit']}")
    run_tests(check)
    check.save()
    check.result["ceilings"] = gpu_ops.ceilings(check.device, torch.bfloat16)
    check.say(f"ceilings: {check.result['ceilings']}")
    time_kernels(check, torch.bfloat16, impl)
    time_layers(check, torch.bfloat16, impl)
    check.save()
    if args.dry_run:
        run_small("cpu", impl)
    else:
        sanitize(check)
    reached = all(row["status"] != "skipped" for row in check.result["rows"])
    check.result["complete"] = reached and not check.result["tests"].get("not reached")
    check.say(f"{'all well' if not check.bad else f'{len(check.bad)} failures'}: {check.out}")
    check.save()
    return 1 if check.bad or not check.result["complete"] else 0


if __name__ == "__main__":
    sys.exit(main())
