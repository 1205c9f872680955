"""Bases that make y0 themselves, with a bias many times x Rᵀ: y0 in 16 bits has lost bits of z."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import get_peft_model
from torch import nn

from secura import AdapterConfig, SecuraConfig, SECURALinear, bases
from secura_kernels import naive

N, K, T = 96, 256, 64
TIMES = 300
"""How many times z the bias is, about."""


def linear(seed=0):
    torch.manual_seed(seed)
    made = nn.Linear(K, N).bfloat16()
    made.bias.data.normal_(std=TIMES / 3**0.5)
    return made


def four_bits():
    bnb, dense = pytest.importorskip("bitsandbytes"), linear()
    made = bnb.nn.Linear4bit(K, N, compute_dtype=torch.bfloat16, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
    made.bias = dense.bias
    made.support_avx512bf16_for_cpu = False
    return made.to("cpu")


def eight_bits():
    bnb, dense = pytest.importorskip("bitsandbytes"), linear()
    made = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    values = dense.weight.data.half()
    made.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)
    made.bias = dense.bias
    return made.to("cpu")


def moved():
    return add_hook_to_module(linear(), AlignDevicesHook("cpu"))


def moved_four_bits():
    return add_hook_to_module(four_bits(), AlignDevicesHook("cpu"))


BASES = {"4 bits": four_bits, "8 bits": eight_bits, "moved": moved, "moved 4 bits": moved_four_bits}


def adapted(base, norm, **settings):
    layer = SECURALinear(base, AdapterConfig(r=8, norm=norm, **settings)).train()
    layer.B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return layer


def gradient(layer, x, g):
    """∂A of a layer beside fp64's, of the dequantised weight."""
    found = torch.autograd.grad(layer(x), layer.A, g)[0]
    weight, bias = bases.weight(layer.base).double(), bases.bias(layer.base).double()
    frozen = layer.kernel_layer(layer.base, weight)._replace(columns=None, bias=bias)
    if frozen.core is not None:
        frozen = frozen._replace(core=frozen.core.double())
    a = layer.A.detach().double().requires_grad_()
    exact = naive.secura_linear(x.double(), frozen, a, layer.B.detach().double())
    return found, torch.autograd.grad(exact, a, g.double())[0]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(T, size, generator=generator).bfloat16() for size in (K, N)]


@pytest.mark.parametrize("norm", ["none", "channel", "activation"])
@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_the_gradient_is_that_of_the_inputs_own_product(make, norm, batch):
    layer = adapted(make(), norm)
    for _ in range(2):
        found, exact = gradient(layer, *batch)
        assert (found - exact).norm() < 0.01 * exact.norm()
        layer.fold()
        layer.B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(3))


def test_a_trained_base_reads_it_off_its_weight_as_it_is(batch):
    layer = adapted(linear(), "none")
    layer.base.requires_grad_(True)
    for _ in range(2):
        found, exact = gradient(layer, *batch)
        assert (found - exact).norm() < 0.01 * exact.norm()
        with torch.no_grad():
            layer.base.weight.normal_(std=K**-0.5)


def test_no_row_is_kept_and_no_product_made_where_nothing_is_lost(batch):
    layer = adapted(four_bits(), "none")
    assert layer.kept_rows.shape == (8, K)
    x = batch[0].float()
    plain = adapted(moved().float(), "none")
    assert plain.own_z(plain.base, x, x.new_zeros(T, N)) is None
    layer.base.bias = None
    layer.derive(layer.base)
    assert layer.kept_rows is None and layer.own_z(layer.base, *batch) is None


@pytest.mark.parametrize("make", [linear, four_bits])
def test_what_a_hook_made_of_the_input_is_read_off_the_output(make, batch):
    """``x`` itself is not what the base multiplied, so z stays that of y0."""
    x, g = batch
    base = make()
    base.bias.data.zero_()
    plain = gradient(adapted(base, "none"), 2 * x, g)[0]
    base = make()
    base.bias.data.zero_()
    base.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    hooked = torch.autograd.grad((layer := adapted(base, "none"))(x), layer.A, g)[0]
    torch.testing.assert_close(hooked, plain, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("make", [linear, four_bits, moved])
@pytest.mark.parametrize("way", ["sum", "rows"])
def test_adapters_that_add_up_and_adapters_by_row_see_it_too(make, way, batch):
    """Each as it is alone."""
    x, g = batch
    config = SecuraConfig(r=8, norm="none", target_modules=["0"])
    model = get_peft_model(nn.Sequential(make()), config)
    model.add_adapter("second", SecuraConfig(r=8, norm="none", seed=1, target_modules=["0"]))
    layer = model.base_model.model[0]
    for adapter in layer.secura_adapter.values():
        adapter.B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        adapter.requires_grad_(True)
    if way == "sum":
        model.base_model.set_adapter(["default", "second"])
        out, own = model(x), {"default": slice(None), "second": slice(None)}
    else:
        names = ["default", "second"] * (T // 2)
        out = model.eval()(x, adapter_names=names)
        own = {"default": slice(0, None, 2), "second": slice(1, None, 2)}
    for name, rows in own.items():
        adapter = layer.secura_adapter[name]
        found = torch.autograd.grad(out, adapter.A, g, retain_graph=True)[0]
        alone = Alone(adapter, make())
        exact = gradient(alone, x[rows], g[rows])[1]
        assert (found - exact).norm() < 0.01 * exact.norm()


class Alone:
    """One of a model's adapters on a base of its own."""

    def __init__(self, adapter, base):
        self.base, self.kernel_layer = base, adapter.kernel_layer
        self.A, self.B = adapter.A, adapter.B
        self.forward = adapter.forward

    def __call__(self, x):
        return self.forward(self.base, x)


@pytest.mark.parametrize("norm", ["weight", "none"])
def test_rows_are_kept_where_they_are_read(norm):
    base = four_bits()
    if norm == "none":
        base.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    assert adapted(base, norm).kept_rows is None


def test_an_offloaded_base_goes_on_with_its_output(batch):
    layer = adapted(linear(), "none", keep_columns=True)
    add_hook_to_module(layer.base, AlignDevicesHook("cpu", offload=True))
    assert layer.base.weight.is_meta
    assert torch.isfinite(layer(batch[0])).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [moved, four_bits])
def test_under_autocast_and_with_dropout(make, dtype, batch):
    """x in fp32; the mask is applied to z once."""
    x, g = (one.float() for one in batch)
    layer = adapted(make().float() if make is moved else make(), "none", dropout=0.5)
    masks = []
    layer.dropout_mask = lambda given: masks[0]
    torch.manual_seed(3)
    masks.append(nn.functional.dropout(torch.ones(T, 8), 0.5).to(dtype))
    with torch.autocast("cpu", dtype):
        found = torch.autograd.grad(layer(x), layer.A, g.to(dtype))[0]
    weight, bias = bases.weight(layer.base).double(), bases.bias(layer.base).double()
    frozen = layer.kernel_layer(layer.base, weight)._replace(columns=None, bias=bias)
    a = layer.A.detach().double().requires_grad_()
    exact = naive.secura_linear(
        x.double(), frozen, a, layer.B.detach().double(), z_scale=masks[0].double()
    )
    expected = torch.autograd.grad(exact, a, g.double())[0]
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_compiled_it_is_the_same(batch):
    x, g = batch
    layer = adapted(moved(), "channel")
    found = torch.autograd.grad(layer(x), layer.A, g)[0]
    whole = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(whole(x), layer.A, g)[0], found)
