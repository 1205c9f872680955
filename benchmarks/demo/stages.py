"""The demo's stages: load, score the base, train a method, merge. Each keeps what it finished."""

from __future__ import annotations

import copy
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo import serve
from benchmarks.demo.board import Board
from benchmarks.demo.methods import METHODS, Method, describe_config
from benchmarks.demo.settings import MODEL, Settings, Sources
from benchmarks.demo.text import (
    Batch,
    Example,
    answer_examples,
    fixed_batches,
    news_examples,
    training_batches,
)
from benchmarks.demo.train import evaluate, native_bf16, train
from secura._extras import require
from secura.cli.errors import UserError
from secura.cli.folders import ADAPTER_WEIGHTS, complete_folder

MAX_STEPS, MIN_STEPS = 40, 8
EVAL_BATCH = 8
ANSWER_UNITS, MERGE_UNITS = 6, 15
SERVE_SECONDS = 25
MERGED_BYTES_A_PARAMETER = 5
RECORD = "record.json"


@dataclass(frozen=True)
class Material:
    """The base model and the tokenised texts."""

    base: Any
    tokenizer: Any
    train: list[Example]
    gsm8k: list[Batch]
    news: list[Batch]
    example: Example
    question: dict[str, str]

    @property
    def evaluation_units(self) -> int:
        """Batches of one evaluation."""
        return len(self.gsm8k) + len(self.news)

    def training_batches(self, settings: Settings, steps: int) -> list[Batch]:
        """The batches every method sees, in their order."""
        pad = self.tokenizer.pad_token_id
        return training_batches(self.train, settings.batch_size, steps, pad, settings.seed)


def load(settings: Settings, sources: Sources) -> Material:
    """Fetches and tokenises everything; the question is the first test problem."""
    train_rows, test_rows, articles = sources.train_rows(), sources.test_rows(), sources.news()
    base, tokenizer = sources.load_model()
    examples = answer_examples(train_rows, tokenizer, settings.max_tokens)
    held_out = answer_examples(test_rows, tokenizer, settings.max_tokens)
    news = news_examples(articles, tokenizer, settings.news_tokens)
    _need(examples, settings.batch_size, "training problems", "batch_size")
    _need(held_out, settings.eval_examples, "test problems", "eval_examples")
    _need(news, settings.news_articles, "news articles", "news_articles")
    held_out, news = held_out[: settings.eval_examples], news[: settings.news_articles]
    return Material(
        base=base,
        tokenizer=tokenizer,
        train=examples,
        gsm8k=fixed_batches(held_out, EVAL_BATCH, tokenizer.pad_token_id),
        news=fixed_batches(news, EVAL_BATCH, tokenizer.pad_token_id),
        example=held_out[0],
        question=test_rows[0],
    )


def plan(path: Path, settings: Settings, material: Material, board: Board) -> dict[str, Any]:
    """The base model's figures, and how many steps in which precision; kept in `path`."""
    if path.exists():
        made: dict[str, Any] = read(path)
        use_precision(material.base, made["dtype"])
        board.advance(material.evaluation_units + ANSWER_UNITS)
        return made
    board.stage("Base model")
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bf16" if native_bf16() else "fp32"
    use_precision(material.base, dtype)
    start = time.perf_counter()
    base: dict[str, Any] = scores(material.base, material, dtype, board)
    scoring = time.perf_counter() - start
    question = material.question["question"]
    base["answer"] = serve.generate_answer(material.base, material.tokenizer, question)
    board.advance(ANSWER_UNITS)
    board.say(f"Base model: GSM8K {base['gsm8k']:.3f}, news {base['news']:.3f}")
    steps = settings.steps
    if steps is None:
        board.stage("Timing a step")
        a_step = _time_a_step(settings, material, dtype)
        spent = time.perf_counter() - start
        left = settings.max_seconds - spent - 4 * scoring - SERVE_SECONDS
        steps = max(MIN_STEPS, min(MAX_STEPS, int(left / (2 * a_step))))
    made = {"steps": steps, "dtype": dtype, "base": base, "seconds": board.seconds}
    write(path, json.dumps(made, indent=1))
    return made


