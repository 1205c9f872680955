"""``activation_linear`` in Triton's interpreter against the fp64 oracle."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from secura_kernels import NormOptions, activation_linear
from secura_kernels.activation import SAVES
from secura_kernels.activation_dense import adds_thin
from secura_kernels.gain import COMBINES
from secura_kernels.kernels import activation_backward as launcher

from .cases import SHAPES, assert_no_worse, check, draw, run

GATED = NormOptions("activation", "calibrated", "gated")
THIN = (70, 150, 31, 9)  # N > 2 K: gated, h R is added to g W


@pytest.fixture(autouse=True)
def poisoned():
    """What is allocated and never written is NaN, and operators without a fixed order raise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 64 columns, and of 64 tokens."""
    monkeypatch.setattr(launcher, "WORKSPACE_MIB", 2**-20)
    monkeypatch.setattr(launcher, "_ENOUGH_TOKENS", 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (9, 150, 13, 140)], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
def test_shapes_and_dtypes(shape, dtype, combine):
    check(shape, NormOptions("activation", "calibrated", combine), dtype)


@pytest.mark.parametrize(
    ("folded", "dropout", "restrain", "biased", "save"),
    [
        *product((False, True), (False, True), (False,), (True,), SAVES),
        (True, True, True, True, "recompute"),
        (False, True, False, False, "8bit"),
    ],
)
@pytest.mark.parametrize("combine", COMBINES)
def test_every_flag(combine, folded, dropout, restrain, biased, save, small_chunks):
    check(
        THIN, NormOptions("activation", "calibrated", combine), torch.float16, folded=folded,
        dropout=dropout, restrain=restrain, biased=biased, delta_bias=biased, save=save,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [9, 140])
def test_h_goes_on_over_chunks(m, dtype, small_chunks):
    check((130, 150, 31, m), GATED, dtype, folded=True, dropout=True)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_forms_that_look_at_the_whole_batch(form):
    check((33, 70, 20, 5), NormOptions("activation", form, "averaged", 4.0, 0.05, True))


def test_route_is_the_one_that_moves_fewer_bytes():
    assert adds_thin(14336, 4096, "gated", None)
    assert adds_thin(4096, 4096, "gated", None)
    assert not adds_thin(4096, 14336, "gated", None)
    assert not adds_thin(14336, 4096, "averaged", None)
    assert not adds_thin(14336, 4096, "gated", torch.ones(14336))


class Largest(TorchDispatchMode):
    """The most elements of any one result, but for views and the interpreter's copies."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        skipped = func.is_view or func.overloadpacket is torch.ops.aten.set_
        if isinstance(out, torch.Tensor) and not skipped and out.dtype != torch.uint8:
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, False]])
@pytest.mark.parametrize("m", [9, 140])
def test_backward_through_h_makes_no_tensor_of_all_tokens_and_outputs(needs, m, small_chunks):
    t, n = 200, 500
    case = draw((t, n, 3, m), torch.bfloat16)
    z, p = case.x.new_ones(t, m), case.p.bfloat16()
    with Largest() as seen:
        h, dp, dbias = launcher.backward(
            case.grad, case.grad, None, z, case.rows, p, None, None, None, None, None,
            [1.0, 1.0, 1.0], "calibrated", "gated", needs, thin=needs[0],
        )  # fmt: skip
    assert [value is not None for value in (h, dp, dbias)] == needs
    assert 0 < seen.numel <= max(t, n) * 144


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("combine", COMBINES)
def test_strides_expanded_gradients_and_inputs_left_as_they_were(combine, save):
    case = draw((40, 66, 20, 5), torch.bfloat16)
    options = NormOptions("activation", None, combine)
    plain = run(case, options, "triton", save=save)
    before = {name: value.clone() for name, value in vars(case).items() if name != "restrain"}
    case.weight = case.weight.t().contiguous().t()
    case.x = case.x.repeat_interleave(2, 1)[:, ::2]
    case.grad = case.grad.t().contiguous().t()
    for got, expected in zip(run(case, options, "triton", save=save), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    assert all(torch.equal(getattr(case, name), value) for name, value in before.items())
    case.grad = torch.ones((), dtype=torch.bfloat16).expand(40, 66)
    exact = run(case.to(torch.float64), options, "oracle")
    if save == "recompute":
        reference = run(case, options, "reference")
        assert_no_worse(run(case, options, "triton"), reference, exact, torch.bfloat16)


def test_same_bits_twice(small_chunks):
    case = draw(THIN, torch.bfloat16)
    first, second = (run(case, GATED, "triton", folded=True, dropout=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_partial_gradients_equal_those_of_all():
    case = draw(THIN, torch.bfloat16)
    whole = run(case, GATED, "triton")[1:]
    for index in range(3):
        leaves = [leaf.clone() for leaf in (case.x, case.p, case.delta_bias)]
        leaves[index].requires_grad_()
        out = activation_linear(
            leaves[0], case.weight, case.bias, case.rows, leaves[1], GATED, delta_bias=leaves[2],
            impl="triton",
        )  # fmt: skip
        out.backward(case.grad)
        assert [leaf.grad is not None for leaf in leaves] == [i == index for i in range(3)]
        assert torch.equal(leaves[index].grad, whole[index])


@pytest.mark.parametrize("x", [torch.ones(2, 0, 5), torch.ones(3, 4, 5)], ids=str)
def test_any_leading_dimensions(x):
    x = x.requires_grad_()
    case = draw((1, 8, 5, 2))
    out = activation_linear(x, case.weight, None, case.rows, case.p, GATED, impl="triton")
    out.sum().backward()
    assert out.shape == (*x.shape[:-1], 8) and x.grad.shape == x.shape
