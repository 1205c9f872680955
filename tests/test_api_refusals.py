"""What the api refuses: operands that do not fit, and what a space cannot do."""

from __future__ import annotations

from math import inf

import pytest
import torch

import secura_kernels
from secura_kernels import (
    NormOptions,
    Restrain,
    effective_weight,
    init_a,
    secura_add,
    secura_linear,
    select,
)
from secura_kernels.inspection.examples import Case

WIDE = {"dtype": torch.float64, "n": 13, "k": 11, "m": 4, "t": 7}

CHANGES = {
    "bias": torch.ones(1),
    "core": torch.ones(3, 4),
    "columns": torch.ones(13, 3),
    "rows": torch.ones(1, 4, dtype=torch.int64),
    "cols": torch.arange(3),
    "gram": torch.ones(3, 3),
    "base_norms": torch.ones(12),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("function", ["secura_linear", "secura_add", "effective_weight"])
def test_a_part_of_the_layer_that_does_not_fit_is_refused(name, function):
    example = Case(NormOptions("channel"), **WIDE).draw()
    layer = example.layer._replace(**{name: CHANGES[name]})
    first = {"secura_linear": [example.x], "secura_add": [example.grad]}.get(function, [])
    with pytest.raises(ValueError, match="must be"):
        getattr(secura_kernels, function)(*first, layer, example.a)


NOT_TAKEN = {
    "core requires a gradient": {"core": torch.ones(4, 4).requires_grad_()},
    "scaling requires a gradient": {"scaling": torch.ones(()).requires_grad_()},
    "the weight is torch.int8": {"weight": torch.ones(13, 11, dtype=torch.int8)},
    "important is torch.float32": {"restrain": Restrain(torch.ones(13))},
}


@pytest.mark.parametrize("message", NOT_TAKEN)
@pytest.mark.parametrize("function", ["secura_linear", "secura_add"])
def test_what_would_be_taken_for_something_else_is_refused(message, function):
    example = Case(NormOptions("none"), **WIDE).draw()
    layer = example.layer._replace(**NOT_TAKEN[message])
    first = example.x if function == "secura_linear" else example.grad
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(secura_kernels, function)(first, layer, example.a)
    with pytest.raises(ValueError, match=r"(x|y0) \[\]"):
        getattr(secura_kernels, function)(torch.tensor(1.0), example.layer, example.a)


@pytest.mark.parametrize("weight", [torch.ones(2, 3, 4), torch.ones(4), torch.ones(3, 4).int()])
def test_what_is_no_matrix_of_floating_numbers_is_refused(weight):
    for make in (lambda: select(weight, 1), lambda: init_a(weight, 1, 1)):
        with pytest.raises(ValueError, match=r"must be \[N, K\], of floating numbers"):
            make()


@pytest.mark.parametrize("norm", ["none", "activation"])
def test_an_output_of_another_width_than_the_weights_is_refused(norm):
    example = Case(NormOptions(norm), **WIDE, given=True).draw()
    for n in (1, 12, 14):
        with pytest.raises(ValueError, match=rf"weight \[13, .* must be \[{n}, K\]"):
            secura_kernels.secura_add(
                torch.ones(5, n), example.layer._replace(bias=None), example.a
            )


@pytest.mark.parametrize("y0_given", [False, True])
@pytest.mark.parametrize("name", ["x", "a", "b", "delta_bias", "z_scale", "important"])
def test_an_argument_that_does_not_fit_is_refused(name, y0_given):
    flags = {"inner": 6, "dropout": True, "restrained": True, "given": y0_given}
    example = Case(NormOptions("channel"), **WIDE, **flags).draw()
    example.run()
    wrong = {"x": example.x[:, 1:], "a": example.a[1:], "b": example.b[:, 1:]}
    wrong |= {"delta_bias": torch.ones(1), "z_scale": torch.ones(1, 4)}
    if name == "important":
        restrain = example.layer.restrain._replace(important=torch.ones(14, dtype=torch.bool))
        changed = example._replace(layer=example.layer._replace(restrain=restrain))
    else:
        changed = example._replace(**{name: wrong[name]})
    with pytest.raises(ValueError, match=r"must be|does not fit the weight"):
        changed.output()


def test_what_a_space_cannot_do_is_refused():
    example = Case(NormOptions("weight"), **WIDE).draw()
    layer, x, a = example.layer, example.x, example.a
    with pytest.raises(ValueError, match="call secura_linear"):
        secura_add(example.grad, layer, a)
    with pytest.raises(ValueError, match="takes no z_scale"):
        secura_linear(x, layer, a, z_scale=torch.ones(7, 4))
    channel = layer._replace(options=NormOptions("channel"))
    with pytest.raises(ValueError, match="gram and base_norms"):
        secura_linear(x, channel, a)
    bare = layer._replace(weight=None, options=NormOptions("none"))
    with pytest.raises(ValueError, match="call secura_add"):
        secura_linear(x, bare, a)
    with pytest.raises(ValueError, match="neither weight nor columns"):
        secura_add(example.grad, bare, a)
    with pytest.raises(ValueError, match="not linear in x"):
        effective_weight(layer._replace(options=NormOptions("activation")), a)
    drawn = layer._replace(rounding_seed=0, options=NormOptions("none"))
    with pytest.raises(ValueError, match=r"is to torch\.bfloat16"):
        effective_weight(drawn, a, dtype=torch.float16)
    with pytest.raises(ValueError, match="no W' to round"):
        secura_linear(x, drawn._replace(options=NormOptions("activation")), a)
    with pytest.raises(ValueError, match="no z to scale"):
        secura_linear(x, drawn, a, z_scale=torch.ones(7, 4))
    with pytest.raises(ValueError, match="stochastic rounding multiplies by W' itself"):
        secura_add(example.grad, drawn, a)
    for name, value in (("eps", 0.0), ("scale", inf)):
        with pytest.raises(ValueError, match=rf"{name}={value} .*must be"):
            secura_linear(x, layer._replace(options=NormOptions("none", **{name: value})), a)
    with pytest.raises(ValueError, match="z_scale requires a gradient"):
        secura_linear(x, layer, a, z_scale=torch.ones(7, 4, requires_grad=True))
    with pytest.raises(ValueError, match="unknown norm 'rows'"):
        secura_linear(x, layer._replace(options=NormOptions("rows")), a)


@pytest.mark.parametrize("y0_given", [False, True])
def test_integers_are_refused(y0_given):
    example = Case(NormOptions("none"), given=y0_given).draw()
    with pytest.raises(TypeError, match="floating"):
        example._replace(x=example.x.long()).output()


@pytest.mark.parametrize("index", [-14, 13, 2**40])
def test_an_index_out_of_range_is_an_error_in_plain_torch(index, options):
    example = Case(options, **WIDE).draw()
    rows = example.layer.rows.clone()
    rows[1] = index
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        example._replace(layer=example.layer._replace(rows=rows)).output()
