"""Whole training steps: forward, backward and AdamW, in tokens per second and peak memory.

    python -m benchmarks.model --preset llama3-8b --out benchmarks/results/model-h200.json

The model has the published dimensions and random weights, the tokens are random, the attention is
torch's. Each provider is first checked on one layer of the model against fp64, and its loss must be
finite; then the providers' layers are put into the same model in turns, a step each.

What a step needs of memory can be counted without a device: ``benchmarks.memory``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from . import measure, oracle
from .registry import Provider, Ranks, WrongError, choose, for_models, frozen_linear
from .schema import Result, Row
from .session import Session, Turn, collect, command, in_turns, parser
from .shapes import MODELS, M, R
from .tables import model_table
from .training import adapted, flop_per_token, random_model, set_checkpointing, target_layers

PRESETS = ("quick", "block", "llama3-8b", "qwen2-7b", "qwen2-1.5b", "full")
CHECK_TOKENS = 256


@dataclass(frozen=True)
class StepCase:
    """One setting of a training step."""

    model: str
    blocks: int
    targets: str
    sequence: int
    batch: int
    accumulate: int = 1
    checkpointing: bool = False
    m: int = M
    r: int = R


def model_preset(name: str) -> list[StepCase]:
    """The cases of one of ``PRESETS``, the most important first.

    ``quick`` is six blocks of SmolLM2-135M's shape and short sequences, for a CPU. A model's name:
    all linears at sequence 4096 × 2 (the published NeMo Automodel setting), then checkpointing,
    adapters on q and v, accumulation. ``full`` is every such model. ``block``
    is what a quarter of an hour and 78 GiB allow: 8 blocks of Llama-3-8B, all linears, without and
    with checkpointing, and with short sequences.
    """
    if name == "quick":
        return [StepCase("smollm2-135m", 6, targets, 128, 1, m=32) for targets in ("all", "q,v")]
    if name == "block":
        eight = StepCase("llama3-8b", 8, "all", 4096, 2)
        checkpointed = replace(eight, checkpointing=True)
        return [eight, checkpointed, replace(checkpointed, sequence=2048, batch=1)]
    cases = []
    for model in ("llama3-8b", "qwen2-7b", "qwen2-1.5b") if name == "full" else (name,):
        first = StepCase(model, MODELS[model].layers, "all", 4096, 2)
        checkpointed = replace(first, checkpointing=True)
        cases += [first, checkpointed, replace(first, targets="q,v")]
        cases.append(replace(checkpointed, accumulate=4))
    return cases


class Contender:
    """One provider's layers for a model, its optimizer and its training step on random tokens.

    Raises:
        MissingError: where the provider cannot run.
    """

    def __init__(self, provider: Provider, model: nn.Module, case: StepCase) -> None:
        self.provider, self.model, self.case = provider, model, case
        ranks = Ranks(case.m, case.r)
        self.layers = {
            name: provider.build(layer, ranks)
            for name, layer in target_layers(model, case.targets).items()
        }
        self.trained = [
            parameter
            for layer in self.layers.values()
            for parameter in layer.parameters()
            if parameter.requires_grad
        ]
        for parameter in self.trained:
            if not parameter.any():
                nn.init.normal_(parameter, std=1e-3)
        self.device = self.trained[0].device
        vocab = MODELS[case.model].vocab
        size = (case.accumulate, case.batch, case.sequence)
        self.tokens = torch.randint(vocab, size, device=self.device)
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=fused)
        self.loss = torch.tensor(math.nan)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, the model is this contender's."""
        with adapted(self.model, self.layers), self.provider.running():
            yield

    def step(self) -> None:
        """One optimizer step over the accumulated batches."""
        for part in self.tokens:
            self.loss = self.model(input_ids=part, labels=part).loss / self.case.accumulate
            self.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step_call(self) -> Callable[[], None]:
        """What to time, after a step that is not: the one before was another contender's."""
        self.step()
        return self.step


