"""Launches and bytes counted on tensors without data, against what is known and what is planned."""

import pytest
import torch

from benchmarks import counts, launches
from benchmarks.shapes import LayerCase
from secura_kernels import Layer, NormOptions, plan, secura_linear
from secura_kernels.dispatch import interpreting
from secura_kernels.inspection.costs import layer_costs
from secura_kernels.norm import complete
from secura_kernels.plan import DEFAULT, Shape

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are interpreted, not recorded")

SHAPES = ((8192, 4096, 4096), (2048, 14336, 4096), (512, 4096, 14336))


def case(t: int, n: int, k: int) -> LayerCase:
    return LayerCase("one", "q", 1, t, n, k, 128, 16)


def test_a_frozen_layer_is_two_products():
    t, n, k = 512, 1024, 4096
    found, first = counts.rival("frozen")(case(t, n, k))
    assert [one.name for one in found] == ["mm", "mm"] and first == 1
    assert {one.cost for one in found} == {plan.product(Shape(t, n, k, 0))}


@pytest.mark.parametrize(
    ("norm", "more"), [("none", 4), ("channel", 4), ("activation", 4), ("weight", 6)]
)
def test_what_a_rank_that_is_no_multiple_of_16_costs(norm, more):
    """As docs/kernels.md says: launches of a layer forward and backward."""
    like = {"device": "meta", "dtype": torch.bfloat16}
    found = []
    for m in (144, 150):
        places = torch.empty(m, dtype=torch.int64, device="meta")
        norms = torch.empty(m, m, device="meta"), torch.empty(4096, device="meta")
        layer = Layer(
            torch.empty(4096, 4096, **like), None, places, places, NormOptions(norm),
            gram=norms[0], base_norms=norms[1],
        )  # fmt: skip
        a, b = (torch.empty(*size, device="meta").requires_grad_() for size in ((m, 8), (8, m)))
        x = torch.empty(8192, 4096, **like).requires_grad_()
        with launches.counting() as launched:
            secura_linear(x, layer, a, b, impl="triton").backward(torch.empty(8192, 4096, **like))
        found.append(len(launched))
    assert found[1] - found[0] == more


def test_operators_read_their_inputs_and_write_their_outputs():
    wide, rows = torch.empty(64, 32, device="meta"), torch.empty(5, device="meta").long()
    with launches.counting() as found:
        wide.t().reshape(64, 32)
        wide[:, :1].expand(64, 32) + wide
        wide.index_select(0, rows)
        torch.mm(wide.t(), wide, out=torch.empty(32, 32, device="meta"))
        torch.empty_like(wide).view(-1)
    moved = {one.name: one.cost.bytes for one in found}
    square = 64 * 32 * 4
    assert moved == {
        "clone": 2 * square,
        "add": 64 * 4 + 2 * square,
        "index_select": 5 * 8 + 2 * 5 * 32 * 4,
        "mm": 2 * square + 32 * 32 * 4,
    }


@pytest.mark.parametrize("space", counts.SPACES)
def test_sums_of_one_inputs_gradient(space):
    """Two additions for three layers, and with ∂x in place none: a [T, K] read for each instead."""
    given = [case(512, n, 1024) for n in (1024, 512, 512)]
    apart, _ = counts.ours(space)(*given)
    together, _ = counts.ours(space, shares=True)(*given)
    sums = [sum(of.name in ("add", "add_") for of in found) for found in (apart, together)]
    assert sums == [2, 0]
    size = 512 * 1024 * 2
    moved = [sum(of.cost.bytes for of in found) for found in (apart, together)]
    assert moved[0] - moved[1] == pytest.approx(2 * (3 - 1) * size)


def test_c_beside_the_weight_is_read_whole():
    """Of the sectors that 128 columns of 4096 lie in, a sixteenth and no other byte."""
    n, k, m = 1024, 4096, 128
    moved = []
    for kept in (False, True):
        found, _ = counts.ours("none", columns=kept)(case(512, n, k))
        moved.append(sum(of.cost.bytes for of in found if of.name.startswith("_project")))
    indices = 2 * 8 * m
    expected = 2 * (plan.sectors(n, k, m, 2) - n * m * 2) + indices
    assert moved[0] - moved[1] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("space", counts.SPACES)
def test_a_micro_batch_between_others(space):
    """No column of W is read, nor is a product of A and B made, and ∂P is added to."""
    found, first = counts.ours(space, holds=True)(case(512, 1024, 4096))
    plain, before = counts.ours(space)(case(512, 1024, 4096))
    names = [of.name for of in found]
    assert not any(name.startswith("_project") for name in names) and "add_" in names
    assert first <= before - 2 and len(found) - first <= len(plain) - before - 3


@pytest.mark.parametrize("keeps", ["never", "always"])
@pytest.mark.parametrize("space", counts.SPACES)
def test_the_plan_is_what_is_launched(space, keeps):
    """Each pass's bytes and time as :func:`layer_costs` has them, within 5%."""
    norm = complete(NormOptions(space))
    for t, n, k in SHAPES:
        found, first = counts.ours(space, keeps)(case(t, n, k))
        planned = layer_costs(Shape(t, n, k, 128), norm, keeps == "always")
        for steps, made in zip(planned, (found[:first], found[first:]), strict=True):
            moved = sum(step.bytes for step in steps.values())
            assert moved == pytest.approx(sum(one.cost.bytes for one in made), rel=0.05)
            time = sum(one.cost.seconds(DEFAULT) for one in made)
            assert plan.seconds(steps, DEFAULT) == pytest.approx(time, rel=0.05)
