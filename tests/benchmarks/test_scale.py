"""What the table of docs/scale.md holds of memory and launches, against a layer of each kind."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import scale
from benchmarks.measure import saved_mib
from benchmarks.registry import Ranks, catalogue, choose, frozen_linear
from benchmarks.shapes import M, R


@pytest.fixture
def provider(request):
    names = {"lora": "peft lora bf16", "secura channel": "secura channel reference"}
    (one,) = choose(catalogue(torch.bfloat16, dropout=False), names[request.param])
    return request.param, one


@pytest.mark.parametrize("provider", scale.METHODS, indirect=True)
def test_what_is_kept_is_what_autograd_keeps(provider):
    method, one = provider
    base = frozen_linear(torch.randn(192, 256, dtype=torch.bfloat16))
    layer = one.build(base, Ranks(M, R))
    x = torch.randn(scale.TOKENS, 256, dtype=torch.bfloat16, requires_grad=True)
    known = [*layer.parameters(), *layer.buffers()]
    with one.running():
        found = saved_mib(lambda: layer(x), known)
    expected = scale.kept([scale.Linear(192, 256, "K")], method, 1) / 2**20
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("provider", scale.METHODS, indirect=True)
def test_launches(provider, monkeypatch):
    recorder = pytest.importorskip("secura_kernels.inspection.recorder")
    method, one = provider
    monkeypatch.setenv("SECURA_IMPL", "triton")
    base = frozen_linear(torch.randn(256, 256, dtype=torch.bfloat16))
    layer = one.make(base, Ranks(32, 16)).to("meta")
    x = torch.empty(512, 256, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with recorder.record(recorder.TARGETS["sm_90"]):
        layer(x)  # norms of W are formed once
    with (
        recorder.record(recorder.TARGETS["sm_90"]) as kernels,
        profile(activities=[ProfilerActivity.CPU]) as steps,
    ):
        layer(x).backward(torch.empty_like(x))
    names = Counter(event.name.removeprefix("aten::") for event in steps.events())
    passes = ("mm", "index_select", "sum", "mul", "add", "cat", "fill_")
    own = sum(names[one] for one in passes) - 3 * names["addmm"]  # on meta two mul and an add more
    assert len(kernels) + own - 2 == scale.LAUNCHES[method]