def check(model: nn.Module, provider: Provider, case: StepCase) -> None:
    """Hold the provider on one layer of this model against fp64.

    Raises:
        WrongError: where they differ.
    """
    layer = next(iter(target_layers(model, case.targets).values()))
    weight, bias = layer.weight.detach(), layer.bias
    adapter = provider.build(frozen_linear(weight, bias), Ranks(case.m, case.r))
    oracle.randomise(adapter, weight)
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    x = torch.randn(CHECK_TOKENS, layer.in_features, **options)
    grad = torch.randn(CHECK_TOKENS, layer.out_features, **options)
    with provider.running():
        oracle.check(oracle.errors(adapter, weight, bias, x, grad), weight.dtype)


def run_case(
    model: nn.Module,
    case: StepCase,
    providers: Sequence[Provider],
    ceilings: dict[str, float],
    *,
    steps: int = 2,
    turn: Turn | None = None,
) -> list[Row]:
    """Check every provider and time their training steps in turns; one row each.

    A turn takes two steps, of which the second is timed: count both against a GPU's budget.
    The memory of a step is measured on CUDA once the optimizer has its state and kernels are
    compiled; elsewhere, where a step takes long, of the first: its peak comes before the state.
    """
    device = next(model.parameters()).device

    def prepare(provider: Provider, row: Row) -> dict[str, measure.Task]:
        check(model, provider, case)
        contender = Contender(provider, model, case)
        with contender.running():
            row.figures["trainable_parameters"] = sum(p.numel() for p in contender.trained)
            if device.type == "cuda":
                contender.step()
            row.figures["peak_mib"] = measure.peak_mib(contender.step, device)
            if not math.isfinite(contender.loss.item()):
                raise WrongError("the loss is not finite")
        return {"step": measure.Task(contender.step_call, contender.running)}

    def finish(provider: Provider, row: Row, times: dict[str, dict[str, float]]) -> None:
        row.figures |= rates(times["step"], case, ceilings)

    return in_turns(
        asdict(case),
        providers,
        prepare,
        finish,
        device,
        turn=turn or Turn(),
        rounds=steps,
        timer=measure.stopwatch,
    )


def rates(timing: dict[str, float], case: StepCase, ceilings: dict[str, float]) -> dict[str, Any]:
    """Tokens per second and utilisation of a step's times."""
    tokens = case.batch * case.sequence * case.accumulate
    rate = tokens / timing["median"] * 1e3
    tflop_s = rate * flop_per_token(MODELS[case.model], case.blocks, case.sequence) / 1e12
    return {
        "step_ms": timing,
        "tokens_per_s": rate,
        "tflop_s": tflop_s,
        "mfu_measured": tflop_s / ceilings["gemm_tflop_s"],
    }


def run(options: argparse.Namespace) -> Result:
    """Everything the command line asked for; finished cases are kept whatever happens."""
    session = Session("model", options, {"steps": options.steps})
    providers = choose(for_models(session.dtype), options.providers)
    device, built = session.device, dict[tuple[str, int], nn.Module]()

    def rows_of(values: dict[str, Any], turn: Turn) -> list[Row]:
        case = StepCase(**values)
        torch.manual_seed(options.seed)
        key = (case.model, case.blocks)
        if key not in built:
            turn.say(f"building {case.model}")
            built.clear()
            collect(device)
            shape = MODELS[case.model]
            built[key] = random_model(shape, case.blocks, device, session.dtype, case.sequence)
        set_checkpointing(built[key], case.checkpointing)
        ceilings = session.result.ceilings
        return run_case(built[key], case, providers, ceilings, steps=options.steps, turn=turn)

    cases = model_preset(options.preset)[: options.cases]
    named = [(asdict(case), f"{case.model}, adapters on {case.targets}", 1.0) for case in cases]
    return session.run(named, providers, rows_of)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    flags = parser(__doc__ or "", PRESETS)
    flags.add_argument("--cases", type=int, help="only the preset's first settings")
    flags.add_argument(
        "--steps", type=int, default=10, help="timed steps of each provider at most; default 10"
    )
    return command(flags, arguments, run, model_table)


if __name__ == "__main__":
    raise SystemExit(main())
