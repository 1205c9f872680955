"""The coordinates of an anchor: roots of both sums, one price in all layers, and sums of sums."""

from __future__ import annotations

from functools import partial
from itertools import permutations
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import TEXTS, cored

from secura import anchor, anchoring, whitening
from secura.curvature import Statistics, curvature


def statistics(model, texts):
    """Σ and Γ of every adapted layer by their definition: one text at a time, autograd alone."""
    generator = torch.Generator().manual_seed(0)
    found = [[torch.zeros(4, 4), torch.zeros(4, 4)] for _ in tiny.parts(model)]
    for text in texts:
        seen, hooks = [], []
        for layer in tiny.layers(model).values():
            watch = partial(lambda seen, _, x, y: seen.append((x[0][0], y)), seen)
            hooks.append(layer.register_forward_hook(watch))
        logits = model(input_ids=text[None]).logits
        labels = torch.multinomial(logits[0].softmax(-1), 1, generator=generator)
        loss = -logits[0].log_softmax(-1).gather(1, labels).sum()
        gradients = torch.autograd.grad(loss, [y for _, y in seen])
        for hook in hooks:
            hook.remove()
        pairs = zip(found, seen, gradients, tiny.layers(model).values(), strict=True)
        for (sigma, gamma), (x, _), g, layer in pairs:
            weight, part = layer.base_layer.weight.detach(), layer.secura_adapter["default"]
            z, h = x @ weight[part.rows].t(), g[0] @ weight[:, part.cols]
            sigma += (z.t() @ z).detach()
            gamma += (h.t() @ h).detach()
    return found


@pytest.mark.parametrize("damping", [1e-2, 0.5])
def test_left_and_right_are_the_roots_of_both_statistics(damping):
    model = cored()
    expected = statistics(model, TEXTS)
    report = anchor(model, TEXTS, damping=damping, length=64, batch_size=1)
    assert (report.layers, report.tokens, report.sampled) == (4, sum(map(len, TEXTS)), False)
    prices, moved = [], []
    for (sigma, gamma), part, layer in zip(
        expected, tiny.parts(model), tiny.layers(model).values(), strict=True
    ):
        eye = torch.eye(4, dtype=torch.float64)
        for matrix, root in ((sigma, part.right), (gamma, part.left)):
            matrix = matrix.double() / matrix.diagonal().double().mean()
            product = root.double() @ (matrix + damping * eye) @ root.double()
            scale = product.diagonal().mean()
            torch.testing.assert_close(product / scale, eye, rtol=0, atol=2e-4)
        prices.append(price(part.left, gamma) * price(part.right, sigma))
        weight = layer.base_layer.weight.detach()
        c, r = weight[:, part.cols], weight[part.rows]
        moved.append((c @ part.left).norm() * (part.right @ r).norm() / (c.norm() * r.norm()))
    if damping == 1e-2:  # beyond, the cheapest stands at λ times the mean
        assert_alike(prices)
    torch.testing.assert_close(torch.stack(moved).log().mean().exp(), torch.ones(()))
    assert max(moved) > 1.1 * min(moved)


def price(root, matrix):
    """What a unit of Ũ costs on one side, in the mean over directions."""
    return float((root @ matrix @ root).diagonal().mean())


def assert_alike(values):
    torch.testing.assert_close(torch.tensor(values), torch.full((len(values),), values[0]))


