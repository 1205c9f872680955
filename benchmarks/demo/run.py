"""SECURA and LoRA learn GSM8K side by side: a table, a picture, a report, a merged model.

    output_dir/
      settings.json    what was asked for; a rerun with --resume must ask for the same
      plan.json        the base model's figures, and the steps and precision settled on
      lora/, secura/   each method's adapter and its record.json
      merged/          the SECURA adapter merged into a plain transformers checkpoint
      results.json     every figure; report.md and curves.png are made from it

Each file and folder takes its name only when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.assets import get_asset
from benchmarks.demo.methods import METHODS
from benchmarks.demo.settings import DTYPES, PACKAGED, Settings, Sources
from secura._extras import require
from secura.cli.errors import Parser, UserError
from secura.cli.folders import check_output_folder

PICTURE = "curves.png"
FILES = ("settings.json", "plan.json", "results.json", "report.md", PICTURE)
FOLDERS = ("merged", *METHODS)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m benchmarks.demo`; what goes wrong is raised.

    Args:
        argv: the flags; None means the process's own.

    Returns:
        The exit status, 0.
    """
    flags = vars(_parser().parse_args(argv))
    output_dir = Path(flags.pop("output_dir")).expanduser()
    overwrite, resume = flags.pop("overwrite_output_dir"), flags.pop("resume")
    flags["target_modules"] = tuple(flags["target_modules"])
    run(output_dir, Settings(**flags), overwrite=overwrite, resume=resume)
    return 0


def run(
    output_dir: Path,
    settings: Settings,
    *,
    overwrite: bool = False,
    resume: bool = False,
    sources: Sources = PACKAGED,
) -> dict[str, Any]:
    """The whole demo.

    Args:
        output_dir: filled as this module's docstring says.
        settings: what to train and score.
        overwrite: whether an earlier demo in the folder is removed first.
        resume: whether an earlier demo with the same settings is continued; what it finished is
            kept.
        sources: model and texts.

    Returns:
        The content of `results.json`.

    Raises:
        UserError: the folder is not empty, or cannot be continued with these settings.
        AssetError: model or data could not be fetched.
    """
    console = require("rich.console", "bench").Console()
    _prepare_folder(output_dir, settings, overwrite=overwrite, resume=resume)
    from benchmarks.demo.report import terminal_table
    from benchmarks.demo.stages import read

    finished = output_dir / "results.json"
    if finished.exists():
        console.print(f"{output_dir} holds the finished results of these settings:")
    else:
        _measure(output_dir, settings, sources, console)
    results: dict[str, Any] = read(finished)
    merge = results["merge"]
    console.print(terminal_table(results))
    console.print(
        "Merged, and loaded by transformers alone: logits differ by at most "
        f"{merge['max_logit_difference']:.1e} (tolerance {merge['tolerance']:.0e})"
    )
    asked = results["question"]
    said = (
        ("Question", asked["question"]),
        ("Answer of the merged model", merge["answer"]),
        ("Answer of the data set", asked["answer"].rpartition("#### ")[2]),
    )
    for title, words in said:
        console.print(f"{title}: {words}", markup=False, highlight=False)
    console.print(f"Report: {output_dir / 'report.md'}", highlight=False, soft_wrap=True)
    return results


def _measure(output_dir: Path, settings: Settings, sources: Sources, console: Any) -> None:
    """Goes through the stages, then writes picture, report and, last, `results.json`."""
    import torch

    from benchmarks import machine
    from benchmarks.demo import plots, report, stages
    from benchmarks.demo.board import Board

    with _quiet(), Board(console) as board:
        board.stage("Fetching and loading model and data")
        for name in sources.assets:
            board.say(get_asset(name).describe())
        material = stages.load(settings, sources)
        fixed = 5 * material.evaluation_units + stages.ANSWER_UNITS + stages.MERGE_UNITS
        board.expect(fixed + 2 * (settings.steps or stages.MAX_STEPS))
        plan = stages.plan(output_dir / "plan.json", settings, material, board)
        board.expect(fixed + 2 * plan["steps"])
        methods = {
            name: stages.train_method(output_dir / name, settings, plan, material, method, board)
            for name, method in METHODS.items()
        }
        merge = stages.merge(output_dir, material, board)
    results = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(settings),
        "seconds": sum(part["seconds"] for part in (plan, merge, *methods.values())),
        "settings": asdict(settings),
        "plan": {key: plan[key] for key in ("steps", "dtype", "seconds")},
        "base": plan["base"],
        "methods": methods,
        "merge": merge,
        "question": material.question,
        "assets": [_asset(name) for name in sources.assets],
        "versions": machine.versions(report.PACKAGES),
        "hardware": machine.describe(torch.device("cpu")),
    }
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".picture-") as scratch:
        plots.draw(results, Path(scratch) / PICTURE)
        os.replace(Path(scratch) / PICTURE, output_dir / PICTURE)
    stages.write(output_dir / "report.md", report.markdown(results, PICTURE))
    stages.write(output_dir / "results.json", json.dumps(results, indent=1))


