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
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from secura_kernels.held import Held

from . import graphs, measure, oracle
from .registry import Provider, Ranks, catalogue, choose, frozen_linear, work
from .schema import Result, Row
from .session import Session, Turn, command, in_turns, parser
from .shapes import LAYER_PRESETS, LayerCase, layer_preset
from .tables import layer_table

PHASES = ("forward", "backward", "both")
GRAPH = "both_graph"
CUDA_ROUNDS, CPU_ROUNDS = 4, 40


class Problem:
    """Random tensors of a case, shared by all its providers."""

    def __init__(self, case: LayerCase, device: torch.device, dtype: torch.dtype, seed: int = 0):
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        self.case, self.device, self.dtype = case, device, dtype
        self.weight = draw(case.N, case.K).mul_(case.K**-0.5)
        self.x = draw(case.T, case.K).requires_grad_()
        self.grad = draw(case.T, case.N)


class Runner:
    """A provider's layer on a problem, checked against fp64.

    Attributes:
        figures: its errors, what it keeps for its backward, and the most it needs for both passes.
        phases: what can be timed of it.
        note: what to know about its figures.

    Raises:
        MissingError: where the provider cannot run.
        WrongError: where it is not what it should be.
    """

    def __init__(self, provider: Provider, problem: Problem) -> None:
        case, weight = problem.case, problem.weight
        self.problem, self.provider = problem, provider
        layer: Any = provider.build(frozen_linear(weight), Ranks(case.m, case.r))
        self.layer = layer
        oracle.randomise(layer, weight)
        with provider.running():
            found = oracle.errors(layer, weight, None, problem.x, problem.grad)
            oracle.check(found, problem.dtype)
            self.figures: dict[str, Any] = {f"error_{name}": of for name, of in found.items()}
            if provider.holds:
                layer.held = Held(lambda: False, in_graphs=True)
            self.both()
            self.backward_call()()
            known = [*layer.parameters(), *layer.buffers(), weight]
            self.figures |= {
                "saved_mib": measure.saved_mib(self.forward, known),
                "held_mib": measure.held_mib(self.forward, problem.device),
                "peak_mib": measure.peak_mib(self.both, problem.device),
            }
            self.phases: tuple[str, ...] = PHASES
            notes = []
            if "dropout" in provider.name:
                notes.append("checked with dropout off")
            if graphs.supported(problem.device):
                if reason := graphs.why_not(self.both):
                    notes.append(f"no CUDA graph: {reason}")
                else:
                    self.phases = (*PHASES, GRAPH)
            self.note = "; ".join(notes)

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
        if self.provider.holds:  # gradients that are to be returned are not held
            self.problem.x.grad = None
            out.backward(self.problem.grad, inputs=inputs, **kwargs)
            return ()
        return torch.autograd.grad(out, inputs, self.problem.grad, **kwargs)


def run_case(
    case: LayerCase,
    providers: Sequence[Provider],
    device: torch.device,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    rounds: int = 3,
    phases: Sequence[str] = (*PHASES, GRAPH),
    turn: Turn | None = None,
) -> list[Row]:
    """Check and time every provider on one case; one row each, in the order given."""
    torch.manual_seed(seed)
    if any(provider.compiled for provider in providers):
        torch._dynamo.reset()
    problem = Problem(case, device, dtype, seed)

    def prepare(provider: Provider, row: Row) -> dict[str, measure.Task]:
        runner = Runner(provider, problem)
        row.figures, row.note = runner.figures, runner.note
        return {
            phase: measure.Task(getattr(runner, f"{phase}_call"), provider.running)
            for phase in runner.phases
            if phase in phases
        }

    def finish(provider: Provider, row: Row, times: dict[str, dict[str, float]]) -> None:
        least = work(provider.family, case, dtype.itemsize)
        for phase, time in times.items():
            row.figures[f"{phase}_ms"] = time
            if phase in least:
                row.figures[f"{phase}_gflop"] = least[phase].flop / 1e9
                row.figures[f"{phase}_moved_mib"] = least[phase].bytes / measure.MIB

    return in_turns(
        asdict(case),
        providers,
        prepare,
        finish,
        device,
        turn=turn or Turn(),
        rounds=rounds,
        optional=[GRAPH],
    )


def run(options: argparse.Namespace) -> Result:
    """Everything the command line asked for; finished cases are kept whatever happens."""
    preset = layer_preset(options.preset)
    models, tokens = (part and part.split(",") for part in (options.models, options.tokens))
    cases = [
        case
        for case in preset.cases
        if (not models or case.model in models) and (not tokens or str(case.T) in tokens)
    ]
    if not cases:
        raise ValueError(f"no case of preset {options.preset!r} has these --models and --tokens")
    phases = options.phases.split(",") if options.phases else [*PHASES, GRAPH]
    if not {"both"} <= set(phases) <= {*PHASES, GRAPH}:
        raise ValueError(f"--phases {options.phases}: give both, and any of {(*PHASES, GRAPH)}")
    cuda = options.device == "cuda" or (not options.device and torch.cuda.is_available())
    rounds = options.rounds or (CUDA_ROUNDS if cuda else CPU_ROUNDS)
    compiled = cuda if options.compile is None else options.compile
    settings = {"headline_t": preset.headline_t, "rounds": rounds, "phases": phases}
    session = Session("layer", options, settings | {"compiled": compiled})
    providers = choose(catalogue(session.dtype), options.providers)
    active = [provider for provider in providers if compiled or not provider.compiled]

    def rows_of(case: dict[str, Any], turn: Turn) -> list[Row]:
        rows = run_case(
            LayerCase(**case),
            active,
            session.device,
            session.dtype,
            seed=options.seed,
            rounds=rounds,
            phases=phases,
            turn=turn,
        )
        left_out = functools.partial(Row, case, status="missing", note="not asked for (--compile)")
        measured = {row.provider: row for row in rows}
        return [measured.get(one.name) or left_out(one.name) for one in providers]

    named = [
        (
            asdict(case),
            f"{case.model} {case.projection} T={case.T} {case.K}→{case.N}",
            float(case.T * case.N * case.K),
        )
        for case in cases
    ]
    return session.run(named, providers, rows_of)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    flags = parser(__doc__ or "", LAYER_PRESETS)
    flags.add_argument("--models", help="only these of the preset, e.g. qwen2-7b,gemma2-2b")
    flags.add_argument("--tokens", help="only these T of the preset, e.g. 512,2048")
    flags.add_argument("--phases", help="time only these: forward,backward,both,both_graph")
    flags.add_argument("--rounds", type=int, help="turns at most; default 4 on cuda, 40 elsewhere")
    flags.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="run the torch.compile providers; default: on cuda",
    )
    return command(flags, arguments, run, layer_table)


if __name__ == "__main__":
    raise SystemExit(main())
