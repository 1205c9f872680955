"""Launches that skip Triton's look-up, tried with a kernel and a device that are not there."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from types import SimpleNamespace

import torch
from triton import knobs

from secura_kernels.ops import launch
from secura_kernels.ops.launch import Kernel


class Pointer:
    """What a launch asks of a tensor."""

    is_cuda = True

    def __init__(self, place=0, dtype=torch.bfloat16, device=0, size=64):
        self.place, self.dtype, self.device, self.size = place, dtype, device, size

    def untyped_storage(self):
        return SimpleNamespace(size=lambda: self.size)

    def data_ptr(self):
        return self.place

    def get_device(self):
        return self.device


class Compiled:
    """Compiled code that notes how it is started."""

    def __init__(self, log):
        self.function, self.packed_metadata, self.log = "function", "metadata", log

    def run(self, *arguments):
        self.log.append(arguments)


class Jit:
    """Triton's function: counts the launches that go through it."""

    arg_names = ("x", "size", "scale", "WIDE", "BLOCK")

    def __init__(self, *unspecialized):
        self.slow, self.fast = [], []
        self.params = [
            SimpleNamespace(do_not_specialize=name in unspecialized) for name in self.arg_names
        ]

    def __getitem__(self, grid):
        def start(*arguments, **constants):
            self.slow.append((grid, arguments, constants))
            return Compiled(self.fast)

        return start


@pytest.fixture
def kernel(a_driver):
    return Kernel(Jit())


@pytest.fixture
def a_driver(monkeypatch):
    class Driver:
        active = None

        @staticmethod
        def get_current_stream(device):
            return f"stream {device}"

    Driver.active = Driver
    monkeypatch.setattr(launch, "driver", Driver)


CONSTANTS = {"num_warps": 4, "BLOCK": 64, "WIDE": True}


def start(kernel, pointer=None, size=8, grid=(3, 2), scale=0.5, **changes):
    kernel[grid](pointer or Pointer(), size, scale, **CONSTANTS | changes)
    return len(kernel.jit.slow), len(kernel.jit.fast)


def test_the_second_launch_goes_to_the_code_of_the_first(kernel):
    assert start(kernel) == (1, 0)
    other = Pointer(32)
    assert start(kernel, other, grid=(5,)) == (1, 1)
    x, y, z, stream, function, metadata, *hooks, pointer, size, scale, wide, block = (
        kernel.jit.fast[0]
    )
    assert (x, y, z) == (5, 1, 1) and stream == "stream 0"
    assert (function, metadata, hooks) == ("function", "metadata", [None] * 3)
    assert pointer is other and (size, scale) == (8, 0.5)
    assert (wide, block) == (True, 64), "constants in the order of the function's arguments"


@pytest.mark.parametrize(
    "changes",
    [
        {"pointer": Pointer(8)},
        {"pointer": Pointer(dtype=torch.float32)},
        {"pointer": Pointer(device=1)},
        {"size": 9},
        {"size": 2**40},
        {"scale": 1},
        {"size": True},
        {"BLOCK": 32},
        {"num_warps": 8},
        {"WIDE": False},
    ],
)
def test_what_may_need_other_code_goes_through_triton(kernel, changes):
    start(kernel)
    assert start(kernel, **changes) == (2, 0)


def test_a_number_that_triton_does_not_specialize_counts_by_its_width(a_driver):
    """Such as the count of tokens, a new one in every batch: the code is the same."""
    kernel = Kernel(Jit("size"))
    start(kernel, size=8)
    for already, size in enumerate((9, 1, 0, 16, 2**31 - 1)):
        assert start(kernel, size=size) == (1, 1 + already)
    assert [given[-4] for given in kernel.jit.fast] == [9, 1, 0, 16, 2**31 - 1]
    assert start(kernel, size=2**31) == (2, 5)
    assert start(kernel, size=2**40) == (2, 6)
    assert start(kernel, grid=(7,)) == (2, 7)


def test_a_fraction_is_one_whatever_its_value(kernel):
    """Such as a scale with a schedule; 1.0 is no 1, which Triton makes a constant of."""
    start(kernel, scale=1)
    assert start(kernel, scale=1.0) == (2, 0)
    assert start(kernel, scale=0.25) == (2, 1)
    assert kernel.jit.fast[0][-3] == 0.25


def test_a_tensor_of_more_than_2_gib_takes_other_code_on_rocm(kernel, monkeypatch):
    """Triton makes offsets of 32 bits for smaller ones there."""
    small, large = Pointer(size=2**31 - 1), Pointer(size=2**31)
    start(kernel, small)
    assert start(kernel, large) == (1, 1)
    monkeypatch.setattr(launch, "_SHORT_OFFSETS", True)
    start(kernel, small)
    assert start(kernel, large) == (3, 1)
    assert start(kernel, large) == (3, 2) and start(kernel, small) == (3, 3)


def test_hooks_and_other_devices_see_every_launch(kernel, monkeypatch):
    start(kernel)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        slow = len(kernel.jit.slow)
        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, name, lambda *_: None)
            assert start(kernel) == (slow + 1, 0)
        hook = str  # any function
        getattr(knobs.runtime, name).add(hook)
        try:
            assert start(kernel) == (slow + 2, 0)
        finally:
            getattr(knobs.runtime, name).remove(hook)
    on_a_cpu = Pointer()
    on_a_cpu.is_cuda = False
    assert start(kernel, on_a_cpu) == (6, 0)
    assert start(kernel) == (6, 1)


def test_it_forgets_before_it_grows_without_end(kernel, monkeypatch):
    monkeypatch.setattr(launch, "MOST_KEPT", 2)
    for size in range(3):
        start(kernel, size=size)
    assert len(kernel._known) <= 2
    assert start(kernel, size=2) == (3, 1) and start(kernel, size=0) == (4, 1)
