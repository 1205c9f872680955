"""Time and peak memory to wrap every linear layer of a model, against an SVD initialisation.

    python -m benchmarks.startup --preset quick --out benchmarks/results/startup-cpu.json

``secura`` takes A as a slice of W; ``svd init`` computes the same A as the released code does,
from each layer's whole SVD. The SVD is timed on one layer of each shape and multiplied by how many
there are, unless ``--every_svd``; a note says so. Both must agree on A before they are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from secura_kernels import init_a

from . import console, measure
from .machine import new_result
from .oracle import relative_error
from .providers import MissingError, Provider, Ranks, catalogue, choose, frozen_linear, secura
from .schema import SPENT, Recorder, Row
from .shapes import MODELS


@dataclass(frozen=True)
class StartupCase:
    """A model, or its first blocks."""

    model: str
    blocks: int
    m: int = 128
    r: int = 16


def startup_preset(name: str) -> StartupCase:
    """``quick`` is all of SmolLM2-135M's shape, else a whole model by name."""
    if name == "quick":
        return StartupCase("smollm2-135m", MODELS["smollm2-135m"].layers)
    return StartupCase(name, MODELS[name].layers)


def linears(case: StartupCase, device: torch.device, dtype: torch.dtype) -> list[nn.Linear]:
    """Every frozen linear layer of the model's blocks, random weights."""
    layers = []
    for _ in range(case.blocks):
        for part in MODELS[case.model].projections():
            for _ in range(part.per_block):
                weight = torch.randn(part.n, part.k, device=device, dtype=dtype)
                layers.append(frozen_linear(weight.mul_(part.k**-0.5)))
    return layers


def svd_init(weight: Tensor, m: int, r: int) -> Tensor:
    """``A [m, r] = U[:m] Σ V[:r]ᵀ`` of ``W = U Σ Vᵀ``, as the released code starts."""
    u, sigma, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return (u[:m] * sigma) @ vh[:, :r]


def inner_rank(layer: nn.Linear, m: int) -> int:
    """SECURA's default."""
    return min(2 * m, layer.in_features)


def wrap(provider: Provider, layers: list[nn.Linear], ranks: Ranks) -> list[nn.Module]:
    """The provider's layers on all of them."""
    return [provider.build(layer, ranks) for layer in layers]


def one_of_each(layers: list[nn.Linear]) -> Iterator[tuple[nn.Linear, int]]:
    """A layer of every shape and how many of that shape there are."""
    shapes = [layer.weight.shape for layer in layers]
    for shape in dict.fromkeys(shapes):
        yield layers[shapes.index(shape)], shapes.count(shape)


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """``(seconds, peak MiB)`` of a call, which is made once for each."""
    (time_ms,) = measure.stopwatch(call, device)
    return time_ms / 1e3, measure.peak_mib(call, device)


def svd_row(
    case: StartupCase, layers: list[nn.Linear], device: torch.device, *, every: bool
) -> Row:
    """The cost of starting from SVDs; ``wrong`` where they disagree with the slice."""
    row = Row(asdict(case), "svd init")
    seconds, peaks = 0.0, list[float]()
    chosen = [(layer, 1) for layer in layers] if every else list(one_of_each(layers))
    for layer, count in chosen:
        inner = inner_rank(layer, case.m)
        found: list[Tensor] = []
        call = _svd_call(layer, case.m, inner, found)
        took, peak = timed(call, device)
        error = relative_error(found[0], init_a(layer.weight, case.m, inner).double())
        if not error < 1e-3:
            row.status, row.note = "wrong", f"A differs from the slice of W by {error:.1e}"
            return row
        seconds += took * count
        peaks.append(peak)
    row.figures = {
        "seconds": seconds,
        "peak_mib": max(peaks),
    }
    if not every:
        row.note = "one layer of each shape, times their number"
    return row


def _svd_call(layer: nn.Linear, m: int, r: int, found: list[Tensor]) -> Callable[[], None]:
    return lambda: found.append(svd_init(layer.weight, m, r))


def run(options: argparse.Namespace) -> Recorder:
    """Everything the command line asked for."""
    device, dtype = console.device_and_dtype(options)
    case = startup_preset(options.preset)
    settings = {"preset": options.preset, "seed": options.seed, "every_svd": options.every_svd}
    result = new_result(
        "startup", options.preset, device, dtype, settings, commit_name=options.commit
    )
    recorder = Recorder(result, options.out)
    clock = console.Clock(options.max_seconds, device)
    torch.manual_seed(options.seed)
    layers = linears(case, device, dtype)
    rivals = [entry for entry in catalogue(dtype, dropout=False) if entry.name.startswith("peft")]
    spaces = ("none", "channel", "activation", "weight")
    providers = [secura(space, "auto", f"secura {space}") for space in spaces]
    providers = choose([*providers, *rivals], options.providers)
    progress = console.Progress(len(providers) + 1)
    for provider in providers:
        recorder.add([_provider_row(case, provider, layers, device, clock)])
        progress.step(provider.name)
    if clock.left <= 0:
        recorder.add([Row(asdict(case), "svd init", "skipped", SPENT)])
    else:
        recorder.add([svd_row(case, layers, device, every=options.every_svd)])
    progress.step("svd init")
    recorder.close()
    return recorder


def _provider_row(
    case: StartupCase,
    provider: Provider,
    layers: list[nn.Linear],
    device: torch.device,
    clock: console.Clock,
) -> Row:
    row = Row(asdict(case), provider.name)
    if clock.left <= 0:
        row.status, row.note = "skipped", SPENT
        return row
    try:
        ranks = Ranks(case.m, case.r)
        wrap(provider, layers[:1], ranks)
        seconds, peak = timed(lambda: wrap(provider, layers, ranks), device)
        row.figures = {"seconds": seconds, "peak_mib": peak, "layers": len(layers)}
    except MissingError as error:
        row.status, row.note = "missing", str(error)
    except Exception as error:  # a rival's failure must not end the run
        row.status, row.note = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = console.parser(__doc__ or "", ("quick", *MODELS))
    parser.add_argument("--every_svd", action="store_true", help="compute every layer's SVD")
    options = parser.parse_args(arguments)
    from .report import startup_table

    try:
        recorder = run(options)
    except ValueError as error:
        parser.error(str(error))
    print(startup_table(recorder.result, "startup"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
