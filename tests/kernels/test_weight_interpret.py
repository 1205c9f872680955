"""The kernels of the space ``weight`` and of the merge, interpreted, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secura_kernels import NormOptions, normed_weight, reference, weight_norm_linear
from secura_kernels.gain import COMBINES, FORMS, coefficients
from secura_kernels.kernels import weight as kernels
from secura_kernels.merge import effective_weight

from .cases import SHAPES, Case, assert_no_worse, check, draw, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHT = NormOptions("weight")


@pytest.fixture(autouse=True)
def poisoned():
    """What is allocated and never written is NaN, and operators without a fixed order raise."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def against_oracle(case: Case, options: NormOptions, dtype=torch.float32, **flags) -> None:
    exact = run(case.to(torch.float64), options, None, **flags)
    ours, plain = (run(case, options, impl, **flags) for impl in ("triton", "reference"))
    assert_no_worse(ours, plain, exact, dtype)


def column_major(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


def every_other(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("folded", [False, True], ids=["fresh", "folded"])
def test_forward_and_every_gradient(shape, dtype, folded):
    check(shape, WEIGHT, dtype, folded=folded)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("restrain", [False, True], ids=["free", "restrained"])
@pytest.mark.parametrize("folded", [False, True], ids=["fresh", "folded"])
def test_every_norm(form, combine, restrain, folded):
    options = NormOptions("weight", form, combine)
    check((9, 70, 37, 5), options, restrain=restrain, folded=folded)


@pytest.mark.parametrize("folded", [False, True], ids=["fresh", "folded"])
def test_relative_eps(folded):
    check((7, 70, 37, 5), NormOptions("weight", eps=0.5, eps_relative=True), folded=folded)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("delta_bias", [False, True])
def test_biases(biased, delta_bias):
    check((7, 13, 11, 4), WEIGHT, torch.bfloat16, biased=biased, delta_bias=delta_bias)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_moves_nothing_changes(form):
    case = draw((3, 13, 11, 4))
    fused = normed_weight(
        case.weight, case.rows, torch.zeros_like(case.p), NormOptions("weight", form), impl="triton"
    )
    torch.testing.assert_close(fused, case.weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("largest", [0.0, 3.0])
def test_slope_and_offset_come_from_all_maxima(form, largest):
    peaks, scalars = torch.zeros(37), torch.full((3,), 0.25)
    peaks[[5, 36]] = torch.tensor([largest / 2, largest])
    kernels.weight_scalars_kernel[(1,)](peaks, scalars, 37, 6.0, FORM=form, BLOCK=16)
    expected = torch.stack([scalars[0], *coefficients(form, 6.0, peaks.amax(), peaks)])
    torch.testing.assert_close(scalars, expected)
    assert scalars[0] == 0.25


@pytest.mark.parametrize("form", FORMS)
def test_the_restraint_acts_only_where_enough_gains_are_small(form):
    case, options = draw((3, 70, 37, 5)), NormOptions("weight", form)
    for percent in (0.0, 0.4, 0.8, 1.0):
        limits = case.restrain._replace(percent=percent)
        got, expected = (
            normed_weight(case.weight, case.rows, case.p, options, restrain=limits, impl=impl)
            for impl in ("triton", "reference")
        )
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("view", [column_major, every_other])
@pytest.mark.parametrize("folded", [False, True], ids=["fresh", "folded"])
def test_strided_weights(view, folded):
    case = draw((9, 70, 131, 5))
    expected = run(case, WEIGHT, "triton", folded=folded)
    case.weight = view(case.weight)
    for got, value in zip(run(case, WEIGHT, "triton", folded=folded), expected, strict=True):
        torch.testing.assert_close(got, value)
    fused = normed_weight(case.weight, case.rows, case.p, WEIGHT, impl="triton")
    assert (fused.stride() == case.weight.stride()) == (view is column_major)


def test_expanded_and_strided_gradients_and_inputs():
    case = draw((9, 13, 11, 4))
    for grad in (torch.ones(()).expand(9, 13), column_major(case.grad), every_other(case.grad)):
        case.grad, case.x = grad, column_major(case.x)
        against_oracle(case, WEIGHT)


def test_a_weight_in_another_dtype_than_x():
    case = draw((9, 70, 37, 5))
    case.x, case.grad, case.bias = (value.bfloat16() for value in (case.x, case.grad, case.bias))
    against_oracle(case, WEIGHT, torch.bfloat16)


def test_partial_gradients():
    case = draw((9, 70, 37, 5))
    whole = run(case, WEIGHT, "triton")[1:]
    for index in range(3):
        leaves = [case.x.clone(), case.p.clone(), case.delta_bias.clone()]
        leaves[index].requires_grad_()
        x, p, delta_bias = leaves
        out = weight_norm_linear(
            x, case.weight, case.bias, case.rows, p, WEIGHT, delta_bias=delta_bias, impl="triton"
        )
        (gradient,) = torch.autograd.grad(out, leaves[index], case.grad)
        assert torch.equal(gradient, whole[index])


def test_same_bits_twice_and_inputs_unwritten():
    case = draw((40, 140, 131, 20), torch.bfloat16)
    before = {name: getattr(case, name).clone() for name in ("x", "weight", "p", "p_base", "grad")}
    first, second = (run(case, WEIGHT, "triton", folded=True, restrain=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(getattr(case, name), value) for name, value in before.items())


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_chunks_do_not_change_the_gradient(rows, monkeypatch):
    case = draw((9, 66 if rows > 3 else 13, 37, 5))
    expected = run(case, WEIGHT, "triton", folded=True, restrain=True)
    monkeypatch.setattr(kernels, "chunk_rows", lambda n, k, itemsize: rows)
    got = run(case, WEIGHT, "triton", folded=True, restrain=True)
    torch.testing.assert_close(got[2], expected[2])


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (2, 5), (3, 10**8), (127, 64), (1024, 4096), (4096, 4096), (4096, 14336),
     (14336, 4096), (128256, 4096), (4096, 128256)],
    ids=str,
)  # fmt: skip
def test_a_chunk_is_neither_whole_nor_larger_than_the_workspace(shape, itemsize):
    n, k = shape
    rows = kernels.chunk_rows(n, k, itemsize)
    assert rows >= 1 and (n == 1 or rows < n)
    assert rows == 1 or rows * k * itemsize <= kernels.WORKSPACE_MIB * 2**20 <= 32 * 2**20


@settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    t=st.integers(0, 20), n=st.integers(1, 90), k=st.integers(1, 140), m=st.integers(1, 70),
    norm=st.tuples(st.sampled_from(FORMS), st.sampled_from(COMBINES)),
    view=st.sampled_from([None, column_major, every_other]), folded=st.booleans(),
)  # fmt: skip
def test_any_shape_and_stride(t, n, k, m, norm, view, folded):
    case = draw((t, n, k, min(m, n)))
    if view is not None:
        case.weight = view(case.weight)
    options = NormOptions("weight", *norm, eps=1e-3)
    against_oracle(case, options, folded=folded)


@pytest.mark.parametrize("norm", ["none", "channel", "weight"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("folded", [False, True], ids=["fresh", "folded"])
def test_merge_is_the_oracle_rounded_once(norm, dtype, folded):
    case = draw((1, 70, 131, 20), dtype)
    p_base = case.p_base if folded else None
    restrain = None if norm == "none" else case.restrain
    options = NormOptions(norm, combine="averaged")
    arguments = (case.weight, case.rows, case.p, options)
    got = effective_weight(*arguments, p_base=p_base, restrain=restrain, impl="triton")
    exact = reference.effective_weight(
        case.weight.double(), case.rows, case.p.double(), options,
        p_base=None if p_base is None else p_base.double(), restrain=restrain,
    )  # fmt: skip
    assert got.dtype == dtype
    error = (got.double() - exact).abs() - 0.51 * torch.finfo(dtype).eps * exact.abs()
    assert error.max() <= 5e-6


def test_merge_in_another_dtype():
    case = draw((1, 13, 11, 4), torch.bfloat16)
    arguments = (case.weight, case.rows, case.p, WEIGHT)
    got, expected = (
        effective_weight(*arguments, dtype=torch.float32, impl=impl)
        for impl in ("triton", "reference")
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("norm", ["none", "channel", "weight"])
def test_stochastic_rounding_is_unbiased_and_picks_a_neighbour(norm, impl):
    case = draw((1, 24, 20, 4), torch.bfloat16)
    arguments = (case.weight, case.rows, case.p * 1e-2, NormOptions(norm))
    wide = effective_weight(*arguments, dtype=torch.float32, impl=impl)
    draws = torch.stack(
        [
            effective_weight(*arguments, stochastic_rounding=True, seed=seed, impl=impl).float()
            for seed in range(32)
        ]
    )
    below = (wide.view(torch.int32) >> 16 << 16).view(torch.float32)
    step = ((wide.view(torch.int32) >> 16) + 1 << 16).view(torch.float32) - below
    assert ((draws == below) | (draws == below + step)).all()
    share_up, probability = (draws != below).float().mean(0), (wide - below) / step
    assert (share_up - probability).abs().max() < 0.5
    assert (share_up - probability).mean().abs() < 0.03
    assert torch.equal(
        effective_weight(*arguments, stochastic_rounding=True, seed=0, impl=impl).float(), draws[0]
    )


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_stochastic_rounding_keeps_what_bf16_holds(impl):
    case = draw((1, 24, 20, 4), torch.bfloat16)
    for special in (float("inf"), -float("inf"), 3.3895313892515355e38, 2.0**-126):
        case.weight[5, 3] = special
        got = effective_weight(
            case.weight, torch.arange(4), torch.zeros(24, 4), NormOptions("none"),
            stochastic_rounding=True, impl=impl,
        )  # fmt: skip
        assert torch.equal(got, case.weight)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_stochastic_rounding_draws_anew_for_each_entry(impl):
    weight = torch.ones(24, 20, dtype=torch.bfloat16)
    got = effective_weight(
        weight, torch.arange(4), torch.full((24, 4), 2.0**-10), NormOptions("none"),
        stochastic_rounding=True, impl=impl,
    ).float()  # fmt: skip
    assert (got.std(0) > 0).all() and (got.std(1) > 0).all()


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_stochastic_rounding_keeps_nan_of_every_payload(impl):
    weight = torch.ones(64, 8)
    weight[4:] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    got = effective_weight(
        weight, torch.arange(4), torch.zeros(64, 4), NormOptions("none"),
        dtype=torch.bfloat16, stochastic_rounding=True, impl=impl,
    )  # fmt: skip
    assert got[4:].isnan().all() and torch.equal(got[:4], weight[:4].bfloat16())


def test_stochastic_rounding_does_not_depend_on_the_tiles(monkeypatch):
    case = draw((1, 70, 37, 5), torch.bfloat16)
    arguments = (case.weight, case.rows, case.p, NormOptions("none"))
    expected = effective_weight(*arguments, stochastic_rounding=True, seed=3, impl="triton")
    small = {"BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    monkeypatch.setattr(kernels, "_blocks", lambda *how: small)
    got = effective_weight(*arguments, stochastic_rounding=True, seed=3, impl="triton")
    assert torch.equal(got, expected)
    other = effective_weight(*arguments, stochastic_rounding=True, seed=4, impl="triton")
    assert not torch.equal(other, expected)


def test_what_no_kernel_takes_is_refused():
    case = draw((3, 5, 4, 2)).to(torch.float64)
    with pytest.raises(RuntimeError, match="no kernel takes float64"):
        weight_norm_linear(case.x, case.weight, None, case.rows, case.p, WEIGHT, impl="triton")
    with pytest.raises(RuntimeError, match="no kernel takes float64"):
        effective_weight(case.weight, case.rows, case.p, WEIGHT, impl="triton")
