"""P = C U and its gradient in Triton's interpreter against fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secura_kernels import plan
from secura_kernels.ops.project.op import project, project_backward

from .pairs import pairwise
from .rule import check_project

# N, K, m: ones, primes, more than one block of rows, of C's columns and of U's columns
SHAPES = [(1, 1, 1), (7, 13, 4), (131, 67, 33), (70, 150, 140), (2100, 64, 16)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(
    ("shape", "dtype", "transposed"), pairwise(SHAPES, DTYPES, (False, True)), ids=str
)
def test_matches_fp64(shape, dtype, transposed):
    check_project(*shape, dtype, transposed=transposed)


def test_splits_of_several_blocks(monkeypatch):
    monkeypatch.setattr(plan, "MOST_ROW_SPLITS", 2)
    check_project(150, 40, 7, torch.bfloat16)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 200), k=st.integers(1, 90), m=st.integers(1, 70), seed=st.integers(0, 99),
    transposed=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape_and_strides(n, k, m, seed, transposed, dtype):
    check_project(n, k, min(m, k), dtype, seed=seed, transposed=transposed)


@pytest.mark.parametrize("outside", [-1, 9, 2**40])
def test_columns_that_w_does_not_have_read_as_zero(outside):
    """An index out of range must not read beyond W."""
    weight, u, dp = torch.randn(6, 9), torch.randn(3, 3), torch.randn(6, 3)
    cols = torch.tensor([2, outside, 0])
    columns = weight[:, [2, 0, 0]].clone()
    columns[:, 1] = 0
    p = project(weight, cols, u, torch.float32, "triton")
    torch.testing.assert_close(p, columns @ u)
    du = project_backward(dp, weight, cols, None, "triton")
    torch.testing.assert_close(du, columns.T @ dp)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_c_itself(dtype, scaled):
    """Without indices the weight is C: the same bits as of the columns of a W."""
    torch.manual_seed(0)
    weight, cols = torch.randn(131, 67).to(dtype), torch.randperm(67)[:33]
    u, dp, scale = torch.randn(33, 33), torch.randn(131, 33), torch.randn(131) if scaled else None
    c = weight[:, cols].contiguous()
    for run in (
        lambda w, at: project(w, at, u, torch.float32, "triton"),
        lambda w, at: project_backward(dp, w, at, scale, "triton"),
    ):
        torch.testing.assert_close(run(c, None), run(weight, cols), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_times_something_is_nothing(dtype):
    """Of P = 0 the largest ρ is 0, and of the smallest number that is not it is not."""
    weight, cols = torch.randn(20, 9).to(dtype), torch.randperm(9)[:4]
    p = project(weight, cols, torch.zeros(4, 4), dtype, "triton")
    assert torch.equal(p, torch.zeros(20, 4, dtype=dtype))
