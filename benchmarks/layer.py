"""One adapted linear layer, forward and backward, for every provider.

    python -m benchmarks.layer --preset quick --out benchmarks/results/layer-cpu.json

A provider is checked before it is timed: its adapter is given random values, and its output, dx and
parameter gradients must agree with fp64 (``oracle``); one that does not has no figures. Each round
then times every provider in turn, forward, backward and both, so that a machine that slows down
slows all of them, and ratios are of one run. Figures are medians with 20% and 80% quantiles. On
CUDA ``both`` is timed once more as a CUDA graph's replay, which the host does not hold up.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import console, costs, graphs, measure, oracle
from .machine import new_result
from .providers import Provider, Ranks, catalogue, choose, excuse, frozen_linear
from .schema import SPENT, Recorder, Row
from .shapes import LayerCase, LayerPreset, layer_preset

PHASES = ("forward", "backward", "both")
GRAPH = "both_graph"
ROUNDS = {"cuda": 4}
CPU_ROUNDS = 40


class Problem:
    """Random tensors of a case, shared by all its providers."""

    def __init__(self, case: LayerCase, device: torch.device, dtype: torch.dtype, seed: int):
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        self.case, self.device, self.dtype = case, device, dtype
        self.weight = draw(case.N, case.K).mul_(case.K**-0.5)
        self.x = draw(case.T, case.K).requires_grad_()
        self.grad = draw(case.T, case.N)


@dataclass
class Runner:
    """A provider's layer on a problem, checked.

    Attributes:
        phases: what is timed of it.
        note: what to know about its figures.
    """

    provider: Provider
    layer: nn.Module
    problem: Problem
    figures: dict[str, Any]
    phases: tuple[str, ...] = PHASES
    note: str = ""

    def forward(self) -> Tensor:
        """The output, with its graph."""
        return self.layer(self.problem.x)

    def both(self) -> tuple[Tensor, ...]:
        """dx and the adapter's gradients."""
        return self._gradients(self.forward())

    def forward_call(self) -> Callable[[], Any]:
        """What to time as the forward pass."""
        return self.forward

    def both_call(self) -> Callable[[], Any]:
        """What to time as forward and backward."""
        return self.both

    def backward_call(self) -> Callable[[], Any]:
        """The backward pass of a graph that is kept as long as this call is."""
        out = self.forward()
        return lambda: self._gradients(out, retain_graph=True)

    def both_graph_call(self) -> Callable[[], Any]:
        """What to time as forward and backward without the host's part."""
        return graphs.graphed(self.both)

    def _gradients(self, out: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        inputs = [self.problem.x, *oracle.trainable(self.layer).values()]
        return torch.autograd.grad(out, inputs, self.problem.grad, **kwargs)


def prepare(provider: Provider, problem: Problem) -> Runner | Row:
    """A provider ready to be timed, or the row that says why it is not."""
    case = problem.case
    row = Row(case.as_dict(), provider.name)
    try:
        layer = provider.build(frozen_linear(problem.weight), Ranks(case.m, case.r))
        oracle.randomise(layer, problem.weight)
        with provider.running():
            found = oracle.errors(layer, problem.weight, None, problem.x, problem.grad)
            row.figures = {f"error_{name}": value for name, value in found.items()}
            if reason := oracle.wrong(found, problem.dtype):
                row.status, row.note, row.figures = "wrong", f"against fp64: {reason}", {}
                return row
            runner = Runner(provider, layer, problem, row.figures)
            runner.both()
            runner.backward_call()()
            row.figures |= memory(runner)
            settle_phases(runner)
            return runner
    except Exception as error:  # a rival's failure must not end the run
        row.status, row.note = excuse(error)
    row.figures = {}
    return row


def settle_phases(runner: Runner) -> None:
    """Find out whether a layer can be timed as a CUDA graph, and note why not."""
    notes = ["checked with dropout off"] if "dropout" in runner.provider.name else []
    if graphs.supported(runner.problem.device):
        reason = graphs.why_not(runner.both)
        if reason is None:
            runner.phases = (*PHASES, GRAPH)
        else:
            notes.append(f"no CUDA graph: {reason}")
    runner.note = "; ".join(notes)


def memory(runner: Runner) -> dict[str, float | None]:
    """What a layer keeps for its backward, and the most it needs for both passes."""
    device, layer = runner.problem.device, runner.layer
    weights = [*layer.parameters(), *layer.buffers(), runner.problem.weight]
    return {
        "saved_mib": measure.saved_mib(runner.forward, weights),
        "held_mib": measure.held_mib(runner.forward, device),
        "peak_mib": measure.peak_mib(runner.both, device),
    }


def run_case(
    case: LayerCase,
    providers: list[Provider],
    device: torch.device,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    rounds: int = 3,
    phases: tuple[str, ...] = (*PHASES, GRAPH),
    deadline: float = float("inf"),
    end: float = float("inf"),
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Check and time every provider on one case; one row each, in the order given.

    No round begins after ``deadline`` but the first two, no provider is taken up after ``end``.
    """
    torch.manual_seed(seed)
    if any(provider.compiled for provider in providers):
        torch._dynamo.reset()
    problem = Problem(case, device, dtype, seed)
    prepared: list[Runner | Row] = []
    for provider in providers:
        if time.monotonic() > end:
            prepared += _skipped(case, [provider], SPENT)
            continue
        say(f"checking {provider.name}")
        prepared.append(prepare(provider, problem))
    runners = [entry for entry in prepared if isinstance(entry, Runner)]
    for runner in runners:
        runner.phases = tuple(phase for phase in runner.phases if phase in phases)
    times, failures = _times(runners, device, rounds=rounds, deadline=deadline, progress=say)
    return [
        entry if isinstance(entry, Row) else _timed_row(entry, times, failures)
        for entry in prepared
    ]


def _timed_row(runner: Runner, times: dict, failures: dict) -> Row:
    """A checked provider's row: its figures, or what it raised while it was timed."""
    problem, name, figures = runner.problem, runner.provider.name, runner.figures
    notes = [runner.note]
    row = Row(problem.case.as_dict(), name)
    work = costs.work(runner.provider.family, problem.case, problem.dtype.itemsize)
    for phase in PHASES:
        if (name, phase) in failures:
            row.status, row.note = excuse(failures[name, phase])
            return row
        if (name, phase) not in times:
            continue
        figures[f"{phase}_ms"] = times[name, phase]
        figures[f"{phase}_gflop"] = work[phase].flop / 1e9
        figures[f"{phase}_moved_mib"] = work[phase].bytes / measure.MIB
    if (name, GRAPH) in times:
        figures[f"{GRAPH}_ms"] = times[name, GRAPH]
    if (name, GRAPH) in failures:
        notes.append(f"no CUDA graph: {failures[name, GRAPH]}")
    row.note, row.figures = "; ".join(filter(None, notes)), figures
    return row


def _times(runners: list[Runner], device: torch.device, **kwargs: Any) -> tuple[dict, dict]:
    """Timings by ``(provider, phase)``, and what was raised instead."""
    tasks: dict[tuple[str, str], measure.Task] = {}
    for runner in runners:
        for phase in runner.phases:
            key = runner.provider.name, phase
            tasks[key] = measure.Task(getattr(runner, f"{phase}_call"), runner.provider.running)
    return measure.interleaved(tasks, device, **kwargs)


def selected(preset: LayerPreset, options: argparse.Namespace) -> Iterator[LayerCase]:
    """The preset's cases that the flags let through."""
    for case in preset.cases:
        if options.models and case.model not in options.models.split(","):
            continue
        if options.tokens and str(case.T) not in options.tokens.split(","):
            continue
        yield case


def run(options: argparse.Namespace) -> Recorder:
    """Everything the command line asked for; finished cases are kept whatever happens."""
    device, dtype = console.device_and_dtype(options)
    preset = layer_preset(options.preset)
    cases = list(selected(preset, options))
    if not cases:
        raise ValueError(f"no case of preset {options.preset!r} has these --models and --tokens")
    providers = choose(catalogue(dtype), options.providers)
    phases = tuple(options.phases.split(",")) if options.phases else (*PHASES, GRAPH)
    if not {"both"} <= set(phases) <= {*PHASES, GRAPH}:
        raise ValueError(f"--phases {options.phases}: give both, and any of {(*PHASES, GRAPH)}")
    rounds = options.rounds or ROUNDS.get(device.type, CPU_ROUNDS)
    compiled = options.compile if options.compile is not None else device.type == "cuda"
    settings = {
        "preset": options.preset,
        "headline_t": preset.headline_t,
        "seed": options.seed,
        "rounds": rounds,
        "phases": list(phases),
        "compiled": compiled,
    }
    result = new_result(
        "layer", options.preset, device, dtype, settings, commit_name=options.commit
    )
    recorder = Recorder(result, options.out, resume=options.resume)
    clock = console.Clock(options.max_seconds, device)
    measure.raise_ceilings(result.ceilings, device, dtype)
    finished = [row.case for row in result.rows]
    cases = [case for case in cases if case.as_dict() not in finished]
    progress = console.Progress(len(cases))
    for index, case in enumerate(cases):
        if clock.left <= 0:
            recorder.add(_skipped(case, providers, SPENT))
            continue
        active = [provider for provider in providers if compiled or not provider.compiled]
        rows = run_case(
            case,
            active,
            device,
            dtype,
            seed=options.seed,
            rounds=rounds,
            phases=phases,
            deadline=clock.deadline([float(rest.T * rest.N * rest.K) for rest in cases[index:]]),
            end=clock.end,
            say=progress.say,
        )
        left_out = [provider for provider in providers if provider not in active]
        rows += _skipped(case, left_out, "not asked for (--compile)", "missing")
        order = [provider.name for provider in providers]
        recorder.add(sorted(rows, key=lambda row: order.index(row.provider)))
        progress.step(f"{case.model} {case.projection} T={case.T} {case.K}→{case.N}")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    measure.raise_ceilings(result.ceilings, device, dtype)
    recorder.close()
    return recorder


def _skipped(
    case: LayerCase, providers: list[Provider], note: str, status: str = "skipped"
) -> list[Row]:
    return [Row(case.as_dict(), provider.name, status, note) for provider in providers]


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = console.parser(__doc__ or "", ("quick", "host", "llama3-8b", "block", "full"))
    parser.add_argument("--models", help="only these of the preset, e.g. qwen2-7b,gemma2-2b")
    parser.add_argument("--tokens", help="only these T of the preset, e.g. 512,2048")
    parser.add_argument("--phases", help="time only these: forward,backward,both,both_graph")
    parser.add_argument("--rounds", type=int, help="turns at most; default 4 on cuda, 40 elsewhere")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="run the torch.compile providers; default: on cuda",
    )
    options = parser.parse_args(arguments)
    from .report import layer_table

    started = time.monotonic()
    try:
        recorder = run(options)
    except ValueError as error:
        parser.error(str(error))
    print(layer_table(recorder.result, "layer"))
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
