"""Tensor parallel, two processes: outputs, gradients, training and files are those of one."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import tiny
import two_processes
from tensor_parallel_runs import LAYERS, PLANS, REFUSED, WHOLE, targets_of

from benchmarks import scale


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return two_processes.run("tensor_parallel_runs:cases", tmp_path_factory.mktemp("two"))


def errors(found, start):
    """``{case: {quantity: error}}`` of the cases whose name starts so."""
    chosen = {name: value for name, value in found.items() if name.startswith(start)}
    assert chosen and not [value for value in chosen.values() if isinstance(value, str)], chosen
    return chosen


@pytest.mark.parametrize("space", tiny.NORMS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_model_and_its_file_are_those_of_one_process(plan, space, found):
    (of,) = errors(found, f"{plan} {space}").values()
    assert of.pop("between the two") == 0
    assert len(of) == (7 if plan == "transformers" else 4) and max(of.values()) < 1e-5, of


@pytest.mark.parametrize("space", tiny.NORMS)
def test_layers_with_biases_dropout_and_split_tokens(space, found):
    of = errors(found, f"layers {space}")
    assert len(of) == 4 + (space != "weight")
    cast = of.pop(f"layers {space} cast")["all"]  # two parts' sums are rounded to bf16 each
    assert max(one["all"] for one in of.values()) < 1e-5 and cast < 0.15, (of, cast)


def test_folded_bases_and_uneven_parts(found):
    of = errors(found, "folded") | errors(found, "uneven")
    assert len(of) == 4
    assert max(max(one.values()) for one in of.values()) < 1e-5, of


def test_processes_start_with_the_firsts_adapter(found):
    apart, largest = found["starts"]
    assert apart == 0 < largest


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_at_a_whole_layer_is_refused(name, found):
    setting, _ = REFUSED[name]
    assert re.match(f"ValueError: layer: {setting} (looks at|rounds) a", found[f"refused {name}"])


def test_several_adapters_are_refused_and_what_needs_a_layer_whole(found):
    assert "active together, which a tensor parallel base does not take" in found["several"]
    for name in WHOLE:
        assert "export or anchor it on one process" in found[f"whole {name}"], name


def test_lora_trains_what_transformers_split_over_its_outputs_and_nothing_else(found):
    (of,) = errors(found, "lora transformers N").values()
    assert max(of.values()) < 1e-5, of
    for name in ("transformers K", "torch N", "torch K"):
        assert found[f"lora {name}"].startswith("RuntimeError"), found[f"lora {name}"]


@pytest.mark.parametrize("method", scale.METHODS)
@pytest.mark.parametrize("setup", ["DDP", "FSDP2", "TP"])
def test_what_scale_counts_is_what_two_processes_send(setup, method, found):
    expected = Counter()
    layers = [LAYERS[name] for name in targets_of(setup, method)]
    blocks = 2 * layers if setup == "DDP" else layers
    for one in scale.added(setup, method, blocks, m=4, r=4, t=21, itemsize=4):
        count = 1 if setup == "DDP" else 2
        expected[f"{one.kind} calls"] += one.calls * count
        expected[f"{one.kind} bytes"] += one.bytes * one.times * count
    assert found[f"{setup} {method}"] == {name: n for name, n in expected.items() if n}
