"""``secura.learning_rate``: its formula, what it is of a model, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from peft import get_peft_model
from torch import nn

import secura
from secura import AdapterConfig, SECURALinear
from secura.rates import SHARE

N, K, M = 96, 64, 16


def layer(scale: float = 1.0, bias: bool = False, **settings) -> SECURALinear:
    torch.manual_seed(3)
    base = nn.Linear(K, N, bias=bias)
    nn.init.normal_(base.weight, std=scale)
    return SECURALinear(base, AdapterConfig(r=M, norm="none", **settings))


def size(weight) -> float:
    """The largest singular value of random entries as large as the weight's."""
    n, k = weight.shape
    return float(weight.double().pow(2).mean().sqrt()) * (math.sqrt(n) + math.sqrt(k))


def parts(one: SECURALinear):
    weight = one.base.weight.detach().double()
    return weight[:, one.cols], weight[one.rows], weight


def rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


def test_a_size_is_the_largest_singular_value_of_random_entries():
    weight = parts(layer())[2]
    assert torch.linalg.matrix_norm(weight, 2) == pytest.approx(size(weight), rel=0.08)


def test_a_step_of_adam_at_the_rate_moves_a_core_by_the_share():
    one = layer(core="u", scaling=0.5)
    rate = secura.learning_rate(one, 10)
    torch.manual_seed(0)
    x, wanted = torch.randn(500, K), torch.randn(500, N)
    optimizer = torch.optim.AdamW([one.U], lr=rate, weight_decay=0.0)
    (one(x) - wanted).square().sum().backward()
    optimizer.step()
    moved = one.delta_weight().norm() / size(one.base.weight.detach())
    assert moved == pytest.approx(SHARE, rel=0.25)  # some signs agree


def test_a_step_of_random_signs_moves_a_core_by_the_share():
    one = layer(core="u", scaling=0.5)
    c, r, weight = parts(one)
    rate = secura.learning_rate(one, 10)
    signs = torch.randn(200, M, M, dtype=torch.float64).sign()
    moved = (rate * 0.5 * c @ signs @ r).flatten(1).norm(dim=1).square().mean().sqrt()
    assert moved == pytest.approx(SHARE * size(weight), rel=0.05)
    assert rate == rounded(SHARE * size(weight) / float(0.5 * c.norm() * r.norm()))


@pytest.mark.parametrize("steps", [1, 64, 5000])
@pytest.mark.parametrize("grown", [0.0, 0.3])
def test_of_a_and_b_both_products_count_and_how_they_grow(steps, grown):
    one = layer(scaling=2.0)
    nn.init.constant_(one.B, grown)
    c, r, weight = parts(one)
    a, b = one.A.detach().double(), one.B.detach().double()
    rate = secura.learning_rate(one, steps)
    first = 2.0 * float((c @ a).norm() * r.norm() + c.norm() * (b @ r).norm())
    growth = 2.0 * 2 * steps / 2 * math.sqrt(len(b)) * float(c.norm() * r.norm())
    found = rate * first + rate**2 * growth
    assert found == pytest.approx(SHARE * size(weight), rel=0.1)  # two digits of the rate
    roots = (-first + math.sqrt(first**2 + 4 * growth * SHARE * size(weight))) / (2 * growth)
    assert rate == rounded(roots)


def test_what_is_frozen_does_not_move():
    one = layer()
    c, r, weight = parts(one)
    one.A.requires_grad_(False)
    only_b = rounded(SHARE * size(weight) / float((c @ one.A.double()).norm() * r.norm()))
    assert secura.learning_rate(one, 1000) == only_b
    one.A.requires_grad_(True)
    one.B.requires_grad_(False)
    with pytest.raises(ValueError, match="no active adapter of the model is trained"):
        secura.learning_rate(one, 1000)  # B is 0
    nn.init.constant_(one.B, 0.3)
    one.A.requires_grad_(False)
    with pytest.raises(ValueError, match="no active adapter of the model is trained"):
        secura.learning_rate(one, 1000)
    one.B.requires_grad_(True)
    assert secura.learning_rate(one, 1000) == only_b
    one.B.requires_grad_(False)
    one.A.requires_grad_(True)
    only_a = SHARE * size(weight) / float(c.norm() * (one.B.double() @ r).norm())
    assert secura.learning_rate(one, 1000) == rounded(only_a)


def test_a_larger_weight_takes_a_lower_rate():
    rates = [secura.learning_rate(layer(scale, core="u"), 10) for scale in (0.02, 0.2, 2.0)]
    assert rates[0] == pytest.approx(10 * rates[1], rel=0.06)
    assert rates[1] == pytest.approx(10 * rates[2], rel=0.06)


def test_the_root_mean_square_of_the_layers_shares_decides():
    small, large = layer(0.02, core="u"), layer(0.04, core="u")
    rates = [secura.learning_rate(one, 10) for one in (small, large)]
    both = secura.learning_rate(nn.ModuleList([small, large, nn.Linear(2, 2)]), 10)
    expected = math.sqrt(2 / sum(rate**-2 for rate in rates))
    assert both == pytest.approx(expected, rel=0.06)
    nothing = layer(0.5, core="u")
    nn.init.zeros_(nothing.base.weight)
    assert secura.learning_rate(nn.ModuleList([small, nothing]), 10) == rates[0]
    with pytest.raises(ValueError, match="or what it acts on is 0"):
        secura.learning_rate(nothing, 10)


