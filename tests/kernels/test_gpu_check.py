"""What runs on a GPU machine, tried without one: its steps, its rows, and what breaks in them."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    first_gpu,
    gpu_check,
    gpu_kernels,
    gpu_rows,
    graphs,
    layer,
    model,
    report,
    shapes,
    targets,
)
from benchmarks.children import Child, last_line
from benchmarks.providers import catalogue, choose
from benchmarks.rivals import StrongDoRA
from benchmarks.schema import Result

from .conftest import interpreter_broken

ROOT = Path(__file__).resolve().parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def run_module(name: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, args)]
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True)


@no_gpu
def test_without_a_gpu_it_says_so_and_exits_2(tmp_path):
    done = run_module("gpu_check", "--out", tmp_path)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1 and "no GPU" in done.stdout
    assert not list(tmp_path.iterdir())


@no_gpu
def test_dry_run_goes_through_every_step_without_plugins(tmp_path):
    bare = {"PYTEST_ADDOPTS": "-p no:timeout -p no:xdist"}
    done = run_module("gpu_check", "--dry_run", "--out", tmp_path, "--commit", "abc", **bare)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert result["complete"] and not result["failures"] and result["commit"] == "abc"
    assert result["tests"]["skipped"] == result["tests"]["total"] > 0
    assert result["ceilings"]["fp32_tflop_s"] > 0
    layers = [row for row in result["rows"] if row["case"]["kind"] == "layer"]
    assert {row["provider"] for row in layers} >= {"linear", "none", "weight"}
    assert all(row["status"] == "ok" and row["figures"]["ratio"] > 0 for row in layers)
    assert "all well" in (tmp_path / "gpu_check.log").read_text()
    assert "test session starts" in (tmp_path / "gpu_check_output.log").read_text()


@no_gpu
def test_a_budget_too_small_is_an_incomplete_run(tmp_path):
    done = run_module("gpu_check", "--dry_run", "--out", tmp_path, "--budget_s", 0.001)
    assert done.returncode == 1
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert not result["complete"] and result["tests"]["not reached"]
    assert {row["status"] for row in result["rows"]} == {"skipped"}


@pytest.mark.skipif(interpreter_broken() is not None, reason=str(interpreter_broken()))
def test_every_kernel_row_runs_in_the_interpreter(tmp_path):
    path = tmp_path / "rows.jsonl"
    command = ("gpu_rows", "kernels", "--dry_run", "--rows", path)
    done = run_module(*command, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["note"] for row in rows if row["status"] != "ok"] == []
    names = [row["provider"] for row in rows]
    assert names == [planned.provider for planned in gpu_rows.plan("kernels", False)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("height", "width"), [(1, 16), (7, 64), (5, 33), (40, 7)])
def test_sectors_are_those_that_the_columns_bytes_lie_in(height, width, itemsize):
    columns = random.Random(0).sample(range(width), width // 3 + 1)
    touched = {
        (row * width + column) * itemsize // 32 for row in range(height) for column in columns
    }
    found = gpu_kernels.sectors(torch.tensor(columns), height, width, itemsize)
    assert found == len(touched)


def test_a_workspace_is_put_back():
    from secura_kernels.kernels import activation_backward

    before = activation_backward.WORKSPACE_MIB
    with pytest.raises(ZeroDivisionError), gpu_kernels.workspace(1024):
        assert activation_backward.WORKSPACE_MIB == 1024
        raise ZeroDivisionError
    assert before == activation_backward.WORKSPACE_MIB


def planned(name, measure):
    return gpu_rows.Planned({"kind": "kernel"}, name, measure)


def good():
    figures = {"time_ms": {"median": 2.0}, "bytes": 10**9, "flop": 0, "rate": "gemm_tflop_s"}
    return gpu_rows.Found("ok", "", figures)


def bad():
    raise RuntimeError("no such kernel")


def test_a_row_that_raises_leaves_the_others():
    kept = []
    rows = [planned("a", good), planned("b", bad), planned("c", good)]
    assert gpu_rows.run(rows, kept.append, lambda: None) == 0
    assert [row["status"] for row in kept] == ["ok", "failed", "ok"]
    assert "no such kernel" in kept[1]["note"]


def test_a_lost_device_ends_the_process_and_is_said():
    kept = []
    rows = [planned("a", good), planned("b", bad), planned("c", good)]
    assert gpu_rows.run(rows, kept.append, lambda: "an illegal access") == gpu_rows.LOST
    assert [row["provider"] for row in kept] == ["a", "b"]
    assert "lost" in kept[1]["note"] and "an illegal access" in kept[1]["note"]


def test_what_a_rows_set_up_raises_fails_that_row_alone():
    def make():
        raise MemoryError

    broken = gpu_kernels.Kernel("broken", make)
    whole = gpu_kernels.Kernel("whole", lambda: gpu_kernels.Call(lambda: None, 1, "1"))
    rows = [
        planned(kernel.name, lambda kernel=kernel: gpu_rows._kernel(kernel, "cpu"))
        for kernel in (broken, whole)
    ]
    kept = []
    gpu_rows.run(rows, kept.append, lambda: None)
    assert [row["status"] for row in kept] == ["failed", "ok"]


def test_a_floor_is_the_longer_of_bytes_and_operations():
    ceilings = {"copy_gb_s": 1000.0, "gemm_tflop_s": 1.0, "fp32_tflop_s": 0.1}
    row = planned("a", good).row(good())
    figures = gpu_rows.with_floor(row, ceilings)["figures"]
    assert figures["floor_ms"] == pytest.approx(1.0) and figures["floor_share"] == 0.5
    row["figures"] |= {"flop": 10**9, "rate": "fp32_tflop_s"}
    assert gpu_rows.with_floor(row, ceilings)["figures"]["floor_ms"] == pytest.approx(10.0)


def test_processes_are_what_the_machine_takes():
    assert gpu_check.processes(16, 143771) == 12
    assert gpu_check.processes(16, 81559) == 7
    assert gpu_check.processes(1, 0) == 1
    names = [f"t.py::test_{index}" for index in range(5)]
    large = [f"t.py::{gpu_check.LARGE_TEST}[{norm}]" for norm in "ab"]
    parts = gpu_check.shared_out([*names, *large], 3)
    assert [len(part) for part in parts] == [4, 2, 1] and set(large) < set(parts[0])


# Writes rows from the one numbered argv[2] on into argv[1]; breaks at those numbered in argv[3].
WRITER = """
import json, os, sys
path, skip, broken = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
for index in range(skip, 4):
    if index in broken:
        print("about to break", flush=True)
        os._exit(9)
    figures = {"time_ms": {"median": 1.0}}
    row = {"case": {"kind": "kernel"}, "provider": str(index), "status": "ok", "note": ""}
    open(path, "a").write(json.dumps(row | {"figures": figures}) + "\\n")
