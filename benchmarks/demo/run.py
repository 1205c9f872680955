"""SECURA and LoRA learn GSM8K side by side; table, picture, report, merged model.

output_dir/
  settings.json    what was asked for; a rerun with --resume must ask for the same
  plan.json        the steps settled on and the base model's answer
  cells/           the two training runs, as benchmarks.retention keeps them
  lora/, secura/   each method's adapter
  merged/          the SECURA adapter merged into a plain transformers checkpoint
  results.json     every figure; report.md and curves.png are made from it
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.asset_table import ASSETS
from benchmarks.board import Board
from benchmarks.demo import report
from benchmarks.demo.merge import ANSWER_TOKENS, merge_and_check
from benchmarks.files import write_text
from benchmarks.retention import data, record
from benchmarks.retention.build import build
from benchmarks.retention.cells import TARGETS, Cell, Settings
from benchmarks.retention.methods import get_method
from benchmarks.retention.record import Record
from benchmarks.retention.rows import batch_loss, pack
from benchmarks.retention.runner import Runner
from benchmarks.retention.score import write
from secura.cli.errors import UserError
from secura.cli.folders import check_output_folder
from secura.folders import complete_folder

METHODS = {"lora": ("lora", "LoRA r=8"), "secura": ("secura-weight-gated", "SECURA")}
FILES = ("settings.json", "plan.json", "results.json", "report.md", "curves.png")
FOLDERS = ("cells", "merged", *METHODS)
TASK, TEXT, TARGET = "gsm8k", "news", "qv"
MIN_STEPS, MAX_STEPS = 8, 40
_MERGE_SECONDS = 25
_PACKAGES = ("torch", "transformers", "peft", "gguf", "numpy", "safetensors")
_ASSETS = ("smollm2-135m", "gsm8k-train", "gsm8k-test", "xsum-test")


@dataclass(frozen=True)
class Asked:
    """What decides the demo's figures.

    Args:
        steps: optimizer steps of each method; None fits them into `max_seconds`.
        learning_rate: peak rate of SECURA.
        lora_learning_rate: peak rate of LoRA.
        max_seconds: what the whole run may take where `steps` is None.
        seed: of the batches' order and of the adapters' initial values.
        settings: of the model, the texts and their scoring.
    """

    steps: int | None = None
    learning_rate: float = 5e-4
    lora_learning_rate: float = 1e-3
    max_seconds: float = 220.0
    seed: int = 0
    settings: Settings = field(
        default_factory=lambda: Settings(
            texts=(TEXT,), probes=(), held_out=32, text_count=16, text_tokens=128
        )
    )

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UserError(f"--steps {self.steps} must be at least 1")
        for name in ("learning_rate", "lora_learning_rate", "max_seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} {getattr(self, name)} must be above 0")

    def cell(self, name: str, steps: int) -> Cell:
        """The training run of one of the two methods."""
        rate = self.lora_learning_rate if name == "lora" else self.learning_rate
        return Cell(METHODS[name][0], TARGET, rate, self.seed, (TASK,), steps)


def run(
    output_dir: Path, asked: Asked, *, overwrite: bool = False, resume: bool = False
) -> dict[str, Any]:
    """The whole demo; gives the content of `results.json`.

    Args:
        output_dir: filled as this module's docstring says.
        asked: what to train and score.
        overwrite: whether an earlier demo in the folder is removed first.
        resume: whether an earlier one is continued; what it finished is kept.

    Raises:
        UserError: the folder is not empty, or cannot be continued with these settings.
        AssetError: model or data could not be fetched.
    """
    _prepare(output_dir, asked, overwrite=overwrite, resume=resume)
    console, finished = Console(), output_dir / "results.json"
    if not finished.exists():
        with Board(console) as board:
            results = _measure(output_dir, asked, board)
        report.draw(results, output_dir / "curves.png")
        write_text(output_dir / "report.md", report.markdown(results, "curves.png"))
        _write(finished, results)
    results = _read(finished)
    table = Table(header_style="bold")
    for column in report.COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for row in report.table_rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(f"Report: {output_dir / 'report.md'}", highlight=False, soft_wrap=True)
    return results


def _measure(output_dir: Path, asked: Asked, board: Board) -> dict[str, Any]:
    began = time.perf_counter()
    runner = Runner(output_dir, "cells", asked.settings, torch.device("cpu"), False, board)
    runner.on_trained = _keeper(output_dir)
    material = runner.material
    example = data.load_task(TASK).held_out[0]
    plan_file = output_dir / "plan.json"
    if not plan_file.exists():
        board.begin("Scoring the base model, timing a step")
        _ = material.groups
        scoring = time.perf_counter() - began
        answer = write(material.base, [example.prompt], material.tokenizer, ANSWER_TOKENS)[0]
        steps = asked.steps or _steps(asked, runner, scoring, began)
        _write(plan_file, {"steps": steps, "dtype": "fp32", "answer": answer})
    plan = _read(plan_file)
    cells = {name: asked.cell(name, plan["steps"]) for name in METHODS}
    runner.run(list(cells.values()))
    records = {name: _record(output_dir, cell) for name, cell in cells.items()}
    board.begin("Reloading, merging, checking")
    merge = merge_and_check(
        material.fresh_model(),
        material.tokenizer,
        output_dir / "secura",
        output_dir / "merged",
        f"{example.prompt}{example.completion}",
        example.prompt,
    )
    board.end(f"Merged: logits differ by at most {merge['max_logit_difference']:.1e}")
    end = records["lora"].end
    settings = asdict(asked.settings) | {"seed": asked.seed, "target_modules": TARGETS[TARGET]}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.demo",
        "seconds": time.perf_counter() - began,
        "settings": settings,
        "plan": plan,
        "base": {
            "gsm8k": end.tasks[TASK].base_loss,
            "news": end.texts[TEXT].base_loss,
            "answer": plan["answer"],
        },
        "methods": {
            name: _figures(found, METHODS[name][1], output_dir / name)
            for name, found in records.items()
        },
        "merge": merge,
        "question": {"prompt": example.prompt, "answer": example.completion.strip()},
        "assets": [
            asdict(ASSETS[name]) | {"description": ASSETS[name].describe()} for name in _ASSETS
        ],
        "versions": machine.package_versions(_PACKAGES),
        "hardware": machine.describe(torch.device("cpu")),
    }


def _keeper(output_dir: Path) -> Callable[[Cell, Any], None]:
    """Saves each trained adapter in a folder of its own."""
    names = {method: name for name, (method, _) in METHODS.items()}

    def keep(cell: Cell, model: Any) -> None:
        folder = output_dir / names[cell.method]
        shutil.rmtree(folder, ignore_errors=True)
        with complete_folder(folder) as made:
            model.save_pretrained(made, save_embedding_layers=False)

    return keep


def _steps(asked: Asked, runner: Runner, scoring: float, began: float) -> int:
    """As many steps as fit: one of middling length is timed, after one to warm up."""
    material = runner.material
    cell = asked.cell("secura", MIN_STEPS)
    model, _ = build(cell, get_method(cell.method), material, {})
    batches = sorted(
        material.batches(TASK, asked.seed, MIN_STEPS), key=lambda rows: rows[-1].length
    )
    for _ in range(2):
        start = time.perf_counter()
        batch_loss(model, pack(batches[MIN_STEPS // 2], material.device)).backward()
        a_step = time.perf_counter() - start
    left = asked.max_seconds - (time.perf_counter() - began) - 4 * scoring - _MERGE_SECONDS
    return max(MIN_STEPS, min(MAX_STEPS, int(left / (2 * a_step))))


def _figures(found: Record, title: str, folder: Path) -> dict[str, Any]:
    """A method's entry in the results."""
    base, news = found.end.tasks[TASK].base_loss, found.end.texts[TEXT].base_loss
    ways = [m for m in found.measures if m.part and m.step < found.end.step]
    method = get_method(found.cell.method)
    fields = {"rank": method.rank or "default", **method.config}
    return {
        "title": title,
        "learning_rate": found.cell.rate,
        "about": f"learning rate {found.cell.rate:g}; "
        + ", ".join(f"{name} {value}" for name, value in fields.items()),
        "trainable_parameters": found.trained,
        "adapter_bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "seconds_per_step": found.seconds["training"] / found.cell.steps,
        "seconds": found.seconds["total"],
        "train_losses": found.losses,
        "evaluations": [
            {
                "step": measure.step,
                "gsm8k": base - measure.tasks[TASK].learned,
                "news": news + measure.texts[TEXT].rise,
            }
            for measure in (*ways, found.end)
        ],
    }


def _record(output_dir: Path, cell: Cell) -> Record:
    found = record.read(output_dir / "cells" / cell.path)
    if found is None or found.status == "failed":
        raise UserError(f"{cell.title}: {found.error if found else 'another process is at it'}")
    return found


def _prepare(output_dir: Path, asked: Asked, *, overwrite: bool, resume: bool) -> None:
    """Makes `output_dir` ready, or raises `UserError` and leaves it as it is."""
    if overwrite and resume:
        raise UserError("--overwrite_output_dir and --resume exclude each other")
    known, wanted = output_dir / "settings.json", json.loads(json.dumps(asdict(asked)))
    if resume and known.exists():
        begun = _read(known)
        if differing := sorted(key for key in wanted if begun.get(key) != wanted[key]):
            raise UserError(
                f"{output_dir} was begun with another {', '.join(differing)}; ask for the same to "
                "continue, or begin again with --overwrite_output_dir"
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
    _write(known, wanted)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{path} is missing or damaged; begin again with --overwrite_output_dir"
        ) from error


def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1))


__all__ = ["FILES", "FOLDERS", "METHODS", "Asked", "run"]
