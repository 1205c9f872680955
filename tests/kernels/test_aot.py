"""Every default configuration of every kernel, compiled for every chip it ships for."""

from __future__ import annotations

import pytest

from secura.cli import main
from secura_kernels.kernel_table import COLUMNS, kernel_configs, kernel_reports, kernel_table

pytest.importorskip("triton")
from secura_kernels.kernels.aot import TARGETS, Report, compile_config, inspect_config

CASES = [(config, target) for config in kernel_configs() for target in config.targets]


@pytest.mark.parametrize(
    ("config", "target"), CASES, ids=[f"{config.name}-{target}" for config, target in CASES]
)
def test_no_spills_shared_memory_fits_wide_loads_and_matrix_instructions(config, target):
    assert inspect_config(config, target).problems(config) == []


def test_names_are_unique_a_target():
    names = [(config.name, target) for config, target in CASES]
    assert len(names) == len(set(names))


def test_problems_name_what_is_wrong():
    config = CASES[0][0]
    report = Report(config.name, "gfx942", 256, 4, 65537, 0, 0, 10**6, 0)
    text = "; ".join(report.problems(config))
    for part in ("spills 4", "65537 bytes shared", "0 16-byte loads", "one or two bytes", "no mat"):
        assert part in text


def test_table_prints_a_row_a_report():
    rows = list(kernel_table(kernel_reports(["sm_90"], match=CASES[0][0].name)))
    assert rows[0] == "| " + " | ".join(COLUMNS) + " |"
    assert CASES[0][0].name in rows[2] and "sm_90" in rows[2]


def test_table_refuses_what_it_cannot_do(monkeypatch):
    with pytest.raises(ValueError, match="sm_1"):
        next(kernel_reports(["sm_1"]))
    monkeypatch.setattr(
        "secura_kernels.kernel_table.triton_missing", lambda: "triton is not installed"
    )
    with pytest.raises(RuntimeError, match="triton is not installed"):
        kernel_configs()


def test_compiling_under_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interpreted"):
        compile_config(CASES[0][0], TARGETS["sm_90"])


def test_doctor_kernels_prints_the_table_and_fails_on_a_problem(monkeypatch, capsys):
    config = next(config for config, target in CASES if target == "sm_90")
    monkeypatch.setattr("secura_kernels.kernel_table.kernel_configs", lambda: [config])
    assert main(["doctor", "--kernels", "sm_90"]) == 0
    assert f"| {config.name} | sm_90 |" in capsys.readouterr().out
    monkeypatch.setattr(Report, "problems", lambda report, config: ["spills 8 bytes"])
    assert main(["doctor", "--kernels", "sm_90"]) == 1
    assert "spills 8 bytes" in capsys.readouterr().out
    assert main(["doctor", "--kernels", "sm_1"]) == 2
    assert "unknown target" in capsys.readouterr().err
