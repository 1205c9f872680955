"""The coordinates of an anchor: roots of both sums, one price in all layers, and sums of sums."""

from __future__ import annotations

from functools import partial

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


def statistics_of(sigma, gamma, tokens=1.0, size=3):
    """Sums of a layer whose directions are all alike, and of C and R of norm 1 a direction."""
    eye = torch.eye(size)
    return Statistics(sigma * eye, gamma * eye, eye, eye, torch.tensor(tokens))


def anchored(**layers):
    """κ of layers given as ``(Σ, Γ, tokens, Σ and Γ before or None, price before)``."""
    eye, roots = torch.eye(3).double(), {}
    for name, (sigma, gamma, tokens, sets, price) in layers.items():
        before = whitening.Sums(sets * eye, sets * eye, price) if sets else None
        roots[name] = whitening.roots_of(statistics_of(sigma, gamma, tokens), 0.5, before)
    return whitening.scales(roots), roots


def test_kappa_is_one_over_the_root_of_the_price_of_a_token():
    found, roots = anchored(a=(2, 3, 10.0, 0, 0), b=(8, 3, 10.0, 0, 0), c=(8, 3, 40.0, 0, 0))
    assert found["a"] / found["b"] == pytest.approx(2)
    assert found["a"] / found["c"] == pytest.approx(1)
    moved = [found[name] * float(one.left[0, 0] * one.right[0, 0]) for name, one in roots.items()]
    assert torch.tensor(moved).log().mean().item() == pytest.approx(0, abs=1e-6)


def test_prices_of_added_texts_are_averaged():
    """Each relative to its geometric mean over the layers that have both, by the number of sets."""
    found, _ = anchored(a=(1, 1, 1.0, 2, 9.0), b=(4, 1, 1.0, 2, 1.0))
    prices = [(1 / 2 + 2 * 3) / 3, (2 + 2 / 3) / 3]
    assert (found["b"] / found["a"]) ** 2 == pytest.approx(prices[0] / prices[1])
    found, roots = anchored(a=(1, 1, 1.0, 1, 5.0), b=(4, 1, 1.0, 1, 5.0), c=(16, 1, 1.0, 0, 0))
    prices = {"a": (1 / 2 + 1) / 2, "b": (2 + 1) / 2, "c": 8.0}
    whole = {
        name: found[name] * float(one.left[0, 0] * one.right[0, 0]) for name, one in roots.items()
    }
    for name, price in prices.items():
        assert (whole["a"] / whole[name]) ** 2 == pytest.approx(price / prices["a"]), name


def test_what_no_text_reached_keeps_its_scale():
    found, roots = anchored(a=(0, 1, 1.0, 0, 0), b=(4, 1, 1.0, 0, 0))
    assert found["a"] == 1 and torch.equal(roots["a"].left, torch.eye(3).double())
    assert whitening.scales({}) == {}


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