def test_layers_that_hardly_move_do_not_raise_it():
    alive = [layer(0.02, core=core) for core in ("u", "ab")]
    for one, most in zip(alive, (1.5, 1.5), strict=True):
        dead = layer(0.02, core=one.config.core)
        dead.base.weight.data[dead.rows] *= 1e-9
        rates = [secura.learning_rate(nn.ModuleList(two), 100) for two in ([one], [one, dead])]
        assert rates[0] <= rates[1] <= most * rates[0]


def test_what_several_adapters_of_a_layer_do_adds_up():
    model = tiny.adapted(norm="none", core="u", target_modules=["q_proj"])
    alone = secura.learning_rate(model, 10)
    model.add_adapter("other", tiny.config(norm="none", core="u", target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    assert secura.learning_rate(model, 10) == pytest.approx(alone / 2, rel=0.06)


def test_a_computed_factor_is_trained_where_what_it_is_made_of_is():
    class Doubled(nn.Module):
        def forward(self, value):
            return 2 * value

    for core, name in (("ab", "B"), ("u", "U")):
        one = layer(core=core)
        before = secura.learning_rate(one, 100)
        nn.utils.parametrize.register_parametrization(one, name, Doubled())
        assert secura.learning_rate(one, 100) == before


def test_between_folds_a_and_b_grow_no_further():
    rates = [secura.learning_rate(layer(0.02, fold_every=every), 2000) for every in (0, 10, 5000)]
    assert rates[0] == rates[2] < rates[1] == secura.learning_rate(layer(0.02), 20)


def test_an_anchored_core_takes_the_rate_of_one_that_is_not():
    model = tiny.adapted(core="u", norm="none")
    before = secura.learning_rate(model, np.int64(10))
    secura.anchor(model, tiny.TEXTS)
    assert before / 2 < secura.learning_rate(model, 10) < before * 1.1
    tiny.parts(model)[0].left.mul_(1e4)
    assert secura.learning_rate(model, 10) < before / 5


def test_a_convolution_of_transformers_counts_as_its_transposed_linear():
    from transformers.pytorch_utils import Conv1D

    plain = layer(core="u")
    base = Conv1D(N, K)
    base.weight.data = plain.base.weight.detach().t().clone()
    conv = SECURALinear(base, AdapterConfig(r=M, norm="none", core="u"))
    assert torch.equal(conv.rows, plain.rows)
    assert secura.learning_rate(conv, 10) == secura.learning_rate(plain, 10)


@pytest.mark.parametrize("core", ["ab", "u"])
def test_every_expert_counts_as_a_layer(core):
    names = {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    model = tiny.mixtral()
    model = get_peft_model(
        model, secura.SecuraConfig(r=4, norm="none", core=core, init="orthogonal", **names)
    )
    rates = []
    for wrapped in tiny.layers(model).values():
        stack, part = wrapped.adapted.weight.detach(), wrapped.secura_adapter["default"]
        for number, weight in enumerate(stack):
            base = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            base.weight.data = weight.clone()
            own = SECURALinear(base, part.config)
            own.rows.copy_(part.rows[number] % weight.shape[0])
            own.cols.copy_(part.cols[number] % weight.shape[1])
            if core == "ab":
                own.A.data.copy_(part.A.detach()[number])
            rates.append(secura.learning_rate(own, 100))
    assert len(rates) == 4
    found = secura.learning_rate(model, 100)
    assert found == pytest.approx(math.sqrt(4 / sum(rate**-2 for rate in rates)), rel=0.1)
    assert min(rates) <= found <= max(rates)


def test_nothing_is_changed_or_recorded():
    model = tiny.adapted(norm="channel")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        under = secura.learning_rate(model, 100)
    assert secura.learning_rate(model, 100) == under
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_another_dtype_it_is_the_same(dtype):
    rates = [
        secura.learning_rate(tiny.adapted(tiny.llama(dtype=one), norm="none", core="u"), 100)
        for one in (torch.float32, dtype)
    ]
    assert rates[0] == pytest.approx(rates[1], rel=0.1)


def test_of_a_quantised_base_it_is_that_of_its_numbers():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    plain = tiny.wide()
    whole = secura.learning_rate(tiny.adapted(plain, norm="none", core="u"), 100)
    quantised = tiny.wide()
    quantize_(quantised.model, Int8WeightOnlyConfig())
    assert secura.learning_rate(
        get_peft_model(quantised, tiny.config(norm="none", core="u")), 100
    ) == pytest.approx(whole, rel=0.06)


@pytest.mark.parametrize(
    ("steps", "kind", "said"),
    [
        (0, ValueError, "steps=0 must be 1 or more"),
        (-3, ValueError, "steps=-3 must be 1 or more"),
        (2.5, TypeError, "steps=2.5 must be an integer"),
        (True, TypeError, "steps=True must be an integer"),
        ("9", TypeError, "steps='9' must be an integer"),
    ],
)
def test_a_wrong_number_of_steps_is_refused(steps, kind, said):
    with pytest.raises(kind, match=said):
        secura.learning_rate(layer(), steps)


def test_a_merged_adapter_and_a_model_without_one_are_refused():
    one = layer()
    one.merge()
    with pytest.raises(RuntimeError, match="merged into the base weight"):
        secura.learning_rate(one, 10)
    with pytest.raises(ValueError, match="no active adapter"):
        secura.learning_rate(nn.Linear(4, 4), 10)
