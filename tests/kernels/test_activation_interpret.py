"""The ``activation`` kernels in Triton's interpreter against the fp64 oracle."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secura_kernels import NormOptions, Restrain, activation_norm, reference
from secura_kernels.activation import SAVES, activation_backward
from secura_kernels.gain import COMBINES, FORMS
from secura_kernels.kernels import activation_backward as launcher
from secura_kernels.machine import H100, assume

FLOORS = {torch.float32: 5e-7, torch.float16: 6e-4, torch.bfloat16: 5e-3}
CAPS = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def poisoned():
    """Every tensor that torch leaves uninitialised holds NaN (or the largest integer)."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Random tensors of one call; ``y0`` is exact in its dtype, the oracle sees the same values."""

    def __init__(self, t, n, m, dtype, seed=0, strided=False):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        wide = draw(t, 2 * n) if strided else draw(t, n)
        self.y0 = (wide.to(dtype)[:, :n]).requires_grad_()
        self.bias = draw(n).to(dtype)
        self.rows = torch.randperm(n, generator=generator)[:m]
        self.p = (0.3 * draw(n, m)).requires_grad_()
        self.p_base = 0.3 * draw(n, m)
        self.delta_bias = (0.1 * draw(n)).requires_grad_()
        self.z_scale = (torch.rand(t, m, generator=generator) > 0.3).float() / 0.7
        self.important = torch.rand(n, generator=generator) > 0.5
        if strided:
            self.rows = self.rows.repeat_interleave(2)[::2]
            self.delta_bias = self.delta_bias.detach().repeat_interleave(2)[::2].requires_grad_()
        self.grad = draw(t, 2 * n).to(dtype)[:, ::2] if strided else draw(t, n).to(dtype)

    def leaves(self):
        return self.y0, self.p, self.delta_bias


def oracle(case, options, flags, dtype=torch.float64):
    """The equations in ``dtype`` on the same values, by autograd; M detached."""
    options = options._replace(form=options.form or "calibrated")
    y0, p, delta_bias = (leaf.detach().to(dtype).requires_grad_() for leaf in case.leaves())
    z = y0[:, case.rows] - (case.bias[case.rows].to(dtype) if flags["bias"] else 0)
    base = y0 + z @ case.p_base.to(dtype).T if flags["folded"] else y0
    zd = z * case.z_scale.to(dtype) if flags["dropout"] else z
    delta = zd @ p.T + (delta_bias if flags["bias"] else 0)
    gain = reference.magnitude_gain(
        reference.relative_change(base, delta, options), options.form, options.scale
    )
    restrain = Restrain(case.important, *flags["restrain"]) if flags["restrain"] else None
    out = reference.combine(base, delta, gain, options.combine)
    out = out * reference.restrain_factor(gain, restrain)
    out.backward(case.grad.to(dtype))
    return out.detach(), y0.grad, p.grad, delta_bias.grad if flags["bias"] else None


def kernel(case, options, flags, save="recompute", impl="triton"):
    for leaf in case.leaves():
        leaf.grad = None
    out = activation_norm(
        case.y0, case.bias if flags["bias"] else None, case.rows, case.p, options,
        p_base=case.p_base if flags["folded"] else None,
        delta_bias=case.delta_bias if flags["bias"] else None,
        z_scale=case.z_scale if flags["dropout"] else None,
        restrain=Restrain(case.important, *flags["restrain"]) if flags["restrain"] else None,
        save=save, impl=impl,
    )  # fmt: skip
    out.backward(case.grad)
    return out.detach(), case.y0.grad, case.p.grad, case.delta_bias.grad


def flags(bias=True, folded=False, dropout=False, restrain=None):
    return {"bias": bias, "folded": folded, "dropout": dropout, "restrain": restrain}


def check(case, options, how, save="recompute"):
    """Error ≤ 2 × that of plain torch in the same dtype + a floor, under an absolute cap."""
    dtype = case.y0.dtype
    exact = oracle(case, options, how)
    plain = oracle(case, options, how, dtype)
    got = kernel(case, options, how, save)
    step = 1e-3 if save == "8bit" else 0.0
    for name, ours, ideal, same in zip(("out", "y0", "p", "bias"), got, exact, plain, strict=True):
        if ideal is None:
            assert ours is None
            continue
        scale = ideal.norm().clamp(min=1e-30)
        error = (ours.double() - ideal).norm() / scale
        yardstick = (same.double() - ideal).norm() / scale
        limit = min(2 * yardstick + FLOORS[dtype], CAPS[dtype]) + step
        assert error <= limit, f"{name}: {error:.2e} over {limit:.2e}"
    assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == torch.float32


