"""W' of a forward pass, kept for its backward pass: the same numbers, one pass over W less."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from secura_kernels import NormOptions, kept_weight
from secura_kernels.inspection.examples import Case
from secura_kernels.ops.weight import plain as weight

WEIGHT = Case(NormOptions("weight"), torch.float64, inner=6, biased=False)


@pytest.fixture
def made(monkeypatch):
    """How often W' was made, forward and backward."""
    names, found = ("fused", "backward"), {"fused": 0, "backward": 0}
    plain = {name: getattr(weight, name) for name in names}

    def watched(name):
        def run(*args):
            found[name] += name == "fused" or args[-1]  # backward makes it where ∂x is asked for
            return plain[name](*args)

        return run

    for name in names:
        monkeypatch.setattr(weight, name, watched(name))
    return found


def gradients(run, example):
    leaves = [of.detach().clone().requires_grad_() for of in (example.x, example.a, example.b)]
    out = run(lambda x, a, b: example._replace(x=x, a=a, b=b).output("reference"), *leaves)
    out.backward(example.grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(
    ("said", "forward", "backward"), [("auto", 1, 1), ("never", 1, 1), ("always", 1, 0)]
)
def test_one_pass_less_where_it_is_always_kept(said, forward, backward, made, monkeypatch):
    example = WEIGHT.draw()
    expected = gradients(lambda layer, *args: layer(*args), example)
    made.update(fused=0, backward=0)
    monkeypatch.setenv("SECURA_KEEP_WEIGHT", said)
    found = gradients(lambda layer, *args: layer(*args), example)
    assert made == {"fused": forward, "backward": backward}
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)


def test_what_is_rounded_stochastically_is_not_kept(monkeypatch):
    """∂x takes W' rounded to nearest, kept or not."""
    example = Case(NormOptions("weight"), torch.bfloat16, inner=6).draw()
    layer = example.layer._replace(rounding_seed=3)
    example = example._replace(layer=layer)
    expected = gradients(lambda layer, *args: layer(*args), example)
    monkeypatch.setenv("SECURA_KEEP_WEIGHT", "always")
    found = gradients(lambda layer, *args: layer(*args), example)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_keeps_it_and_the_pass_before_does_not(reentrant, made):
    example = WEIGHT.draw()
    expected = gradients(lambda layer, *args: layer(*args), example)
    made.update(fused=0, backward=0)
    found = gradients(lambda *args: checkpoint(*args, use_reentrant=reentrant), example)
    assert made == {"fused": 2, "backward": 0}
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)


def test_another_word_is_an_error(monkeypatch):
    monkeypatch.setenv("SECURA_KEEP_WEIGHT", "yes")
    with pytest.raises(ValueError, match="unknown SECURA_KEEP_WEIGHT='yes'"):
        kept_weight.keeps_weight()
