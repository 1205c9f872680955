"""What the api refuses: operands that do not fit, and what a space cannot do."""

from __future__ import annotations

from itertools import product
from math import inf

import pytest
import torch

import secura_kernels
from secura_kernels import (
    NormOptions,
    Restrain,
    effective_weight,
    important_channels,
    init_a,
    secura_add,
    secura_linear,
    select,
)
from secura_kernels.cur import RankError
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
    "the weight is torch.float8": {"weight": torch.ones(13, 11).to(torch.float8_e4m3fn)},
    "core is torch.complex64": {"core": torch.ones(4, 4, dtype=torch.complex64)},
    "bias is torch.int64": {"bias": torch.ones(13, dtype=torch.int64)},
    r"weight \[13\] must be": {"weight": torch.ones(13)},
    r"weight \[13, 11, 1\] must be": {"weight": torch.ones(13, 11, 1)},
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


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(2, 3, 4),
        torch.ones(4),
        torch.ones(3, 4).int(),
        torch.ones(3, 4).to(torch.float8_e4m3fn),
    ],
)
def test_what_is_no_matrix_of_floating_numbers_is_refused(weight):
    for make in (select, important_channels, lambda weight, m: init_a(weight, m, 1)):
        with pytest.raises(ValueError, match=r"must be \[N, K\], of floating numbers"):
            make(weight, 1)


def test_ranks_out_of_range_are_refused():
    """Of a slice, a negative number would be another one."""
    weight = torch.ones(8, 12)
    for m in (0, 9, 12, -100):
        for make in (select, important_channels, lambda weight, m: init_a(weight, m, 1)):
            with pytest.raises(ValueError, match=rf"r={m} \(an op.s m\) must lie between 1 and"):
                make(weight, m)
    for init in ("svd", "kaiming", "identity"):
        with pytest.raises(ValueError, match=r"inner_r=-1 \(an op.s r\) must be 0 or more"):
            init_a(weight, 4, -1, init)


@pytest.mark.parametrize("name", ["a", "b", "delta_bias", "z_scale"])
def test_operands_of_complex_numbers_are_refused(name):
    example = Case(NormOptions("none"), **WIDE, inner=6, dropout=True).draw()
    given = getattr(example, name)
    given = torch.ones(13) if given is None else given
    with pytest.raises(TypeError, match=f"{name} is torch.complex"):
        example._replace(**{name: given.detach() * (1 + 1j)}).output()


def test_a_merge_to_what_holds_no_weight_is_refused():
    example = Case(NormOptions("none"), **WIDE).draw()
    for dtype in (torch.int8, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="a weight in torch"):
            effective_weight(example.layer, example.a, dtype=dtype)


@pytest.mark.parametrize("b", [torch.tensor(1.0), torch.ones(4), torch.ones(6, 4, 1)])
def test_a_factor_that_is_no_matrix_is_refused(b):
    example = Case(NormOptions("none"), **WIDE, inner=6).draw()
    with pytest.raises(ValueError, match="must be"):
        example._replace(b=b).output()


@pytest.mark.parametrize("norm", ["none", "channel", "activation"])
def test_a_trained_layer_is_checked_as_a_frozen_one(norm):
    """It is computed by plain equations, which would take anything."""
    example = Case(NormOptions(norm), **WIDE, given=True).draw()
    layer = example.layer._replace(weight=example.layer.weight.clone().requires_grad_())
    for name, value in (("eps", 0.0), ("scale", inf)):
        options = layer.options._replace(**{name: value})
        with pytest.raises(ValueError, match=rf"{name}={value} .*must be"):
            secura_add(example.x, layer._replace(options=options), example.a)
    options = layer.options._replace(eps_relative="no")
    with pytest.raises(ValueError, match=r"eps_relative='no' .*True or False"):
        secura_add(example.x, layer._replace(options=options), example.a)
    with pytest.raises(ValueError, match="unknown impl 'nonsense'"):
        secura_add(example.x, layer, example.a, impl="nonsense")
    with pytest.raises(RuntimeError, match="impl='triton' cannot run"):
        secura_add(example.x, layer, example.a, impl="triton")
    with pytest.raises(ValueError, match="z requires a gradient"):
        secura_add(example.x, layer, example.a, z=torch.ones(7, 4).requires_grad_())


