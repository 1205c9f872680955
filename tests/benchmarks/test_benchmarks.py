"""The benchmarks' own promises: nothing is timed unchecked, nothing finished is lost or hidden."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from dataclasses import asdict

import pytest
import torch

from benchmarks import (
    compare,
    layer,
    measure,
    oracle,
    plots,
    registry,
    session,
    shapes,
    tables,
)
from benchmarks.registry import (
    MissingError,
    Provider,
    Ranks,
    WrongError,
    catalogue,
    choose,
    frozen_linear,
)
from benchmarks.rivals import StrongLoRA
from benchmarks.schema import LOST, Recorder, Result, Row
from benchmarks.session import Turn
from secura_kernels.plan import Cost

TINY = shapes.LayerCase("square", "linear", 1, T=24, N=40, K=56, m=6, r=3)
OTHER = shapes.LayerCase("square", "linear", 1, T=12, N=40, K=56, m=6, r=3)
CPU = torch.device("cpu")


def runnable(dtype: torch.dtype) -> list[Provider]:
    return [entry for entry in catalogue(dtype) if entry.impl != "triton" and not entry.compiled]


@pytest.fixture
def tiny_preset(monkeypatch):
    """``quick`` is two tiny layers, and nothing measures the machine."""
    preset = shapes.LayerPreset([TINY, OTHER], headline_t=TINY.T)
    monkeypatch.setattr(layer, "layer_preset", lambda name: preset)
    monkeypatch.setattr(
        session,
        "raise_ceilings",
        lambda found, *_: found.update(copy_gb_s=10.0, gemm_tflop_s=0.1),
    )


def run_layer(path, *flags) -> Result:
    arguments = ["--providers", "frozen,strong lora,secura channel", "--rounds", "1"]
    arguments += ["--commit", "test", "--device", "cpu", "--out", str(path), *flags]
    assert layer.main(arguments) == 0
    return Result.load(path)


def test_a_result_survives_its_file(tmp_path):
    row = Row(asdict(TINY), "frozen", figures={"both_ms": measure.timing([1.0, 2.0, 4.0])})
    result = Result("layer", "quick", "cmd", "abc", "now", "fp32", {}, {}, rows=[row])
    result.save(tmp_path / "deep" / "r.json")
    assert Result.load(tmp_path / "deep" / "r.json") == result
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.json"]


def test_a_lost_device_costs_no_row_and_no_case_before_it(tmp_path, tiny_preset, monkeypatch):
    """The second provider's error is one that leaves the device useless; nothing runs after it."""
    lost = []

    def fail(self, *_):
        lost.append(True)
        raise RuntimeError("an illegal memory access")

    def collected(device):
        if lost:
            raise RuntimeError("an illegal memory access, still")

    monkeypatch.setattr(StrongLoRA, "__init__", fail)
    monkeypatch.setattr(session, "is_lost", lambda device: bool(lost))
    monkeypatch.setattr(session, "collect", collected)
    result = run_layer(tmp_path / "r.json")
    assert not result.complete and {row.case["T"] for row in result.rows} == {TINY.T}
    notes = {row.provider: row.note for row in result.rows}
    assert "an illegal memory access" in notes.pop("strong lora")
    assert notes["frozen"] == notes["secura channel reference"] == LOST
    assert "ok" not in {row.status for row in result.rows}


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"schema": 99}), encoding="utf-8")
    with pytest.raises(ValueError, match="run its benchmark again"):
        Result.load(path)
    with pytest.raises(ValueError, match="unknown status"):
        Row({}, "frozen", "fast")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_providers_agree_with_fp64(dtype, bias):
    torch.manual_seed(0)
    base_bias = torch.randn(TINY.N, dtype=dtype) if bias else None
    weight = torch.randn(TINY.N, TINY.K, dtype=dtype) / 8
    x, grad = torch.randn(TINY.T, TINY.K, dtype=dtype), torch.randn(TINY.T, TINY.N, dtype=dtype)
    for provider in runnable(dtype):
        module = provider.build(frozen_linear(weight, base_bias), Ranks(TINY.m, TINY.r))
        oracle.randomise(module, weight)
        with provider.running():
            oracle.check(oracle.errors(module, weight, base_bias, x, grad), dtype)
        assert all(part.training for part in module.modules()), provider.name
        if provider.family != "frozen":
            wide = {name: value.double() for name, value in oracle.trainable(module).items()}
            change = registry.delta_weight(module, weight.double(), wide).norm().item()
            assert change / weight.double().norm() == pytest.approx(oracle.CHANGE, rel=0.02)


