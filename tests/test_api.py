"""The api against the oracle: values and every gradient, each space, form and combination."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn.functional import linear

import secura_kernels
from secura_kernels import (
    Layer,
    NormOptions,
    effective_weight,
    important_channels,
    naive,
    secura_add,
    secura_linear,
    with_norms,
)
from secura_kernels.api import additive_product
from secura_kernels.inspection.examples import Case
from secura_kernels.norm import COMBINES, FORMS, NORMS, SAVES, pack, unpack
from secura_kernels.ops.channel.op import delta_norms
from secura_kernels.ops.common import summed_bias
from secura_kernels.ops.project.op import project
from secura_kernels.ops.weight import plain

WIDE = {"dtype": torch.float64, "n": 13, "k": 11, "m": 4, "t": 7}


def close(example, **tolerance):
    for got, expected in zip(example.run(), example.run(functions=naive), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("folded", ["", "base", "change"])
@pytest.mark.parametrize("restrained", [False, True], ids=["free", "restrained"])
@pytest.mark.parametrize("inner", [0, 6], ids=["U", "A B"])
def test_linear_matches_the_oracle(options, folded, restrained, inner):
    flags = {"folded": folded, "restrained": restrained, "inner": inner, "scaling": 0.5}
    close(Case(options, **WIDE, **flags).draw())


@pytest.mark.parametrize("folded", ["", "base"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("own_z", [False, True])
def test_add_matches_the_oracle(options, folded, biased, own_z):
    if options.replaces_product:
        pytest.skip("the space takes no y0")
    flags = {"restrained": True, "biased": biased, "given": True, "own_z": own_z}
    close(Case(options, **WIDE, folded=folded, **flags).draw())


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("dropout", [False, True])
def test_a_z_of_its_own_is_what_the_output_and_the_gradient_of_u_are_made_of(
    options, dropout, save
):
    """z of other numbers than y0's acts; ∂y0 is where the gradient of x comes from all the same."""
    if options.replaces_product:
        pytest.skip("the space takes no y0")
    flags = {"folded": "base", "dropout": dropout, "given": True, "save": save}
    example = Case(options, **WIDE, own_z=True, **flags).draw()
    if save != "8bit":
        close(example)
    shaped = example._replace(x=example.x[None], z=example.z[None], grad=example.grad[None])
    mask = None if example.z_scale is None else example.z_scale[None]
    for one, of_batch in zip(example.run(), shaped._replace(z_scale=mask).run(), strict=True):
        torch.testing.assert_close(of_batch.view_as(one), one)
    read = example._replace(z=None).run()
    assert not any(
        torch.allclose(a, b) for a, b in zip(example.run()[:3:2], read[:3:2], strict=True)
    )


@pytest.mark.parametrize("save", SAVES)
def test_nan_is_not_hidden(options, save):
    """What is NaN in U shows in the output and in the gradient of x."""
    example = Case(options, **WIDE, save=save).draw()
    example.a[:, 2] = torch.nan
    out, dx, *_ = example.run()
    assert out.isnan().any(dim=0).all() and dx.isnan().any()


@pytest.mark.parametrize("norm", ["none", "channel", "activation"])
@pytest.mark.parametrize("combine", ["gated", "averaged"])
@pytest.mark.parametrize("y0_given", [True, False])
def test_dropout_scales_z_of_the_change_alone(norm, combine, y0_given):
    options = NormOptions(norm, combine=combine)
    flags = {"dropout": True, "folded": "base", "restrained": norm != "none", "given": y0_given}
    close(Case(options, **WIDE, **flags).draw())


