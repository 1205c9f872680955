"""Made-up records of experiments: plausible figures, drawn from a seed."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from secura.experiments.grid import BASE_CELL, EXPERIMENTS, Cell, cells, rate_search
from secura.experiments.methods import METHODS
from secura.experiments.presets import PRESETS, Settings

SETTINGS = replace(
    PRESETS["small"][0],
    tasks=("gsm8k", "logiqa", "arc-easy"),
    probes=("mmlu", "arc-challenge", "hellaswag", "triviaqa"),
    steps=12,
)
SEEDS = (0, 1, 2)
BASE_SCORES = {
    "gsm8k": ("exact_match", 0.031, 1.65),
    "logiqa": ("accuracy", 0.25, 2.91),
    "arc-easy": ("accuracy", 0.5, 2.2),
    "mmlu": ("accuracy", 0.297, 3.02),
    "arc-challenge": ("accuracy", 0.281, 3.1),
    "hellaswag": ("accuracy", 0.406, 2.7),
    "triviaqa": ("exact_match", 0.047, 3.9),
}
LEARNS = {"lora": 0.67, "dora": 0.68, "cur-lora": 0.5, "cabr": 0.63, "full": 0.7}
LOSES = {"lora": 0.016, "dora": 0.018, "i-lora": 0.009, "cabr": 0.2, "cur-lora": 0.12, "full": 0.1}


def record(cell: Cell, settings: Settings = SETTINGS) -> dict[str, Any]:
    """The finished cell's record."""
    draw = random.Random(f"{cell}")
    base = not cell.tasks
    rate = 0.0 if base else cell.learning_rate / (4e-5 if cell.method == "full" else 1e-3)
    effort = 1.3 * rate / (rate + 0.5) - 0.05 * rate**2
    made: dict[str, Any] = {
        "format": 1,
        "cell": {
            "method": cell.method, "learning_rate": cell.learning_rate,
            "seed": cell.seed, "tasks": list(cell.tasks),
        },
        "status": "done",
        "settings": settings.as_json(),
        "environment": {
            "secura": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2",
            "lm_eval": "0.4.13", "commit": "1c164a6",
            "machine": {"device": "cpu", "name": "AMD EPYC", "threads": 1},
            "model": "SmolLM2-135M-Instruct (Apache-2.0); dequantised from GGUF Q4_1",
            "finished": "2026-11-25T22:01:02Z",
        },
        "data": {
            name: {
                "title": name.upper(), "metric": metric, "licence": "MIT", "source": "a package",
                "train": 0 if name in settings.probes else 1032, "test": 64,
                "sha256": hashlib.sha256(f"{name} {cell.seed}".encode()).hexdigest(), "note": "",
            }
            for name, (metric, _, _) in BASE_SCORES.items()
        },
        "seconds": {"training": 61.0, "scoring": 40.2, "total": 103.0},
        "scores": {},
        "text": {"tokens": 4608, "n": 24},
    }  # fmt: skip
    lost = (
        0.0
        if base
        else LOSES.get(cell.method, 0.1) * rate**1.2 * len(cell.tasks) * draw.gauss(1, 0.1)
    )
    made["text"]["loss"] = 3.378 + lost
    made["text"]["perplexity"] = math.exp(made["text"]["loss"])
    for name, (metric, score, loss) in BASE_SCORES.items():
        if name in cell.tasks:
            age = len(cell.tasks) - 1 - cell.tasks.index(name)
            gain = LEARNS.get(cell.method, 0.6) * effort * (1 - 0.35 * age) * draw.gauss(1, 0.03)
            score, loss = score + 0.15 * gain, loss - gain
        else:
            score, loss = score * (1 - 0.3 * lost * draw.uniform(0.2, 1)), loss + 0.5 * lost
        made["scores"][name] = {metric: max(round(score * 64), 0) / 64, "loss": loss, "n": 64}
    if not base:
        made["training"] = training(cell, settings, rate, draw)
        if len(cell.tasks) == 1:
            made["spectra"] = spectra(cell.method, rate, draw)
    return made


def training(cell: Cell, settings: Settings, rate: float, draw: random.Random) -> dict[str, Any]:
    parts = {"full": ["weights"], "cur-lora": ["B"], "dora": ["lora_A", "lora_B", "lora_magnitude"]}
    names = parts.get(cell.method, ["A", "B"])
    norms = {
        part: [draw.lognormvariate(-2 * place, 0.3) for _ in range(settings.steps)]
        for place, part in enumerate(names)
    }
    return {
        "steps": settings.steps,
        "trainable_parameters": 460800,
        "tokens": 31744,
        "loss": [1.6 - 0.3 * step / settings.steps for step in range(settings.steps)],
        "gradient_norm": [math.hypot(*values) for values in zip(*norms.values(), strict=True)],
        "gradient_norm_by_part": norms,
        "gradient_norm_by_layer": [draw.lognormvariate(0, 0.3) for _ in range(30)],
        "validation_loss": 1.0 + 0.1 * math.log(rate) ** 2 + 0.01 * draw.random(),
    }


def spectra(method: str, rate: float, draw: random.Random) -> list[dict[str, Any]]:
    size = rate * LEARNS.get(method, 0.6)
    return [
        {
            "name": f"model.layers.{layer}.self_attn.{kind}",
            "norm_before": 20.0, "norm_after": 20.0 + size * draw.random(),
            "nuclear_before": 300.0, "nuclear_after": 301.0,
            "change": 0.01 * size * draw.lognormvariate(0, 0.1) * (1 + layer / 30),
            "stable_rank_before": 20.0, "stable_rank_after": 19.5,
            "effective_rank_change": draw.uniform(2, 40), "new_directions": draw.randrange(8),
            "inexact": "activation" in method,
        }
        for layer in range(30)
        for kind in ("q_proj", "v_proj")
    ]  # fmt: skip


def failed(cell: Cell, error: str = "the loss became nan at step 7") -> dict[str, Any]:
    """The record of a cell that failed."""
    made = record(cell)
    return {key: made[key] for key in ("format", "cell", "settings", "environment", "seconds")} | {
        "status": "failed",
        "error": error,
    }


def grid(methods: Sequence[str] = tuple(METHODS), seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """Every cell of all experiments."""
    found: Iterable[Cell] = [
        *cells(list(EXPERIMENTS.values()), methods, SETTINGS.tasks, seeds, SETTINGS.learning_rate),
        *rate_search(methods, SETTINGS.tasks[0], seeds[0]),
    ]
    return list(dict.fromkeys(found))


__all__ = ["BASE_CELL", "SETTINGS", "failed", "grid", "record"]
