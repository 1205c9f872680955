"""What ``activation`` keeps for its backward pass, in plain torch: 8-bit and recomputed."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from secura_kernels import NormOptions, naive
from secura_kernels.inspection.examples import Case
from secura_kernels.norm import COMBINES, FORMS, SAVES

CASE = {"t": 9, "n": 37, "k": 21, "m": 5, "dropout": True}


@pytest.mark.parametrize("y0_given", [True, False])
@pytest.mark.parametrize(
    ("form", "combine", "folded"), list(product(FORMS, COMBINES, ("", "base")))
)
def test_eight_bits_change_gradients_by_less_than_half_a_step(form, combine, folded, y0_given):
    flags = CASE | {"folded": folded, "restrained": bool(folded), "given": y0_given}
    options = NormOptions("activation", form, combine)
    (out, *kept), (exact, *wanted) = (
        Case(options, save=save, **flags).draw().run() for save in ("8bit", "recompute")
    )
    assert torch.equal(out, exact)
    for got, gradient in zip(kept, wanted, strict=True):
        assert not torch.equal(got, gradient) or (form != "calibrated" and gradient.norm() == 0)
        assert (got - gradient).norm() <= 2e-3 * gradient.norm()


@pytest.mark.parametrize("y0_given", [True, False])
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
def test_saved_bytes_an_output_element(dtype, save, wanted, y0_given):
    case = Case(NormOptions("activation"), dtype, save=save, **CASE | {"given": y0_given})
    example, sizes = case.draw(), []
    example = example._replace(x=example.x.requires_grad_())

    def note(tensor):
        if tensor.shape == example.grad.shape:
            sizes.append(tensor.element_size())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        example.output()
    assert sum(sizes) == wanted


@pytest.mark.parametrize("norm", ["none", "channel", "activation"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_large_bias_takes_no_bits_of_z(dtype, norm):
    """In y0 of 16 bits z is rounded as b is, in the gradients a fifth of it where b is 150 z."""
    example = Case(NormOptions(norm), dtype, n=64, k=48, m=8, inner=8).draw()
    bias = 50 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    example = example._replace(layer=example.layer._replace(bias=bias.to(dtype)))
    found, wanted = example.run(), example.to(torch.float64).run(functions=naive)
    for got, gradient in zip(found[1:], wanted[1:], strict=True):
        assert (got - gradient).norm() <= 2e-2 * gradient.norm()


def test_unknown_save_is_refused():
    with pytest.raises(ValueError, match=r"unknown save '4bit'"):
        Case(NormOptions("activation"), save="4bit").draw().run()
    assert SAVES[0] == "recompute"


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_nothing_in(shape):
    (t, n), options = shape, NormOptions("activation", "released")
    example = Case(options, t=t, n=n, m=min(2, n), given=True, save="8bit").draw()
    out, dx, du, dbias = example.run()
    assert out.shape == dx.shape == shape and not du.any() and not dbias.any()
