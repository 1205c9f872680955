"""What every benchmark's command line shares: its flags, its progress bar, its clock."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BUDGET_S = {"cuda": 480.0}
CPU_BUDGET_S = 120.0


def parser(doc: str, presets: tuple[str, ...]) -> argparse.ArgumentParser:
    """The flags of every benchmark."""
    made = argparse.ArgumentParser(description=doc.partition("\n")[0])
    made.add_argument("--preset", choices=presets, default="quick")
    made.add_argument("--device", help="default: cuda where there is one, else cpu")
    made.add_argument("--dtype", choices=DTYPES, help="default: bf16 on cuda, fp32 elsewhere")
    made.add_argument(
        "--max_seconds",
        type=float,
        help="nothing new is begun later; default 480 on cuda, 120 elsewhere",
    )
    made.add_argument("--providers", help="only those called, or holding, one of these: lora,dora")
    made.add_argument("--out", type=Path, help="where to keep the figures, as JSON")
    made.add_argument(
        "--resume", action="store_true", help="go on from --out: finished cases are not run again"
    )
    made.add_argument("--commit", help="what to record where git cannot say it")
    made.add_argument("--seed", type=int, default=0)
    return made


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Those asked for, or the machine's."""
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(kind)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    return device, DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]


class Clock:
    """A time budget that cases share.

    Args:
        seconds: the budget, or None for the device's.
        device: where the benchmark runs.
    """

    def __init__(self, seconds: float | None, device: torch.device) -> None:
        self.seconds = BUDGET_S.get(device.type, CPU_BUDGET_S) if seconds is None else seconds
        self.start = time.monotonic()

    @property
    def end(self) -> float:
        """The ``time.monotonic()`` at which the budget is spent."""
        return self.start + self.seconds

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.end - time.monotonic()

    def deadline(self, sizes: Sequence[float]) -> float:
        """The ``time.monotonic()`` by which the first of the remaining cases should end.

        A case's share of what is left grows with its size, and half of it does not depend on it:
        checking and compiling take as long for small ones.
        """
        mean = sum(sizes) / len(sizes)
        return time.monotonic() + self.left * (1 + sizes[0] / mean) / (2 * len(sizes))


class Progress:
    """A bar on stderr: redrawn in place on a terminal, one line a step elsewhere.

    Args:
        total: steps.
    """

    WIDTH = 24

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.live = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """What is being done, on a terminal alone."""
        if self.live:
            self._draw(text, "\r\x1b[K", "")

    def step(self, text: str) -> None:
        """One step is done."""
        self.done += 1
        self._draw(text, "\r\x1b[K" if self.live else "", "\n")

    def _draw(self, text: str, begin: str, end: str) -> None:
        filled = self.WIDTH * self.done // max(1, self.total)
        bar = "█" * filled + "░" * (self.WIDTH - filled)
        seconds = time.monotonic() - self.start
        line = f"{begin}{bar} {self.done}/{self.total} {seconds:4.0f} s  {text}{end}"
        print(line, end="", file=sys.stderr, flush=True)


__all__ = ["DTYPES", "Clock", "Progress", "device_and_dtype", "parser"]
