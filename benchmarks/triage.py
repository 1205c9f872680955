"""The first minutes on a GPU: are the layers right, how far from frozen, and where the time goes.

    python -m benchmarks.triage --out DIR [--budget_s 130] [--resume]

One process measures, after ``WARMERS`` others have compiled what it will run. It prints one JSON
line a measurement: each provider's layer (errors, eager and graph time, memory), what it costs the
host, how much of a small update reaches its output, and every op beside its floor
(:mod:`benchmarks.ops`). Times are in microseconds (``*_us``). ``triage.json`` keeps them as they
come, a table is printed last. ``--resume`` measures what is not there yet. ``--dry_run`` goes
through all of it on a CPU, in Triton's interpreter with tiny shapes: its figures mean nothing.
Exit status: 0 all measured, 1 not, 2 no GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from secura_kernels.plan import Shape

from . import graphs, measure
from .children import Child, end_by, exit_when_asked
from .landing import shares
from .layer import PHASES, Problem, Runner
from .ops import OPS, Op, Tensors, allowed_ratio
from .registry import Provider, Ranks, catalogue, choose, excuse, secura
from .schema import SPENT, Recorder, Row, new_result
from .session import gpu_parser, lacks_gpu
from .shapes import LayerCase, M, R

WARMERS, WARM_S = 10, 50.0
DEVICE_LOST = "the device does nothing more in this process"
PROVIDERS = (
    "frozen",
    "peft lora bf16",
    "strong lora",
    "secura none triton",
    "secura channel triton",
    "secura activation triton",
    "secura weight triton",
    "secura none stochastic",
    "peft dora bf16",
)
ROUNDED = secura("none", "triton", "secura none stochastic", stochastic_rounding=True)
"""W' rounded stochastically: the one of ``PROVIDERS`` that the catalogue has not."""
SHAPES = {"q+o": Shape(8192, 4096, 4096, M), "gate+up": Shape(8192, 14336, 4096, M)}
LANDING = (1e-3, 3e-4)
"""‖ΔW‖ / ‖W‖ of the small updates whose way to the output is measured."""


