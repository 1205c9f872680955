"""`secura doctor`: versions, devices, and each op's implementation and error on this machine."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from secura._extras import how_to_install
from secura.cli.errors import UserError, one_line
from secura.cli.parser import Parser

ANCHOR_LIMIT = 1e-4
"""Largest share of what a core adds that anchoring it may move, in fp32."""

PACKAGES = {
    "secura": "",
    "torch": "",
    "triton": "",
    "numpy": "",
    "safetensors": "",
    "transformers": "train",
    "peft": "train",
    "trl": "train",
    "accelerate": "train",
    "datasets": "train",
    "bitsandbytes": "quant",
}


def make_parser() -> Parser:
    """The flags of `secura doctor`."""
    parser = Parser(
        prog="secura doctor",
        description=__doc__,
        epilog="SECURA_IMPL=reference|triton|auto steers the choice. Needs torch and safetensors "
        "alone. The exit status is 1 where a check fails.",
    )
    parser.add_argument(
        "--kernels",
        nargs="*",
        action="extend",
        metavar="TARGET",
        help="instead: compile every kernel's default configuration, for sm_80, gfx942, … or all "
        "chips, and print registers, spills and shared memory; needs triton but no GPU",
    )
    parser.add_argument(
        "--layer",
        metavar="INxOUT",
        help="instead: count what a layer of these in_features and out_features takes in 16 bits, "
        "as JSON: each step's MiB, GFLOP and least time, and what it adds to the frozen layer",
    )
    layer = parser.add_argument_group("with --layer")
    layer.add_argument("--tokens", type=int, help="default 8192")
    layer.add_argument("--r", type=int, help="CUR rank, default 64")
    layer.add_argument("--norm", help="S-MagNorm's space, default weight")
    layer.add_argument(
        "--chip",
        help="h100 (default), h200, or its copy rate in TB/s and matrix rate in TFLOP/s: 3.0,798",
    )
    return parser


def settle(options: Namespace) -> None:
    """Fill in what `--layer` takes where nothing is given.

    Raises:
        UserError: it is given without `--layer`.
    """
    for name, usual in (("tokens", 8192), ("r", 64), ("norm", "weight"), ("chip", "h100")):
        if getattr(options, name) is None:
            setattr(options, name, usual)
        elif options.layer is None:
            raise UserError(f"--{name} goes with --layer: give the layer's sizes, or leave it out")


def main(argv: list[str]) -> int:
    """Print the findings; 1 if an op fails its check."""
    options = make_parser().parse_args(argv)
    settle(options)
    if options.kernels is not None:
        return print_kernels(options.kernels)
    if options.layer is not None:
        print(json.dumps(layer_plan(options), indent=1, ensure_ascii=False))
        return 0
    import torch

    print(f"Python {platform.python_version()}, {platform.platform()}")
    print_table(("package", "version", ""), versions())
    print_table(("device", "", ""), devices(torch))
    print(f"SECURA_IMPL={os.environ.get('SECURA_IMPL', 'auto')}\n")
    checks = run_checks(torch)
    print_table(
        ("op", "norm", "device", "dtype", "takes", "error", "limit", ""),
        [
            (
                check.op,
                check.norm,
                check.device,
                check.dtype,
                check.impl or "-",
                "-" if check.failure else f"{check.error:.1e}",
                f"{check.limit:.0e}",
                "ok" if check.passed else f"FAILED {check.failure}".rstrip(),
            )
            for check in checks
        ],
    )
    print("error: largest over output and gradients, relative to the fp64 oracle")
    for device, dtype, impl, reason in dict.fromkeys(
        (check.device, check.dtype, check.impl, check.reason) for check in checks
    ):
        print(f"{device} {dtype}: {impl or 'nothing'}, because {reason}")
    try:
        kept = anchor_error(torch)
        said = f"a core U and its κ L Ũ S differ by {kept:.1e} in a layer's output"
    except RuntimeError as error:
        kept, said = math.inf, one_line(error)
    print(f"\nanchor: {said}, {'ok' if kept < ANCHOR_LIMIT else 'FAILED'}")
    failed = sum(not check.passed for check in checks) + (not kept < ANCHOR_LIMIT)
    print(f"\n{len(checks) + 1 - failed} of {len(checks) + 1} checks passed")
    return 1 if failed else 0


def print_kernels(targets: list[str]) -> int:
    """Print what each kernel costs on each chip; 1 where a launch breaks a rule."""
    from secura_kernels.inspection.kernel_table import kernel_reports, kernel_table

    problems = []

    def reports() -> Iterator[Any]:
        for row in kernel_reports(targets or None):
            problems.extend(row.problems)
            yield row

    for line in kernel_table(reports()):
        print(line, flush=True)
    return 1 if problems else 0


def layer_plan(options: Namespace) -> dict[str, Any]:
    """What ``--layer`` takes: the choices made for it, its steps, and its time over the frozen's.

    Raises:
        UserError: for a shape, chip or norm that is none.
    """
    from secura_kernels import NormOptions, kept_weight, plan
    from secura_kernels.inspection.costs import choices, layer_costs, over_frozen
    from secura_kernels.norm import NORMS, complete

    sizes = re.fullmatch(r"(\d+)x(\d+)", options.layer)
    if sizes is None or min(options.tokens, options.r, *map(int, sizes.groups())) < 1:
        raise UserError(
            f"--layer {options.layer} --tokens {options.tokens} --r {options.r}: give sizes of 1 "
            "or more, the layer's as in_features and out_features, e.g. 4096x14336"
        )
    if options.norm not in NORMS:
        raise UserError(f"--norm {options.norm}: choose one of {', '.join(NORMS)}")
    rates = re.fullmatch(r"([\d.]+),([\d.]+)", options.chip)
    if rates is None and options.chip not in plan.CEILINGS:
        known = ", ".join(plan.CEILINGS)
        raise UserError(f"--chip {options.chip}: choose one of {known}, or give TB/s,TFLOP/s")
    chip = plan.CEILINGS.get(options.chip)
    if chip is None and rates is not None:
        chip = plan.Ceilings(float(rates[1]) * 1e12, float(rates[2]) * 1e12)
    assert chip is not None
    k, n = map(int, sizes.groups())
    if options.r > min(n, k):
        raise UserError(f"--r {options.r} must be at most {min(n, k)} on --layer {options.layer}")
    shape = plan.Shape(options.tokens, n, k, options.r)
    norm, kept = complete(NormOptions(options.norm)), kept_weight.keeps_weight()
    passes = dict(zip(("forward", "backward"), layer_costs(shape, norm, kept, chip), strict=True))
    return {
        "norm": options.norm,
        "shape": shape._asdict(),
        "chip": chip._asdict(),
        "choices": choices(shape, norm, kept, chip),
        **{
            name: {
                step: {
                    "mib": round(cost.bytes / 2**20, 2),
                    "gflop": round(cost.flop / 1e9, 2),
                    "us": round(cost.seconds(chip) * 1e6, 2),
                }
                for step, cost in steps.items()
            }
            for name, steps in passes.items()
        },
        "over_frozen": round(over_frozen(shape, norm, kept, chip), 3),
    }


def versions() -> list[tuple[str, str, str]]:
    """Each package's version, or how to get it."""
    rows = []
    for package, extra in PACKAGES.items():
        try:
            rows.append((package, importlib.metadata.version(package), ""))
        except importlib.metadata.PackageNotFoundError:
            hint = how_to_install(extra) if extra else ""
            rows.append((package, "-", hint))
    return rows


