"""The whole layer as one op: the bits of its ops one after the other, and what it refuses."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from secura_kernels import Layer, NormOptions, row_norms, secura_linear
from secura_kernels.gain import NORMS

from .cases import check_layer_op

FLAGS = [
    {},
    {"bias": True, "scaling": 0.5},
    {"folded": "base", "bias": True},
    {"folded": "change", "restrain": True},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(flags) or "plain")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("combine", ["gated", "averaged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_as_its_ops(norm, combine, dtype, flags):
    if norm == "none" and flags.get("restrain"):
        pytest.skip("without a norm there is nothing to restrain")
    options = NormOptions(norm, None, combine if norm != "none" else None)
    for shape in ((7, 13, 11, 4), (29, 12, 6, 4)):
        check_layer_op(shape, options, dtype, impl="reference", **flags)
        if norm != "weight":
            check_layer_op(shape, options, dtype, impl="reference", dropout=True, **flags)


def test_eight_bits():
    options = NormOptions("activation")
    check_layer_op((7, 13, 11, 4), options, torch.float32, impl="reference", save="8bit")


def layer(**changes):
    values = {
        "weight": torch.randn(13, 11),
        "bias": None,
        "rows": torch.arange(4),
        "cols": torch.arange(4),
        "options": NormOptions("none"),
    }
    return Layer(**values | changes)


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"cols": torch.arange(3)}, {}, "cols"),
        ({"core": torch.zeros(3, 4)}, {}, "core"),
        ({"options": NormOptions("channel")}, {}, "gram and base_norms"),
        ({"options": NormOptions("weight")}, {"z_scale": torch.ones(2, 4)}, "z_scale"),
        ({"bias": torch.zeros(12)}, {}, "bias"),
    ],
)
def test_what_does_not_fit_is_refused(changes, flags, message):
    with pytest.raises(ValueError, match=message):
        secura_linear(
            torch.randn(2, 11), layer(**changes), torch.randn(4, 8), torch.randn(8, 4), **flags
        )


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must be"):
        secura_linear(torch.randn(2, 11), layer(), torch.randn(4, 8), torch.randn(7, 4))
    with pytest.raises(TypeError, match="floating"):
        secura_linear(torch.ones(2, 11).long(), layer(), torch.randn(4, 8), torch.randn(8, 4))


def test_gradients_that_nobody_wants_are_not_made():
    a, b = torch.randn(4, 8), torch.randn(8, 4)
    for wanted in range(3):
        leaves = [torch.randn(2, 11), a.clone(), b.clone()]
        leaves[wanted].requires_grad_()
        secura_linear(leaves[0], layer(), leaves[1], leaves[2]).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(3)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("watched", [False, True])
def test_a_core_that_is_trained_itself(norm, watched):
    """Without B, A is the core: as with the identity in B's place, gradients included."""
    torch.manual_seed(0)
    weight = torch.randn(13, 11, dtype=torch.float64)
    own = layer(weight=weight, options=NormOptions(norm), scaling=1.5)
    if norm == "channel":
        gram, norms = row_norms(weight, own.rows, None)
        own = own._replace(gram=gram, base_norms=norms)
    x = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    u = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(4, dtype=torch.float64)
    weights = torch.randn(5, 13, dtype=torch.float64)

    def run(*factors):
        with FlopCounterMode(display=False) if watched else nullcontext():
            out = secura_linear(x, own, *factors)
        return out, *torch.autograd.grad((out * weights).sum(), (x, u))

    for got, expected in zip(run(u), run(u, eye), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"without b, a is \[4, 4\]"):
        secura_linear(x, own, u[:, :3])