class Setup:
    """A device, the tensors and providers that are measured on it, and the times of calls.

    Args:
        device: ``"cuda"``, or ``"cpu"`` for a dry run in the interpreter.
        warming: whether every call runs once, to be compiled, and nothing is timed.
    """

    def __init__(self, device: str, warming: bool = False) -> None:
        self.device, self.dry = torch.device(device), device == "cpu"
        self.dtype, self.timing = torch.bfloat16, not (warming or self.dry)

    def shape(self, shape: Shape) -> Shape:
        """The shape asked for, or on a CPU one with as many blocks of nearly nothing."""
        t, n, k, _, _ = shape
        if not self.dry:
            return shape
        return Shape(max(16, t // 256), max(32, n // 128), max(32, k // 128), 16)

    @functools.lru_cache(maxsize=1)  # noqa: B019  one shape at a time is all a GPU should hold
    def tensors(self, shape: Shape) -> Tensors:
        """Random tensors of a layer of a shape."""
        return Tensors(self.shape(shape), str(self.device), self.dtype)

    def problem(self, shape: Shape) -> Problem:
        """A layer's random tensors, for the providers."""
        t, n, k, m, _ = self.shape(shape)
        case = LayerCase("triage", "linear", 1, t, n, k, m, min(R, m))
        return Problem(case, self.device, self.dtype)

    def provider(self, name: str) -> Provider:
        """The one of that name."""
        return choose([*catalogue(self.dtype, dropout=False), ROUNDED], name)[0]

    def us(self, call: Callable[[], Any], *, eager: bool = False) -> float | None:
        """Microseconds of a call by itself, as a CUDA graph where it can be one."""
        if not self.timing:
            call()
            return None
        if not eager:
            with suppress(graphs.NotCapturableError):
                call = graphs.graphed(call)
        return 1e3 * measure.timing(measure.sample(call, self.device))["median"]

    def host_us(self, call: Callable[[], Any]) -> float | None:
        """Microseconds from one eager call to the next, when many follow each other."""
        call()
        if not self.timing:
            return None
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / 100 * 1e6


class Measurement(NamedTuple):
    """A name and what finds its figures."""

    name: str
    run: Callable[[Setup], dict[str, Any]]


def measurements(ceilings: dict[str, float], only: str = "") -> list[Measurement]:
    """Those whose names begin with a part of ``only``, the most important first."""
    found = [Measurement(f"layer: {name}", functools.partial(_layer, name)) for name in PROVIDERS]
    found += [
        Measurement(f"host: {name}", functools.partial(_host, name)) for name in PROVIDERS[:-1]
    ]
    for label, shape in SHAPES.items():
        for op in OPS:
            run = functools.partial(_op, op, shape, ceilings)
            found.append(Measurement(f"op: {op.name}, {label}", run))
    found += [
        Measurement(f"lands: {name}", functools.partial(_lands, name)) for name in PROVIDERS[1:]
    ]
    return [one for one in found if one.name.startswith(tuple(only.split(",")))]


def _layer(name: str, setup: Setup) -> dict[str, Any]:
    """A provider's layer: errors against fp64, memory, and forward, backward and graph."""
    runner = Runner(setup.provider(name), setup.problem(SHAPES["q+o"]))
    figures = dict(runner.figures)
    with runner.provider.running():
        for phase in PHASES:
            call = getattr(runner, f"{phase}_call")()
            figures[f"{phase}_eager_us"] = setup.us(call, eager=True)
            del call
        figures["both_graph_us"] = setup.us(runner.both)
    return figures


def _host(name: str, setup: Setup) -> dict[str, Any]:
    """One layer on few tokens, so that its time is the host's."""
    runner = Runner(setup.provider(name), setup.problem(Shape(16, 4096, 4096, M)))
    with runner.provider.running():
        return {
            "eager forward_us": setup.host_us(runner.forward),
            "eager_us": setup.host_us(runner.both),
            "graph_us": setup.us(runner.both),
        }


def _op(op: Op, shape: Shape, ceilings: dict[str, float], setup: Setup) -> dict[str, Any]:
    """An op's times, their floors by bytes and operations, and the shares that are of them."""
    data, figures = setup.tensors(shape), dict[str, Any]()
    calls = op.calls(data, "triton")
    floors = op.floors_us(calls, data, ceilings) if ceilings else {}
    for name, call in calls.items():
        figures[f"{name}_us"] = found = setup.us(call)
        if found is not None:
            figures |= {f"{name}_floor_us": floors[name], f"{name}_share": floors[name] / found}
    return figures


def _lands(name: str, setup: Setup) -> dict[str, Any]:
    """The share of a small update's exact effect that a layer's output shows."""
    problem, figures = setup.problem(Shape(1024, 4096, 4096, M)), {}
    ranks, provider = Ranks(problem.case.m, problem.case.r), setup.provider(name)
    for change in LANDING:
        found = shares(provider, problem.weight, problem.x.detach(), ranks, change)
        figures[f"share at {change:g}"] = found["share"]
    return figures


def warm(part: int, parts: int, only: str) -> None:
    """Run every ``parts``-th measurement once, so that its kernels are in Triton's cache."""
    setup = Setup("cuda", warming=True)
    for one in measurements({}, only)[part::parts]:
        try:
            one.run(setup)
        except Exception as error:  # it will run again, and its failure be kept
            print(f"{one.name}: {error!r}"[:300], flush=True)


def warmed(out: Path, seconds: float, only: str) -> None:
    """Have other processes compile; none outlives its seconds."""
    end = time.monotonic() + seconds
    command = [sys.executable, "-m", "benchmarks.triage", "--out", str(out), "--only", only]
    children = [
        Child([*command, "--warm", f"{part}/{WARMERS}"], out / "warm.log")
        for part in range(WARMERS)
    ]
    end_by(children, end)


def measured(one: Measurement, setup: Setup) -> Row:
    """The row of a measurement; one that fails says why."""
    row = Row({"question": one.name}, "triage")
    try:
        row.figures = one.run(setup)
    except Exception as error:  # one failure must not end the others
        row.fail(*excuse(error))
        if measure.is_lost(setup.device):
            row.note += f"; {DEVICE_LOST}"
    return row


def begin_again(seconds: float) -> None:
    """Put a new process in the place of this one, whose device is lost, for what is left."""
    kept = [word for word in sys.argv[1:] if word != "--resume"]
    again = ["-m", "benchmarks.triage", *kept, "--resume", "--budget_s", f"{seconds:.0f}"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *again])


def ceilings_of(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """This machine's ``copy_gb_s``, ``gemm_tflop_s`` of ``dtype``, and ``fp32_tflop_s``."""
    edge, numel = (8192, 2**29) if device.type == "cuda" else (256, 2**18)
    found = measure.rates(device, dtype, edge=edge, numel=numel)
    narrow = measure.rates(device, torch.float32, edge=edge // 2, numel=2**18)
    return found | {"fp32_tflop_s": narrow["gemm_tflop_s"]}


def table(rows: list[Row], ceilings: dict[str, float]) -> list[str]:
    """The layers over the frozen one, beside what the ceilings allow, and what failed."""
    shape = SHAPES["q+o"]
    layers = {
        row.case["question"].removeprefix("layer: "): row.figures
        for row in rows
        if row.case["question"].startswith("layer: ") and row.figures.get("both_graph_us")
    }
    frozen = layers.get("frozen", {}).get("both_graph_us")
    lines = [
        "",
        f"{'layer at ' + str(shape[:4]):32s} graph µs  ratio  allowed  eager µs  saved MiB",
    ]
    for name, figures in layers.items() if frozen else ():
        allowed, graph_us = allowed_ratio(name, shape, ceilings), figures["both_graph_us"]
        lines.append(
            f"{name:32s} {graph_us:8.0f}  {graph_us / frozen:5.3f}  "
            f"{'' if allowed is None else f'{allowed:.3f}':>7s}  "
            f"{figures['both_eager_us']:8.0f}  {figures['saved_mib']:9.1f}"
        )
    bad = [row for row in rows if row.status != "ok"]
    return lines + [f"{row.status}: {row.case['question']}: {row.note}"[:300] for row in bad]


def run(options: argparse.Namespace) -> int:
    """Measure; the exit status."""
    start = time.monotonic()
    setup = Setup("cpu" if options.dry_run else "cuda")
    preset = "dry_run" if options.dry_run else "full"
    result = new_result("triage", preset, setup.device, setup.dtype, {}, options.commit)
    recorder = Recorder(result, options.out / "triage.json", resume=options.resume)
    result.rows = [row for row in result.rows if row.status == "ok" or DEVICE_LOST in row.note]
    print(json.dumps([result.machine, result.versions, result.commit]), flush=True)
    if not options.dry_run and not result.rows:
        warmed(options.out, min(WARM_S, options.budget_s / 2), options.only)
        print(f"compiled: {time.monotonic() - start:.0f} s", flush=True)
    result.ceilings = result.ceilings or ceilings_of(setup.device, setup.dtype)
    print(json.dumps(result.ceilings), flush=True)
    known = {row.case["question"] for row in result.rows}
    for one in measurements(result.ceilings, options.only):
        if one.name in known:
            continue
        if time.monotonic() - start > options.budget_s:
            recorder.add([Row({"question": one.name}, "triage", "skipped", SPENT)])
            continue
        row = measured(one, setup)
        recorder.add([row])
        shown = {
            key: float(f"{of:.4g}") if isinstance(of, float) else of
            for key, of in row.figures.items()
        }
        line = [one.name, row.status, row.note, f"{time.monotonic() - start:.0f} s", shown]
        print(json.dumps(line, ensure_ascii=False), flush=True)
        if DEVICE_LOST in row.note:
            begin_again(options.budget_s - (time.monotonic() - start))
    recorder.close()
    print("\n".join(table(result.rows, result.ceilings)))
    return 0 if all(row.status == "ok" for row in result.rows) else 1


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; see the module's docstring for the exit status."""
    flags = gpu_parser("triage", __doc__, 130.0)
    flags.add_argument("--only", default="", help="those that begin so: layer,host,op")
    flags.add_argument("--warm", help=argparse.SUPPRESS)
    options = flags.parse_args(arguments)
    if lacks_gpu(options):
        return 2
    exit_when_asked()
    if options.warm:
        part, _, parts = options.warm.partition("/")
        warm(int(part), int(parts), options.only)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