def test_errors_out_of_tolerance_are_named():
    with pytest.raises(WrongError, match=r"against fp64: out 1.0e-03 > 1e-04$"):
        oracle.check({"out": 1e-3, "dx": 0.0, "parameters": 0.0}, torch.float32)


def test_a_provider_that_is_wrong_has_no_figures():
    class OffByABit(StrongLoRA):
        def forward(self, x):
            return super().forward(x) * 1.001

    broken = Provider("broken lora", "lora", lambda base, ranks: OffByABit(base, ranks.r))
    (row,) = layer.run_case(TINY, [broken], CPU, torch.float32, rounds=1)
    assert row.status == "wrong" and "out" in row.note and not row.figures


def test_a_provider_that_breaks_does_not_end_the_run():
    def breaks(base, ranks):
        raise RuntimeError("no kernel image\nsecond line")

    providers = [Provider("breaks", "lora", breaks), *choose(runnable(torch.float32), "frozen")]
    rows = layer.run_case(TINY, providers, CPU, torch.float32, rounds=1)
    assert [row.status for row in rows] == ["failed", "ok"]
    assert rows[0].note == "RuntimeError: no kernel image"


def test_a_missing_provider_is_shown_as_missing(tiny_preset, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    result = run_layer(tmp_path / "r.json", "--providers", "frozen,peft lora,triton,compiled")
    status = {row.provider: row.status for row in result.rows if row.case == asdict(TINY)}
    assert status["peft lora fp32"] == "missing" and status["frozen"] == "ok"
    table = tables.layer_table(result)
    for name in ("PEFT LoRA fp32, r=3", "SECURA channel compiled, m=6", "PEFT is not installed"):
        assert name in table
    if not torch.cuda.is_available():
        assert "SECURA weight triton, m=6" in table and "kernels run on cuda" in table


def test_every_figure_is_there(tiny_preset, tmp_path):
    result = run_layer(tmp_path / "r.json")
    assert result.complete and result.commit == "test" and result.machine["device"] == "cpu"
    assert {"torch", "python", "triton", "peft"} <= result.versions.keys()
    good = [row for row in result.rows if row.status == "ok"]
    ours = {"secura channel reference", "secura channel held"}
    assert {row.provider for row in good} == {"frozen", "strong lora", *ours}
    for row in good:
        assert {"saved_mib", "peak_mib", "error_out", "error_dx"} <= row.figures.keys()
        for phase in layer.PHASES:
            time = row.figures[f"{phase}_ms"]
            assert 0 < time["q20"] <= time["median"] <= time["q80"]


def test_an_interrupted_run_keeps_what_it_has_and_resumes(tiny_preset, monkeypatch, tmp_path):
    path, reached, real = tmp_path / "r.json", [], layer.run_case

    def interrupted(case, *args, **kwargs):
        reached.append(case.T)
        if len(reached) == 2:
            raise KeyboardInterrupt
        return real(case, *args, **kwargs)

    monkeypatch.setattr(layer, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_layer(path)
    kept = Result.load(path)
    assert {row.case["T"] for row in kept.rows} == {TINY.T} and not kept.complete
    result = run_layer(path, "--resume")
    assert reached == [TINY.T, OTHER.T, OTHER.T] and result.complete
    assert result.rows[: len(kept.rows)] == kept.rows
    assert result.command.startswith(f"{kept.command} && python -m benchmarks.layer")
    with pytest.raises(SystemExit):
        run_layer(path, "--resume", "--seed", "1")
    with pytest.raises(SystemExit):
        run_layer(path, "--resume", "--providers", "strong dora,strong lora")


def test_a_spent_budget_skips_visibly(tiny_preset, tmp_path):
    result = run_layer(tmp_path / "r.json", "--max_seconds", "0")
    assert {row.status for row in result.rows} == {"skipped"} and not result.complete
    assert "cut short" in tables.layer_table(result)
    assert run_layer(tmp_path / "r.json", "--resume").complete


def test_a_budget_spent_within_a_case_leaves_the_case_unfinished(monkeypatch):
    providers = choose(runnable(torch.float32), "frozen,strong lora")
    clock = itertools.chain([0.0], itertools.repeat(2.0))
    monkeypatch.setattr(session.time, "monotonic", lambda: next(clock))
    rows = layer.run_case(TINY, providers, CPU, torch.float32, rounds=1, turn=Turn(end=1.0))
    assert [row.status for row in rows] == ["ok", "skipped"]
    result = Result("layer", "quick", "cmd", "abc", "now", "fp32", {}, {}, rows=rows)
    assert result.finished() == []


def test_a_provider_that_breaks_while_timed_has_no_figures(monkeypatch):
    def breaks(self):
        if self.provider.name == "strong lora":
            raise RuntimeError("an illegal access")
        return self.both

    monkeypatch.setattr(layer.Runner, "both_call", breaks)
    providers = choose(runnable(torch.float32), "frozen,strong lora")
    rows = layer.run_case(TINY, providers, CPU, torch.float32, rounds=1)
    assert [row.status for row in rows] == ["ok", "failed"]
    assert rows[1].note == "RuntimeError: an illegal access" and not rows[1].figures


@pytest.mark.parametrize(("n", "thin", "moved"), [(3, 0, 3), (4, 1, 8), (9, 1, 8)])
def test_a_wide_activation_layer_moves_h_r_and_not_the_gradient_of_its_output(n, thin, moved):
    t, k, m = 2, 4, 3
    case = shapes.LayerCase("wide", "linear", 1, T=t, N=n, K=k, m=m, r=1)
    extra = registry.work("secura activation", case, 2)["backward"]
    frozen = registry.work("frozen", case, 2)["backward"]
    assert extra.flop - frozen.flop == 2 * (3 * t * n * m + thin * t * k * m)
    assert extra.bytes - frozen.bytes == 2 * t * (2 * n + moved)


def test_costs_count_by_the_table():
    case = shapes.LayerCase("square", "linear", 1, T=2, N=3, K=5, m=1, r=1)
    frozen = registry.work("frozen", case, 2)
    assert frozen["forward"] == Cost(2 * (6 + 10 + 15), 2 * 30)
    assert frozen["both"] == Cost(4 * (6 + 10 + 15), 4 * 30)
    for provider in catalogue(torch.bfloat16):
        work = registry.work(provider.family, case, 2)["both"]
        assert work.flop >= frozen["both"].flop and work.bytes >= frozen["both"].bytes


def test_shapes_are_the_published_ones():
    found = {
        name: {(part.k, part.n) for part in shape.projections()}
        for name, shape in shapes.MODELS.items()
    }
    assert found["llama3-8b"] == {(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)}
    assert found["qwen2-7b"] == {(3584, 3584), (3584, 512), (3584, 18944), (18944, 3584)}
    assert found["qwen2-1.5b"] == {(1536, 1536), (1536, 256), (1536, 8960), (8960, 1536)}
    assert found["gemma2-2b"] == {
        (2304, 2048), (2304, 1024), (2304, 9216), (2048, 2304), (9216, 2304)
    }  # fmt: skip
    for name in ("quick", "host", "llama3-8b", "full"):
        cases = shapes.layer_preset(name).cases
        assert len(set(cases)) == len(cases)
        assert all(2 * case.m <= min(case.K, 1e9) and case.m <= case.N for case in cases)


def test_sums_count_every_projection_of_a_block():
    def row(count, time_ms):
        time = {"median": time_ms, "q20": time_ms, "q80": time_ms}
        figures = {f"{phase}_ms": time for phase in layer.PHASES}
        figures |= {"saved_mib": 1.0, "peak_mib": time_ms, "both_gflop": 1, "both_moved_mib": 1}
        return Row({"count": count}, "frozen", figures=figures)

    sums = tables.summed([row(2, 10.0), row(1, 5.0)])
    assert sums["time"]["both"]["median"] == 25 and sums["saved_mib"] == 3
    assert sums["peak_mib"] == 10 and sums["gflop"] == 3


def test_a_whole_name_chooses_one_provider_and_a_part_all_that_hold_it():
    providers = catalogue(torch.bfloat16)
    chosen = [provider.name for provider in choose(providers, "peft lora bf16,strong")]
    assert chosen == ["peft lora bf16", "strong lora", "strong dora"]
    assert len(choose(providers, "peft lora")) == 4


def test_an_unknown_provider_is_an_error():
    with pytest.raises(ValueError, match="no provider is called 'qlora'"):
        choose(catalogue(torch.float32), "frozen,qlora")


def test_the_recorder_refuses_another_machines_file(tmp_path):
    def result(name):
        return Result("layer", "quick", "cmd", "abc", "now", "fp32", {"name": name}, {})

    Recorder(result("one"), tmp_path / "r.json").close()
    with pytest.raises(ValueError, match="another machine"):
        Recorder(result("two"), tmp_path / "r.json", resume=True)


def test_plots_are_the_same_for_the_same_results(tiny_preset, tmp_path):
    pytest.importorskip("matplotlib")
    run_layer(tmp_path / "layer-x.json")
    first = {path: path.read_bytes() for path in plots.draw_all(tmp_path)}
    assert {path.stem for path in first} == {f"layer-x-{kind}" for kind in plots.KINDS["layer"]}
    for path in first:
        path.unlink()
    assert {path: path.read_bytes() for path in plots.draw_all(tmp_path)} == first


def test_targets_are_judged_by_their_ratio(tiny_preset, tmp_path, capsys):
    figures = {"a": {"saved": 8.0}, "b": {"saved": 10.0}}
    most, least, absent = (
        compare.judge(target, figures)
        for target in (
            compare.Target("saved", "a", "b", 0.85),
            compare.Target("saved", "b", "a", 1.3, True),
            compare.Target("saved", "a", "c", 1.0),
        )
    )
    ends = [verdict.cells()[-1] for verdict in (most, least, absent)]
    assert ends == ["reached", "missed", "not measured"]
    assert most.excess < 1 < least.excess and absent.excess == 0
    run_layer(tmp_path / "r.json")
    capsys.readouterr()
    compare.main([str(tmp_path / "r.json")])
    judged = "| eager time | secura channel reference | strong lora | ≤ 0.95 × |"
    assert judged in capsys.readouterr().out


def test_two_results_are_compared_where_both_have_figures(tiny_preset, tmp_path, capsys):
    old = run_layer(tmp_path / "old.json", "--providers", "frozen,strong lora")
    for row in old.rows:
        if row.case["T"] == TINY.T:
            row.figures["saved_mib"] += 1
        else:
            row.fail("failed", "nothing to compare")
    old.save(tmp_path / "old.json")
    new = run_layer(tmp_path / "new.json", "--commit", "later", "--providers", "strong lora")
    lines = compare.changes(old, new).splitlines()
    assert "| test | later | new / old |" in lines[0]
    assert len(lines) == 2 + 3 and all("T=24" in line for line in lines[2:])
    (saved,) = (line for line in lines if "| saved |" in line)
    after = 24 * (56 + TINY.r) * 4 / 2**20  # x and x Aᵀ
    before = 1 + after
    assert f"| {before:.5g} | {after:.5g} | {after / before:.3f} × |" in saved
    capsys.readouterr()
    compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_provider_agrees_with_fp64_on_a_gpu(dtype):
    case = shapes.LayerCase("square", "linear", 1, T=200, N=320, K=264, m=48, r=16)
    problem = layer.Problem(case, torch.device("cuda"), dtype, 0)
    for provider in catalogue(dtype):
        with contextlib.suppress(MissingError):
            layer.Runner(provider, problem)


def test_a_kernel_that_cannot_run_is_missing_with_the_reason():
    if torch.cuda.is_available():
        pytest.skip("kernels run here")
    (provider,) = choose(catalogue(torch.float32), "secura none triton")
    with pytest.raises(MissingError, match="cpu"):
        provider.build(frozen_linear(torch.randn(8, 8)), Ranks(2, 2))
