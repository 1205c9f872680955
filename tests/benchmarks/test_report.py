"""The pages' tables are the committed results, and nothing stands in them by hand."""

from __future__ import annotations

import json
import re

from benchmarks import markdown, report
from benchmarks.measure import timing
from benchmarks.schema import Result, Row
from benchmarks.tables import NOT_YET

MARKER = re.compile(r"<!-- table: ([\w.-]+) -->")


def test_the_tables_equal_the_results():
    texts = [page.read_text(encoding="utf-8") for page in report.PAGES]
    names = {name for text in texts for name in MARKER.findall(text)}
    assert {"demo-cpu", "layer-cpu", "retention-confirm-mlp"} <= names
    for text in texts:
        assert report.render(text) == text, "run make table"


def test_every_layer_and_model_result_is_of_the_schema():
    for path in report.RESULTS.glob("*.json"):
        if not path.name.startswith(("demo", "gpu")):
            assert Result.load(path).commit != "unknown", path


def test_the_cpu_layer_result_has_what_the_page_promises():
    result = Result.load(report.RESULTS / "layer-cpu.json")
    status = {
        row.provider: row.status
        for row in result.rows
        if (row.case["T"], row.case["N"], row.case["K"]) == (2048, 1024, 1024)
        and (row.case["m"], row.case["r"]) == (32, 16)
    }
    assert result.dtype == "fp32"
    for provider in ("peft lora fp32", "secura none reference", "secura channel reference"):
        assert status[provider] == "ok"


def test_a_table_has_its_figures_to_the_right_and_one_space_in_an_empty_cell():
    assert markdown.table(["", "on", "KL"], [["a", "q", "1"], ["b", "", ""]], labels=2) == (
        "| | on | KL |\n| --- | --- | ---: |\n| a | q | 1 |\n| b | | |"
    )


def layer_result(time_ms: float) -> Result:
    case = {"model": "square", "projection": "linear", "count": 1, "T": 8, "N": 4, "K": 4}
    case |= {"m": 2, "r": 1}
    figures = {f"{phase}_ms": timing([time_ms]) for phase in ("forward", "backward", "both")}
    figures |= {"saved_mib": 1.0, "peak_mib": 2.0, "both_gflop": 1.0, "both_moved_mib": 1.0}
    machine = {"device": "cpu", "name": "a processor", "threads": 2}
    ceilings = {"copy_gb_s": 10.0, "gemm_tflop_s": 1.0}
    rows = [
        Row(case, "peft lora fp32", figures=figures),
        Row(case, "secura weight reference", "wrong", "against fp64: dx 1e-1"),
    ]
    return Result(
        "layer", "quick", "python -m benchmarks.layer", "abc", "now", "fp32", machine,
        {"torch": "2"}, {"headline_t": 8}, ceilings, rows, True,
    )  # fmt: skip


def test_a_changed_result_changes_the_table(tmp_path):
    text = "before\n<!-- table: layer-x -->\nstale\n<!-- end -->\nafter\n"
    layer_result(10.0).save(tmp_path / "layer-x.json")
    first = report.render(text, tmp_path)
    assert "10.00 (10.00, 10.00) | 1.00 ×" in first and "stale" not in first
    assert first.startswith("before\n") and first.endswith("<!-- end -->\nafter\n")
    assert report.render(first, tmp_path) == first
    layer_result(11.0).save(tmp_path / "layer-x.json")
    assert report.render(first, tmp_path) != first


def test_what_was_wrong_is_said(tmp_path):
    layer_result(10.0).save(tmp_path / "layer-x.json")
    assert "No figures for SECURA weight reference, m=2: wrong, against fp64" in report.table(
        "layer-x", tmp_path
    )


def test_a_result_that_is_not_there_is_said_to_be_missing(tmp_path):
    assert report.table("layer-h200", tmp_path) == NOT_YET


def test_the_demo_table_takes_the_demos_own_file(tmp_path):
    method = {
        "title": "LoRA", "learning_rate": 1e-3, "trainable_parameters": 1234,
        "adapter_bytes": 5e6, "seconds_per_step": 1.5,
        "evaluations": [{"gsm8k": 9.0, "news": 9.0}, {"gsm8k": 1.25, "news": 3.5}],
    }  # fmt: skip
    demo = {
        "base": {"gsm8k": 1.651, "news": 3.378},
        "settings": {"batch_size": 4, "target_modules": ["q_proj"]},
        "plan": {"steps": 50, "dtype": "fp32"},
        "methods": {"lora": method, "secura": method | {"title": "SECURA"}},
        "assets": [{"title": "SmolLM2", "note": "from GGUF"}],
        "hardware": {"name": "a processor", "threads": 2},
        "seconds": 100.0,
    }
    (tmp_path / "demo-cpu.json").write_text(json.dumps(demo), encoding="utf-8")
    assert "| SECURA, lr 0.001 | 1.250 | 3.500 | 1,234 | 5.0 MB | 1.50 |" in report.table(
        "demo-cpu", tmp_path
    )