def devices(torch: Any) -> list[tuple[str, str, str]]:
    """Each device torch can use, its name, and what is worth knowing of it."""
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} CPUs"
    rows = [("cpu", platform.processor() or platform.machine(), threads)]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}"
        rows.append((f"cuda:{index}", found.name, memory))
    return rows


def run_checks(torch: Any) -> list[Any]:
    """The self-check on CUDA where there is a device, and on the CPU unless kernels are forced."""
    from secura_kernels.inspection.selfcheck import self_check

    cuda, checks = torch.cuda.is_available(), []
    if not (cuda and os.environ.get("SECURA_IMPL") == "triton"):
        checks += self_check("cpu", (torch.float32, torch.bfloat16))
    if cuda:
        checks += self_check("cuda", (torch.float32, torch.bfloat16, torch.float16))
    return checks


def anchor_error(torch: Any) -> float:
    """How far anchoring moves what a layer computes, relative to what its core adds."""
    from secura import AdapterConfig, SECURALinear, anchor

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(32, 24)
            self.layer = SECURALinear(torch.nn.Linear(24, 32), AdapterConfig(8, core="u"))

        def forward(self, input_ids: Any) -> Any:
            return SimpleNamespace(logits=self.layer(self.embed(input_ids)))

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model, ids = Model(), torch.arange(32)
        plain = model.layer.base(model.embed(ids))
        model.layer.trained.normal_()
        before = model(ids).logits
        anchor(model, [ids])
        gap = (model(ids).logits - before).norm() / (before - plain).norm()
    return float(gap)


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their widest cell, and an empty line after them."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print()


__all__ = ["ANCHOR_LIMIT", "anchor_error", "main"]
