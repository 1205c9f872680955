"""What ``activation_norm`` keeps for its backward pass, in plain torch: 8-bit and recomputed."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from secura_kernels import NormOptions, activation_norm
from secura_kernels.activation import SAVES, activation_forward
from secura_kernels.gain import COMBINES, FORMS

from .cases import draw

CASE = draw((9, 37, 21, 5))
Y0 = CASE.x @ CASE.weight.T + CASE.bias


def norm(y0, p, delta_bias, options, save, folded=False, restrain=False):
    return activation_norm(
        y0, CASE.bias, CASE.rows, p, options, p_base=CASE.p_base if folded else None,
        delta_bias=delta_bias, z_scale=CASE.z_scale, restrain=CASE.restrain if restrain else None,
        save=save,
    )  # fmt: skip


def run(options, save, folded=False, restrain=False, forward=norm):
    leaves = [x.clone().requires_grad_() for x in (Y0, CASE.p, CASE.delta_bias)]
    out = forward(*leaves, options, save, folded, restrain)
    return out.detach(), *torch.autograd.grad(out, leaves, CASE.grad)


@pytest.mark.parametrize(
    ("form", "combine", "folded"), list(product(FORMS, COMBINES, (False, True)))
)
def test_eight_bits_change_gradients_by_less_than_half_a_step(form, combine, folded):
    options = NormOptions("activation", form, combine)
    (out, *kept), (exact, *wanted) = (
        run(options, save, folded, restrain=folded) for save in ("8bit", "recompute")
    )
    assert torch.equal(out, exact)
    for got, gradient in zip(kept, wanted, strict=True):
        assert not torch.equal(got, gradient) or (form != "calibrated" and gradient.norm() == 0)
        assert (got - gradient).norm() <= 2e-3 * gradient.norm()


def saved_bytes(dtype, save):
    y0, p = Y0.to(dtype, copy=True).requires_grad_(), CASE.p.clone().requires_grad_()
    sizes = []

    def note(tensor):
        if tensor.shape == y0.shape:
            sizes.append(tensor.element_size() * tensor.numel() / y0.numel())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        activation_norm(y0, None, CASE.rows, p, NormOptions("activation"), save=save)
    return sum(sizes)


@pytest.mark.parametrize(
    ("dtype", "save", "wanted"),
    [
        (torch.float32, "recompute", 4),
        (torch.bfloat16, "recompute", 2),
        (torch.float32, "8bit", 1),
        (torch.bfloat16, "8bit", 1),
    ],
    ids=str,
)
def test_saved_bytes_an_output_element(dtype, save, wanted):
    assert saved_bytes(dtype, save) == wanted


def test_operators_that_keep_eight_bits_pass_opcheck_and_compile_whole():
    limits = [CASE.restrain.percent, CASE.restrain.edge, CASE.restrain.decay]
    arguments = (
        Y0, CASE.bias, CASE.rows, CASE.p, CASE.p_base, CASE.delta_bias, CASE.z_scale,
        CASE.restrain.important, limits, "paper", "gated", 6.0, 1e-10, True, True, "reference",
    )  # fmt: skip
    operators = torch.ops.secura
    torch.library.opcheck(operators.activation_norm.default, arguments)
    out, z, kept, scalars, factor = activation_forward(*arguments)
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(
            operators.activation_norm_backward.default,
            (out, None, kept, z, CASE.rows, CASE.p, CASE.p_base, None, CASE.z_scale, scalars,
             factor, [], "paper", "gated", needs, "reference"),
        )  # fmt: skip
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    options = NormOptions("activation", "paper", "averaged")
    for got, wanted in zip(
        run(options, "8bit", forward=compiled), run(options, "8bit"), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_unknown_save_is_refused():
    with pytest.raises(ValueError, match=r"unknown save '4bit'"):
        run(NormOptions("activation"), "4bit")
    assert SAVES[0] == "recompute"


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 0, 4)], ids=str)
def test_nothing_in(shape):
    y0 = torch.randn(shape, requires_grad=True)
    rows = torch.arange(min(2, shape[-1]))
    p = torch.randn(shape[-1], len(rows), requires_grad=True)
    out = activation_norm(y0, None, rows, p, NormOptions("activation", "released"), save="8bit")
    out.sum().backward()
    assert out.shape == y0.grad.shape == y0.shape and not p.grad.any()
