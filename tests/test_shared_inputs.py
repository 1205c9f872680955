"""Layers that are given the same x: the gradient that autograd adds up, added up in place."""

import gc
import weakref
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    checkpoint,
)

from secura_kernels import NormOptions
from secura_kernels.inspection.examples import Case
from secura_kernels.shared import Total

SPACES = ("none", "channel", "activation", "weight")


def examples(norm, count=3):
    """Layers of different outputs that take the same x."""
    cases = [Case(NormOptions(norm), torch.float64, n=9 + of, inner=6) for of in range(count)]
    return [case.draw(seed=seed) for seed, case in enumerate(cases)]


def outputs(layers, x, shares=True):
    return [
        one._replace(x=x, layer=one.layer._replace(shares_input=shares)).output() for one in layers
    ]


def gradients(layers, x, shares, used=None, runs=lambda run, x: run(x)):
    """``[∂x, ∂A, …]`` of the outputs that are used, x being another function's output."""
    leaf = x.clone().requires_grad_()
    own = [one._replace(a=one.a.clone().requires_grad_()) for one in layers]

    def loss(x):
        outs = outputs(own, x, shares)
        return sum(outs[of].sin().sum() for of in (used or range(len(outs))))

    runs(loss, leaf.tanh()).backward()
    return [leaf.grad, *(one.a.grad for one in own)]


def check_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("used", [None, (0,), (2,), (0, 2)])
@pytest.mark.parametrize("norm", SPACES)
def test_the_same_gradients(norm, used):
    """Also where a layer's output is not used, be it the first's, in whose call x was entered."""
    layers = examples(norm)
    x = layers[0].x.reshape(1, *layers[0].x.shape)
    check_equal(gradients(layers, x, True, used), gradients(layers, x, False, used))


@pytest.mark.parametrize("keeps", ["always", "never"])
@pytest.mark.parametrize("norm", ["none", "channel", "weight"])
def test_the_same_with_the_weight_kept(norm, keeps, monkeypatch):
    monkeypatch.setenv("SECURA_KEEP_WEIGHT", keeps)
    layers = examples(norm)
    check_equal(gradients(layers, layers[0].x, True), gradients(layers, layers[0].x, False))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("norm", SPACES)
def test_the_same_under_checkpointing(norm, reentrant):
    layers = examples(norm)
    expected = gradients(layers, layers[0].x, False)

    def runs(run, x):
        return checkpoint(lambda x: run(x * 1), x, use_reentrant=reentrant)

    check_equal(gradients(layers, layers[0].x, True, runs=runs), expected)
    within = gradients(
        layers, layers[0].x, True, runs=lambda run, x: checkpoint(run, x, use_reentrant=reentrant)
    )
    check_equal(within, expected)


@pytest.mark.parametrize("norm", SPACES)
def test_one_sum_written_once_by_each(norm, monkeypatch):
    """Three layers, three parts of one tensor, and of autograd's own sums none."""
    parts = []
    keep = Total.keep
    monkeypatch.setattr(Total, "keep", lambda own, dx: (parts.append(dx), keep(own, dx)))
    layers = examples(norm)
    gradients(layers, layers[0].x, True)
    assert len(parts) == 3 and len({part.data_ptr() for part in parts}) == 1
    gradients(layers, layers[0].x, False)
    assert len(parts) == 3


def test_a_pass_that_did_not_ask_for_it_leaves_nothing_behind():
    layers = examples("none")
    leaf = layers[0].x.clone().requires_grad_()
    own = [one._replace(a=one.a.clone().requires_grad_()) for one in layers]
    loss = sum(out.sum() for out in outputs(own, leaf * 1))
    torch.autograd.grad(loss, [one.a for one in own], retain_graph=True)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], first, rtol=0, atol=0)
    (expected,) = torch.autograd.grad(sum(o.sum() for o in outputs(own, leaf * 1, False)), leaf)
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-13)


def test_the_sum_is_not_kept_longer_than_its_pass(monkeypatch):
    layers, sums = examples("none"), []
    keep = Total.keep
    monkeypatch.setattr(
        Total, "keep", lambda own, dx: (sums.append(weakref.ref(dx)), keep(own, dx))
    )
    leaf = layers[0].x.clone().requires_grad_()
    own = [one._replace(a=one.a.clone().requires_grad_()) for one in layers]
    loss = sum(out.sum() for out in outputs(own, leaf * 1))
    torch.autograd.grad(loss, leaf, retain_graph=True)
    assert len(sums) == 3 and all(one() is None for one in sums)
    torch.autograd.grad(loss, own[0].a, retain_graph=True)  # of which ∂x is a part, never taken
    assert len(sums) > 3 and all(one() is None for one in sums)


