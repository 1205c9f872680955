"""Run the knowledge-retention experiments, or report on what was run.

exp0 singular values, exp2 one task each, exp3 gradients, exp4 knowledge kept after one task, exp5
tasks in sequence; `report` makes report.md and its pictures from the results in --out alone.
Experiments share their cells, so that any number of them given together cost little more than the
longest. A run that was stopped goes on where it stopped when it is given again; several may work at
one --out at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from secura._extras import require
from secura.cli.docstrings import docstring_entries
from secura.cli.errors import Parser, UserError
from secura.experiments.grid import (
    BASE_CELL,
    EXPERIMENTS,
    Cell,
    Experiment,
    cells,
    rate_search,
    split,
)
from secura.experiments.methods import METHODS, get_methods
from secura.experiments.presets import PRESETS, Settings

REPORT = "report"
RATES = ("one", "own", "both", "all")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `secura experiment`.

    Returns:
        0, or 1 where cells failed.
    """
    flags = vars(_parser().parse_args(argv))
    names = list(dict.fromkeys(flags.pop("experiments")))
    out = Path(flags.pop("out")).expanduser()
    if REPORT in names:
        if len(names) > 1:
            raise UserError("'report' stands alone: first run the experiments, then report on them")
        return _report(out)
    settings, seeds = PRESETS[flags.pop("preset")]
    seeds = flags.pop("seeds") or seeds
    methods = [method.name for method in get_methods(flags.pop("methods") or list(METHODS))]
    control = {name: flags.pop(name) for name in ("rates", "shard", "retry_failed")}
    given = {name: value for name, value in flags.items() if value is not None}
    settings = replace(settings, **given)
    chosen = [EXPERIMENTS[name] for name in names]
    return _run(out, chosen, settings, methods, seeds, **control)


def _run(
    out: Path,
    experiments: list[Experiment],
    settings: Settings,
    methods: list[str],
    seeds: tuple[int, ...],
    *,
    rates: str | None,
    shard: tuple[int, int],
    retry_failed: bool,
) -> int:
    from rich.console import Console

    from secura.experiments.board import Board
    from secura.experiments.material import Material
    from secura.experiments.run import Runner, best_rates
    from secura.experiments.store import Store
    from secura.experiments.team import Team

    own_rate = any(experiment.own_rate for experiment in experiments)
    if rates not in (None, "one") and not own_rate:
        raise UserError(f"--rates {rates} is for exp4, which none of the experiments given is")
    rates = rates or ("both" if own_rate else "one")
    team = Team()
    material = Material(settings, team.size)
    material.check()
    logging = require("transformers", "experiments").utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    console = Console(stderr=True, quiet=not team.is_main)
    if team.is_main:
        store = Store(out, settings)
    team.wait()
    if not team.is_main:
        store = Store(out, settings)
    with Board(console) as board:
        runner = Runner(store, material, board, team, retry_failed=retry_failed)
        if rates != "own":
            grid = cells(experiments, methods, settings.tasks, seeds, settings.learning_rate)
            runner.run(split(grid, *shard))
        if rates != "one":
            task = settings.tasks[0]
            search, *others = (
                split([BASE_CELL, *rate_search(methods, task, seed)], *shard) for seed in seeds
            )
            runner.run(search)
            if rates == "all":
                runner.run([cell for part in others for cell in part])
            best = team.agree(best_rates(store, search[1:]))
            own = [Cell(s, (task,), method, best[method]) for s in seeds for method in best]
            runner.run(own)
    outcome = runner.outcome
    if team.is_main:
        console.print(outcome.describe(out), highlight=False, soft_wrap=True)
    return 1 if outcome.failed else 0


def _report(out: Path) -> int:
    from secura.experiments.report import write_report
    from secura.experiments.store import read_records

    path = write_report(read_records(out), out, list(EXPERIMENTS))
    print(f"Report: {path}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="secura experiment",
        usage="secura experiment {exp0,exp2,exp3,exp4,exp5,report} ... --out DIR [flags]",
        description=__doc__,
    )
    parser.add_argument(
        "experiments", nargs="+", choices=[*EXPERIMENTS, REPORT], metavar="EXPERIMENT"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="Folder of the results.")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="Size of it. [small]")
    parser.add_argument(
        "--methods",
        type=_names,
        help=f"Of {', '.join(METHODS)} [all], or forms: SECURA in every other form of the norm.",
    )
    parser.add_argument("--seeds", type=_seeds, metavar="N,N", help="Seeds. [the preset's]")
    parser.add_argument(
        "--rates",
        choices=RATES,
        help="The one rate for all methods, each method's own best (of its grid, on the first "
        "seed), both, or all of its grid on every seed. [both in exp4]",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="Only the I-th part of N, from 0, for several machines; copy their folders together.",
    )
    parser.add_argument("--retry_failed", action="store_true", help="Try failed cells again.")
    group = parser.add_argument_group("settings", "Each has a value in every preset.")
    texts = docstring_entries(Settings.__doc__ or "")
    for field in fields(Settings):
        kind: Any = {"int": int, "int | None": int, "float": float, "str": str}.get(
            str(field.type), _names
        )
        group.add_argument(f"--{field.name}", type=kind, metavar="X", help=texts[field.name])
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(seed) for seed in _names(text))
    except ValueError as error:
        raise UserError(f"--seeds {text}: wanted integers, such as 0,1,2") from error
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: each seed may stand there once, a repeat adds nothing")
    if not seeds or min(seeds) < 0:
        raise UserError(f"--seeds {text}: wanted integers from 0, such as 0,1,2")
    return seeds


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard {text}: wanted I/N with I from 0 to N-1, such as 0/2")
    return int(index), int(count)