@pytest.mark.parametrize("y0_given", [True, False])
def test_given_and_made_outputs_agree(options, y0_given):
    """secura_add on the base's own output is secura_linear, the gradients of A and δb included."""
    if options.replaces_product:
        pytest.skip("the space takes no y0")
    example = Case(options, **WIDE, folded="base").draw()
    y0 = linear(example.x, example.layer.weight, example.layer.bias)
    added = example._replace(x=y0, given=True).run()
    made = example.run()
    for index in (0, 2, 3):
        torch.testing.assert_close(added[index], made[index], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(added[1] @ example.layer.weight, made[1], rtol=1e-10, atol=1e-10)


def test_columns_stand_in_the_place_of_those_of_the_weight(options):
    example = Case(options, **WIDE, folded="base").draw()
    columns = torch.randn(13, 4, dtype=torch.float64)
    layer = example.layer._replace(columns=columns)
    given = example._replace(layer=with_norms(layer) if options.norm == "channel" else layer)
    close(given)
    if not options.replaces_product:
        bare = given.layer._replace(weight=None)
        added = secura_add(example.grad, bare, example.a)
        whole = secura_add(example.grad, given.layer, example.a)
        torch.testing.assert_close(added, whole)


def test_relative_eps(options):
    close(Case(options._replace(eps=0.05, eps_relative=True), **WIDE, folded="base").draw())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_dtypes_err_no_more_than_plain_torch(norm, dtype):
    """Error against the fp64 oracle ≤ 2 × that of plain torch in the same dtype + a floor."""
    case = Case(NormOptions(norm), dtype, 8, 29, 33, 40, trains_bias=False)
    low, wide = case.draw(), case.draw().to(torch.float64)
    got, exact = low.run(), wide.run(functions=naive)

    def plain(example):
        layer = example.layer
        x, u = example.x.clone().requires_grad_(), example.a.clone().requires_grad_()
        p = (layer.weight[:, layer.cols].to(u.dtype) @ u).to(x.dtype)
        out = linear(x, layer.weight, layer.bias) + (x @ layer.weight[layer.rows].T) @ p.T
        return out.detach(), *torch.autograd.grad(out, (x, u), example.grad)

    floor = 4 * torch.finfo(dtype).eps
    for ours, oracle, same, ideal in zip(got, exact, plain(low), plain(wide), strict=True):
        error = (ours.double() - oracle).norm() / oracle.norm()
        yardstick = (same.double() - ideal).norm() / ideal.norm()
        assert error <= 2 * yardstick + floor
        assert ours.dtype == same.dtype


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (2, 0, 3)], ids=str)
def test_leading_dimensions(shape, options):
    example = Case(options, **WIDE, trains_bias=False).draw()
    x = torch.randn(*shape, 11, dtype=torch.float64, requires_grad=True)
    a = example.a.clone().requires_grad_()
    out = example._replace(x=x, a=a).output()
    assert out.shape == (*shape, 13)
    out.sum().backward()
    assert x.grad.shape == x.shape and a.grad.isfinite().all()


def test_an_output_with_leading_dimensions_may_be_written_into(options):
    example = Case(options, **WIDE, trains_bias=False).draw()
    x = example.x.clone().requires_grad_()

    def gradient(x):
        out = example._replace(x=x).output()
        out *= 2
        return torch.autograd.grad(out.square().sum(), x)[0]

    torch.testing.assert_close(gradient(x[None].detach().requires_grad_())[0], gradient(x))


def test_strided_inputs(options):
    example = Case(options, **WIDE, folded="base").draw()
    expected = example.run()
    moved = example._replace(
        x=example.x.repeat_interleave(2, 1)[:, ::2],
        grad=example.grad.t().contiguous().t(),
        layer=example.layer._replace(weight=example.layer.weight.t().contiguous().t()),
    )
    for got, value in zip(moved.run(), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-10)


def test_expanded_gradient(options):
    example = Case(options, **WIDE, folded="base").draw()
    ones = torch.ones_like(example.grad)
    expanded = example._replace(grad=torch.ones((), dtype=torch.float64).expand(ones.shape)).run()
    for got, expected in zip(expanded, example._replace(grad=ones).run(), strict=True):
        torch.testing.assert_close(got, expected)


def test_gradients_that_nobody_wants_are_not_made(options):
    example = Case(options, **WIDE, inner=6, folded="base").draw()
    names = ("x", "a", "b", "delta_bias")
    for wanted in names:
        leaves = {name: getattr(example, name).clone() for name in names}
        leaves[wanted].requires_grad_()
        example._replace(**leaves).output().backward(example.grad)
        assert [name for name in names if leaves[name].grad is not None] == [wanted]


