"""Operations by count: an operator's formula, and what runs within it."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from secura_kernels import NormOptions, api, dispatch, plan
from secura_kernels.gpu import H100, assume
from secura_kernels.inspection.examples import Case
from secura_kernels.inspection.recorder import TARGETS, record

from .draws import draw, every_option


@every_option
@pytest.mark.parametrize("folded", ["", "base"])
@pytest.mark.parametrize("given", [False, True])
def test_operations_are_those_of_the_products_within(options, folded, given, monkeypatch):
    if given and options.norm == "weight":
        pytest.skip("the space takes no y0")

    def counted():
        # torch's own table lacks products in place
        in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            for sizes in ({}, {"t": 29}, {"k": 29}):
                draw(options, folded=folded, given=given, **sizes).run("reference")
        return counter.get_total_flops()

    by_formula = counted()
    for module in (dispatch, api):
        monkeypatch.setattr(module, "is_watched", lambda *args: False)
    assert by_formula == counted() > 0


@pytest.mark.parametrize("biased", [False, True])
def test_operations_of_an_activation_whose_z_has_a_product_of_its_own(biased):
    case = Case(NormOptions("activation"), torch.bfloat16, 8, 48, 16, 32, biased=biased)
    with FlopCounterMode(display=False) as counter:
        case.draw().output("reference")
    own = 2 * 48 * 32 * 8 * biased
    assert counter.get_total_flops() == own + 2 * (16 * 8 * 8 + 48 * 16 * 32 + 48 * 16 * 8)


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_operations_of_a_forward_through_the_new_weight(norm, monkeypatch):
    """Rounded stochastically; and with kernels where W' moves less."""
    t, n, k, m = 48, 16, 32, 8
    case = Case(NormOptions(norm), torch.bfloat16, m, t, n, k, trains_bias=False)
    through = 2 * (n * m * m * (1 + (norm == "channel")) + n * k * m + t * k * m + t * n * k)
    beside = through + 2 * (t * n * m - n * k * m - t * k * m)

    def counted(case, device, impl):
        example = case.draw(device)
        example.a.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            example.output(impl)
        return counter.get_total_flops()

    rounded = replace(case, rounding_seed=0)
    assert counted(rounded, "cpu", "reference") == through
    assert counted(case, "cpu", "reference") == beside
    for taken, expected in ((True, through), (False, beside)):
        monkeypatch.setattr(plan, "takes_weight", lambda shape, kept, ceilings, taken=taken: taken)
        with assume(H100):
            assert counted(case, "meta", "triton") == expected
            assert counted(replace(case, dropout=True), "meta", "triton") == beside


def test_kernels_make_the_change_once_a_pass():
    """`paper` looks for the largest ρ first; plain torch keeps a small W's change from there."""
    t, n, k, m = 48, 16, 32, 8
    case = Case(NormOptions("weight", "paper"), torch.bfloat16, m, t, n, k, trains_bias=False)

    def counted(device, impl):
        with FlopCounterMode(display=False) as counter:
            case.draw(device).output(impl)
        return counter.get_total_flops()

    once = 2 * (n * m * m + t * n * k + n * k * m)
    assert counted("cpu", "reference") == once
    with assume(H100):
        assert counted("meta", "triton") == once + 2 * n * k * m


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_no_z_is_made_where_no_backward_pass_follows(norm, monkeypatch):
    """Nor with A and B frozen; where it goes through W', z is a product of its own."""
    monkeypatch.setattr(plan, "takes_weight", lambda shape, kept, ceilings: True)
    example = Case(NormOptions(norm), torch.bfloat16, 8, 48, 16, 32).draw("meta")
    trained = example._replace(a=example.a.requires_grad_())

    def counted(example):
        with FlopCounterMode(display=False) as counter:
            example.output("triton")
        return counter.get_total_flops()

    with record(TARGETS["sm_90"]):
        for watched in (True, False):  # as the formula has it, and as it is
            for module in (dispatch, api):
                monkeypatch.setattr(module, "is_watched", lambda *args, watched=watched: watched)
            whole = counted(trained)
            with torch.no_grad():
                assert counted(trained) == whole - 2 * 48 * 32 * 8
            assert counted(example._replace(a=example.a.detach())) == whole - 2 * 48 * 32 * 8


def test_a_formula_takes_arguments_that_its_op_has():
    from secura_kernels.ops.flops import FORMULAS

    for operator, formula in FORMULAS.values():
        wanted = inspect.signature(formula).parameters
        assert wanted.keys() <= inspect.signature(operator).parameters.keys()
