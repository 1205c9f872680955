"""What runs on a GPU machine, tried without one: its steps, its rows, and what breaks in them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from ops.conftest import interpreter_broken

from benchmarks import (
    compare,
    gpu_tests,
    graphs,
    layer,
    measure,
    model,
    ops,
    shapes,
    tables,
    triage,
)
from benchmarks.children import Child, last_line
from benchmarks.registry import catalogue, choose
from benchmarks.rivals import StrongDoRA
from benchmarks.schema import Result
from secura_kernels import plan

ROOT = Path(__file__).resolve().parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def run_module(name: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, args)]
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True)


@pytest.fixture
def no_handler(monkeypatch):
    """The scripts without their handler of SIGTERM, which would be pytest's as well."""
    for script in (gpu_tests, triage):
        monkeypatch.setattr(script, "exit_when_asked", lambda: None)


@no_gpu
@pytest.mark.parametrize("script", [triage, gpu_tests], ids=["triage", "gpu_tests"])
def test_without_a_gpu_it_says_so_and_exits_2(script, tmp_path, capsys):
    assert script.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1 and "no GPU" in said
    assert not list(tmp_path.iterdir())


@no_gpu
def test_gpu_tests_dry_run_needs_no_plugin_and_goes_on(tmp_path):
    bare = {"PYTEST_ADDOPTS": "-p no:timeout -p no:xdist"}
    done = run_module("gpu_tests", "--dry_run", "--out", tmp_path, "--commit", "abc", **bare)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = Result.load(tmp_path / "gpu_tests.json")
    assert result.complete and result.commit == "abc" and len(result.rows) == 20
    assert {row.status for row in result.rows} == {"missing"}
    assert "test session starts" in (tmp_path / "gpu_tests.log").read_text()


def test_tests_that_were_not_reached_are_listed_and_do_not_pass(tmp_path, no_handler, monkeypatch):
    monkeypatch.setattr(gpu_tests, "collected", lambda: ["a::test_one", "a::test_two"])
    monkeypatch.setattr(gpu_tests, "pytest_command", lambda: SLEEP)
    flags = ["--dry_run", "--out", str(tmp_path), "--budget_s", "0.001", "--commit", "abc"]
    assert gpu_tests.main(flags) == 1
    rows = Result.load(tmp_path / "gpu_tests.json").rows
    assert [(row.case["test"], row.status) for row in rows] == [
        ("test_one", "skipped"), ("test_two", "skipped"),
    ]  # fmt: skip
    assert all("not reached" in row.note for row in rows)


def test_the_most_telling_tests_come_first_and_the_large_ones_last():
    names = ["a::test_odd", f"a::{gpu_tests.LARGE}[none]", "a::test_cuda_graph[x]",
             "a::test_layers_of_an_8b_model[1]", "a::test_matches_oracle[131, 67]"]  # fmt: skip
    found = gpu_tests.ordered(names)
    assert found == [names[3], names[2], names[4], names[0], names[1]]
    assert gpu_tests.shared_out(found, 2) == [found[::2], found[1::2]]
    assert gpu_tests.shared_out(found[:1], 3) == [found[:1]]


OUTCOMES = """
def test_good(): pass
def test_bad(): assert False
def test_slow():
    import pathlib, time; pathlib.Path({asleep!r}).touch(); time.sleep(600)
def test_after(): pass
"""


def test_a_run_cut_short_keeps_what_it_found(tmp_path, monkeypatch):
    path = tmp_path / "test_outcomes.py"
    path.write_text(OUTCOMES.format(asleep=str(tmp_path / "asleep")))
    shown = os.path.relpath(path, ROOT)  # as pytest prints it
    good, bad, slow, after = (f"{shown}::test_{name}" for name in ("good", "bad", "slow", "after"))
    log = tmp_path / "log"
    monkeypatch.setattr(gpu_tests, "pytest_command", lambda: COMMAND)
    rows = gpu_tests.run_tests([good, bad, after], 2, time.monotonic() + 60, log)
    assert [row.status for row in rows] == ["ok", "failed", "ok"]

    class UntilAsleep(Child):
        def wait(self, seconds):
            until = time.monotonic() + 60
            while not (tmp_path / "asleep").exists() and time.monotonic() < until:
                time.sleep(0.05)
            return super().wait(0)

    monkeypatch.setattr(gpu_tests, "Child", UntilAsleep)
    rows = gpu_tests.run_tests([good, slow, after], 1, time.monotonic(), log)
    assert [row.status for row in rows] == ["ok", "skipped", "skipped"]


SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
COMMAND = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", "/", "-p", "no:xdist"]


@pytest.mark.skipif(interpreter_broken() is not None, reason=str(interpreter_broken()))
def test_every_measurement_runs_in_the_interpreter(tmp_path):
    flags = ("--dry_run", "--out", tmp_path, "--commit", "abc", "--budget_s", 250)
    done = run_module("triage", *flags, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = Result.load(tmp_path / "triage.json")
    assert [row.note for row in result.rows if row.status != "ok"] == [] and result.complete
    names = [one.name for one in triage.measurements({})]
    assert [row.case["question"] for row in result.rows] == names and len(set(names)) == len(names)


def test_resuming_measures_what_is_not_there_yet(tmp_path, no_handler, monkeypatch):
    ran = []

    def fails_once(name, setup):
        ran.append(name)
        if ran.count("broken") == 1 and name == "broken":
            raise RuntimeError("no such kernel")
        return {"x": 1.0}

    def measurements(ceilings, only):
        names = [name for name in ("good", "broken", "late") if name.startswith(only)]
        return [triage.Measurement(name, partial(fails_once, name)) for name in names]

    monkeypatch.setattr(triage, "measurements", measurements)
    monkeypatch.setattr(triage, "ceilings_of", lambda device, dtype: {"copy_gb_s": 1.0})
    flags = ["--dry_run", "--out", str(tmp_path), "--commit", "abc"]
    assert triage.main([*flags, "--only", "good"]) == 0
    assert triage.main([*flags, "--resume"]) == 1
    assert triage.main([*flags, "--resume"]) == 0
    assert ran == ["good", "broken", "late", "broken"]
    rows = Result.load(tmp_path / "triage.json").rows
    assert [row.case["question"] for row in rows] == ["good", "late", "broken"]


def test_a_measurement_that_raises_fails_alone_and_a_lost_device_is_said(monkeypatch):
    def bad(setup):
        raise RuntimeError("no such kernel")

    cpu = triage.Setup("cpu")
    row = triage.measured(triage.Measurement("a", bad), cpu)
    assert row.status == "failed" and "no such kernel" in row.note
    assert triage.DEVICE_LOST not in row.note
    monkeypatch.setattr(measure, "is_lost", lambda device: True)
    assert triage.DEVICE_LOST in triage.measured(triage.Measurement("a", bad), cpu).note
    good = triage.Measurement("b", lambda setup: {"x": 1.0})
    assert triage.measured(good, cpu).figures == {"x": 1.0}


def test_the_ceilings_allow_what_the_bytes_and_products_come_to():
    ceilings = {"copy_gb_s": 3000.0, "gemm_tflop_s": 700.0}
    shape = plan.Shape(8192, 4096, 4096, 128)
    allowed = {
        space: ops.allowed_ratio(f"secura {space} triton", shape, ceilings)
        for space in ("none", "channel", "activation", "weight")
    }
    assert ops.allowed_ratio("peft lora bf16", shape, ceilings) is None
    assert 1.1 < allowed["none"] < allowed["channel"] < allowed["activation"] < 1.25
    assert 1.5 < allowed["weight"] < 1.75
    faster = ops.allowed_ratio("secura none", shape, ceilings | {"copy_gb_s": 4300.0})
    assert faster < allowed["none"]


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_every_ops_floor_grows_with_its_bytes_and_its_operations(op):
    data = ops.Tensors(plan.Shape(32, 48, 64, 16), "cpu", torch.bfloat16)
    calls = op.calls(data, "reference")
    assert ("both" in calls) == (op.back is not None)
    slow, fast = {"copy_gb_s": 1e-3, op.rate: 1e6}, {"copy_gb_s": 1e9, op.rate: 1e-6}
    by_bytes = op.floors_us(calls, data, slow)
    forward, backward = op.moved(data.shape)
    assert by_bytes["forward"] == pytest.approx(forward)
    assert by_bytes.get("both") in (None, pytest.approx(forward + backward))
    by_flop = op.floors_us(calls, data, fast)
    assert all(by_flop[name] > 0 for name in calls if "W'" not in op.name)


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
    assert "both, graph, ms" in tables.layer_table(result).splitlines()[0]
    (verdicts,) = compare.judged(result).values()
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


def test_the_presets_of_a_quarter_of_an_hour():
    cases = shapes.layer_preset("block").cases
    assert [case.T for case in cases] == [8192] * 4 + [2048] * 4 + [512] * 4
    steps = model.model_preset("block")
    assert {case.blocks for case in steps} == {8} and steps[1].checkpointing