def test_norms_of_a_weight_that_is_trained_have_no_graph():
    layer = Case(NormOptions("channel"), **WIDE).draw().layer
    trained = layer._replace(weight=layer.weight.clone().requires_grad_())
    found = with_norms(trained)
    assert not (found.gram.requires_grad or found.base_norms.requires_grad)
    assert torch.equal(found.base_norms, layer.base_norms)


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_computes_in_its_dtype_and_keeps_gradients_in_fp32(norm):
    example = Case(NormOptions(norm)).draw()
    x, a = example.x.clone().requires_grad_(), example.a.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = example._replace(x=x, a=a).output()
    assert out.dtype == torch.bfloat16
    out.backward(example.grad.bfloat16())
    assert x.grad.dtype == a.grad.dtype == torch.float32


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_leaves_fp64_as_it_is(norm):
    example = Case(NormOptions(norm), torch.float64).draw()
    expected = example.run()
    with torch.autocast("cpu", torch.bfloat16):
        found = example.run()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("form", "combine"), list(product(FORMS, COMBINES)))
def test_weight_chunks_do_not_change_the_result(form, combine, monkeypatch):
    options = NormOptions("weight", form, combine)
    example = Case(options, **WIDE, folded="base", restrained=True).draw()
    whole = [effective_weight(example.layer, example.a), *example.run()]
    monkeypatch.setattr(plain, "CACHE_MIB", 1e-9)
    assert plain.rows_at_once(example.layer.weight, torch.float64) == 1
    torch.testing.assert_close([effective_weight(example.layer, example.a), *example.run()], whole)


@pytest.mark.parametrize("folded", ["", "base", "change"])
@pytest.mark.parametrize("norm", ["none", "channel", "weight"])
def test_effective_weight_matches_the_oracle(norm, folded):
    example = Case(NormOptions(norm), **WIDE, folded=folded, restrained=True, inner=6).draw()
    arguments = (example.layer, example.a, example.b)
    torch.testing.assert_close(effective_weight(*arguments), naive.effective_weight(*arguments))


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_additive_product_is_that_of_the_effective_weight(norm):
    example = Case(NormOptions(norm), **WIDE, folded="base", restrained=True).draw()
    layer = example.layer
    q, base_scale = additive_product(layer, example.a)
    base = layer.weight if base_scale is None else base_scale[:, None] * layer.weight
    expected = effective_weight(layer, example.a)
    torch.testing.assert_close(base + q @ layer.weight[layer.rows], expected)
    with pytest.raises(ValueError, match="no product of low rank"):
        additive_product(layer._replace(options=NormOptions("weight")), example.a)


def test_the_public_names_are_few():
    assert len(secura_kernels.__all__) <= 10
    assert all(hasattr(secura_kernels, name) for name in secura_kernels.__all__)


def test_a_norm_comes_back_from_its_packed_form(options):
    example = Case(options, restrained=True).draw()
    restrain = example.layer.restrain
    for traced in (False, True):
        norm = unpack(pack(options._replace(eps=0.1, scale=1 / 3), restrain, traced=traced))
        assert norm.space == options.norm and (norm.eps, norm.scale) == (0.1, 1 / 3)
        assert norm.restrained == (restrain is not None)
        if restrain is not None:
            assert (norm.percent, norm.edge, norm.decay) == restrain[1:]


def test_p_is_c_u():
    example = Case(NormOptions("none"), **WIDE).draw()
    layer, u = example.layer, example.a
    p = project(layer.weight, layer.cols, u, torch.float64, None)
    torch.testing.assert_close(p, layer.weight[:, layer.cols] @ u)
    assert project(layer.weight, layer.cols, u, torch.bfloat16, None).dtype == torch.bfloat16


def test_meta_tensors_give_shapes(options):
    assert Case(options, **WIDE).draw("meta").output().shape == (7, 13)


@pytest.mark.parametrize("norm", NORMS)
def test_by_default_next_to_no_change_leaves_the_layer_alone(norm):
    example = Case(NormOptions(norm), **WIDE, trains_bias=False).draw()
    out = example._replace(a=example.a * 1e-12).output()
    torch.testing.assert_close(out, linear(example.x, example.layer.weight, example.layer.bias))


def test_averaged_scales_the_base_of_an_entry_that_hardly_moves():
    example = Case(NormOptions("weight", combine="averaged"), **WIDE).draw()
    fused = effective_weight(example.layer, example.a * 1e-12)
    ratio = (fused / example.layer.weight).min()
    assert ratio == pytest.approx(2 / (2 - torch.sigmoid(torch.tensor(-3.0))).item(), abs=1e-3)
    assert ratio == pytest.approx(1.0243, abs=1e-3)


