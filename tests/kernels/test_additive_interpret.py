"""The additive and channel kernels in Triton's interpreter, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secura_kernels import NormOptions, additive, channel_product, lowrank_add, lowrank_linear
from secura_kernels.gain import COMBINES, FORMS
from secura_kernels.kernels import additive as kernels
from secura_kernels.kernels import channel as channel_kernels

from .cases import SHAPES, assert_no_worse, check, draw, run

GRID = [(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
GRID.append(((67, 71, 40, 33), torch.float16))


@pytest.fixture(autouse=True)
def poisoned():
    """What is allocated and never written is NaN, and operators without a fixed order raise."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(2, 2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def both_routes(monkeypatch, rebuild: bool):
    monkeypatch.setattr(additive, "rebuilds_weight", lambda t, n, k, z_scale: rebuild)
    monkeypatch.setattr(additive, "takes_weight", lambda t, n, k, m, z_scale: rebuild)


@pytest.mark.parametrize(("shape", "dtype"), GRID, ids=str)
@pytest.mark.parametrize("rebuild", [True, False], ids=["rebuilt", "gathered"])
def test_linear(shape, dtype, rebuild, monkeypatch):
    both_routes(monkeypatch, rebuild)
    check(shape, NormOptions("channel", "calibrated", "averaged"), dtype, folded=True)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rebuild", [True, False], ids=["rebuilt", "gathered"])