"""


@pytest.mark.parametrize(
    ("broken", "expected"),
    [([1], ["ok", "failed", "ok", "ok"]), ([0, 1, 2, 3], ["failed"] * 3 + ["skipped"])],
)
def test_a_step_goes_on_after_a_row_that_ends_its_process(monkeypatch, tmp_path, broken, expected):
    def command(step, path, skip, dry_run):
        return [sys.executable, "-c", WRITER, str(path), str(skip), json.dumps(broken)]

    monkeypatch.setattr(gpu_check, "rows_command", command)
    monkeypatch.setattr(
        gpu_rows, "plan", lambda step, dry_run: [planned(str(index), good) for index in range(4)]
    )
    args = argparse.Namespace(dry_run=True, out=tmp_path, budget_s=60.0, commit="abc")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    check = gpu_check.Check(args, scratch)
    gpu_check.run_rows(check, "kernels", 1.0)
    assert [row["status"] for row in check.result["rows"]] == expected
    assert [row["provider"] for row in check.result["rows"]] == list("0123")
    failed = next(row for row in check.result["rows"] if row["status"] == "failed")
    assert "status 9" in failed["note"] and "about to break" in failed["note"]
    assert any("lost" in failure for failure in check.bad) == ("skipped" in expected)


def test_a_child_that_does_not_heed_is_ended_with_its_own(tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    log = tmp_path / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.children.GRACE_S", 0.5)
        command = [sys.executable, "-c", deaf + "print('up'); time.sleep(600)"]
        with Child(command, log) as child:
            until = time.monotonic() + 60
            while last_line(log) != "up" and time.monotonic() < until:
                assert child.wait(0.05) is None
    assert child.wait(0) == -9


def test_layers_are_timed_and_judged_by_graph_where_both_have_one(monkeypatch):
    def graphed(call):
        if isinstance(call.__self__.layer, StrongDoRA):
            raise graphs.NotCapturableError("it waits for the device")
        return call

    monkeypatch.setattr(graphs, "supported", lambda device: True)
    monkeypatch.setattr(graphs, "graphed", graphed)
    case = shapes.LayerCase("square", "linear", 1, T=24, N=40, K=56, m=6, r=3)
    providers = choose(catalogue(torch.float32), "frozen,strong,secura channel reference")
    rows = layer.run_case(case, providers, torch.device("cpu"), torch.float32, rounds=1)
    for row in rows:
        captured = row.provider != "strong dora"
        assert row.status == "ok" and ("both_graph_ms" in row.figures) == captured
        assert ("it waits" in row.note) == (not captured)
    machine = {"device": "cpu", "name": "cpu", "threads": 1}
    result = Result(
        "layer", "quick", "cmd", "abc", "now", "fp32", machine, {}, {"headline_t": 24},
        {"copy_gb_s": 1.0, "gemm_tflop_s": 1.0}, rows,
    )  # fmt: skip
    assert "both, graph, ms" in report.layer_table(result, "none").splitlines()[0]
    (verdicts,) = targets.of_layers(result).values()
    judged = {
        verdict.target.rival: verdict.figure
        for verdict in verdicts
        if verdict.ratio and "channel" in verdict.target.ours
    }
    assert judged == {"strong lora": "graph time", "strong dora": "eager time"}


@pytest.mark.gpu
def test_a_graph_replays_and_a_call_that_waits_is_refused():
    x = torch.ones(8, device="cuda")
    replay = graphs.graphed(lambda: x.mul_(2))
    before = x.clone()
    replay()
    assert torch.equal(x, 2 * before)
    assert graphs.why_not(lambda: x.sum().item()) is not None
    assert graphs.why_not(lambda: torch.randn(8, device="cuda")) is None
    torch.randn(8, device="cuda")


def step(name, code, **kwargs):
    return first_gpu.Step(
        name, [sys.executable, "-c", code], **{"time_flag": "--s", "most_s": 60, "least_s": 1,
        "beyond_s": 0.0} | kwargs,
    )  # fmt: skip


def test_first_session_runs_every_step_whatever_becomes_of_the_others(tmp_path):
    resumes = "import sys; print(sys.argv); sys.exit(0 if '--resume' in sys.argv else 7)"
    told: list[str] = []
    outcomes = first_gpu.run(
        [
            step("breaks", "raise SystemExit('no kernel image')"),
            step("hangs", "import time; print('asleep'); time.sleep(600)", most_s=9),
            step("needs", "print('never')", least_s=1e6),
            step("resumes", resumes, again=["--resume"]),
            step("works", "print('fine')"),
        ],
        tmp_path, 600, told.append,
    )  # fmt: skip
    assert [one.well for one in outcomes] == [False, False, False, True, True]
    assert "no kernel image" in outcomes[0].text and "asleep" in outcomes[1].text
    assert "not begun" in outcomes[2].text
    assert "fine" in (tmp_path / "works_output.log").read_text()
    lines, well = first_gpu.summary(outcomes, tmp_path)
    assert not well and "layer: left no result" in lines


@no_gpu
def test_first_sessions_commands_are_ones_the_benchmarks_take(tmp_path, capsys):
    names = {provider.name for provider in catalogue(torch.bfloat16)}
    assert set(first_gpu.LAYER_PROVIDERS) <= names
    contenders = {provider.name for provider in model.contenders(torch.bfloat16)}
    assert set(first_gpu.MODEL_PROVIDERS) <= contenders
    for one, module in zip(first_gpu.steps(tmp_path, "abc")[1:], (layer, model), strict=True):
        with pytest.raises(SystemExit):
            module.main([*one.command[3:], one.time_flag, "10", *(one.again or ())])
        assert "--device cuda: torch sees no CUDA device" in capsys.readouterr().err


def test_the_summary_shows_failures_and_the_furthest_ratios(tmp_path):
    check = {
        "tests": {"passed": 3, "failures": ["t"]}, "sanitizer": {}, "complete": True,
        "failures": ["t.py::test_a"] * 12,
        "rows": [{"case": {"kind": "sum"}, "provider": "none", "status": "ok",
                  "note": "to reach 1.1: NOT reached", "figures": {"ratio": 1.25}}],
    }  # fmt: skip
    (tmp_path / "gpu_check.json").write_text(json.dumps(check))
    lines, well = first_gpu.summary([first_gpu.Outcome("gpu_check", "done", True)], tmp_path)
    text = "\n".join(lines)
    assert not well and "… and 2 more" in text and "none: 1.250, to reach 1.1: NOT" in text