def train_method(
    folder: Path,
    settings: Settings,
    planned: dict[str, Any],
    material: Material,
    method: Method,
    board: Board,
) -> dict[str, Any]:
    """Trains and scores one method into `folder`, or reads what an earlier run put there."""
    steps, dtype = planned["steps"], planned["dtype"]
    if folder.exists():
        board.advance(steps + 2 * material.evaluation_units)
        board.say(f"{method.title}: kept from the earlier run")
        return read(folder / RECORD)
    board.stage(method.title)
    start = time.perf_counter()
    model = adapted(material.base, method, settings)
    prepared = time.perf_counter() - start
    evaluations: list[dict[str, Any]] = []

    def on_step(step: int, loss: float) -> None:
        board.advance(1, f"step {step}/{steps}, loss {loss:.3f}")
        if step in (steps // 2, steps):
            evaluations.append({"step": step, **scores(model, material, dtype, board)})

    rate = settings.rate(method)
    curve = train(model, material.training_batches(settings, steps), rate, dtype, on_step)
    record = {
        "title": method.title,
        "learning_rate": rate,
        "config": describe_config(model.peft_config["default"]),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "prepare_seconds": prepared,
        "seconds_per_step": statistics.median(curve.seconds),
        "evaluations": evaluations,
        "train_losses": curve.losses,
        "step_seconds": curve.seconds,
    }
    with complete_folder(folder) as made:
        model.peft_config["default"].base_model_name_or_path = MODEL
        model.save_pretrained(made, save_embedding_layers=False)
        record["adapter_bytes"] = (made / ADAPTER_WEIGHTS).stat().st_size
        record["seconds"] = time.perf_counter() - start
        write(made / RECORD, json.dumps(record, indent=1))
    last = evaluations[-1]
    board.say(
        f"{method.title}: GSM8K {last['gsm8k']:.3f}, news {last['news']:.3f}, "
        f"{record['seconds_per_step']:.2f} s a step"
    )
    return record


def merge(output_dir: Path, material: Material, board: Board) -> dict[str, Any]:
    """Merges the saved SECURA adapter into `output_dir/merged` and checks the checkpoint."""
    board.stage("Reloading, merging, checking")
    start = time.perf_counter()
    need = MERGED_BYTES_A_PARAMETER * sum(p.numel() for p in material.base.parameters())
    free = shutil.disk_usage(output_dir).free
    if free < need:
        raise UserError(
            f"the merged model needs {need / 1e6:,.0f} MB in {output_dir}, where "
            f"{free / 1e6:,.0f} MB are free; make room, then continue with --resume"
        )
    record = serve.merge_and_check(
        material.base,
        material.tokenizer,
        output_dir / "secura",
        output_dir / "merged",
        material.example,
        material.question["question"],
    )
    board.advance(MERGE_UNITS)
    board.say(f"Merged: logits differ by at most {record['max_logit_difference']:.1e}")
    return {**record, "seconds": time.perf_counter() - start}


def adapted(base: Any, method: Method, settings: Settings) -> Any:
    """A copy of `base` with a method's fresh adapter, seeded."""
    torch.manual_seed(settings.seed)
    config = method.make_config(settings.target_modules)
    return require("peft", "bench").get_peft_model(copy.deepcopy(base), config)


def scores(model: Any, material: Material, dtype: str, board: Board) -> dict[str, float]:
    """Held-out loss on GSM8K's answers and on news."""
    return {
        "gsm8k": evaluate(model, material.gsm8k, dtype, board.advance),
        "news": evaluate(model, material.news, dtype, board.advance),
    }


def use_precision(model: Any, dtype: str) -> None:
    """Picks the attention that is quicker to train on CPUs: in bf16 that is not the fused one."""
    model.set_attn_implementation("eager" if dtype == "bf16" else "sdpa")


def read(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{path} is missing or damaged; begin again with --overwrite_output_dir"
        ) from error


def write(path: Path, text: str) -> None:
    """Writes a file that is whole as soon as it is there."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        made = Path(scratch) / path.name
        made.write_text(text, encoding="utf-8")
        os.replace(made, path)


def _time_a_step(settings: Settings, material: Material, dtype: str) -> float:
    """Seconds of a SECURA step on a batch of middling length, after one to warm up."""
    model = adapted(material.base, METHODS["secura"], settings)
    batches = material.training_batches(settings, EVAL_BATCH)
    middling = sorted(batches, key=lambda batch: batch.input_ids.numel())[EVAL_BATCH // 2]
    curve = train(model, [middling] * 3, 1e-5, dtype, lambda step, loss: None)
    return statistics.mean(curve.seconds[1:])


def _need(found: Sequence[Example], wanted: int, what: str, flag: str) -> None:
    if len(found) < wanted:
        raise UserError(
            f"only {len(found):,} {what} are short or long enough, fewer than --{flag} {wanted}"
        )
