"""The ops against the oracle: values and every gradient, each space, form and combination."""

from __future__ import annotations

import inspect
from itertools import product

import pytest
import torch
from layers import Layer
from torch.nn.functional import linear

import secura_kernels
from secura_kernels import (
    NormOptions,
    activation_norm,
    channel_product,
    effective_weight,
    lowrank_add,
    lowrank_linear,
    normed_weight,
    project,
    reference,
    row_norms,
    weight_norm_linear,
)
from secura_kernels.gain import COMBINES, FORMS


def run_op(layer: Layer, x, p, delta_bias, options, p_base, z_scale, restrain, fused=True):
    """The op that serves a space."""
    if options.norm == "weight":
        return weight_norm_linear(
            x, layer.weight, layer.bias, layer.rows, p, options,
            p_base=p_base, delta_bias=delta_bias, restrain=restrain,
        )  # fmt: skip
    if options.norm == "activation":
        return activation_norm(
            linear(x, layer.weight, layer.bias), layer.bias, layer.rows, p, options,
            p_base=p_base, delta_bias=delta_bias, z_scale=z_scale, restrain=restrain,
        )  # fmt: skip
    q, share = (p, None) if p_base is None else (p + p_base, None)
    if options.norm == "channel":
        gram, norms = row_norms(layer.weight, layer.rows, p_base)
        q, share = channel_product(p, p_base, gram, norms, options, restrain)
    kwargs = {"share": share, "delta_bias": delta_bias, "z_scale": z_scale}
    if fused:
        return lowrank_linear(x, layer.weight, layer.bias, layer.rows, q, **kwargs)
    y0 = linear(x, layer.weight, layer.bias)
    return lowrank_add(y0, layer.bias, layer.rows, q, **kwargs)


def both(layer: Layer, options, *, folded, dropout, restrain, bias=True, fused=True):
    """Outputs and gradients (x, P, δb) of the op and of the oracle."""
    p_base = layer.p_base if folded else None
    z_scale = layer.z_scale if dropout else None
    restrain = layer.restrain if restrain and options.norm != "none" else None
    results = []
    for which in ("op", "oracle"):
        leaves = [layer.x, layer.p, layer.delta_bias]
        x, p, db = (leaf.clone().requires_grad_() for leaf in leaves)
        delta_bias = db if bias else None
        if which == "op":
            out = run_op(layer, x, p, delta_bias, options, p_base, z_scale, restrain, fused)
        else:
            out = reference.linear(
                x, layer.weight, layer.bias, layer.rows, p, options,
                p_base=p_base, delta_bias=delta_bias, z_scale=z_scale, restrain=restrain,
            )  # fmt: skip
        out.backward(layer.grad)
        results.append((out, x.grad, p.grad, db.grad))
    return results


@pytest.mark.parametrize("folded", [False, True], ids=["fresh", "folded"])
@pytest.mark.parametrize("restrain", [False, True], ids=["free", "restrained"])
def test_matches_oracle(layer, options, folded, restrain):
    got, expected = both(layer, options, folded=folded, dropout=False, restrain=restrain)
    for value, reference_value in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference_value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["none", "channel", "activation"])
@pytest.mark.parametrize("fused", [True, False])
def test_dropout_scales_z_of_the_change_alone(layer, norm, fused):
    got, expected = both(
        layer, NormOptions(norm), folded=norm == "activation", dropout=True, restrain=False,
        fused=fused,
    )  # fmt: skip
    for value, reference_value in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference_value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("combine", ["averaged", "gated"])
def test_add_on_a_given_output_matches_oracle(layer, combine):
    options = NormOptions("channel", "calibrated", combine)
    got, expected = both(
        layer, options, folded=True, dropout=False, restrain=True, fused=False, bias=False
    )
    for value, reference_value in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(value, reference_value, rtol=1e-10, atol=1e-10)


def test_relative_eps(layer, options):
    got, expected = both(
        layer, options._replace(eps=0.05, eps_relative=True), folded=True, dropout=False,
        restrain=False,
    )  # fmt: skip
    for value, reference_value in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference_value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["none", "weight", "channel", "activation"])
