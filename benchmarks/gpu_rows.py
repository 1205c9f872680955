"""The timed rows of ``benchmarks.gpu_check``, measured in a process of their own.

    python -m benchmarks.gpu_rows layers --rows FILE [--skip 3]

appends one JSON object a row to FILE as it goes. A row that raises is a failed row, and the next
one follows; an error after which the device does nothing more ends the process with the status
``LOST``, and whoever started it may start it again for the rows after that one. :func:`plan` makes
nothing on the device, so the rows of a run are known whether or not it reaches them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from secura_kernels.dispatch import interpreting

from . import graphs
from .gpu_kernels import Kernel, kernels
from .gpu_ops import (
    LAYERS,
    PROJECTIONS,
    Size,
    Tensors,
    ceilings,
    every_op_once,
    layer_step,
    time_ms,
    worst_error,
)

TOKENS, RANK = 8192, 128
ERROR_LIMIT = 0.05
DTYPE = torch.bfloat16
LOST = 3
"""Exit status where the device does nothing more in this process."""
CEILINGS = "ceilings"
"""The first row of every plan: what floors are computed with."""


class Found(NamedTuple):
    """What a row came to: ``status`` as in ``schema.STATUSES``, a note, and figures by name."""

    status: str
    note: str
    figures: dict[str, Any]


class Planned(NamedTuple):
    """A row to measure: what it is of, and how."""

    case: dict[str, Any]
    provider: str
    measure: Callable[[], Found]

    def row(self, found: Found) -> dict[str, Any]:
        """The row as it is kept."""
        return {"case": self.case, "provider": self.provider} | found._asdict()


def plan(step: str, dry_run: bool) -> list[Planned]:
    """The rows of a step, ``"layers"`` or ``"kernels"``, in the order they are measured.

    ``dry_run`` takes a CPU, tiny shapes and plain torch; no kernel runs there but in the
    interpreter.
    """
    device, impl = ("cpu", "reference") if dry_run else ("cuda", "triton")
    rows = [Planned({"kind": CEILINGS}, CEILINGS, lambda: _ceilings(device))]
    if step == "kernels":
        if dry_run and not interpreting():
            return []
        size = Size(16, 32, 32, 4) if dry_run else Size(TOKENS, 4096, 4096, RANK)
        case = {"kind": "kernel", **size._asdict()}
        for kernel in kernels(size, device, DTYPE, "triton"):
            measure = functools.partial(_kernel, kernel, device)
            rows.append(Planned(case, kernel.name, measure))
        return rows
    for label, n, k, _ in PROJECTIONS:
        size = Size(16, n // 128, k // 128, 4) if dry_run else Size(TOKENS, n, k, RANK)
        case = {"kind": "layer", "projection": label, **size._asdict()}
        for name in LAYERS:
            rows.append(Planned(case, name, functools.partial(_layer, name, size, device, impl)))
    return rows


def _ceilings(device: str) -> Found:
    return Found("ok", "", dict(ceilings(device, DTYPE)))


def _kernel(kernel: Kernel, device: str) -> Found:
    call = kernel.make()
    run, note = _replayed(call.run, device)
    figures = {
        "time_ms": time_ms(run, device), "bytes": call.bytes, "flop": call.flop, "rate": call.rate
    }  # fmt: skip
    return Found("ok", f"{call.formula}; {note}", figures)


def _layer(name: str, size: Size, device: str, impl: str) -> Found:
    error = worst_error(name, size, device, DTYPE, impl)
    if not error <= ERROR_LIMIT:
        return Found("wrong", f"relative error {error:.1e}", {"error": error})
    step = layer_step(name, Tensors(size, device, DTYPE), impl)
    eager_ms = time_ms(step, device)
    run, note = _replayed(step, device)
    figures = {
        "time_ms": time_ms(run, device), "eager_ms": eager_ms, "error": error, "bytes": 0,
        "flop": 4 * size.t * size.n * size.k, "rate": "gemm_tflop_s",
    }  # fmt: skip
    return Found("ok", note, figures)


def _replayed(call: Callable[[], Any], device: str) -> tuple[Callable[[], Any], str]:
    """What to time in the place of ``call``, and a note of what it is."""
    if not graphs.supported(torch.device(device)):
        return call, "eager"
    try:
        return graphs.graphed(call), "CUDA graph"
    except graphs.NotCapturableError as reason:
        return call, f"eager, launches included: no CUDA graph ({reason})"


def with_floor(row: dict[str, Any], ceilings: dict[str, float]) -> dict[str, Any]:
    """The row with ``floor_ms``, the longer of its bytes' and operations' time, and its share."""
    figures = row["figures"]
    if row["status"] != "ok" or not ceilings:
        return row
    floor_ms = max(
        figures["bytes"] / ceilings["copy_gb_s"] / 1e6,
        figures["flop"] / ceilings[figures["rate"]] / 1e9,
    )
    share = floor_ms / figures["time_ms"]["median"]
    return row | {"figures": figures | {"floor_ms": floor_ms, "floor_share": share}}


def with_ratio(row: dict[str, Any], earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """A layer's row with its ``ratio`` to the frozen layer's among the earlier ones."""
    frozen = [
        other["figures"]["time_ms"]["median"]
        for other in [*earlier, row]
        if other["provider"] == LAYERS[0] and other["case"] == row["case"]
        and other["status"] == "ok"
    ]  # fmt: skip
    if row["status"] != "ok" or not frozen:
        return row
    ratio = row["figures"]["time_ms"]["median"] / frozen[0]
    return row | {"figures": row["figures"] | {"ratio": ratio}}


def run(
    rows: list[Planned],
    write: Callable[[dict[str, Any]], None],
    lost: Callable[[], str | None],
) -> int:
    """Measure rows one after the other; the process's exit status.

    Args:
        rows: what to measure.
        write: keeps a row.
        lost: says after a failure why the device does nothing more, or None.
    """
    for row in rows:
        try:
            found = row.measure()
        except Exception as error:
            found = Found("failed", repr(error)[:500], {})
        reason = lost() if found.status == "failed" else None
        if reason is not None:
            note = f"{found.note}; the device is lost to this process: {reason}"
            write(row.row(Found("failed", note, {})))
            return LOST
        write(row.row(found))
    return 0


def lost(device: str) -> str | None:
    """Why the device does nothing more in this process, or None where it still works."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def main(argv: list[str] | None = None) -> int:
    """Measure the rows of a step, or run every op once for compute-sanitizer."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_rows", description=__doc__)
    parser.add_argument("step", choices=("layers", "kernels", "small"))
    parser.add_argument("--rows", type=Path, help="the file that rows are appended to")
    parser.add_argument("--skip", type=int, default=0, help="rows not to measure again")
    parser.add_argument("--dry_run", action="store_true")
    args = parser.parse_args(argv)
    if args.step == "small":
        every_op_once()
        return 0
    with args.rows.open("a", encoding="utf-8") as kept:

        def write(row: dict[str, Any]) -> None:
            kept.write(json.dumps(row) + "\n")
            kept.flush()

        rows = plan(args.step, args.dry_run)[args.skip :]
        return run(rows, write, lambda: lost("cpu" if args.dry_run else "cuda"))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Taking down what a lost device holds may abort, and so hide the status.
    os._exit(status)
