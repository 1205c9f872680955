"""The ``activation`` kernels in Triton's interpreter against the fp64 oracle."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secura_kernels import NormOptions, naive
from secura_kernels.norm import COMBINES, FORMS, SAVES, pack
from secura_kernels.ops.activation.op import activation_backward
from secura_kernels.ops.common import Measured, Terms

from .pairs import pairwise
from .rule import (
    SHAPES,
    assert_no_worse,
    case_of,
    check,
    check_example,
    exactly,
    shapes_in_two_dtypes,
)

GATED = NormOptions("activation", "calibrated", "gated")
WIDE = (70, 150, 31, 9)  # N > 2 K: gated, h R is added to g W
ALL = {"folded": "base", "dropout": True, "restrained": True}


pytestmark = pytest.mark.usefixtures("poisoned")


LARGER = [(9, 150, 13, 140), (130, 97, 12, 24)]


@pytest.mark.parametrize(("shape", "dtype"), shapes_in_two_dtypes(*SHAPES, *LARGER), ids=str)
@pytest.mark.parametrize("combine", COMBINES)
def test_shapes_and_dtypes(shape, dtype, combine):
    check(shape, NormOptions("activation", "calibrated", combine), dtype)


@pytest.mark.parametrize("shape", [(1, 1, 3, 1), (33, 66, 3, 16), (9, 150, 3, 140)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
def test_shapes_and_dtypes_of_a_given_output(shape, dtype, combine):
    options = NormOptions("activation", "calibrated", combine)
    check(shape, options, dtype, given=True)
    check(shape, options, dtype, given=True, own_z=True)


@pytest.mark.parametrize(
    ("norm", "folded", "dropout", "restrained"),
    pairwise(list(product(FORMS, COMBINES)), ("", "base"), (False, True), (False, True)),
)
def test_every_option(norm, folded, dropout, restrained):
    check(
        (19, 70, 3, 9), NormOptions("activation", *norm), torch.float16, given=True,
        folded=folded, dropout=dropout, restrained=restrained,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("y0_given", [False, True])
def test_fp32_restrained_and_relative_to_a_folded_base(form, y0_given):
    options = NormOptions("activation", form, "averaged", 4.0, 0.05, True)
    check((34, 70, 20, 9), options, given=y0_given, **ALL)


@pytest.mark.parametrize("folded", ["", "base"])
@pytest.mark.parametrize("m", [9, 66])
@pytest.mark.parametrize("combine", COMBINES)
def test_eight_bits_keep_the_gain(combine, m, folded):
    how = ALL if folded else {}
    options = NormOptions("activation", "calibrated", combine)
    check((40, 70, 3, m), options, torch.float16, given=True, save="8bit", **how)


def test_kept_gain_is_within_half_a_step_and_y0_is_not_saved():
    flags = {"given": True, "save": "8bit", "biased": False, "trains_bias": False}
    example = case_of((40, 70, 3, 9), NormOptions("activation"), **flags).draw()
    x = example.x.clone().requires_grad_()
    for impl in ("triton", "reference"):
        out = example._replace(x=x).output(impl)
        saved = out.grad_fn.saved_tensors
        large = [tensor for tensor in saved if tensor is not None and tensor.shape == x.shape]
        assert [tensor.dtype for tensor in large] == [torch.uint8]
        wide = example.to(torch.float64)
        p = wide.layer.columns @ wide.a
        delta = wide.x[:, wide.layer.rows] @ p.T
        rho = delta.abs() / (wide.x.abs() + 1e-10)
        exact = 1 / naive.magnitude_gain(rho, "calibrated", 6.0)
        assert (0.5 + large[0].double() / 510 - exact).abs().max() <= 0.5 / 510 + 1e-6


@pytest.mark.parametrize("combine", COMBINES)
def test_kept_levels_are_read_as_plain_torch_reads_them(combine):
    t, n, m = 20, 40, 5
    levels = torch.arange(t * n).remainder(256).to(torch.uint8).view(t, n)
    g, z, p, p_base = (torch.randn(size) for size in ((t, n), (t, m), (n, m), (n, m)))
    terms = Terms(p, p_base, None, torch.rand(t, m))
    found, norm = Measured(torch.empty(0), torch.empty(0)), pack(GATED._replace(combine=combine))
    plain, ours = (
        activation_backward(
            g, levels, z, None, torch.randperm(n)[:m], terms, found, norm, [True] * 3, impl
        )
        for impl in ("reference", "triton")
    )
    torch.testing.assert_close(ours[1:], plain[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("combine", COMBINES)
def test_strides_expanded_gradients_and_inputs_left_as_they_were(combine, save):
    options = NormOptions("activation", None, combine)
    example = case_of((40, 66, 20, 5), options, torch.bfloat16, save=save).draw()
    plain, held = example.run("triton"), (example.x, example.layer.weight, example.grad)
    x, weight, grad = (tensor.clone() for tensor in held)
    moved = example._replace(
        x=x.repeat_interleave(2, 1)[:, ::2],
        grad=grad.t().contiguous().t(),
        layer=example.layer._replace(weight=weight.t().contiguous().t()),
    )
    for got, expected in zip(moved.run("triton"), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    assert all(torch.equal(a, b) for a, b in zip(held, (x, weight, grad), strict=True))
    expanded = moved._replace(grad=torch.ones((), dtype=torch.bfloat16).expand(40, 66))
    if save == "recompute":
        check_example(expanded)


@pytest.mark.parametrize("combine", COMBINES)
def test_a_row_named_twice_far_apart(combine):
    """By two programs: averaged, both add to ∂y0 in place, where one could read the other's sum."""
    options = NormOptions("activation", "calibrated", combine)
    example = case_of((20, 90, 3, 80), options, given=True).draw()
    rows = example.layer.rows.clone()
    rows[79] = rows[0]
    check_example(example._replace(layer=example.layer._replace(rows=rows)))