def test_what_was_written_to_is_another_input():
    layers = examples("none", 2)

    def run(shares):
        leaf = layers[0].x.clone().requires_grad_()
        x = leaf * 1
        first = outputs(layers[:1], x, shares)[0]
        second = outputs(layers[1:], x.mul_(2), shares)[0]
        return torch.autograd.grad(first.sum() + second.sum(), leaf)[0]

    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-13)


def test_writing_to_it_afterwards_is_an_error():
    """Where a layer saves x, it is x's own version that autograd looks at."""
    layers = examples("weight", 2)
    x = layers[0].x.clone().requires_grad_() * 1
    outs = [one._replace(a=one.a.requires_grad_()) for one in layers]
    loss = sum(out.sum() for out in outputs(outs, x))
    x.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("is_leaf", [False, True])
def test_an_input_is_freed(is_leaf):
    """Nothing but the caller keeps it, in spaces that save neither x nor y0."""
    layers = examples("none", 2)
    x = layers[0].x.clone().requires_grad_()
    x = x if is_leaf else x * 1
    outs, seen = outputs(layers, x), weakref.ref(x)
    gc.disable()
    try:
        if is_leaf:
            sum(out.sum() for out in outs).backward()
            del outs
        del x
        assert seen() is None
    finally:
        gc.enable()


def test_an_input_that_its_own_graph_keeps_is_freed_with_that():
    """After its backward pass nothing here keeps the two alive."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.out = 2 * x
            return ctx.out

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    layers = examples("none", 2)
    x = Doubled.apply(layers[0].x.clone().requires_grad_())
    seen = weakref.ref(x)
    sum(out.sum() for out in outputs(layers, x)).backward()
    del x
    gc.collect()
    assert seen() is None


def test_a_second_derivative_is_an_error():
    layers = examples("none", 2)
    leaf = layers[0].x.clone().requires_grad_()
    loss = sum(out.square().sum() for out in outputs(layers, leaf * 1))
    (dx,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


@pytest.mark.parametrize("shares", [False, True])
def test_a_pass_within_a_pass_has_a_sum_of_its_own(shares):
    """A hook of one backward pass that asks the same graph for another gradient."""
    layers, inner = examples("none"), []
    leaf = layers[0].x.clone().requires_grad_()
    x = leaf * 1
    outs = outputs(layers, x, shares)
    whole, part = sum(out.sum() for out in outs), 2 * outs[0].sum()
    expected = torch.autograd.grad(whole, x, retain_graph=True)[0]

    def asks(grad):
        inner.append(torch.autograd.grad(part, x, retain_graph=True)[0])

    outs[1].register_hook(asks)
    found = torch.autograd.grad(whole, x, retain_graph=True)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    (alone,) = torch.autograd.grad(part, x)
    torch.testing.assert_close(inner[0], alone, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("norm", SPACES)
def test_a_dispatch_mode_sees_every_operator(norm):
    """Those of the layers that add to a sum too, which no mode could see run on its own tensors."""

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "secura":
                self.seen[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    layers, found = examples(norm), []
    for shares in (False, True):
        with Names() as names:
            found.append((gradients(layers, layers[0].x, shares), names.seen))
    check_equal(found[1][0], found[0][0])
    assert found[1][1] == found[0][1] and set(found[0][1].values()) == {3}


def test_an_input_can_be_saved_and_copied(tmp_path):
    layers = examples("none", 2)
    x = layers[0].x.clone().requires_grad_() * 1
    outputs(layers, x)
    torch.save(x, tmp_path / "x.pt")
    torch.testing.assert_close(torch.load(tmp_path / "x.pt", weights_only=True), x)


def test_compiled_autograd_adds_up_what_it_sees():
    layers, found, seen = examples("none", 2), [], set()

    def backend(graph, inputs):
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph

    for compiles in (False, True):
        leaf = layers[0].x.clone().requires_grad_()
        loss = sum(out.sum() for out in outputs(layers, leaf * 1))
        traced = compiled_autograd._enable(torch.compile(backend=backend))
        with traced if compiles else nullcontext():
            loss.backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)
    assert "secura.lowrank_backward.default" in seen  # the op, whose kernels no compiler looks into