@pytest.mark.parametrize("dampings", [(0.01, 0.01), (0.5, 0.01), (0.01, 0.02, 0.01)], ids=str)
def test_added_statistics_are_those_of_all_texts_at_equal_weight(dampings):
    """Whatever each anchor was damped with, which is taken out again before the next."""
    model, sums = cored(), []
    for text, damping in zip(TEXTS, dampings, strict=False):
        found = statistics(model, [text])
        sums.append([[t / t.diagonal().mean() for t in pair] for pair in found])
        anchor(model, [text], length=64, add=len(sums) > 1, damping=damping)
    for parts, part in zip(zip(*sums, strict=True), tiny.parts(model), strict=True):
        for matrices, root in zip(zip(*parts, strict=True), (part.right, part.left), strict=True):
            total = sum(matrices).double()
            damped = total + dampings[-1] * total.diagonal().mean() * torch.eye(4)
            product = root.double() @ damped @ root.double()
            torch.testing.assert_close(
                product / product.diagonal().mean(), torch.eye(4).double(), rtol=0, atol=2e-3
            )


def alike(sigma, gamma, tokens=1.0, size=3):
    """Sums of a layer whose directions are all alike, and of C and R of norm 1 a direction."""
    eye = torch.eye(size)
    return Statistics(sigma * eye, gamma * eye, eye, eye, torch.tensor(tokens))


def anchored(damping=0.01, **layers):
    """κ of layers given as ``(Σ, Γ, tokens, sets before, price before)``, and what moves them."""
    eye, roots = torch.eye(3).double(), {}
    for name, (sigma, gamma, tokens, sets, price) in layers.items():
        before = whitening.Sums(sets * eye, sets * eye, price, 0.1) if sets else None
        roots[name] = whitening.roots_of(alike(sigma, gamma, tokens), damping, before)
    kappa = whitening.scales(roots)
    return {name: kappa[name] * float(r.left[0, 0] * r.right[0, 0]) for name, r in roots.items()}


def test_kappa_is_one_over_the_root_of_the_price_of_a_token():
    moved = anchored(a=(2, 3, 10.0, 0, 0), b=(8, 3, 10.0, 0, 0), c=(8, 3, 40.0, 0, 0))
    assert moved["a"] / moved["b"] == pytest.approx(2)
    assert moved["a"] / moved["c"] == pytest.approx(1)
    logs = torch.tensor(list(moved.values())).log()
    assert logs.mean().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("damping", "most"), [(1e-2, 5.0), (1e-4, 50.0)])
def test_the_cheapest_layer_moves_as_far_as_the_damping_lets_it(damping, most):
    """A gate that starts near 0, or a rare expert, has next to no gradient."""
    moved = anchored(damping, a=(1e-9, 1e-9, 1.0, 0, 0), b=(1, 1, 1.0, 0, 0))
    assert moved["a"] / moved["b"] == pytest.approx((2 / damping) ** 0.5)
    assert moved["a"] / moved["b"] < 3 * most
    denormal = anchored(damping, a=(1, 1e-45, 1.0, 0, 0), b=(1, 1, 1.0, 0, 0))
    assert denormal == pytest.approx(moved)


def test_prices_of_added_texts_are_averaged():
    """Each relative to its mean over the layers that have both, by the number of sets."""
    moved = anchored(a=(1, 1, 1.0, 2, 9.0), b=(4, 1, 1.0, 2, 1.0))
    assert (moved["b"] / moved["a"]) ** 2 == pytest.approx((0.4 + 2 * 1.8) / (1.6 + 2 * 0.2))
    moved = anchored(a=(1, 1, 1.0, 1, 5.0), b=(4, 1, 1.0, 1, 5.0), c=(16, 1, 1.0, 0, 0))
    prices = {"a": (0.4 + 1) / 2, "b": (1.6 + 1) / 2, "c": 6.4}
    for name, price in prices.items():
        assert (moved["a"] / moved[name]) ** 2 == pytest.approx(price / prices["a"]), name


def test_what_no_text_reached_keeps_its_scale():
    assert anchored(a=(0, 1, 1.0, 0, 0), b=(4, 1, 1.0, 0, 0))["a"] == 1
    assert whitening.scales({}) == {}


