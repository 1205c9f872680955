"""Where a figure was made: device, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "peft", "numpy", "pytest")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEASURED = ("secura", "secura_kernels", "benchmarks/*.py")


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


def package_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and ``packages``; ``"missing"`` where one is not installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def commit(*measured: str) -> str:
    """The commit of the project's working tree, or ``"unknown"`` where it runs from no checkout.

    Args:
        measured: paths from the project's root, ``MEASURED`` where none is given; where they differ
            from the commit, it is marked ``-dirty``.
    """
    name = _git("rev-parse", "--short=12", "HEAD") if (ROOT / "pyproject.toml").is_file() else None
    if name is None:
        return "unknown"
    return f"{name}-dirty" if _git("status", "--porcelain", "--", *measured or MEASURED) else name


def dtype_name(dtype: torch.dtype) -> str:
    """``"bf16"`` for ``torch.bfloat16``."""
    return {known: name for name, known in DTYPES.items()}[dtype]


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
