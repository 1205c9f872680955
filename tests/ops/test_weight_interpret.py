"""The kernels of the space ``weight`` and of the merge, interpreted, against the fp64 oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secura_kernels import NormOptions, effective_weight, naive, plan
from secura_kernels.norm import COMBINES, FORMS, coefficients, complete, pack
from secura_kernels.ops.common import noise, noise_key, round_stochastically
from secura_kernels.ops.triton import gain_scalars
from secura_kernels.ops.weight import plain
from secura_kernels.ops.weight import triton as kernels
from secura_kernels.ops.weight.op import merged_weight, normed_weight

from .pairs import pairwise
from .rule import SHAPES, case_of, check, check_example, exactly, shapes_in_two_dtypes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHT = NormOptions("weight")
ROUNDED = [
    NormOptions("none"),
    NormOptions("channel"),
    NormOptions("channel", "paper", "averaged"),
    WEIGHT,
    NormOptions("weight", "calibrated", "averaged"),
]


pytestmark = pytest.mark.usefixtures("poisoned")


def on(example, **changes):
    """The example with other tensors in its layer."""
    return example._replace(layer=example.layer._replace(**changes))


def column_major(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


def every_other(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]


@pytest.mark.parametrize(("shape", "dtype"), shapes_in_two_dtypes(*SHAPES), ids=str)
@pytest.mark.parametrize("folded", ["", "base"], ids=["fresh", "folded"])
def test_forward_and_every_gradient(shape, dtype, folded):
    check(shape, WEIGHT, dtype, folded=folded)


@pytest.mark.parametrize(
    ("form", "combine", "restrained", "folded"),
    pairwise(FORMS, COMBINES, (False, True), ("", "base")),
)
def test_every_norm(form, combine, restrained, folded):
    # with the default ε one entry of the folded base near 0 decides ρ's largest, and its rounding
    options = NormOptions("weight", form, combine, eps=1e-3)
    check((9, 70, 37, 5), options, restrained=restrained, folded=folded)


@pytest.mark.parametrize("folded", ["", "base"], ids=["fresh", "folded"])
def test_relative_eps(folded):
    check((7, 70, 37, 5), NormOptions("weight", eps=0.5, eps_relative=True), folded=folded)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("trains_bias", [False, True])
def test_biases(biased, trains_bias):
    check((7, 13, 11, 4), WEIGHT, torch.bfloat16, biased=biased, trains_bias=trains_bias)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_moves_nothing_changes(form):
    example = case_of((3, 13, 11, 4), NormOptions("weight", form)).draw()
    fused = effective_weight(example.layer, torch.zeros(4, 4), impl="triton")
    torch.testing.assert_close(fused, example.layer.weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("largest", [0.0, 3.0])
def test_slope_and_offset_come_from_all_maxima(form, largest):
    peaks, scalars = torch.zeros(1037), torch.full((3,), 0.25)
    peaks[[5, 1036]] = torch.tensor([largest / 2, largest])
    norm = complete(NormOptions("weight", form))
    gain_scalars(peaks, scalars, norm)
    expected = torch.stack([scalars[0], *coefficients(norm, peaks.amax(), peaks)])
    torch.testing.assert_close(scalars, expected)
    assert scalars[0] == 0.25


@pytest.mark.parametrize("form", FORMS)
def test_the_restraint_acts_only_where_enough_gains_are_small(form):
    options = NormOptions("weight", form)
    example = case_of((3, 70, 37, 5), options, restrained=True).draw()
    for percent in (0.0, 0.4, 0.8, 1.0):
        restrain = example.layer.restrain._replace(percent=percent)
        layer = example.layer._replace(restrain=restrain)
        got, expected = (
            effective_weight(layer, example.a, impl=impl) for impl in ("triton", "reference")
        )
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("view", [column_major, every_other])
@pytest.mark.parametrize("folded", ["", "base"], ids=["fresh", "folded"])
def test_strided_weights(view, folded):
    example = case_of((9, 70, 131, 5), WEIGHT, folded=folded).draw()
    expected = example.run("triton")
    moved = on(example, weight=view(example.layer.weight))
    for got, value in zip(moved.run("triton"), expected, strict=True):
        torch.testing.assert_close(got, value)
    fused = effective_weight(moved.layer, moved.a, impl="triton")
    assert (fused.stride() == moved.layer.weight.stride()) == (view is column_major)


def test_expanded_and_strided_gradients_and_inputs():
    example = case_of((9, 13, 11, 4), WEIGHT).draw()
    grad = example.grad
    for other in (torch.ones(()).expand(9, 13), column_major(grad), every_other(grad)):
        check_example(example._replace(grad=other, x=column_major(example.x)))


def test_a_weight_in_another_dtype_than_x():
    example = case_of((9, 70, 37, 5), WEIGHT).draw()
    low = on(example, bias=example.layer.bias.bfloat16())
    check_example(low._replace(x=example.x.bfloat16(), grad=example.grad.bfloat16()))


def test_partial_gradients():
    example = case_of((9, 70, 37, 5), WEIGHT).draw()
    whole = example.run("triton")[1:]
    for index, name in enumerate(("x", "a", "delta_bias")):
        leaf = getattr(example, name).clone().requires_grad_()
        out = example._replace(**{name: leaf}).output("triton")
        (gradient,) = torch.autograd.grad(out, leaf, example.grad)
        assert torch.equal(gradient, whole[index])


def test_same_bits_twice_and_inputs_unwritten():
    flags = {"folded": "base", "restrained": True}
    example = case_of((40, 140, 131, 20), WEIGHT, torch.bfloat16, **flags).draw()
    held = (example.x, example.layer.weight, example.a, example.layer.core, example.grad)
    before = [tensor.clone() for tensor in held]
    first, second = (example.run("triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_chunks_do_not_change_the_gradient(rows, monkeypatch):
    flags = {"folded": "base", "restrained": True}
    example = case_of((9, 66 if rows > 3 else 13, 37, 5), WEIGHT, **flags).draw()
    expected = example.run("triton")
    monkeypatch.setattr(plan, "rows_of_chunk", lambda n, k, itemsize: rows)
    got = example.run("triton")
    torch.testing.assert_close(got[2], expected[2])


@pytest.mark.parametrize("outside", [-1, 13, 2**40])
def test_rows_that_w_does_not_have_read_as_its_first_or_last(outside):
    """An index out of range must not read beyond W."""
    weight, p, rows = torch.randn(13, 11), torch.randn(13, 4), torch.tensor([2, outside, 0, 5])
    r = weight[[2, max(0, min(outside, 12)), 0, 5]]
    got = merged_weight(weight, rows, p, None, torch.float32, None, "triton")
    torch.testing.assert_close(got, weight + p @ r)
    norm = pack(NormOptions("weight", "calibrated"))
    got = normed_weight(weight, rows, p, None, None, norm, torch.float32, None, "triton")
    assert got.isfinite().all()


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (2, 5), (3, 10**8), (127, 64), (1024, 4096), (4096, 4096), (4096, 14336),
     (14336, 4096), (128256, 4096), (4096, 128256)],
    ids=str,
)  # fmt: skip
def test_a_chunk_is_neither_whole_unless_small_nor_larger_than_the_workspace(shape, itemsize):
    n, k = shape
    rows = plan.rows_of_chunk(n, k, itemsize)
    small = n * k * itemsize <= plan.SMALL_MIB * 2**20
    assert rows >= 1 and (rows == n if small or n == 1 else rows < n)
    assert rows == 1 or rows * k * itemsize <= plan.CHUNK_MIB * 2**20 <= 32 * 2**20


@settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    t=st.integers(0, 20), n=st.integers(1, 90), k=st.integers(1, 140), m=st.integers(1, 70),
    norm=st.tuples(st.sampled_from(FORMS), st.sampled_from(COMBINES)),
    view=st.sampled_from([None, column_major, every_other]), folded=st.sampled_from(["", "base"]),
)  # fmt: skip
def test_any_shape_and_stride(t, n, k, m, norm, view, folded):
    options = NormOptions("weight", *norm, eps=1e-3)
    example = case_of((t, n, k, min(m, n)), options, folded=folded).draw()
    check_example(example if view is None else on(example, weight=view(example.layer.weight)))


@pytest.mark.parametrize("norm", ["none", "channel", "weight"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("folded", ["", "base"], ids=["fresh", "folded"])
def test_merge_is_the_oracle_rounded_once(norm, dtype, folded):
    options = NormOptions(norm, combine="averaged")
    example = case_of((1, 70, 131, 20), options, dtype, restrained=True, folded=folded).draw()
    got, wide = effective_weight(example.layer, example.a, impl="triton"), example.to(torch.float64)
    exact = naive.effective_weight(wide.layer, wide.a)
    assert got.dtype == dtype
    error = (got.double() - exact).abs() - 0.51 * torch.finfo(dtype).eps * exact.abs()
    assert error.max() <= 5e-6


def test_merge_in_another_dtype():
    example = case_of((1, 13, 11, 4), WEIGHT, torch.bfloat16).draw()
    got, expected = (
        effective_weight(example.layer, example.a, dtype=torch.float32, impl=impl)
        for impl in ("triton", "reference")
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("norm", ["none", "channel", "weight"])
def test_stochastic_rounding_is_unbiased_and_picks_a_neighbour(norm, impl):
    example = case_of((1, 24, 20, 4), NormOptions(norm), torch.bfloat16).draw()
    layer, a = example.layer, example.a * 1e-2
    wide = effective_weight(layer, a, dtype=torch.float32, impl=impl)
    draws = torch.stack(
        [
            effective_weight(layer._replace(rounding_seed=seed), a, impl=impl).float()
            for seed in range(32)
        ]
    )
    below = (wide.view(torch.int32) >> 16 << 16).view(torch.float32)
    step = ((wide.view(torch.int32) >> 16) + 1 << 16).view(torch.float32) - below
    assert ((draws == below) | (draws == below + step)).all()
    share_up, probability = (draws != below).float().mean(0), (wide - below) / step
    assert (share_up - probability).abs().max() < 0.5
    assert (share_up - probability).mean().abs() < 0.03
    again = effective_weight(layer._replace(rounding_seed=0), a, impl=impl)
    assert torch.equal(again.float(), draws[0])


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("folded", ["", "base"], ids=["fresh", "folded"])
@pytest.mark.parametrize("options", ROUNDED, ids=str)
def test_a_layer_rounded_stochastically_multiplies_by_what_its_merge_writes(options, folded, impl):
    case = case_of((9, 70, 37, 5), options, torch.bfloat16, folded=folded, trains_bias=False)
    example = replace(case, rounding_seed=3).draw()
    merged = effective_weight(example.layer, example.a, impl=impl)
    expected = torch.nn.functional.linear(example.x, merged, example.layer.bias)
    assert torch.equal(example.output(impl), expected)
    assert not torch.equal(merged, effective_weight(case.draw().layer, example.a, impl=impl))


@pytest.mark.parametrize("options", ROUNDED, ids=str)
def test_gradients_beside_stochastic_rounding(options):
    for shape in ((9, 70, 37, 5), (70, 80, 48, 33)):
        check(shape, options, torch.bfloat16, folded="base", rounding_seed=3)


def test_stochastic_rounding_is_the_same_in_plain_torch(monkeypatch):
    """Bit for bit, on sums that fp32 holds exactly; also where plain torch goes by parts of W."""
    source = torch.Generator().manual_seed(0)
    weight = torch.randint(128, 256, (70, 131), generator=source).bfloat16()
    weight[:4] = 1
    p = torch.randint(-255, 256, (70, 4), generator=source) / 65536
    expected = merged(weight, p, "triton")
    assert torch.equal(merged(weight, p, "reference"), expected)
    assert (expected != weight).any() and (expected == weight).any()
    exact = weight.float() + p @ weight[:4].float()
    parts = [round_stochastically(exact[a:b], 0, a) for a, b in ((0, 7), (7, 8), (8, 70))]
    assert torch.equal(torch.cat(parts), expected)
    norm = pack(NormOptions("weight"))
    arguments = (weight, torch.arange(4), p, None, None, norm, torch.bfloat16, 0, "reference")
    whole = normed_weight(*arguments)
    monkeypatch.setattr(plain, "rows_at_once", lambda w, dtype: 5)
    assert torch.equal(normed_weight(*arguments), whole)


def test_noise_is_uniform_and_its_places_and_seeds_are_independent():
    cpu, shape = torch.device("cpu"), torch.Size((512, 512))
    one, two, three = (noise(0, shape, noise_key(i), cpu).double() / 65536 - 0.5 for i in range(3))
    assert abs(one.mean()) < 4 / 512 / 12**0.5 and abs(one.var() * 12 - 1) < 0.02
    pairs = [(one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[:, 16:], one[:, :-16])]
    for a, b in [*pairs, (one, two), (two, three)]:
        assert abs((a * b).mean()) * 12 < 4 / 512
    far = noise(2**20, torch.Size((2, 4096)), 0, cpu)  # places count modulo 2³²
    assert torch.equal(far, noise(0, torch.Size((2, 4096)), 0, cpu))


def merged(weight, p, impl, seed=0, rows=4):
    """``W + P R`` in bf16, rounded stochastically."""
    rows = torch.arange(rows) if isinstance(rows, int) else rows
    return merged_weight(weight, rows, p, None, torch.bfloat16, seed, impl)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_stochastic_rounding_keeps_what_bf16_holds(impl):
    weight = torch.randn(24, 20).bfloat16()
    for special in (float("inf"), -float("inf"), 3.3895313892515355e38, 2.0**-126):
        weight[5, 3] = special
        assert torch.equal(merged(weight, torch.zeros(24, 4), impl), weight)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_stochastic_rounding_draws_anew_for_each_entry(impl):
    weight = torch.ones(24, 20, dtype=torch.bfloat16)
    got = merged(weight, torch.full((24, 4), 2.0**-10), impl).float()
    assert (got.std(0) > 0).all() and (got.std(1) > 0).all()


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_stochastic_rounding_keeps_nan_of_every_payload(impl):
    weight = torch.ones(64, 8)
    weight[4:] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    got = merged(weight, torch.zeros(64, 4), impl)
    assert got[4:].isnan().all() and torch.equal(got[:4], weight[:4].bfloat16())


@pytest.mark.parametrize("shape", [(0, 8, 5, 2), (3, 0, 5, 0), (3, 8, 5, 0)], ids=str)
def test_nothing_to_learn_from(shape):
    """No token, no output, no row of W chosen."""
    example = case_of(shape, NormOptions("weight")).draw()
    for got, expected in zip(example.run("triton"), exactly(example), strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected.float())


def test_stochastic_rounding_does_not_depend_on_the_tiles(monkeypatch):
    source = torch.Generator().manual_seed(0)
    weight, p = (torch.randn(70, size, generator=source) for size in (37, 5))
    weight = weight.bfloat16()
    expected = merged(weight, p, "triton", 3, 5)
    small = {"BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_M": 16, "num_warps": 8, "num_stages": 2}
    monkeypatch.setattr(kernels, "weight_tile", lambda *how: small)
    assert torch.equal(merged(weight, p, "triton", 3, 5), expected)
    assert not torch.equal(merged(weight, p, "triton", 4, 5), expected)


def test_what_no_kernel_takes_is_refused():
    example = case_of((3, 5, 4, 2), WEIGHT, torch.float64).draw()
    with pytest.raises(RuntimeError, match="no kernel takes float64"):
        example.output("triton")
    with pytest.raises(RuntimeError, match="no kernel takes float64"):
        effective_weight(example.layer, example.a, impl="triton")