SHAPES = [(1, 1, 1), (3, 17, 2), (33, 66, 16), (130, 97, 24), (9, 150, 140)]


@pytest.mark.parametrize(("t", "n", "m"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
def test_shapes_and_dtypes(t, n, m, dtype, combine):
    check(Case(t, n, m, dtype), NormOptions("activation", "calibrated", combine), flags())


OPTIONS = list(product(FORMS, COMBINES, (False, True), (False, True), (None, (0.1, 1.9, 0.5))))


@pytest.mark.parametrize(("form", "combine", "folded", "dropout", "restrain"), OPTIONS)
def test_every_option(form, combine, folded, dropout, restrain):
    how = flags(folded=folded, dropout=dropout, restrain=restrain)
    check(Case(19, 70, 9, torch.float16), NormOptions("activation", form, combine), how)


@pytest.mark.parametrize("form", FORMS)
def test_fp32_restrained_and_relative_to_a_folded_base(form):
    how = flags(folded=True, dropout=True, restrain=(0.1, 1.9, 0.5))
    options = NormOptions("activation", form, "averaged", 4.0, 0.05, True)
    check(Case(34, 70, 9, torch.float32), options, how)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("m", [9, 140])
@pytest.mark.parametrize("combine", COMBINES)
def test_eight_bits_keep_the_gain(combine, m, folded):
    how = flags(folded=folded, dropout=folded, restrain=(0.1, 1.9, 0.5) if folded else None)
    check(Case(40, 70, m if m < 70 else 66, torch.float16),
          NormOptions("activation", "calibrated", combine), how, "8bit")  # fmt: skip


def test_kept_gain_is_within_half_a_step_and_y0_is_not_saved():
    case = Case(40, 70, 9, torch.float32)
    for impl in ("triton", "reference"):
        out = activation_norm(case.y0, None, case.rows, case.p, NormOptions("activation"),
                              save="8bit", impl=impl)  # fmt: skip
        saved = out.grad_fn.next_functions[0][0].saved_tensors
        large = [x for x in saved if x is not None and x.shape == case.y0.shape]
        assert [tensor.dtype for tensor in large] == [torch.uint8]
        y0 = case.y0.detach().double()
        delta = y0[:, case.rows] @ case.p.detach().double().T
        rho = delta.abs() / (y0.abs() + 1e-10)
        exact = 1 / reference.magnitude_gain(rho, "calibrated", 6.0)
        assert (0.5 + large[0].double() / 510 - exact).abs().max() <= 0.5 / 510 + 1e-6


@pytest.mark.parametrize("combine", COMBINES)
def test_kept_levels_are_read_as_plain_torch_reads_them(combine):
    case = Case(20, 40, 5, torch.float32)
    levels = torch.arange(800).remainder(256).to(torch.uint8).view(20, 40)
    z = case.y0.detach()[:, case.rows].contiguous()
    thin = (z, case.rows, case.p.detach(), case.p_base, None, case.z_scale)
    how = ([], "calibrated", combine, [True, True, True])
    plain, ours = (
        activation_backward(case.grad, None, levels, *thin, None, None, *how, impl)
        for impl in ("reference", "triton")
    )
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [9, 140])
@pytest.mark.parametrize("combine", COMBINES)
def test_tall_tiles_of_few_processors(combine, m):
    """One processor: programs of 64 tokens, several tiles a program, what large T gets."""
    how = flags(folded=True)
    with assume(H100._replace(processors=1)):
        for n in (530, 544):
            check(Case(131, n, m, torch.float16), NormOptions("activation", None, combine), how)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 64 columns, and of 64 tokens."""
    monkeypatch.setattr(launcher, "WORKSPACE_MIB", 2**-20)
    monkeypatch.setattr(launcher, "_ENOUGH_TOKENS", 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("combine", "m"), list(product(COMBINES, (9, 140))))
@pytest.mark.parametrize("save", SAVES)
def test_sums_go_on_over_chunks(combine, m, dtype, save, small_chunks):
    how = flags(folded=True, dropout=True, restrain=(0.1, 1.9, 0.5))
    check(Case(80, 150, m, dtype), NormOptions("activation", "calibrated", combine), how, save)


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize(("t", "n", "itemsize"), [
    (1, 1, 4), (8192, 4096, 2), (8192, 14336, 2), (40000, 4097, 4), (300, 152064, 2),
])  # fmt: skip
def test_chunks_cover_everything_once_and_fit_the_workspace(t, n, itemsize, whole_rows):
    chunks = list(launcher._chunks(t, n, itemsize, whole_rows))
    sizes = [(a.stop - a.start) * (b.stop - b.start) for a, b in chunks]
    assert sum(sizes) == t * n and len(set(map(str, chunks))) == len(chunks)
    assert all(a.stop <= t and b.stop <= n for a, b in chunks)
    smallest = 64 * n if whole_rows else 64 * min(t, 16384)
    assert max(sizes) == sizes[0] <= max(smallest, launcher.WORKSPACE_MIB * 2**20 // itemsize)
    assert all(a.start % 64 == 0 and b.start % 64 == 0 for a, b in chunks)


def test_torchs_default_dtype_changes_nothing():
    case, options = Case(20, 40, 5, torch.float16), NormOptions("activation", "paper")
    arguments = (case.y0, None, case.rows, case.p, options)
    expected = activation_norm(*arguments, impl="triton")
    torch.set_default_dtype(torch.float64)
    try:
        got = activation_norm(*arguments, impl="triton")
    finally:
        torch.set_default_dtype(torch.float32)
    scalars = [t for t in got.grad_fn.next_functions[0][0].saved_tensors if t is not None]
    assert torch.float64 not in {tensor.dtype for tensor in scalars}
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    t=st.integers(1, 70), n=st.integers(1, 140), m=st.integers(1, 40), seed=st.integers(0, 99),
    strided=st.booleans(), combine=st.sampled_from(COMBINES), save=st.sampled_from(SAVES),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def test_any_shape_and_strides(t, n, m, seed, strided, combine, save, dtype):
    case = Case(t, n, min(m, n), dtype, seed, strided)
    check(case, NormOptions("activation", "calibrated", combine), flags(folded=True), save)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("combine", COMBINES)
def test_no_change_leaves_the_output_as_it_was(form, combine):
    case = Case(5, 20, 4, torch.bfloat16)
    out = activation_norm(case.y0, None, case.rows, torch.zeros(20, 4),
                          NormOptions("activation", form, combine), impl="triton")  # fmt: skip
    assert torch.equal(out, case.y0)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_partial_gradients_equal_those_of_all(combine, dtype):
    case, options = Case(20, 40, 5, dtype), NormOptions("activation", "calibrated", combine)
    whole = kernel(case, options, flags(dropout=True))[1:]
    for index in range(3):
        leaves = [leaf.detach().requires_grad_(i == index) for i, leaf in enumerate(case.leaves())]
        out = activation_norm(leaves[0], case.bias, case.rows, leaves[1], options,
                              delta_bias=leaves[2], z_scale=case.z_scale,
                              impl="triton")  # fmt: skip
        out.backward(case.grad)
        assert [leaf.grad is not None for leaf in leaves] == [i == index for i in range(3)]
        assert torch.equal(leaves[index].grad, whole[index])


def test_inputs_are_not_written_and_expanded_gradients_work():
    case = Case(20, 40, 5, torch.bfloat16)
    before = [tensor.detach().clone() for tensor in (case.y0, case.bias, case.p, case.z_scale)]
    options = NormOptions("activation")
    case.grad = torch.ones(1, 1, dtype=torch.bfloat16).expand(20, 40)
    expanded = kernel(case, options, flags(dropout=True))
    case.grad = case.grad.contiguous()
    for one, other in zip(expanded, kernel(case, options, flags(dropout=True)), strict=True):
        assert torch.equal(one, other)
    after = (case.y0, case.bias, case.p, case.z_scale)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)], ids=str)
def test_nothing_to_launch(shape):
    y0 = torch.randn(shape, requires_grad=True)
    p = torch.randn(shape[-1], 0 if shape[-1] == 0 else 2, requires_grad=True)
    rows = torch.arange(p.shape[1])
    out = activation_norm(y0, None, rows, p, NormOptions("activation", "paper"), impl="triton")
    out.sum().backward()
    assert out.shape == y0.grad.shape == y0.shape and (p.grad == 0).all()


def test_another_dtype_is_refused():
    case = Case(3, 5, 2, torch.float64)
    with pytest.raises(RuntimeError, match=r"float64"):
        kernel(case, NormOptions("activation"), flags())
