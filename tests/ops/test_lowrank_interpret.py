"""The additive kernels in Triton's interpreter, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from secura_kernels import NormOptions, plan
from secura_kernels.ops.lowrank import triton as kernels
from secura_kernels.ops.lowrank.op import MAX_RANK, lowrank, lowrank_backward
from secura_kernels.ops.weight.op import merged_weight

from .rule import SHAPES, case_of, check, check_example

GRID = [(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
GRID.append(((67, 71, 40, 33), torch.float16))
AVERAGED = NormOptions("channel", "calibrated", "averaged")


pytestmark = pytest.mark.usefixtures("poisoned")


def forced(monkeypatch, way: str):
    """The forward through W' or through y0, and ∂x the way that is named."""
    monkeypatch.setattr(plan, "input_way", lambda shape, per_token, scaled, ceilings: way)
    monkeypatch.setattr(plan, "takes_weight", lambda shape, kept, ceilings: way == "weight")


@pytest.mark.parametrize(("shape", "dtype"), GRID, ids=str)
@pytest.mark.parametrize("way", ["weight", "output"])
def test_linear(shape, dtype, way, monkeypatch):
    forced(monkeypatch, way)
    check(shape, AVERAGED, dtype, folded="base")


@pytest.mark.parametrize("y0_given", [False, True])
@pytest.mark.parametrize("way", ["weight", "h", "output"])
@pytest.mark.parametrize("m", [6, 90])
def test_rows_named_twice(y0_given, way, m, monkeypatch):
    """Two adapters that chose the same rows of W: their columns of ∂y0 add up."""
    forced(monkeypatch, way)
    example = case_of((20, 70, 48, m), NormOptions("none"), given=y0_given).draw()
    twice = torch.randint(m // 2, (m,), generator=torch.Generator().manual_seed(0))
    rows = example.layer.rows[twice]
    assert rows.unique().numel() < m
    check_example(example._replace(layer=example.layer._replace(rows=rows)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_output_has_the_bits_of_the_first(reentrant, monkeypatch):
    """Though the second of re-entrant checkpointing's passes alone knows that W' is kept."""
    seen, ways = [], []
    monkeypatch.setattr(
        plan, "takes_weight", lambda shape, kept, ceilings: ways.append(kept) or kept
    )
    example = case_of((40, 48, 32, 16), NormOptions("none"), torch.bfloat16).draw()
    x = example.x.requires_grad_()

    def output(x):
        seen.append(example._replace(x=x).output("triton"))
        return seen[-1]

    with set_checkpoint_early_stop(False):
        checkpoint(output, x, use_reentrant=reentrant).sum().backward()
    first, second = seen
    assert torch.equal(first, second)
    assert ways == [not reentrant] * 2


@pytest.mark.parametrize(("shape", "dtype"), GRID, ids=str)
def test_add_with_dropout(shape, dtype):
    check(shape, AVERAGED, dtype, dropout=True, given=True)
    check(shape, AVERAGED, dtype, dropout=True, folded="base", given=True, own_z=True)
    check(shape, NormOptions("none"), dtype, given=True, own_z=True)


@pytest.mark.parametrize("norm", ["none", "channel"])
@pytest.mark.parametrize("y0_given", [True, False])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("trains_bias", [True, False])
def test_every_flag(norm, y0_given, dropout, biased, trains_bias):
    check(
        (19, 13, 11, 4), NormOptions(norm), torch.bfloat16,
        given=y0_given, dropout=dropout, biased=biased, trains_bias=trains_bias,
    )  # fmt: skip


@pytest.mark.parametrize("folded", ["base", "change"])
def test_trained_by_two_factors_beside_what_was_folded(folded):
    check((19, 13, 11, 4), AVERAGED, inner=6, folded=folded, scaling=0.5)


def strided(tensor: torch.Tensor, how: int) -> torch.Tensor:
    """The same values: contiguous, transposed, every other column, or shifted off alignment."""
    if how == 1:
        return tensor.t().contiguous().t()
    if how == 2:
        return tensor.repeat_interleave(2, 1)[:, ::2]
    if how == 3:
        return torch.cat([tensor[:, :1], tensor], 1)[:, 1:]
    return tensor


def draw(t, n, m, dtype=torch.float32):
    """y, g ``[T, N]``, Q ``[N, m]``, z_scale ``[T, m]``, rows ``[m]``, the rest ``[N]``."""
    source = torch.Generator().manual_seed(0)
    y, g, q, scale, base_scale, bias, delta = (
        torch.randn(size, generator=source).to(dtype)
        for size in ((t, n), (t, n), (n, m), (t, m), (n,), (n,), (n,))
    )
    return y, g, q, scale, torch.randperm(n, generator=source)[:m], base_scale, bias, delta


SMALL = st.integers(0, 40)
LAYOUT = st.integers(0, 3)


@settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(t=SMALL, n=st.integers(1, 70), m=st.integers(1, 35), layouts=st.tuples(*[LAYOUT] * 4))
def test_shapes_and_strides_of_each_kernel(t, n, m, layouts):
    *wide, rows, base_scale, bias, delta = draw(t, n, min(m, n))
    y, g, q, scale = (strided(tensor, how) for tensor, how in zip(wide, layouts, strict=True))
    kept = [tensor.clone() for tensor in (y, g, q, scale)]
    z = kernels.gather(y, bias, rows, scale)
    torch.testing.assert_close(z, (y[:, rows] - bias[rows]) * scale)
    out = torch.empty(y.shape)
    kernels.add_product(y, z, q, base_scale, bias, delta, bias_inside=True, out=out)
    torch.testing.assert_close(out, (y - bias) * base_scale + bias + delta + z @ q.t())
    dy = kernels.output_gradient(g, rows, q, base_scale, scale)
    torch.testing.assert_close(dy, (g * base_scale).index_add(1, rows, (g @ q) * scale))
    for tensor, before in zip((y, g, q, scale), kept, strict=True):
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("outside", [-1, 9, 2**40])
def test_rows_that_y_does_not_have_read_as_zero_and_are_not_written(outside):
    """An index out of range must reach nothing beyond y."""
    y, g, q, scale, rows, base_scale, bias, _ = draw(5, 9, 3)
    rows[1] = outside
    inside = torch.tensor([True, False, True])
    z = kernels.gather(y, bias, rows, scale)
    expected = (y - bias)[:, rows[inside]] * scale[:, inside]
    torch.testing.assert_close(z[:, inside], expected)
    assert not z[:, 1].any()
    dy = kernels.output_gradient(g, rows, q, base_scale, None)
    expected = (g * base_scale).index_add(1, rows[inside], (g @ q)[:, inside])
    torch.testing.assert_close(dy, expected)


@pytest.mark.parametrize("m", [100, 130, 300, 512])
def test_every_block_of_the_rank(m):
    _, g, q, _, rows, base_scale, *_ = draw(5, 520, m, torch.bfloat16)
    got = kernels.output_gradient(g, rows, q, base_scale, None)
    exact = (g.double() * base_scale.double()).index_add(1, rows, g.double() @ q.double())
    assert (got.double() - exact).norm() <= 4e-3 * exact.norm()


def test_a_rank_above_the_largest_block():
    """Plain torch then makes ∂y0."""
    y, g, q, _, rows, *_ = draw(3, 520, MAX_RANK + 1)
    out, z, _ = lowrank(y, None, None, rows, q, [None] * 4, True, False, None, "triton")
    torch.testing.assert_close(out, y + y[:, rows] @ q.t(), rtol=1e-4, atol=1e-4)
    dy, dq, _ = lowrank_backward(g, z, None, rows, q, None, None, [True] * 3, "triton")
    torch.testing.assert_close(dy, g.index_add(1, rows, g @ q))
    torch.testing.assert_close(dq, g.t() @ y[:, rows])


def test_product_works_in_place():
    y, _, q, z, _, base_scale, *_ = draw(33, 70, 5)
    expected = y * base_scale + z @ q.t()
    assert kernels.add_product(y, z, q, base_scale, out=y) is y
    torch.testing.assert_close(y, expected)
    expected = y + z @ q.t()
    assert kernels.add_product(y, z, q, out=y) is y
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", [0, 1, 2])
def test_the_weight_of_a_layer_on_every_layout(how, dtype, impl):
    """W' as the layer multiplies by it: Q in W's own dtype."""
    *_, rows, base_scale, _, _ = draw(5, 70, 5)
    weight, q = (torch.randn(70, size).to(dtype) for size in (12, 5))
    given = strided(weight, how)
    for of_rows in (None, base_scale):
        fused = merged_weight(given, rows, q, of_rows, dtype, None, impl)
        assert fused.stride() == torch.empty_like(given).stride()
        scaled = weight.float() if of_rows is None else weight * of_rows[:, None]
        exact = scaled + q.float() @ weight[rows].float()
        assert (fused - exact).norm() <= (5e-7 if dtype == torch.float32 else 4e-3) * exact.norm()


def test_same_bits_twice():
    example = case_of(
        (40, 70, 33, 20), NormOptions("channel", "paper", "averaged"), torch.bfloat16
    ).draw()
    first, second = (example.run("triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_expanded_and_strided_gradients(norm):
    combine = None if norm == "none" else "averaged"
    example = case_of((9, 13, 11, 4), NormOptions(norm, combine=combine)).draw()
    grad = example.grad
    for other in (torch.ones(()).expand(9, 13), strided(grad, 1), strided(grad, 2)):
        check_example(example._replace(grad=other))


def test_a_dtype_without_a_kernel_is_refused():
    example = case_of((3, 5, 4, 2), NormOptions("none"), torch.float64).draw()
    with pytest.raises(RuntimeError, match="no kernel takes float64"):
        example.output("triton")


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("norm", ["none", "activation"])
def test_results_have_the_strides_that_compilers_are_told(norm, impl):
    options, flags = NormOptions(norm), {"given": True, "save": "8bit"}
    example = case_of((9, 16, 5, 4), options, **flags).draw()
    y0, grad = (strided(tensor, 1) for tensor in (example.x, example.grad))
    x = y0.requires_grad_()
    out = example._replace(x=x).output(impl)
    kept = [saved for saved in out.grad_fn.saved_tensors if saved is not None]
    (dy0,) = torch.autograd.grad(out, x, grad)
    same = [tensor for tensor in (out, dy0, *kept) if tensor.shape == out.shape]
    assert len(same) == 2 + (norm == "activation")
    assert all(tensor.stride() == (16, 1) for tensor in same)


@pytest.mark.parametrize(
    ("norm", "way"),
    [("none", "weight"), ("none", "output"), ("none", "h")]
    + [(norm, "weight") for norm in ("channel", "activation", "weight")],
)
def test_parts_of_one_gradient(norm, way, monkeypatch):
    """Two layers on one x, the second's part of ∂x added to the first's in place."""
    forced(monkeypatch, way)
    cases = [case_of((9, n, 11, 4), NormOptions(norm)) for n in (13, 5)]
    drawn = [case.draw(seed=seed) for seed, case in enumerate(cases)]

    def gradient(shares):
        leaf = drawn[0].x.clone().requires_grad_()
        x = leaf * 1
        outs = [
            one._replace(x=x, layer=one.layer._replace(shares_input=shares)).output("triton")
            for one in drawn
        ]
        return torch.autograd.grad(outs, leaf, [one.grad for one in drawn])[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-5, atol=1e-5)
