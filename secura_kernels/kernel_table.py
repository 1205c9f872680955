"""What each kernel costs on each chip, found by compiling it: no GPU needed.

The ahead-of-time table needs triton and compiles every default configuration: seconds each.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from .dispatch import triton_missing

if TYPE_CHECKING:
    from .kernels.aot import Config, Report

KERNEL_FILES = ("activation", "additive", "channel", "weight")
COLUMNS = ("config", "target", "registers", "spills", "shared KiB", "16-byte loads", "MMA", "")


def kernel_configs() -> list[Config]:
    """Every default configuration of every kernel.

    Raises:
        RuntimeError: where triton is not installed.
    """
    if reason := triton_missing():
        raise RuntimeError(f"no kernel table: {reason}; `pip install triton` (Linux)")
    files = (importlib.import_module(f"{__package__}.kernels.{name}") for name in KERNEL_FILES)
    return [config for file in files for config in getattr(file, "CONFIGS", ())]


def kernel_reports(
    targets: Sequence[str] | None = None, match: str = ""
) -> Iterator[tuple[Config, Report]]:
    """Compile each configuration for each chip it ships for, one after the other.

    Args:
        targets: names of chips (``sm_90``, ``gfx942``), or None for all.
        match: only configurations whose name contains it.

    Yields:
        ``(config, report)``.

    Raises:
        RuntimeError: where triton is not installed or interprets its kernels.
        ValueError: for an unknown chip.
    """
    configs = kernel_configs()
    from .kernels.aot import TARGETS, inspect_config

    if unknown := set(targets or ()) - set(TARGETS):
        raise ValueError(f"unknown target {sorted(unknown)}: choose from {list(TARGETS)}")
    for config in configs:
        for target in config.targets:
            if match in config.name and (targets is None or target in targets):
                yield config, inspect_config(config, target)


def kernel_table(rows: Iterable[tuple[Config, Report]]) -> Iterator[str]:
    """The reports as lines of a Markdown table; the last column names what breaks a rule."""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    for config, report in rows:
        cells = (
            report.config, report.target, report.registers, report.spill_bytes,
            f"{report.shared_bytes / 1024:.0f}", report.wide_loads, report.mma,
            "; ".join(report.problems(config)) or "ok",
        )  # fmt: skip
        yield "| " + " | ".join(map(str, cells)) + " |"


__all__ = ["kernel_configs", "kernel_reports", "kernel_table"]
