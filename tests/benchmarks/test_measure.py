"""Times in turns, and the bytes that a layer keeps."""

from __future__ import annotations

import pytest
import torch

from benchmarks import measure, shapes
from benchmarks.registry import Provider, Ranks, catalogue, choose, frozen_linear

TINY = shapes.LayerCase("square", "linear", 1, T=24, N=40, K=56, m=6, r=3)
CPU = torch.device("cpu")


def test_rounds_are_interleaved_and_stop_in_time():
    order: list[str] = []
    tasks = {
        name: measure.Task(
            lambda name=name: lambda: order.append(name), Provider("", "", id).running
        )
        for name in "ab"
    }
    found, failures = measure.interleaved(tasks, CPU, rounds=3)
    assert order == list("abbaab") and found["a"]["samples"] == 3 and not failures
    assert measure.interleaved(tasks, CPU, rounds=9, deadline=0.0)[0]["b"]["samples"] == 2


def test_a_task_that_raises_leaves_the_others_their_turns():
    def raises():
        raise RuntimeError("out of registers")

    running = Provider("", "", id).running
    tasks = {
        name: measure.Task(lambda call=call: call, running)
        for name, call in (("bad", raises), ("good", lambda: None))
    }
    found, failures = measure.interleaved(tasks, CPU, rounds=3)
    assert found.keys() == {"good"} and found["good"]["samples"] == 3
    assert failures.keys() == {"bad"} and failures["bad"].__traceback__ is None


def test_saved_bytes_are_counted_once_and_without_weights():
    weight, x = torch.randn(TINY.N, TINY.K), torch.randn(TINY.T, TINY.K)
    saved = {}
    for name in ("strong lora", "secura none reference", "secura activation reference"):
        (provider,) = choose(catalogue(torch.float32), name)
        module = provider.build(frozen_linear(weight), Ranks(TINY.m, TINY.r))
        known = [*module.parameters(), *module.buffers(), weight]
        saved[name] = measure.saved_mib(lambda module=module: module(x), known) * 2**20
    assert saved["strong lora"] == x.nbytes + 4 * TINY.T * TINY.r
    thin = 4 * (TINY.T * TINY.m + 2 * TINY.N * TINY.m) + 8 * TINY.m + 8 * TINY.m**2
    assert saved["secura none reference"] <= thin + 4 * TINY.m * TINY.K
    assert saved["secura activation reference"] >= 4 * TINY.T * TINY.N


def test_what_is_gone_before_the_backward_pass_is_not_counted_as_saved():
    x = torch.randn(1024, requires_grad=True)

    def forward():
        for _ in range(3):
            (torch.exp(x) * 2).sum()  # its graph ends here
        return torch.exp(x).tanh()

    assert measure.saved_mib(forward, []) * 2**20 == 2 * x.nbytes


def test_peak_memory_is_the_allocators():
    def call():
        first = torch.empty(2**20)
        second = torch.empty(2**19)
        del first, second
        return torch.empty(2**18)

    assert measure.peak_mib(call, CPU) == pytest.approx(6, abs=0.1)
