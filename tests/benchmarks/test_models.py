"""Benchmarks of whole models: training steps, memory, start-up, anchoring."""

from __future__ import annotations

import peft
import pytest
import torch

from benchmarks import (
    anchor,
    count_tables,
    memory,
    model,
    rates,
    registry,
    report,
    shapes,
    startup,
    tables,
    training,
)
from benchmarks.measure import MIB, saved_mib
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
    chosen = ["--providers", "secura channel,peft lora fp32"]
    assert startup.main(["--device", "cpu", "--out", str(path), *chosen]) == 0
    rows = {row.provider: row for row in Result.load(path).rows}
    assert {row.status for row in rows.values()} == {"ok"} and "svd init" in rows
    assert rows["secura channel"].figures["layers"] == 14
    assert rows["peft lora fp32"].figures["layers"] == 14
    assert "svd init, m=4" in tables.startup_table(Result.load(path))


def test_every_wrapping_is_one_call_over_all_layers(tiny_model, monkeypatch):
    calls, real = [], peft.get_peft_model
    monkeypatch.setattr(peft, "get_peft_model", lambda *a, **k: calls.append(1) or real(*a, **k))
    case = {"model": "tiny", "blocks": 2}
    layers = startup.linears(case, CPU, torch.bfloat16)
    rivals = registry.catalogue(torch.bfloat16, dropout=False)
    ours = [registry.secura(space, "auto", f"secura {space}") for space in registry.SPACES]
    for provider in [*ours, *(one for one in rivals if one.name.startswith("peft"))]:
        model = startup.put(provider, layers, registry.Ranks(4, 2))
        assert len(calls) == 1 and len(model) == len(layers) == 14
        trained = [value for value in model.parameters() if value.requires_grad]
        assert len(trained) >= 28 and not any(of.weight.requires_grad for of in layers)
        assert all(mine.base_layer is of for mine, of in zip(model, layers, strict=True))
        wide = torch.bfloat16 if provider.name.endswith("bf16") else torch.float32
        assert {value.dtype for value in trained} == {wide}
        calls.clear()


def test_the_counted_memory_is_what_autograd_keeps(tiny_model):
    pytest.importorskip("transformers")
    counted = memory.whole_model(tiny_model, 64)
    case = memory.MemoryCase("tiny", 64, 1, m=4, r=2)
    ids = torch.zeros(1, 64, dtype=torch.long)
    for provider in choose(registry.for_models(torch.bfloat16), "secura,lora bf16"):
        layers = memory.built(provider, counted, registry.Ranks(4, 2))
        found = memory.step_memory(counted, case, layers)
        with training.adapted(counted, layers), provider.running():
            known = [tensor for part in (counted, *layers.values()) for tensor in part.parameters()]
            known += [tensor for part in (counted, *layers.values()) for tensor in part.buffers()]
            saved = saved_mib(lambda: counted.model(input_ids=ids).last_hidden_state, known)
        beside = (ids.nbytes + 64 * tiny_model.hidden * 2) / MIB  # the input and the output
        assert found["kept_mib"] == pytest.approx(saved + beside, rel=0.05), provider.name
        assert found["peak_mib"] > found["kept_mib"]
        training.set_checkpointing(counted, True)
        assert memory.step_memory(counted, case, layers)["kept_mib"] < 0.5 * found["kept_mib"]
        training.set_checkpointing(counted, False)


def test_memory_is_counted_and_shown(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CASES", (memory.MemoryCase("tiny", 32, 1, m=4, r=2),))
    monkeypatch.setattr(memory, "SMALL", "tiny")
    path = tmp_path / "memory.json"
    assert memory.main(["--models", "tiny", "--out", str(path)]) == 0
    result = Result.load(path)
    assert result.complete and {row.status for row in result.rows} == {"ok"}
    peaks = {row.provider: row.figures["peak_mib"] for row in result.rows}
    assert peaks[memory.HEAD] < peaks["secura none"] < peaks["peft dora bf16"]
    assert "| 1.00 × |" in count_tables.memory_table(result)


def test_the_cost_of_anchoring_is_measured_and_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(anchor, "ROUNDS", 3)
    path = tmp_path / "anchor.json"
    flags = ["--device", "cpu", "--preset", "tiny", "--max_seconds", "20", "--out", str(path)]
    assert anchor.main(flags) == 0
    result = Result.load(path)
    names = ["anchoring", anchor.PLAIN, anchor.ANCHORED]
    assert result.complete and [row.provider for row in result.rows] == names
    assert result.rows[0].figures["tokens"] == 256 and result.rows[0].case["layers"] == 6
    table = tables.anchor_table(result)
    assert "anchoring 6 layers, 256 tokens" in table and "4 × 128 tokens" in table


def test_the_rate_of_weights_stands_beside_those_that_were_tried(tmp_path):
    path = tmp_path / "rates.json"
    assert rates.main(["--device", "cpu", "--preset", "tiny", "--out", str(path)]) == 0
    (row,) = Result.load(path).rows
    assert 0 < row.figures["rate"] < 1 and row.figures["tried"] == {}
    result = Result.load(report.RESULTS / "rates.json")
    shown = {tuple(row.case.values()): row.figures["tried"] for row in result.rows}
    assert shown == rates.tried()  # of all committed cells
    table = rates.rates_table(result)
    row = (
        "| smollm2-135m | anchored core, rank=128,decay=30 | mlp | 0.19 to 0.2 | 0.0005 | 0.00025: "
    )
    assert row in table