@pytest.mark.parametrize("norm", ["none", "activation"])
def test_an_output_of_another_width_than_the_weights_is_refused(norm):
    example = Case(NormOptions(norm), **WIDE, given=True).draw()
    for n in (1, 12, 14):
        with pytest.raises(ValueError, match=rf"weight \[13, .* must be \[{n}, K\]"):
            secura_kernels.secura_add(
                torch.ones(5, n), example.layer._replace(bias=None), example.a
            )


PARTS = ["x", "a", "b", "delta_bias", "z_scale", "important"]


@pytest.mark.parametrize(("name", "y0_given"), [*product(PARTS, [False, True]), ("z", True)])
def test_an_argument_that_does_not_fit_is_refused(name, y0_given):
    flags = {"inner": 6, "dropout": True, "restrained": True, "given": y0_given}
    example = Case(NormOptions("channel"), **WIDE, **flags).draw()
    example.run()
    wrong = {"x": example.x[:, 1:], "a": example.a[1:], "b": example.b[:, 1:]}
    wrong |= {"delta_bias": torch.ones(1), "z_scale": torch.ones(1, 4), "z": torch.ones(7, 3)}
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
    with pytest.raises(ValueError, match=r"rounding_seed=3\.5 must be an integer"):
        secura_linear(x, drawn._replace(rounding_seed=3.5), a)
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


@pytest.mark.parametrize(
    ("options", "restraint", "message"),
    [
        ({"scale": 0.0}, {}, "scale=0.0 .* above 0"),
        ({"scale": -6.0}, {}, "scale=-6.0 .* above 0"),
        ({}, {"percent": 90}, r"percent=90.0 .* in \[0, 1\]"),
        ({}, {"edge": 0.5}, r"edge=0.5 .* in \[1, 2\]"),
        ({}, {"decay": -3.0}, r"decay=-3.0 .* in \[0, 1\]"),
        ({"norm": "none"}, {"percent": 0.9}, "'none' has no gain"),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_numbers_out_of_range_are_refused(options, restraint, message, given):
    chosen = {"norm": "channel"} | options
    example = Case(NormOptions("channel"), **WIDE, given=given).draw()
    layer = example.layer._replace(options=NormOptions(**chosen))
    if restraint:
        important = torch.ones(13, dtype=torch.bool)
        layer = layer._replace(restrain=Restrain(important, **restraint))
    with pytest.raises(ValueError, match=message):
        example._replace(layer=layer).output()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": "channel"}, "options='channel' must be NormOptions"),
        ({"options": None}, "options=None must be NormOptions"),
        ({"rows": [1, 2, 3, 4]}, "rows is list, and must be a tensor"),
        ({"cols": torch.arange(4, dtype=torch.int32)}, r"cols is torch.int32, .* torch.int64"),
        ({"rows": torch.ones(4, dtype=torch.bool)}, "rows is torch.bool"),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_parts_of_another_kind_are_named(change, message, given):
    example = Case(NormOptions("none"), **WIDE, given=given).draw()
    with pytest.raises(TypeError, match=message):
        example._replace(layer=example.layer._replace(**change)).output()


@pytest.mark.parametrize("m", [4.0, True, "4"])
def test_a_rank_that_is_no_integer_is_refused(m):
    weight = torch.randn(13, 11)
    for run in (lambda: select(weight, m), lambda: init_a(weight, m, 4)):
        with pytest.raises(RankError, match="must be an integer"):
            run()


@pytest.mark.parametrize("name", ["x", "a", "weight"])
def test_a_dtensor_is_refused_and_told_how_to_be_given(name):
    class Whole(torch.Tensor):
        def full_tensor(self):
            return self

    example = Case(NormOptions("none"), **WIDE).draw()
    if name == "weight":
        weight = example.layer.weight.as_subclass(Whole)
        example = example._replace(layer=example.layer._replace(weight=weight))
    else:
        example = example._replace(**{name: getattr(example, name).as_subclass(Whole)})
    with pytest.raises(TypeError, match=r"is a DTensor, .* give its full_tensor\(\)"):
        example.output()
    if name != "x":
        with pytest.raises(TypeError, match="is a DTensor"):
            effective_weight(example.layer, example.a)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_z_that_is_no_floating_number_is_refused(dtype):
    example = Case(NormOptions("none"), **WIDE, given=True).draw()
    with pytest.raises(TypeError, match=f"z is {dtype}"):
        secura_add(example.x, example.layer, example.a, z=torch.ones(7, 4, dtype=dtype))