def _prepare_folder(output_dir: Path, settings: Settings, *, overwrite: bool, resume: bool) -> None:
    """Makes `output_dir` ready, or raises `UserError` and leaves it as it is."""
    from benchmarks.demo.stages import read, write

    if overwrite and resume:
        raise UserError("--overwrite_output_dir and --resume exclude each other")
    known = output_dir / "settings.json"
    wanted = json.loads(json.dumps(asdict(settings)))
    if resume and known.exists():
        begun = read(known)
        differing = sorted(key for key in wanted if begun.get(key) != wanted[key])
        if differing:
            told = ", ".join(f"--{key} {begun.get(key)}, not {wanted[key]}" for key in differing)
            raise UserError(
                f"{output_dir} was begun with {told}; ask for the same to continue, or begin "
                "again with --overwrite_output_dir"
            )
        return
    if overwrite and output_dir.is_dir():
        for name in FOLDERS:
            shutil.rmtree(output_dir / name, ignore_errors=True)
        for name in FILES:
            (output_dir / name).unlink(missing_ok=True)
    else:
        check_output_folder(
            output_dir,
            hint="continue a stopped demo with --resume, begin again with --overwrite_output_dir, "
            "or choose another --output_dir",
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    write(known, json.dumps(wanted, indent=1))


def _asset(name: str) -> dict[str, str]:
    asset = get_asset(name)
    return {
        "name": name,
        "title": asset.title,
        "note": asset.note,
        "licence": asset.licence,
        "sha256": asset.sha256,
        "description": asset.describe(),
    }


def _command(settings: Settings) -> str:
    """The command that repeats a run with these settings."""
    words = ["python -m benchmarks.demo"]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            shown = " ".join(value) if isinstance(value, tuple) else value
            words.append(f"--{field.name} {shown}")
    return " ".join(words)


@contextmanager
def _quiet() -> Iterator[None]:
    """No other progress bars and no warnings of libraries beside the board's bar."""
    logging = require("transformers.utils.logging", "bench")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _parser() -> Parser:
    usual = Settings()
    parser = Parser(
        prog="python -m benchmarks.demo",
        description="SECURA and LoRA learn GSM8K side by side on this machine's CPU: a table, a "
        "picture, a report, and a merged model.",
    )
    add = parser.add_argument
    add("--output_dir", default="secura-demo", help="where everything is written (%(default)s)")
    add("--overwrite_output_dir", action="store_true", help="remove an earlier demo there first")
    add("--resume", action="store_true", help="continue a stopped demo with the same settings")
    add("--steps", type=int, help="steps of each method (as many as --max_seconds allow)")
    add(
        "--max_seconds", type=float, default=usual.max_seconds, help="without --steps (%(default)s)"
    )
    add("--batch_size", type=int, default=usual.batch_size, help="problems a step (%(default)s)")
    rates = "peak learning rate of %s (%%(default)s)"
    add("--learning_rate", type=float, default=usual.learning_rate, help=rates % "SECURA")
    add("--lora_learning_rate", type=float, default=usual.lora_learning_rate, help=rates % "LoRA")
    modules = " ".join(usual.target_modules)
    add("--target_modules", nargs="+", default=usual.target_modules, help=f"layers ({modules})")
    add("--max_tokens", type=int, default=usual.max_tokens, help="of a problem (%(default)s)")
    scored = "%s scored (%%(default)s)"
    add("--eval_examples", type=int, default=usual.eval_examples, help=scored % "test problems")
    add("--news_articles", type=int, default=usual.news_articles, help=scored % "articles")
    add("--news_tokens", type=int, default=usual.news_tokens, help=scored % "tokens an article")
    add("--dtype", choices=DTYPES, default=usual.dtype, help="precision (%(default)s)")
    add("--seed", type=int, default=usual.seed, help="random seed (%(default)s)")
    return parser
