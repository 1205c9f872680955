"""The ``channel`` kernel in Triton's interpreter, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from secura_kernels import NormOptions
from secura_kernels.norm import COMBINES, FORMS, gain, pack
from secura_kernels.ops.channel import op
from secura_kernels.ops.channel import triton as kernels
from secura_kernels.ops.channel.op import channel

from .rule import SHAPES, check

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("restrained", [False, True])
@pytest.mark.parametrize("folded", ["", "base"])
def test_every_norm(form, combine, restrained, folded):
    options = NormOptions("channel", form, combine)
    check((7, 37, 36, 34), options, restrained=restrained, folded=folded)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes(shape, dtype):
    check(shape, NormOptions("channel"), dtype, folded="base")


def test_relative_eps():
    check((7, 13, 11, 4), NormOptions("channel", eps=0.5, eps_relative=True))


@pytest.mark.parametrize("combine", ["gated", "averaged"])
@pytest.mark.parametrize("y0_given", [True, False])
def test_dropout_beside_what_was_folded(combine, y0_given):
    flags = {"dropout": True, "folded": "base", "restrained": True, "given": y0_given}
    check((19, 13, 11, 4), NormOptions("channel", combine=combine), torch.bfloat16, **flags)


def test_gains_are_made_once(monkeypatch):
    """In the kernel; beside it only for the restraint to count."""
    made = []
    monkeypatch.setattr(op, "gain", lambda *args: made.append(1) or gain(*args))
    for restrained in (False, True):
        check((7, 13, 11, 4), NormOptions("channel", "paper"), restrained=restrained)
    plain, restrained = 2, 1
    assert len(made) == plain + restrained


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_norms_neither_overflow_nor_hide_nan(impl, form):
    generator = torch.Generator().manual_seed(0)
    r, p = (torch.randn(*size, generator=generator) for size in ((34, 50), (37, 34)))
    p[3] = 0.0
    norm, norms = pack(NormOptions("channel", form, eps=1e-37)), torch.ones(37)
    q, *_ = channel(p, None, r @ r.T, norms, None, norm, torch.float32, impl)
    for power in (1e-15, 1e15):
        wide = (power * r) @ (power * r).T
        found, *_ = channel(
            power * p, None, wide, power**2 * norms, None, norm, torch.float32, impl
        )
        torch.testing.assert_close(found / power, q, rtol=1e-5, atol=1e-6)
    p[5, 2] = torch.nan
    q, *_ = channel(
        p, None, r @ r.T, norms, None, pack(NormOptions("channel")), torch.float32, impl
    )
    assert q[5].isnan().all() and q[:5].isfinite().all() and q[6:].isfinite().all()


@pytest.mark.parametrize("layout", ["rows", "columns", "every other"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (70, 35), (17, 65)])
def test_norms_of_the_change(n, m, layout):
    generator = torch.Generator().manual_seed(0)
    p, r = (torch.randn(size, m, generator=generator) for size in (n, m))
    gram = r @ r.t()
    if layout == "columns":
        p = p.t().contiguous().t()
    elif layout == "every other":
        p = p.repeat_interleave(2, 1)[:, ::2]
    norms = kernels.delta_norms(p, gram)
    torch.testing.assert_close(norms, (p @ gram * p).sum(1).sqrt(), rtol=1e-4, atol=1e-5)
