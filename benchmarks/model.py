"""Whole training steps: forward, backward and AdamW, in tokens per second and peak memory.

    python -m benchmarks.model --preset llama3-8b --out benchmarks/results/model-h200.json

The model has the published dimensions and random weights, the tokens are random, the attention is
torch's. Each provider is first checked on one layer of the model against fp64, and its loss must be
finite; then the providers' layers are put into the same model in turns, a step each.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from . import console, measure, oracle
from .machine import new_result
from .providers import Provider, Ranks, catalogue, choose, excuse, frozen_linear, secura
from .schema import SPENT, Recorder, Row
from .shapes import MODELS
from .training import adapted, flop_per_token, random_model, target_layers

DATASHEET_TFLOP_S = {"NVIDIA H200": 989.5, "NVIDIA H100": 989.5, "NVIDIA A100": 312.0}
"""Dense bf16, by the vendor's datasheets, as published MFU figures use."""

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
    m: int = 128
    r: int = 16


def model_preset(name: str) -> list[StepCase]:
    """The cases of a preset, the most important first.

    ``quick`` is six blocks of SmolLM2-135M's shape and short sequences, for a CPU. A model's name:
    all linears at sequence 4096 × 2 (the published NeMo Automodel setting), then checkpointing,
    adapters on q and v, accumulation. ``full`` is every such model. ``block`` is what a quarter of
    an hour and 78 GiB allow: 8 blocks of Llama-3-8B, all linears, without and with checkpointing,
    and with short sequences.
    """
    if name == "quick":
        return [StepCase("smollm2-135m", 6, targets, 128, 1, m=32) for targets in ("all", "q,v")]
    if name == "block":
        eight = StepCase("llama3-8b", 8, "all", 4096, 2)
        return [
            eight,
            replace(eight, checkpointing=True),
            replace(eight, checkpointing=True, sequence=2048, batch=1),
        ]
    names = ("llama3-8b", "qwen2-7b", "qwen2-1.5b") if name == "full" else (name,)
    cases = []
    for model in names:
        first: dict[str, Any] = {
            "model": model,
            "blocks": MODELS[model].layers,
            "sequence": 4096,
            "batch": 2,
        }
        cases += [
            StepCase(**first, targets="all"),
            StepCase(**first, targets="all", checkpointing=True),
            StepCase(**first, targets="q,v"),
            StepCase(**first, targets="all", checkpointing=True, accumulate=4),
        ]
    return cases


def contenders(dtype: torch.dtype) -> list[Provider]:
    """SECURA as a user gets it (``impl="auto"``) in every space, then the others."""
    spaces = ("none", "channel", "activation", "weight")
    ours = [secura(space, "auto", f"secura {space}") for space in spaces]
    others = catalogue(dtype, dropout=False)
    return ours + [entry for entry in others if entry.family in ("lora", "dora", "released")]


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
        """What to time."""
        return self.step


def check(model: nn.Module, provider: Provider, case: StepCase) -> str | None:
    """What is wrong with the provider on one layer of this model, or None."""
    layer = next(iter(target_layers(model, case.targets).values()))
    weight, bias = layer.weight.detach(), layer.bias
    adapter = provider.build(frozen_linear(weight, bias), Ranks(case.m, case.r))
    oracle.randomise(adapter, weight)
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    x = torch.randn(CHECK_TOKENS, layer.in_features, **options)
    grad = torch.randn(CHECK_TOKENS, layer.out_features, **options)
    with provider.running():
        return oracle.wrong(oracle.errors(adapter, weight, bias, x, grad), weight.dtype)


def prepare(model: nn.Module, provider: Provider, case: StepCase) -> tuple[Row, Contender | None]:
    """A contender that has taken two steps and whose memory is known, or the row that says why not.

    The first step makes the optimizer's state; the second is measured.
    """
    row = Row(asdict(case), provider.name)
    try:
        if reason := check(model, provider, case):
            row.status, row.note = "wrong", f"against fp64: {reason}"
            return row, None
        contender = Contender(provider, model, case)
        with contender.running():
            contender.step()
            if not math.isfinite(contender.loss.item()):
                row.status, row.note = "wrong", "the loss is not finite"
                return row, None
            row.figures["peak_mib"] = measure.peak_mib(contender.step, contender.device)
        row.figures["trainable_parameters"] = sum(p.numel() for p in contender.trained)
        return row, contender
    except Exception as error:  # a rival's failure must not end the run
        row.status, row.note = excuse(error)
    row.figures = {}
    return row, None


