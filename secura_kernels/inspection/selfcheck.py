"""Check the public functions against the oracle, with the implementation a machine takes.

Small random layers, the same numbers for op and oracle (which sees them in fp64), forward and every
gradient. An error is ``‖got − exact‖ / ‖exact‖`` in the Frobenius norm, the largest over the output
and the gradients of x (or y0), A, B and the trainable bias.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import api, dispatch, naive
from ..norm import NORMS, NormOptions
from .examples import Case

LIMITS = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Largest error that passes, by dtype: some ten roundings of that dtype."""

LAYER = Case(NormOptions(), m=8, t=29, n=37, k=41, inner=12, folded="base")


class Check(NamedTuple):
    """The outcome of one op on one device in one dtype."""

    op: str
    norm: str
    device: str
    dtype: str
    impl: str
    reason: str
    error: float
    limit: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the op ran and its error is within the limit."""
        return not self.failure and self.error <= self.limit


def self_check(
    device: torch.device | str = "cpu", dtypes: Iterable[torch.dtype] = (torch.float32,)
) -> list[Check]:
    """Run every op on ``device`` in each of ``dtypes`` and hold it against the oracle.

    Returns:
        One :class:`Check` an op and dtype. An op that raises is a failed check, not an error here.

    Raises:
        ValueError: ``SECURA_IMPL`` is unknown.
    """
    checks = []
    for dtype in dtypes:
        impl, reason = chosen(torch.empty(1, device=device, dtype=dtype))
        name = str(dtype).removeprefix("torch.")
        for op, norm in OPS:
            error, failure = float("nan"), "" if impl else "no implementation can run"
            given = op == "secura_add"
            case = replace(LAYER, options=NormOptions(norm), dtype=dtype, given=given)
            try:
                error = _error(op, case, device) if impl else error
            except Exception as problem:
                failure = f"{type(problem).__name__}: {problem}"
            checks.append(
                Check(op, norm, str(device), name, impl, reason, error, LIMITS[dtype], failure)
            )
    return checks


def chosen(tensor: Tensor) -> tuple[str, str]:
    """The implementation ops take for ``tensor``, and why; ``""`` where none can run.

    Raises:
        ValueError: ``SECURA_IMPL`` is unknown.
    """
    try:
        impl = dispatch.resolve(None, tensor)
    except RuntimeError as error:
        return "", str(error)
    asked = os.environ.get("SECURA_IMPL", "auto")
    if asked != "auto":
        return impl, f"SECURA_IMPL={asked}"
    fits = f"a {tensor.device.type} tensor of a dtype the kernels take"
    return impl, dispatch.why_not_triton(tensor) or fits


OPS = (
    *(("secura_linear", norm) for norm in NORMS),
    *(("secura_add", norm) for norm in NORMS if not NormOptions(norm).replaces_product),
    *(("effective_weight", norm) for norm in NORMS if norm != "activation"),
)
"""Every op and the space it is checked in."""


def _error(op: str, case: Case, device: torch.device | str) -> float:
    """The largest relative error over the output and, but for a merge, every gradient."""
    low = case.draw(device)
    wide = low.to(torch.float64)
    if op == "effective_weight":
        got = [api.effective_weight(low.layer, low.a, low.b)]
        exact = [naive.effective_weight(wide.layer, wide.a, wide.b)]
    else:
        got, exact = low.run(), wide.run(functions=naive)
    errors = [
        (value.double() - true).norm() / true.norm() for value, true in zip(got, exact, strict=True)
    ]
    return float(torch.stack(errors).max())  # NaN where one is


__all__ = ["OPS", "self_check"]
