"""Benchmarks of whole models: training steps, what a decoder saves, start-up, anchoring."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import anchor, model, registry, shapes, startup, tables, training
from benchmarks.registry import choose
from benchmarks.schema import Result

CPU = torch.device("cpu")


@pytest.fixture
def tiny_model(monkeypatch):
    shape = shapes.ModelShape("tiny", "qwen2", 32, 48, 2, 4, 2, 8, 64)
    monkeypatch.setitem(shapes.MODELS, "tiny", shape)
    return shape


def test_training_steps_of_every_contender(tiny_model):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    frozen = training.random_model(tiny_model, 2, CPU, torch.float32, 16)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    case = model.StepCase("tiny", 2, "all", 16, 1, accumulate=2, checkpointing=True, m=4, r=2)
    training.set_checkpointing(frozen, True)
    providers = registry.for_models(torch.float32)
    rows = model.run_case(frozen, case, providers, {"gemm_tflop_s": 0.1}, steps=2)
    assert {row.provider: row.status for row in rows} == {
        provider.name: "ok" for provider in providers
    }
    assert all(row.figures["tokens_per_s"] > 0 for row in rows)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    result = Result("model", "quick", "cmd", "abc", "now", "fp32", {"device": "cpu", "name": "cpu",
                    "threads": 1}, {}, rows=rows)  # fmt: skip
    assert "| 1.00 × |" in tables.model_table(result)


def test_starting_from_an_svd_gives_the_same_a(tiny_model, tmp_path, monkeypatch):
    case = {"model": "tiny", "blocks": 2, "m": 4, "r": 2}
    monkeypatch.setattr(startup, "preset", lambda name: case)
    path = tmp_path / "r.json"
    assert startup.main(["--device", "cpu", "--out", str(path), "--providers", "channel"]) == 0
    rows = {row.provider: row for row in Result.load(path).rows}
    assert rows["svd init"].status == rows["secura channel"].status == "ok"
    assert rows["secura channel"].figures["layers"] == 14
    assert "svd init, m=4" in tables.startup_table(Result.load(path))


def test_what_the_decoder_saves_is_counted_and_shown(tiny_model):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    frozen = training.random_model(tiny_model, 2, CPU, torch.float32, 64)
    case = model.StepCase("tiny", 2, "all", 64, 1, m=4, r=2, saved_at=32)
    providers = choose(registry.for_models(torch.float32), "secura none,strong lora")
    rows = model.run_case(frozen, case, providers, {"gemm_tflop_s": 0.1}, steps=1)
    ours, lora = (row.figures["saved_mib"] for row in rows)
    assert 0 < ours < lora
    longer = dataclasses.replace(case, saved_at=64)
    for row in model.run_case(frozen, longer, providers, {"gemm_tflop_s": 0.1}, steps=1):
        before = {"secura none": ours, "strong lora": lora}[row.provider]
        assert 1.5 * before < row.figures["saved_mib"] <= 2.1 * before
    machine = {"device": "cpu", "name": "cpu", "threads": 1}
    result = Result("model", "saved", "cmd", "abc", "now", "fp32", machine, {}, rows=rows)
    text = tables.model_table(result)
    assert "| saved at T=32, MiB |" in text and "*Saved* is what the decoder keeps" in text


def test_a_model_that_saves_nothing_new_has_no_column_for_it():
    case = model.StepCase("tiny", 2, "all", 16, 1)
    assert "saved_at" not in case.as_dict() and model.StepCase(**case.as_dict()) == case


def test_the_cost_of_anchoring_is_measured_and_shown(tmp_path):
    path = tmp_path / "anchor.json"
    flags = ["--device", "cpu", "--preset", "tiny", "--max_seconds", "20", "--out", str(path)]
    assert anchor.main(flags) == 0
    result = Result.load(path)
    names = ["anchoring", anchor.PLAIN, anchor.ANCHORED]
    assert result.complete and [row.provider for row in result.rows] == names
    assert result.rows[0].figures["tokens"] == 256 and result.rows[0].case["layers"] == 6
    table = tables.anchor_table(result)
    assert "anchoring 6 layers, 256 tokens" in table and "4 × 128 tokens" in table