def run_case(
    model: nn.Module,
    case: StepCase,
    providers: list[Provider],
    ceilings: dict[str, float],
    *,
    steps: int = 2,
    deadline: float = float("inf"),
    end: float = float("inf"),
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Check every provider and time their training steps in turns; one row each.

    No round begins after ``deadline`` but the first two, no provider is taken up after ``end``.
    """
    rows, tasks = [], {}
    device = next(model.parameters()).device
    for provider in providers:
        if time.monotonic() > end:
            rows.append(Row(asdict(case), provider.name, "skipped", SPENT))
            continue
        say(f"checking {provider.name}")
        row, contender = prepare(model, provider, case)
        rows.append(row)
        if contender is not None:
            tasks[provider.name] = measure.Task(contender.step_call, contender.running)
        collect(device)
    times, failures = measure.interleaved(
        tasks, device, timer=measure.stopwatch, rounds=steps, deadline=deadline, progress=say
    )
    for row in rows:
        if row.provider in failures:
            row.figures = {}
            row.status, row.note = excuse(failures[row.provider])
        elif row.status == "ok":
            row.figures |= figures(times[row.provider], case, ceilings, device)
    return rows


def figures(
    timing: dict[str, float], case: StepCase, ceilings: dict[str, float], device: torch.device
) -> dict[str, Any]:
    """Tokens per second and utilisation of a step's times."""
    tokens = case.batch * case.sequence * case.accumulate
    rate = tokens / timing["median"] * 1e3
    tflop_s = rate * flop_per_token(MODELS[case.model], case.blocks, case.sequence) / 1e12
    found: dict[str, Any] = {
        "step_ms": timing,
        "tokens_per_s": rate,
        "tflop_s": tflop_s,
        "mfu_measured": tflop_s / ceilings["gemm_tflop_s"],
    }
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((v for known, v in DATASHEET_TFLOP_S.items() if name.startswith(known)), None)
        if peak is not None:
            found["mfu_datasheet"] = tflop_s / peak
    return found


def collect(device: torch.device) -> None:
    """Give back what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run(options: argparse.Namespace) -> Recorder:
    """Everything the command line asked for; finished cases are kept whatever happens."""
    device, dtype = console.device_and_dtype(options)
    providers = choose(contenders(dtype), options.providers)
    settings = {"preset": options.preset, "seed": options.seed, "steps": options.steps}
    result = new_result(
        "model", options.preset, device, dtype, settings, commit_name=options.commit
    )
    recorder = Recorder(result, options.out, resume=options.resume)
    clock = console.Clock(options.max_seconds, device)
    measure.raise_ceilings(result.ceilings, device, dtype)
    finished = [row.case for row in result.rows]
    cases = model_preset(options.preset)[: options.cases]
    cases = [case for case in cases if asdict(case) not in finished]
    progress = console.Progress(len(cases))
    model, built = None, None
    for index, case in enumerate(cases):
        if clock.left <= 0:
            recorder.add(Row(asdict(case), entry.name, "skipped", SPENT) for entry in providers)
            continue
        torch.manual_seed(options.seed)
        if built != (case.model, case.blocks):
            progress.say(f"building {case.model}")
            model = None
            collect(device)
            model = random_model(MODELS[case.model], case.blocks, device, dtype, case.sequence)
            built = (case.model, case.blocks)
        assert model is not None
        set_checkpointing(model, case.checkpointing)
        recorder.add(
            run_case(
                model,
                case,
                providers,
                result.ceilings,
                steps=options.steps,
                deadline=clock.deadline([1.0] * (len(cases) - index)),
                end=clock.end,
                say=progress.say,
            )
        )
        progress.step(f"{case.model}, adapters on {case.targets}")
        collect(device)
    recorder.close()
    return recorder


def set_checkpointing(model: Any, on: bool) -> None:
    """Switch gradient checkpointing of the decoder blocks, the non-reentrant kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    presets = ("quick", "block", "llama3-8b", "qwen2-7b", "qwen2-1.5b", "full")
    parser = console.parser(__doc__ or "", presets)
    parser.add_argument("--cases", type=int, help="only the preset's first settings")
    parser.add_argument(
        "--steps", type=int, default=10, help="timed steps of each provider at most; default 10"
    )
    options = parser.parse_args(arguments)
    from .report import model_table

    try:
        recorder = run(options)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    print(model_table(recorder.result, "model"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