def test_in_whatever_order_texts_come_all_count_the_same():
    """Three sets, one of which does not reach a layer; as the files of anchors keep them."""
    generator = torch.Generator().manual_seed(0)

    def drawn(scale):
        halves = [torch.randn(4, 9, generator=generator, dtype=torch.float64) for _ in range(2)]
        sigma, gamma = (scale**0.5 * half @ half.T for half in halves)
        return Statistics(sigma, gamma, torch.eye(4), torch.eye(4), torch.tensor(9.0))

    nothing = Statistics(*(torch.zeros(4, 4) for _ in range(4)), torch.tensor(0.0))
    sets = [
        {name: drawn(scale) for name, scale in zip("abc", scales, strict=True)}
        for scales in ((30, 0.1, 1), (0.2, 20, 1), (4, 1, 1))
    ]
    sets[1]["c"] = nothing
    made = []
    for order in permutations(range(3)):
        kept = dict.fromkeys("abc")
        for number in order:
            roots = {k: whitening.roots_of(sets[number][k], 0.01, kept[k]) for k in kept}
            kappa = whitening.scales(roots)
            for name, one in roots.items():
                adapter = SimpleNamespace(
                    left=kappa[name] * one.left, right=one.right, damping=torch.tensor(0.01)
                )
                kept[name] = whitening.sums_of(adapter)
                sides = adapter.left, adapter.right
                roots[name] = (
                    [side / side.norm() for side in sides],
                    sides[0].norm() * sides[1].norm(),
                )
        made.append(roots)
    for other in made[1:]:
        for name in "abc":
            for side, same in zip(other[name][0], made[0][name][0], strict=True):
                torch.testing.assert_close(side, same, rtol=1e-3, atol=1e-4)
            ratio = other[name][1] / other["a"][1]
            expected = made[0][name][1] / made[0]["a"][1]
            assert float(ratio / expected) == pytest.approx(1, abs=0.2), name


def test_an_anchor_is_read_back_as_it_was_made():
    model = cored()
    anchor(model, TEXTS, length=64)
    once = {part: (part.left.clone(), part.right.clone()) for part in tiny.parts(model)}
    prices = [whitening.sums_of(part).price for part in once]
    assert max(prices) > 1.2 * min(prices)
    anchor(model, TEXTS, length=64, add=True)  # the same again: both roots shrink by √2
    for part, (left, right) in once.items():
        torch.testing.assert_close(part.right * 2**0.5, right, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(part.left, left * 2**0.5, rtol=1e-3, atol=1e-3)
        assert whitening.sums_of(part).sets == pytest.approx(2, rel=1e-3)


def test_every_token_that_reached_a_layer_counts():
    model = cored()
    adapters = anchoring.u_adapters(model)
    how = {"tokens": 1000, "length": 64, "batch_size": 2, "seed": 0}
    sums, read = curvature(model, adapters, list(TEXTS), None, **how)
    assert {int(one.tokens) for one in sums.values()} == {read} == {sum(map(len, TEXTS))}


def test_an_earlier_price_is_measured_anew_in_other_coordinates():
    """By a smaller λ directions that hardly matter cost more: of layers with such, the price."""
    spectra = {"even": (1.0, 1.0, 1.0), "steep": (3.0, 1e-3, 1e-3)}
    nothing = Statistics(*(torch.zeros(3, 3) for _ in range(4)), torch.tensor(0.0))
    prices = {}
    for name, values in spectra.items():
        matrix = torch.diag(torch.tensor(values))
        own = Statistics(matrix, matrix, torch.eye(3), torch.eye(3), torch.tensor(1.0))
        first, last = (whitening.roots_of(own, damping, None) for damping in (1.0, 1e-3))
        before = whitening.Sums(matrix.double(), matrix.double(), first.price, 1.0)
        again = whitening.roots_of(nothing, 1e-3, before)
        prices[name] = first.price, last.price, again.before
    old, new, found = (prices["steep"][i] / prices["even"][i] for i in range(3))
    assert found == pytest.approx(new) and abs(found / old - 1) > 0.2