@pytest.mark.parametrize("m", [6, 90])
def test_rows_named_twice(fused, rebuild, m, monkeypatch):
    """Two adapters that chose the same rows of W: their columns of ∂y0 add up."""
    both_routes(monkeypatch, rebuild)
    case, options = draw((20, 70, 48, m)), NormOptions("none")
    case.rows = case.rows[torch.randint(m // 2, (m,), generator=torch.Generator().manual_seed(0))]
    assert case.rows.unique().numel() < m
    ours, plain = (run(case, options, impl, fused=fused) for impl in ("triton", "reference"))
    assert_no_worse(ours, plain, run(case.to(torch.float64), options, "oracle"), torch.float32)


@pytest.mark.parametrize(("shape", "dtype"), GRID, ids=str)
def test_add_with_dropout(shape, dtype):
    options = NormOptions("channel", "calibrated", "averaged")
    check(shape, options, dtype, folded=False, dropout=True, fused=False)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_channel_norms_neither_overflow_nor_hide_nan(impl, form):
    generator = torch.Generator().manual_seed(0)
    r, p = (torch.randn(*size, generator=generator) for size in ((34, 50), (37, 34)))
    p[3] = 0.0
    options, norms = NormOptions("channel", form, eps=1e-37), torch.ones(37)
    q, _ = channel_product(p, None, r @ r.T, norms, options, impl=impl)
    for power in (1e-15, 1e15):
        wide = (power * r) @ (power * r).T
        found, _ = channel_product(power * p, None, wide, power**2 * norms, options, impl=impl)
        torch.testing.assert_close(found / power, q, rtol=1e-5, atol=1e-6)
    p[5, 2] = torch.nan
    q, _ = channel_product(p, None, r @ r.T, norms, NormOptions("channel"), impl=impl)
    assert q[5].isnan().all() and q[:5].isfinite().all() and q[6:].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("restrain", [False, True])
@pytest.mark.parametrize("folded", [False, True])
def test_every_channel_norm(form, combine, restrain, folded):
    options = NormOptions("channel", form, combine)
    check((7, 37, 36, 34), options, restrain=restrain, folded=folded)


@pytest.mark.parametrize("norm", ["none", "channel"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("delta_bias", [True, False])
def test_every_flag(norm, fused, dropout, biased, delta_bias):
    check(
        (19, 13, 11, 4), NormOptions(norm), torch.bfloat16,
        fused=fused, dropout=dropout, biased=biased, delta_bias=delta_bias,
    )  # fmt: skip


def test_relative_eps():
    options = NormOptions("channel", eps=0.5, eps_relative=True)
    check((7, 13, 11, 4), options)


def strided(tensor: torch.Tensor, how: int) -> torch.Tensor:
    """The same values: contiguous, transposed, every other column, or shifted off alignment."""
    if how == 1:
        return tensor.t().contiguous().t()
    if how == 2:
        return tensor.repeat_interleave(2, 1)[:, ::2]
    if how == 3:
        return torch.cat([tensor[:, :1], tensor], 1)[:, 1:]
    return tensor


SMALL = st.integers(0, 40)
LAYOUT = st.integers(0, 3)


@settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(t=SMALL, n=st.integers(1, 70), m=st.integers(1, 35), layouts=st.tuples(*[LAYOUT] * 4))
def test_shapes_and_strides_of_each_kernel(t, n, m, layouts):
    m = min(m, n)
    case = draw((t, n, 3, m))
    y, g, q, scale = (
        strided(tensor, how)
        for tensor, how in zip(
            (case.grad, case.grad + 1, case.p, case.z_scale), layouts, strict=True
        )
    )
    rows, share, bias, delta = case.rows, case.bias.abs(), case.bias, case.delta_bias
    kept = [tensor.clone() for tensor in (y, g, q, scale)]
    z = kernels.gather(y, bias, rows, scale)
    torch.testing.assert_close(z, (y[:, rows] - bias[rows]) * scale)
    out = kernels.add_product(y, z, q, share, bias, delta, bias_inside=True)
    torch.testing.assert_close(out, (y - bias) * share + bias + delta + z @ q.t())
    dy = kernels.output_gradient(g, rows, q, share, scale)
    torch.testing.assert_close(dy, (g * share).index_add(1, rows, (g @ q) * scale))
    gram = case.p.t() @ case.p
    norms = channel_kernels.delta_norms(q, gram)
    torch.testing.assert_close(norms, (q @ gram * q).sum(1).sqrt(), rtol=1e-4, atol=1e-5)
    for tensor, before in zip((y, g, q, scale), kept, strict=True):
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("m", [100, 130, 300, 512])
def test_every_block_of_the_rank(m):
    case = draw((5, 520, 3, m), torch.bfloat16)
    got = kernels.output_gradient(case.grad, case.rows, case.p.bfloat16(), case.bias, None)
    wide, p = case.grad.double(), case.p.bfloat16().double()
    exact = (wide * case.bias.double()).index_add(1, case.rows, wide @ p)
    assert (got.double() - exact).norm() <= 4e-3 * exact.norm()


def test_product_works_in_place_and_on_transposed_layouts():
    case = draw((33, 70, 12, 5))
    y, z = case.grad.clone(), case.z_scale
    expected = y * case.bias + z @ case.p.t()
    assert kernels.add_product(y, z, case.p, case.bias, out=y) is y
    torch.testing.assert_close(y, expected)
    plain = kernels.add_product(case.grad, z, case.p)
    torch.testing.assert_close(plain, case.grad + z @ case.p.t())
    weight, r = case.weight, case.weight[case.rows]
    for share in (None, case.bias):
        fused = kernels.add_product(weight.t(), r.t(), case.p, share).t()
        assert fused.is_contiguous()
        scaled = weight if share is None else weight * share[:, None]
        torch.testing.assert_close(fused, scaled + case.p @ r)


def test_same_bits_twice():
    case = draw((40, 70, 33, 20), torch.bfloat16)
    options = NormOptions("channel", "paper", "averaged")
    first, second = (run(case, options, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_expanded_and_strided_gradients(norm):
    case = draw((9, 13, 11, 4))
    for grad in (torch.ones(()).expand(9, 13), strided(case.grad, 1), strided(case.grad, 2)):
        case.grad = grad
        options = NormOptions(norm, combine="averaged")
        exact = run(case.to(torch.float64), options, "oracle")
        assert_no_worse(
            run(case, options, "triton"), run(case, options, "reference"), exact, torch.float32
        )


def test_a_dtype_without_a_kernel_is_refused():
    case = draw((3, 5, 4, 2)).to(torch.float64)
    with pytest.raises(RuntimeError, match="no kernel takes float64"):
        lowrank_linear(case.x, case.weight, None, case.rows, case.p, impl="triton")


def test_the_output_has_the_strides_that_compilers_are_told():
    case = draw((9, 16, 5, 4))
    y0 = case.grad.t().contiguous().t()
    for impl in ("triton", "reference"):
        out = lowrank_add(y0, case.bias, case.rows, case.p, impl=impl)
        assert out.stride() == (16, 1)
