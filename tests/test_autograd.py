"""The autograd function: what a second derivative meets, and what is read again going back."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from secura_kernels import Layer, NormOptions, secura_add, secura_linear, select
from secura_kernels.inspection.examples import Case
from secura_kernels.norm import NORMS

WIDE = {"dtype": torch.float64, "n": 13, "k": 11, "m": 4, "t": 7}


@pytest.mark.parametrize("loss_of", [torch.sum, lambda out: out.square().sum()])
def test_double_backward_is_refused(options, loss_of):
    """Also where ∂loss/∂out is a constant, as of a sum: ∂x depends on A and B all the same."""
    example = Case(options, **WIDE).draw()
    x, a = (tensor.clone().requires_grad_() for tensor in (example.x, example.a))
    out = example._replace(x=x, a=a).output()
    (grad,) = torch.autograd.grad(loss_of(out), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (loss_of(out) + grad.square().sum()).backward()


@pytest.mark.parametrize("twice_of", ["step", "penalty"])
def test_a_second_derivative_by_autograd_grad_is_refused(options, twice_of):
    """A step that is differentiated through, and a penalty on a gradient."""
    example = Case(options, **WIDE).draw()
    a = example.a.clone().requires_grad_()
    (grad,) = torch.autograd.grad(
        example._replace(a=a).output().square().mean(), a, create_graph=True
    )
    if twice_of == "step":
        loss = example._replace(a=a - 0.01 * grad).output().square().mean()
    else:
        loss = grad.square().sum() + 0 * a.square().sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, a)


@pytest.mark.parametrize("given", ["y0", "columns", "cols"])
def test_a_weight_written_to_before_the_backward_pass_is_an_error(given):
    weight, x = torch.randn(8, 8), torch.randn(3, 8)
    rows, cols = select(weight, 4)
    a = torch.randn(4, 4, requires_grad=True)
    layer = Layer(weight, None, rows, cols, NormOptions())
    if given == "y0":
        out = secura_add(x @ weight.t(), layer, a)
        weight.zero_()
    elif given == "cols":
        out = secura_linear(x, layer, a)
        cols.copy_(cols.flip(0))
    else:
        columns = weight[:, cols]
        out = secura_linear(x, layer._replace(columns=columns), a)
        columns.zero_()
    with pytest.raises(RuntimeError, match="written to between the forward pass and its backward"):
        out.sum().backward()


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_that_are_recorded_under_checkpointing(norm):
    """What was saved may be asked for once there; the values are those of a plain pass."""
    example = Case(NormOptions(norm), **WIDE).draw()
    a = example.a.clone().requires_grad_()

    def out(a):
        return example._replace(a=a).output().square().sum()

    (plain,) = torch.autograd.grad(out(a), a)
    loss = checkpoint(out, a, use_reentrant=False)
    (recorded,) = torch.autograd.grad(loss, a, create_graph=True)
    torch.testing.assert_close(recorded.detach(), plain)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(recorded.sum(), a)
