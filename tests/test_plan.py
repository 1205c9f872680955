"""Every choice follows its count of bytes and operations."""

import random
from types import SimpleNamespace

import pytest
import torch

from secura_kernels import NormOptions, plan
from secura_kernels.norm import complete
from secura_kernels.plan import CEILINGS, Ceilings, Cost, Shape


def norm_of(combine: str = "gated"):
    return complete(NormOptions("activation", combine=combine))


def test_time_is_of_bytes_or_of_operations():
    ceilings = Ceilings(bytes_s=10.0, flop_s=100.0)
    assert Cost(20, 100).seconds(ceilings) == 2 and Cost(20, 300).seconds(ceilings) == 3
    assert plan.seconds({"a": Cost(20, 100), "b": Cost(20, 300)}, ceilings) == 5


@pytest.mark.parametrize(("width", "itemsize", "m"), [(64, 2, 8), (4096, 2, 128), (96, 4, 30)])
def test_scattered_columns_count_by_the_sectors_that_they_lie_in(width, itemsize, m):
    draw = random.Random(0)
    found = [len({draw.randrange(width) * itemsize // 32 for _ in range(m)}) for _ in range(400)]
    mean = 32 * sum(found) / len(found)
    assert plan.sectors(7, width, m, itemsize) == pytest.approx(7 * mean, rel=0.02)
    assert plan.sectors(1, 4, 4, 2) == 32


@pytest.mark.parametrize(
    ("t", "n", "k", "taken"),
    [
        (8192, 4096, 4096, True),
        (8192, 14336, 4096, True),
        (8192, 4096, 14336, False),
        (2048, 4096, 4096, False),
    ],
)
def test_the_forward_takes_what_was_the_quicker_on_an_h100(t, n, k, taken):
    assert plan.takes_weight(Shape(t, n, k, 128)) is taken


@pytest.mark.parametrize("ceilings", CEILINGS.values(), ids=CEILINGS)
@pytest.mark.parametrize(
    ("t", "n", "k", "way"),
    [
        (8192, 4096, 4096, "weight"),
        (2048, 4096, 4096, "h"),
        (8192, 4096, 14336, "output"),
        (512, 14336, 4096, "h"),
    ],
)
def test_the_input_gradient_takes_the_way_that_moves_the_fewest_bytes(t, n, k, way, ceilings):
    """2 N K elements against 3 T K or so, or T N and the scattered columns."""
    assert plan.input_way(Shape(t, n, k, 128), ceilings=ceilings) == way


def test_ways_that_would_be_wrong_are_none():
    """A token's own W' under dropout; g in the place of ∂y0 where the base has a scale."""
    for shape in (Shape(8192, 4096, 4096, 128), Shape(64, 14336, 4096, 16)):
        assert plan.input_way(shape, per_token=True, scaled=True) == "output"
        assert "weight" not in plan.input_ways(shape, per_token=True)
        assert "h" not in plan.input_ways(shape, scaled=True)


def test_a_chip_with_few_operations_a_byte_makes_no_second_weight():
    shape = Shape(8192, 4096, 4096, 512)
    assert plan.takes_weight(shape, ceilings=Ceilings(1e12, 1e15))
    assert not plan.takes_weight(shape, ceilings=Ceilings(1e15, 1e12)._replace(processors=1))


def test_an_unknown_chip_has_its_own_processors_and_the_rates_of_an_h100(monkeypatch):
    chips = [SimpleNamespace(name="NVIDIA A100-SXM4-80GB", multi_processor_count=108)]
    chips.append(SimpleNamespace(name="NVIDIA H200", multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "get_device_properties", chips.__getitem__)
    plan._ceilings.cache_clear()
    try:
        assert plan._ceilings(0) == plan.DEFAULT._replace(processors=108)
        assert plan._ceilings(1) == plan.CEILINGS["h200"]
    finally:
        plan._ceilings.cache_clear()


def test_h_is_added_where_the_output_is_not_the_narrower_side():
    assert plan.adds_h(Shape(8192, 14336, 4096, 128), norm_of())
    assert plan.adds_h(Shape(8192, 4096, 4096, 128), norm_of())
    assert not plan.adds_h(Shape(8192, 4096, 14336, 128), norm_of())
    assert not plan.adds_h(Shape(8192, 14336, 4096, 128), norm_of("averaged"))
    restrained = norm_of()._replace(restrained=True)
    assert not plan.adds_h(Shape(8192, 14336, 4096, 128), restrained)
