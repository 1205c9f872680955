"""Run cells of the retention experiment, or report on what was run.

    python -m benchmarks.retention run screen --out benchmarks/results/retention
    python -m benchmarks.retention run try --out DIR --methods lora,core-u --rates 1e-3 --steps 8

A stage's name is followed by nothing where its cells are those that were decided on (see grid.py),
or by --methods, --targets, --rates, --seeds, --tasks and --steps, whose product it then is. A run
that was stopped goes on where it stopped; several may work at one folder at the same time.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from benchmarks.assets import ASSETS
from benchmarks.board import Board
from benchmarks.retention.cells import TARGETS, Cell, Settings
from benchmarks.retention.data import TASKS
from benchmarks.retention.grid import STAGES
from benchmarks.retention.methods import METHODS, get_method
from benchmarks.retention.report import write_report
from benchmarks.retention.runner import Runner


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 where cells failed, 2 where it cannot be done as asked."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    flags = parser.parse_args(words)
    try:
        return flags.command(flags, words)
    except UsageError as error:
        parser.error(str(error))


class UsageError(Exception):
    """What was asked for is not there; the message says what is."""


def run(flags: argparse.Namespace, words: list[str]) -> int:
    """Computes the cells of a stage."""
    if flags.assets:
        os.environ["SECURA_CACHE"] = str(Path(flags.assets).expanduser())
    try:
        settings, cells = stage(flags)
    except (TypeError, ValueError) as error:
        raise UsageError(error) from error
    if flags.list:
        print("\n".join(cell.title for cell in cells))
        return 0
    if flags.jobs > 1:
        return _run_side_by_side(flags.jobs, words)
    if flags.threads < 1:
        raise UsageError(f"--threads {flags.threads} must be 1 or more")
    if Path(flags.out).is_file():
        raise UsageError(f"--out {flags.out} is a file: name a folder")
    torch.set_num_threads(flags.threads)
    torch.set_float32_matmul_precision("high")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        device = torch.device(flags.device)
    except RuntimeError as error:
        raise UsageError(f"--device {flags.device}: torch knows no such device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {flags.device}: torch sees no CUDA device")
    dtype = flags.dtype or ("bf16" if device.type == "cuda" else "fp32")
    deadline = time.perf_counter() + flags.budget_s if flags.budget_s else float("inf")
    with Board(Console(stderr=True)) as board:
        runner = Runner(
            Path(flags.out),
            flags.stage,
            settings,
            device,
            dtype == "bf16",
            board,
            deadline,
            flags.retry,
        )
        try:
            runner.run(cells)
        except ValueError as error:
            raise UsageError(error) from error
        board.end(", ".join(f"{count} {what}" for what, count in runner.counts.items()))
    return 1 if runner.counts["failed"] else 0


def report(flags: argparse.Namespace, words: list[str]) -> int:
    """Writes the report of what was run."""
    try:
        print(write_report(Path(flags.out)))
    except ValueError as error:
        raise UsageError(error) from error
    return 0


def stage(flags: argparse.Namespace) -> tuple[Settings, list[Cell]]:
    """The settings and cells that the command line asks for."""
    changed = dict(map(_setting, flags.set))
    if not flags.methods:
        if given := [name for name in _OF_A_CELL if getattr(flags, name) is not None]:
            raise ValueError(
                f"--{given[0]} goes with --methods: without it a stage's cells are run as they "
                "were decided"
            )
        if flags.stage not in STAGES:
            raise ValueError(
                f"stage {flags.stage!r} is none of {', '.join(STAGES)}: give its cells, from "
                "--methods to --steps"
            )
        known = STAGES[flags.stage]
        return _checked(dataclasses.replace(known.settings, **changed)), list(known.cells)
    for name, usual in _OF_A_CELL.items():
        if getattr(flags, name) is None:
            setattr(flags, name, usual)
    if wrong := [rate for rate in flags.rates if not 0 < rate < math.inf]:
        raise ValueError(f"--rates {wrong[0]} must be above 0 and finite")
    if flags.steps < 1:
        raise ValueError(f"--steps {flags.steps} must be 1 or more")
    shared = STAGES[flags.stage].settings if flags.stage in STAGES else Settings()
    settings = _checked(dataclasses.replace(shared, **{"tasks": tuple(flags.tasks)} | changed))
    for name, wanted, there in (
        ("task", flags.tasks, list(TASKS)),
        ("place", flags.targets, list(TARGETS)),
    ):
        if unknown := [word for word in wanted if word not in there]:
            raise ValueError(f"unknown {name} {unknown[0]!r}: choose from {', '.join(there)}")
    for method, targets in product(flags.methods, flags.targets):
        get_method(method).make_config(targets, 0)  # its errors name a wrong variation
    points = product(flags.seeds, flags.targets, flags.methods, flags.rates)
    cells = [
        Cell(get_method(method).name, targets, rate, seed, tuple(flags.tasks[:count]), flags.steps)
        for seed, targets, method, rate in points
        for count in range(1, len(flags.tasks) + 1)
    ]
    return settings, cells


_OF_A_CELL: dict[str, Any] = {
    "targets": ["qv"],
    "rates": [1e-3],
    "seeds": [0],
    "tasks": ["gsm8k"],
    "steps": 128,
}
"""Flags of cells that the command line makes, and what they are unless given."""


def _checked(settings: Settings) -> Settings:
    if settings.model not in ASSETS and not Path(settings.model).expanduser().is_dir():
        models = ", ".join(name for name, asset in ASSETS.items() if asset.kind == "model")
        raise ValueError(f"model {settings.model!r} is no folder, and none of {models}")
    return settings


def _run_side_by_side(jobs: int, words: list[str]) -> int:
    command = [sys.executable, "-m", "benchmarks.retention", *words, "--jobs", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    workers = [subprocess.Popen(command, env=environment) for _ in range(jobs)]
    return max(worker.wait() for worker in workers)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="compute cells")
    one.set_defaults(command=run)
    one.add_argument("stage", help="name of the stage, and of its folder in --out")
    one.add_argument("--out", required=True, help="folder of all stages' results")
    one.add_argument("--methods", type=_words, default=[], help=", ".join(METHODS))
    one.add_argument("--targets", type=_words, help=f"{', '.join(TARGETS)} [qv]")
    one.add_argument("--rates", type=_floats, help="[1e-3]")
    one.add_argument("--seeds", type=_integers, help="[0]")
    one.add_argument("--tasks", type=_words, help="learned one after another [gsm8k]")
    one.add_argument("--steps", type=int, help="of each task [128]")
    one.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="NAME=VALUE", help="other settings"
    )
    one.add_argument("--list", action="store_true", help="print the cells and stop")
    one.add_argument("--jobs", type=int, default=1, help="processes side by side")
    one.add_argument("--threads", type=int, default=1, help="of a process")
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    one.add_argument("--dtype", choices=("fp32", "bf16"), help="[bf16 on a GPU, else fp32]")
    one.add_argument("--assets", metavar="DIR", help="folder of models and data (SECURA_CACHE)")
    one.add_argument("--budget_s", type=float, help="start no cell that would end later")
    one.add_argument("--retry", action="store_true", help="try failed cells again")
    two = commands.add_parser("report", help="write report.md and its pictures from the results")
    two.set_defaults(command=report)
    two.add_argument("--out", required=True, help="folder of all stages' results")
    return parser


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    kinds = dataclasses.asdict(Settings())
    if name not in kinds:
        raise ValueError(f"--set {text}: the settings are {', '.join(kinds)}")
    kind: Any = type(kinds[name])
    try:
        return name, tuple(_words(value)) if kind is tuple else kind(value)
    except ValueError as error:
        raise ValueError(f"--set {text}: {name} takes {kind.__name__}") from error


def _words(text: str) -> list[str]:
    """Names between commas; those of a method's variations belong to it."""
    words: list[str] = []
    for word in text.split(","):
        if "=" in word and "@" not in word and words:
            words[-1] += f",{word}"
        elif word:
            words.append(word)
    return words


def _floats(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
