"""The error rule of the interpreter and GPU tests, and the shapes they run on."""

from __future__ import annotations

import torch
from torch import Tensor

from secura_kernels import NormOptions, naive
from secura_kernels.inspection.examples import Case, Example
from secura_kernels.ops.project.op import project, project_backward

# (T, N, K, m): ones, nothing, primes, more than one block of each dimension, rank above a block
# and above K; rows that start aligned (N, K multiples of 16) and not, which the kernels cut in
# other tiles
SHAPES = [
    (1, 1, 1, 1),
    (0, 5, 4, 2),
    (7, 13, 11, 4),
    (131, 67, 23, 5),
    (67, 71, 40, 33),
    (16, 64, 64, 64),
    (9, 70, 67, 65),
    (70, 80, 48, 33),
]


def shapes_in_two_dtypes(*shapes):
    """``(shape, dtype)``: each in fp32, and in bf16 or fp16 in turn."""
    low = (torch.bfloat16, torch.float16)
    return [
        (shape, dtype)
        for index, shape in enumerate(shapes)
        for dtype in (torch.float32, low[index % 2])
    ]


FLOORS = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
CAPS = {torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}


def case_of(shape, options: NormOptions, dtype=torch.float32, **flags) -> Case:
    """A layer of ``(T, N, K, m)``."""
    t, n, k, m = shape
    return Case(options, dtype, m, t, n, k, **flags)


def exactly(example: Example) -> list[Tensor]:
    """Output and gradients by the fp64 oracle, of the same values."""
    return example.to(torch.float64).run(functions=naive)


def assert_no_worse(ours, plain, exact, dtype: torch.dtype, step: float = 0.0) -> None:
    """Error against fp64 ≤ 2 × that of plain torch in the same dtype + a floor, under a cap.

    Relative to entries of order 1 at least: what cancels may keep the error of its terms. ``step``
    is allowed beyond that.
    """
    for index, (got, same_dtype, oracle) in enumerate(zip(ours, plain, exact, strict=True)):
        assert got.shape == oracle.shape and not got.isnan().any(), f"tensor {index}"
        assert got.dtype == same_dtype.dtype, f"tensor {index}"
        scale = oracle.norm().clamp_min(0.3 * oracle.numel() ** 0.5 + 1e-30)
        error = float((got.double() - oracle).norm() / scale)
        yardstick = float((same_dtype.double() - oracle).norm() / scale)
        limit = min(2 * yardstick + FLOORS[dtype], CAPS[dtype]) + step
        assert error <= limit, f"tensor {index}: error {error:.2e}, allowed {limit:.2e}"


def check_example(example: Example, step: float = 0.0) -> None:
    """The Triton kernels on a layer against the oracle, by the error rule."""
    dtype = example.x.dtype
    ours, plain = (example.run(impl) for impl in ("triton", "reference"))
    assert_no_worse(ours, plain, exactly(example), dtype, step)


def check(shape, options: NormOptions, dtype=torch.float32, device="cpu", **flags) -> None:
    """:func:`check_example` of random tensors; 8 bits of 1/M may be off by half a step."""
    step = 1e-3 if flags.get("save") == "8bit" else 0.0
    check_example(case_of(shape, options, dtype, **flags).draw(device), step)


def check_project(n, k, m, dtype, device="cpu", *, seed=0, transposed=False) -> None:
    """``project`` of a ``[n, k]`` weight and its gradient, by Triton, against fp64."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    weight = (draw(k, n).t() if transposed else draw(n, k)).to(dtype)
    cols = torch.randperm(k, generator=generator, device=device)[:m]
    u, dp, scale = draw(m, m) * m**-0.5, draw(n, m) * n**-0.5, draw(n)

    def run(impl):
        back = [project_backward(dp, weight, cols, of_rows, impl) for of_rows in (None, scale)]
        return project(weight, cols, u, torch.float32, impl), *back

    columns, wide = weight.double()[:, cols], dp.double()
    exact = columns @ u.double(), columns.T @ wide, columns.T @ (wide * scale.double()[:, None])
    ours = run("triton")
    assert_no_worse(ours, run("reference"), exact, torch.float32)
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 3
