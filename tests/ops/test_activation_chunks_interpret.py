"""The ``activation`` kernels where they are cut: chunks of dΔ, tiles, sums that go on."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from secura_kernels import NormOptions, plan
from secura_kernels.gpu import H100, assume
from secura_kernels.norm import COMBINES, SAVES, complete
from secura_kernels.ops.activation import triton as kernels
from secura_kernels.ops.common import Measured, Terms

from .pairs import pairwise
from .rule import case_of, check

GATED = NormOptions("activation", "calibrated", "gated")
WIDE = (70, 150, 31, 9)  # N > 2 K: gated, h R is added to g W
ALL = {"folded": "base", "dropout": True, "restrained": True}
GRID = pairwise(COMBINES, ("", "base"), (False, True), SAVES)


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 64 columns, and of 64 tokens."""
    monkeypatch.setattr(plan, "CHANGE_MIB", 2**-20)
    monkeypatch.setattr(plan, "_ENOUGH_TOKENS", 64)


@pytest.mark.parametrize(
    ("combine", "folded", "dropout", "restrained", "biased", "save"),
    [
        *[(*rest, False, True, save) for *rest, save in GRID],
        *[(combine, "base", True, True, True, "recompute") for combine in COMBINES],
        *[(combine, "", True, False, False, "8bit") for combine in COMBINES],
    ],
)
def test_every_flag(combine, folded, dropout, restrained, biased, save, small_chunks):
    check(
        WIDE, NormOptions("activation", "calibrated", combine), torch.float16, folded=folded,
        dropout=dropout, restrained=restrained, biased=biased, trains_bias=biased, save=save,
    )  # fmt: skip


@pytest.mark.parametrize(("n", "m"), [(530, 9), (544, 140)])
@pytest.mark.parametrize("combine", COMBINES)
def test_tall_tiles_of_few_processors(combine, n, m):
    """One processor: programs of 64 tokens, several tiles a program, what large T gets."""
    options = NormOptions("activation", None, combine)
    with assume(H100._replace(processors=1)):
        check((131, n, 3, m), options, torch.float16, folded="base", given=True)


@pytest.mark.parametrize(
    ("combine", "m", "dtype", "save"),
    pairwise(COMBINES, (9, 140), (torch.float16, torch.float32), SAVES),
    ids=str,
)
def test_sums_go_on_over_chunks(combine, m, dtype, save, small_chunks):
    options = NormOptions("activation", "calibrated", combine)
    check((80, 150, 3, m), options, dtype, given=True, save=save, **ALL)


@pytest.mark.parametrize(
    ("m", "dtype"), [(9, torch.float32), (9, torch.bfloat16), (140, torch.bfloat16)], ids=str
)
def test_h_goes_on_over_chunks(m, dtype, small_chunks):
    check((130, 150, 31, m), GATED, dtype, folded="base", dropout=True)


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize(("t", "n", "itemsize"), [
    (1, 1, 4), (8192, 4096, 2), (8192, 14336, 2), (40000, 4097, 4), (300, 152064, 2),
])  # fmt: skip
def test_chunks_cover_everything_once_and_fit_the_workspace(t, n, itemsize, whole_rows):
    chunks = list(plan.change_blocks(t, n, itemsize, whole_rows))
    sizes = [(a.stop - a.start) * (b.stop - b.start) for a, b in chunks]
    assert sum(sizes) == t * n and len(set(map(str, chunks))) == len(chunks)
    assert all(a.stop <= t and b.stop <= n for a, b in chunks)
    smallest = 64 * n if whole_rows else 64 * min(t, 16384)
    assert max(sizes) == sizes[0] <= max(smallest, plan.CHANGE_MIB * 2**20 // itemsize)
    assert all(a.start % 64 == 0 and b.start % 64 == 0 for a, b in chunks)


class Largest(TorchDispatchMode):
    """The most elements of any one result, but for views and the interpreter's copies."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        skipped = func.is_view or func.overloadpacket is torch.ops.aten.set_
        if isinstance(out, torch.Tensor) and not skipped and out.dtype != torch.uint8:
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, False]])
@pytest.mark.parametrize("m", [9, 140])
def test_backward_through_h_makes_no_tensor_of_all_tokens_and_outputs(needs, m, small_chunks):
    t, n = 200, 500
    g, z, p = (torch.ones(size, dtype=torch.bfloat16) for size in ((t, n), (t, m), (n, m)))
    found = Measured(torch.empty(0), torch.empty(0))
    rows, norm = torch.arange(m), complete(GATED)
    with Largest() as seen:
        h, dp, dbias = kernels.backward(
            g, g, z, rows, Terms(p), found, norm, needs, h_alone=needs[0]
        )
    assert [value is not None for value in (h, dp, dbias)] == needs
    assert 0 < seen.numel <= max(t, n) * 144


def test_same_bits_twice(small_chunks):
    example = case_of(WIDE, GATED, torch.bfloat16, folded="base", dropout=True).draw()
    first, second = (example.run("triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
