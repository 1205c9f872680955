"""Where a benchmark's result was made."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from typing import Any

import torch

from secura import machine
from secura.machine import describe

from .schema import Result

PACKAGES = ("torch", "triton", "transformers", "peft", "numpy", "pytest")
MEASURED = ("secura", "secura_kernels", "benchmarks/*.py")


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; ``"missing"`` where a package is not installed."""
    return machine.versions(PACKAGES)


def commit() -> str:
    """The commit of the working tree, marked ``-dirty`` where code that is measured differs."""
    return machine.commit(*MEASURED)


def new_result(
    benchmark: str,
    preset: str,
    device: torch.device,
    dtype: torch.dtype,
    settings: dict[str, Any],
    *,
    commit_name: str | None = None,
) -> Result:
    """An empty result of this machine, this code and this command line."""
    return Result(
        benchmark=benchmark,
        preset=preset,
        command=shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
        commit=commit_name or commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        dtype=dtype_name(dtype),
        machine=describe(device),
        versions=versions(),
        settings=settings,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``"bf16"`` for ``torch.bfloat16``."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


__all__ = ["commit", "describe", "dtype_name", "new_result", "versions"]