def test_a_given_output_is_not_written_and_expanded_gradients_work():
    flags = {"given": True, "dropout": True}
    example = case_of((20, 40, 3, 5), NormOptions("activation"), torch.bfloat16, **flags).draw()
    y0 = example.x.clone()
    example = example._replace(grad=torch.ones(1, 1, dtype=torch.bfloat16).expand(20, 40))
    contiguous = example._replace(grad=example.grad.contiguous())
    for one, other in zip(example.run("triton"), contiguous.run("triton"), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(example.x, y0)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("y0_given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_partial_gradients_equal_those_of_all(combine, y0_given, dtype):
    options = NormOptions("activation", "calibrated", combine)
    example = case_of(WIDE, options, dtype, given=y0_given, dropout=True).draw()
    whole = example.run("triton")[1:]
    for index, name in enumerate(("x", "a", "delta_bias")):
        leaf = getattr(example, name).clone().requires_grad_()
        out = example._replace(**{name: leaf}).output("triton")
        (gradient,) = torch.autograd.grad(out, leaf, example.grad)
        assert torch.equal(gradient, whole[index])


def test_torchs_default_dtype_changes_nothing():
    options = NormOptions("activation", "paper")
    example = case_of((20, 40, 3, 5), options, torch.float16, given=True).draw()
    example = example._replace(x=example.x.requires_grad_())
    expected = example.output("triton")
    torch.set_default_dtype(torch.float64)
    try:
        got = example.output("triton")
    finally:
        torch.set_default_dtype(torch.float32)
    scalars = [t for t in got.grad_fn.saved_tensors if t is not None]
    assert torch.float64 not in {tensor.dtype for tensor in scalars}
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    t=st.integers(1, 70), n=st.integers(1, 140), m=st.integers(1, 40), seed=st.integers(0, 99),
    strided=st.booleans(), combine=st.sampled_from(COMBINES), save=st.sampled_from(SAVES),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def test_any_shape_and_strides(t, n, m, seed, strided, combine, save, dtype):
    options = NormOptions("activation", "calibrated", combine)
    flags = {"folded": "base", "given": True, "save": save}
    example = case_of((t, n, 3, min(m, n)), options, dtype, **flags).draw(seed=seed)
    if strided:
        layer, delta = example.layer, example.delta_bias.repeat_interleave(2)[::2]
        rows = layer.rows.repeat_interleave(2)[::2]
        x, grad = (tensor.repeat_interleave(2, 1)[:, ::2] for tensor in (example.x, example.grad))
        layer = layer._replace(rows=rows)
        example = example._replace(x=x, grad=grad, delta_bias=delta, layer=layer)
    check_example(example, 1e-3 if save == "8bit" else 0.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("combine", COMBINES)
def test_no_change_leaves_the_output_as_it_was(form, combine):
    options = NormOptions("activation", form, combine)
    flags = {"given": True, "trains_bias": False}
    example = case_of((5, 20, 3, 4), options, torch.bfloat16, **flags).draw()
    assert torch.equal(example._replace(a=torch.zeros(4, 4)).output("triton"), example.x)


@pytest.mark.parametrize("shape", [(0, 8, 5, 2), (3, 8, 5, 2), (3, 0, 5, 0)], ids=str)
@pytest.mark.parametrize("y0_given", [False, True])
def test_nothing_to_launch(shape, y0_given):
    example = case_of(shape, NormOptions("activation", "paper"), given=y0_given).draw()
    for got, expected in zip(example.run("triton"), exactly(example), strict=True):
        assert got.shape == expected.shape and got.isfinite().all()


def test_another_dtype_is_refused():
    example = case_of((3, 5, 2, 2), NormOptions("activation"), torch.float64, given=True).draw()
    with pytest.raises(RuntimeError, match=r"float64"):
        example.output("triton")


def test_plain_torch_in_the_same_dtype_is_the_yardstick():
    """The rule fails on a wrong tensor: here the oracle's own, doubled."""
    example = case_of((19, 70, 31, 9), GATED).draw()
    exact = exactly(example)
    with pytest.raises(AssertionError, match="tensor 0: error"):
        wrong = [2 * exact[0].float(), *example.run("reference")[1:]]
        assert_no_worse(wrong, example.run("reference"), exact, torch.float32)
