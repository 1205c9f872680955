"""Where a figure was made: device, versions, commit."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .schema import Result

PACKAGES = ("torch", "triton", "transformers", "peft", "numpy", "pytest")
MEASURED = ("secura", "secura_kernels", "benchmarks/*.py", "benchmarks/retention/*.py")
ROOT = Path(__file__).parent.parent


def describe(device: torch.device) -> dict[str, Any]:
    """The device's kind and name, and what bounds it."""
    threads = {"threads": torch.get_num_threads()}
    if device.type != "cuda":
        return {"device": device.type, "name": _cpu_name(), **threads}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": properties.total_memory // 2**20,
        "cuda": torch.version.cuda or torch.version.hip,
        **threads,
    }


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and `packages`; ``"missing"`` where one is not installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def commit() -> str:
    """The commit of the working tree, marked ``-dirty`` where code that is measured differs."""
    name = _git("rev-parse", "--short=12", "HEAD")
    if name is None:
        return "unknown"
    return f"{name}-dirty" if _git("status", "--porcelain", "--", *MEASURED) else name


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; ``"missing"`` where a package is not installed."""
    return package_versions(PACKAGES)


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


__all__ = ["commit", "describe", "dtype_name", "new_result", "package_versions", "versions"]