@pytest.mark.parametrize(("t", "n", "k"), [(3, 0, 5), (3, 4, 0), (3, 0, 0), (0, 4, 5), (0, 0, 0)])
@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("norm", NORMS)
def test_every_dimension_may_be_empty(t, n, k, lead, norm):
    example = Case(NormOptions(norm), t=t, n=n, k=k, m=0, trains_bias=False).draw()
    x = torch.randn(*lead, t, k, requires_grad=True)
    layer = example.layer._replace(bias=torch.ones(n), weight=torch.zeros(n, k))
    layer = with_norms(layer) if norm == "channel" else layer
    a = example.a.clone().requires_grad_()
    out = secura_linear(x, layer, a)
    assert out.shape == (*lead, t, n) and bool((out == 1).all())
    for leaf, gradient in zip((x, a), torch.autograd.grad(out.sum(), (x, a)), strict=True):
        assert gradient.shape == leaf.shape
    if norm != "weight":
        y0 = torch.ones(*lead, t, n)
        assert torch.equal(secura_add(y0, layer, a), y0)


@pytest.mark.parametrize("norm", ["none", "channel", "weight"])
def test_a_merge_of_16_bit_factors_rounds_once(norm):
    form = None if norm == "none" else "calibrated"
    example = Case(NormOptions(norm, form), m=8, n=40, k=30, folded="base").draw()
    a, core = example.a.bfloat16(), example.layer.core.bfloat16()
    layer = example.layer._replace(core=core)
    wide = layer._replace(weight=layer.weight.double(), core=core.double())
    exact = effective_weight(wide, a.double()).float()
    torch.testing.assert_close(effective_weight(layer, a), exact, rtol=1e-5, atol=1e-5)


def test_row_norms_are_those_of_the_folded_base():
    example = Case(NormOptions("channel"), **WIDE, folded="base").draw()
    layer = example.layer
    p_base = layer.weight[:, layer.cols] @ layer.core
    r = layer.weight[layer.rows]
    for source in (layer, layer._replace(columns=layer.weight[:, layer.cols])):
        found = with_norms(source)
        torch.testing.assert_close(found.gram, r @ r.T)
        torch.testing.assert_close(found.base_norms, (layer.weight + p_base @ r).norm(dim=1))
    assert important_channels(layer.weight, 4).sum() == (13 - 4) // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocasts", [False, True])
def test_row_norms_of_rows_that_a_fold_cancels(dtype, autocasts):
    """The core takes 97% of R's rows away: W and P_base R as large, their sum small."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(96, 96, generator=generator) / 96**0.5).to(dtype)
    rows = torch.arange(0, 96, 3)
    p_base = torch.zeros(96, 32)
    p_base[rows] = -0.97 * torch.eye(32)
    layer = Layer(weight, None, rows, rows, NormOptions("channel"))
    layer = layer._replace(core=torch.eye(32), core_is_base=True, columns=p_base)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        layer = with_norms(layer)
    gram, norms = layer.gram, layer.base_norms
    exact = weight.double() + p_base.double() @ weight[rows].double()
    assert gram.dtype == norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), exact.norm(dim=1), rtol=1e-5, atol=0)


def test_norms_of_a_change_neither_overflow_nor_are_lost_below_0():
    of_two = torch.linalg.qr(torch.randn(6, 2)).Q
    r = of_two @ torch.randn(2, 50)
    gram, p = r @ r.t(), torch.randn(200, 6)
    of_more = delta_norms(p * 1e25, gram)
    torch.testing.assert_close(of_more, 1e25 * delta_norms(p, gram), rtol=1e-3, atol=0)
    nothing = p - p @ of_two @ of_two.t()
    assert (delta_norms(nothing, gram) < 1e-2).all()  # of squares on either side of 0


def test_biases_are_rounded_once():
    bias, delta = torch.randn(500).bfloat16(), torch.randn(500)
    expected = (bias.float() + delta).bfloat16()
    assert torch.equal(summed_bias(bias, delta, torch.bfloat16), expected)