def test_dtypes_err_no_more_than_plain_torch(norm, dtype):
    """Error against the fp64 oracle ≤ 2 × that of plain torch in the same dtype + a floor."""
    low = Layer(33, 40, 8, 16, 29, dtype=dtype)
    wide = Layer(33, 40, 8, 16, 29)
    for name in ("weight", "bias", "x", "p", "grad"):
        setattr(wide, name, getattr(low, name).double())
    got, _ = both(low, NormOptions(norm), folded=False, dropout=False, restrain=False, bias=False)
    _, exact = both(
        wide, NormOptions(norm), folded=False, dropout=False, restrain=False, bias=False
    )
    x, p = low.x.clone().requires_grad_(), low.p.clone().requires_grad_()
    r = low.weight[low.rows]
    plain = linear(x, low.weight, low.bias) + (x @ r.T) @ p.T
    plain.backward(low.grad)
    x64, p64 = low.x.double().requires_grad_(), low.p.double().requires_grad_()
    w64 = low.weight.double()
    true = linear(x64, w64, low.bias.double()) + (x64 @ w64[low.rows].T) @ p64.T
    true.backward(low.grad.double())
    floor = 4 * torch.finfo(dtype).eps
    pairs = zip(
        got[:3], exact[:3], (plain, x.grad, p.grad), (true, x64.grad, p64.grad), strict=True
    )
    for ours, oracle, same_dtype, ideal in pairs:
        error = (ours.double() - oracle).norm() / oracle.norm()
        yardstick = (same_dtype.double() - ideal).norm() / ideal.norm()
        assert error <= 2 * yardstick + floor
        assert ours.dtype == dtype


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (2, 0, 3)], ids=str)
def test_leading_dimensions(shape, options):
    layer = Layer()
    x = torch.randn(*shape, 11, dtype=torch.float64, requires_grad=True)
    p = layer.p.clone().requires_grad_()
    out = run_op(layer, x, p, None, options, None, None, None)
    assert out.shape == (*shape, 13)
    out.sum().backward()
    assert x.grad.shape == x.shape and p.grad.isfinite().all()


def test_strided_inputs(options):
    layer = Layer()
    expected, _ = both(layer, options, folded=True, dropout=False, restrain=False)
    layer.weight = layer.weight.t().contiguous().t()
    layer.x = layer.x.repeat_interleave(2, 1)[:, ::2]
    layer.grad = layer.grad.t().contiguous().t()
    got, _ = both(layer, options, folded=True, dropout=False, restrain=False)
    for value, reference_value in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference_value, rtol=1e-10, atol=1e-10)


def test_expanded_gradient(options):
    layer = Layer()
    x = layer.x.clone().requires_grad_()
    run_op(layer, x, layer.p, None, options, layer.p_base, None, None).sum().backward()
    grad, x.grad = x.grad, None
    out = run_op(layer, x, layer.p, None, options, layer.p_base, None, None)
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(x.grad, grad)


def test_partial_gradients(options):
    layer = Layer()
    for index in range(3):
        leaves = [layer.x.clone(), layer.p.clone(), layer.delta_bias.clone()]
        leaves[index].requires_grad_()
        out = run_op(layer, *leaves, options, layer.p_base, None, None)
        out.backward(layer.grad)
        assert [leaf.grad is not None for leaf in leaves] == [i == index for i in range(3)]


def test_double_backward_is_refused(layer, options):
    x = layer.x.clone().requires_grad_()
    out = run_op(layer, x, layer.p, None, options, None, None, None)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("norm", ["none", "weight", "channel", "activation"])
def test_autocast_computes_in_its_dtype_and_keeps_gradients_in_fp32(norm):
    layer = Layer(dtype=torch.float32)
    x, p = layer.x.clone().requires_grad_(), layer.p.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = run_op(layer, x, p, None, NormOptions(norm), None, None, None)
    assert out.dtype == torch.bfloat16
    out.backward(layer.grad.bfloat16())
    assert x.grad.dtype == p.grad.dtype == torch.float32


@pytest.mark.parametrize(("form", "combine"), list(product(FORMS, COMBINES)))
def test_weight_chunks_do_not_change_the_result(layer, form, combine, monkeypatch):
    options = NormOptions("weight", form, combine)
    arguments = (layer.weight, layer.rows, layer.p, options)
    keywords = {"p_base": layer.p_base, "restrain": layer.restrain}
    whole = normed_weight(*arguments, **keywords)
    monkeypatch.setattr("secura_kernels.weight.WORKSPACE_MIB", 1e-9)
    torch.testing.assert_close(normed_weight(*arguments, **keywords), whole)


def call(name, layer, **changed):
    """A public op on a layer, with some of its arguments changed."""
    n = layer.weight.shape[0]
    y0 = linear(layer.x, layer.weight)
    norm = {"activation_norm": "activation", "activation_linear": "activation"}.get(name, "weight")
    arguments = {
        "x": layer.x, "weight": layer.weight, "y0": y0, "bias": layer.bias, "rows": layer.rows,
        "p": layer.p, "q": layer.p, "p_base": layer.p_base, "share": torch.ones(n),
        "delta_bias": layer.delta_bias, "z_scale": layer.z_scale, "restrain": layer.restrain,
        "options": NormOptions(norm),
    } | changed  # fmt: skip
    op = getattr(secura_kernels, name)
    taken = inspect.signature(op).parameters
    return op(**{key: value for key, value in arguments.items() if key in taken})


OPS = (
    "lowrank_linear", "lowrank_add", "activation_norm", "activation_linear", "weight_norm_linear",
    "normed_weight", "effective_weight",
)  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_every_argument_of_another_shape_is_refused(layer, name):
    assert call(name, layer).isfinite().all()
    n, m = layer.p.shape
    for argument in inspect.signature(getattr(secura_kernels, name)).parameters:
        wrong = {
            "x": layer.x[:, 1:], "rows": layer.rows[None], "p": layer.p[:, 1:], "q": layer.p[1:],
            "p_base": layer.p_base[:1], "bias": layer.bias[:1], "share": torch.ones(1),
            "delta_bias": torch.ones(1), "z_scale": torch.ones(1, m),
            "restrain": layer.restrain._replace(important=torch.ones(n + 1, dtype=torch.bool)),
        }.get(argument)  # fmt: skip
        if wrong is not None:
            with pytest.raises(ValueError, match=r"must be \[|does not fit the weight"):
                call(name, layer, **{argument: wrong})


