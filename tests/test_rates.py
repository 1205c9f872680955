"""``secura.learning_rate``: its formula, what it is of a model, and what it refuses."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from peft import get_peft_model
from torch import nn

import secura
from secura import AdapterConfig, SECURALinear
from secura.rates import SHARE, trains_others

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


def test_a_step_at_the_rate_moves_a_core_by_the_share():
    """Adam's step on U, of random signs, and of equal ones in the directions of C and R."""
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
    only_a = SHARE * size(weight) / float(c.norm() * (one.B.double() @ r).norm())
    assert secura.learning_rate(one, 1000) == rounded(only_a)


def test_a_larger_weight_takes_a_lower_rate():
    rates = [secura.learning_rate(layer(scale, core="u"), 10) for scale in (0.02, 0.2, 2.0)]
    assert rates[0] == pytest.approx(10 * rates[1], rel=0.06)
    assert rates[1] == pytest.approx(10 * rates[2], rel=0.06)


def test_a_model_has_the_geometric_mean_of_its_layers():
    small, large = layer(0.02, core="u"), layer(0.5, core="u")
    rates = [secura.learning_rate(one, 10) for one in (small, large)]
    both = secura.learning_rate(nn.ModuleList([small, large, nn.Linear(2, 2)]), 10)
    assert both == pytest.approx(math.sqrt(math.prod(rates)), rel=0.08)
    nothing = layer(0.5, core="u")
    nn.init.zeros_(nothing.base.weight)
    assert secura.learning_rate(nn.ModuleList([small, nothing]), 10) == rates[0]
    with pytest.raises(ValueError, match="or what it acts on is 0"):
        secura.learning_rate(nothing, 10)


def test_an_anchored_core_takes_the_rate_of_one_that_is_not():
    model = tiny.adapted(core="u", norm="none")
    before = secura.learning_rate(model, 10)
    secura.anchor(model, tiny.TEXTS)
    assert secura.learning_rate(model, 10) == pytest.approx(before, rel=0.06)
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
    logs = []
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
            logs.append(math.log(secura.learning_rate(own, 100)))
    assert len(logs) > 2
    mean = math.exp(sum(logs) / len(logs))
    assert secura.learning_rate(model, 100) == pytest.approx(mean, rel=0.06)


def test_nothing_is_changed_or_recorded():
    model = tiny.adapted(norm="channel")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        under = secura.learning_rate(model, 100)
    assert secura.learning_rate(model, 100) == under
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


def test_in_bf16_it_is_the_same():
    rates = [
        secura.learning_rate(tiny.adapted(tiny.llama(dtype=dtype), norm="none", core="u"), 100)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert rates[0] == pytest.approx(rates[1], rel=0.1)


@pytest.mark.parametrize(
    ("steps", "kind", "said"),
    [
        (0, ValueError, "steps=0 must be 1 or more"),
        (-3, ValueError, "steps=-3 must be 1 or more"),
        (2.5, TypeError, "steps=2.5 must be an integer"),
        (True, TypeError, "steps=True must be an integer"),
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


def test_whole_weights_that_are_trained_too_are_noticed():
    model = tiny.adapted(norm="none", train_bias=True)
    assert not trains_others(model)
    assert trains_others(tiny.adapted(norm="none", modules_to_save=["lm_head"]))