@pytest.mark.parametrize("name", OPS[:5])
def test_integers_are_refused(layer, name):
    with pytest.raises(TypeError, match="floating"):
        call(name, layer, x=layer.x.long(), y0=linear(layer.x, layer.weight).long())


def test_p_is_c_u_and_keeps_nothing_of_its_size(layer):
    u = layer.p[: len(layer.cols)].clone().requires_grad_()
    p = project(layer.weight, layer.cols, u)
    torch.testing.assert_close(p, layer.weight[:, layer.cols] @ u)
    kept = p.grad_fn.saved_tensors
    assert [tensor.data_ptr() for tensor in kept] == [
        layer.weight.data_ptr(), layer.cols.data_ptr()
    ]  # fmt: skip
    assert torch.autograd.gradcheck(
        lambda u: project(layer.weight.double(), layer.cols, u),
        u.detach().double().requires_grad_(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert project(layer.weight.float(), layer.cols, u.float()).dtype == torch.float32


def test_a_projection_that_does_not_fit_is_refused(layer):
    u = layer.p[: len(layer.cols)]
    with pytest.raises(ValueError, match=r"must be \[N, K\], \[m\] and \[m, m\]"):
        project(layer.weight, layer.cols[1:], u)
    with pytest.raises(TypeError, match="floating"):
        project(layer.weight.long(), layer.cols, u)


@pytest.mark.parametrize("name", ["activation_norm", "activation_linear", "weight_norm_linear"])
def test_the_options_of_another_space_are_refused(layer, name):
    with pytest.raises(ValueError, match=r"options\.norm is 'channel'"):
        call(name, layer, options=NormOptions("channel"))
    gram, norms = row_norms(layer.weight, layer.rows, None)
    with pytest.raises(ValueError, match=r"options\.norm is 'none'"):
        channel_product(layer.p, None, gram, norms, NormOptions())


def test_meta_tensors_give_shapes(layer):
    x, weight, p = (value.to("meta") for value in (layer.x, layer.weight, layer.p))
    rows = layer.rows.to("meta")
    assert lowrank_linear(x, weight, None, rows, p).shape == (len(x), len(weight))


@pytest.mark.parametrize("norm", ["none", "channel", "activation", "weight"])
def test_by_default_next_to_no_change_leaves_the_layer_alone(layer, norm):
    p = layer.p * 1e-12
    out = run_op(layer, layer.x, p, None, NormOptions(norm), None, None, None)
    torch.testing.assert_close(out, linear(layer.x, layer.weight, layer.bias))


def test_averaged_scales_the_base_of_an_entry_that_hardly_moves(layer):
    fused = normed_weight(
        layer.weight, layer.rows, layer.p * 1e-12, NormOptions("weight", combine="averaged")
    )
    ratio = (fused / layer.weight).min()
    assert ratio == pytest.approx(2 / (2 - torch.sigmoid(torch.tensor(-3.0))).item(), abs=1e-3)
    assert ratio == pytest.approx(1.0243, abs=1e-3)


@pytest.mark.parametrize(("t", "n", "k"), [(3, 0, 5), (3, 4, 0), (3, 0, 0), (0, 4, 5), (0, 0, 0)])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_every_dimension_may_be_empty(t, n, k, lead):
    none = torch.empty(0, dtype=torch.int64)
    x, y0 = torch.randn(*lead, t, k), torch.ones(*lead, t, n)
    weight, bias, p = torch.randn(n, k), torch.ones(n), torch.randn(n, 0)
    ops = {
        "linear": lambda x, p: lowrank_linear(x, weight, bias, none, p),
        "add": lambda y0, p: lowrank_add(y0, torch.zeros(n), none, p),
        "weight": lambda x, p: weight_norm_linear(x, weight, bias, none, p, NormOptions("weight")),
    }
    for name, op in ops.items():
        leaves = [(y0 if name == "add" else x).clone().requires_grad_(), p.clone().requires_grad_()]
        out = op(*leaves)
        assert out.shape == (*lead, t, n) and bool((out == 1).all()), name
        found = torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
        for leaf, gradient in zip(leaves, found, strict=True):
            assert gradient is None or gradient.shape == leaf.shape


@pytest.mark.parametrize("norm", ["none", "channel", "weight"])
def test_a_merge_of_a_16_bit_p_rounds_once(norm):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 30, generator=generator)
    p, p_base = (torch.randn(40, 8, generator=generator).bfloat16() for _ in "ab")
    form = None if norm == "none" else "calibrated"
    rows, options = torch.arange(8), NormOptions(norm, form)
    merged = effective_weight(weight, rows, p, options, p_base=p_base)
    exact = effective_weight(
        weight.double(), rows, p.double(), options, p_base=p_base.double()
    ).float()
    torch.testing.assert_close(merged, exact, rtol=1e-5, atol=1e-5)
