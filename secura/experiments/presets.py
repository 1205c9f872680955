"""What decides the figures of a run, and the presets of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Every setting a figure depends on, beside method, rate, seed and tasks.

    Args:
        model: a hub name, a local folder, a packaged model, or ``random``: two layers with random
            weights.
        tasks: trained on, in this order; each alone, or one after another.
        probes: basic knowledge, scored and never trained on.
        steps: optimizer steps a task.
        batch_size: examples a step.
        learning_rate: the one rate all methods share (the paper's).
        max_tokens: training examples of more tokens are left out.
        datasets: data in place of a task's own, such as ``gsm8k=openai/gsm8k:main``.
        train_examples: drawn from a task's training split; no more are used than the steps take.
        validation_examples: further ones of it, by whose loss a method's own rate is chosen.
        test_examples: scored of each task.
        probe_examples: scored of each probe.
        text_examples: general texts scored.
        text_tokens: of each text at most.
        answer_tokens: of a written answer at most, where the task allows more.
        target_modules: layers the adapters are on.
        rank: CUR rank m of SECURA.
        inner_rank: inner rank r of SECURA; None is 2 m.
        lora_rank: r of LoRA and DoRA; alpha is 2 r.
        replay_size: examples kept of earlier tasks, by ER.
        replay_share: part of a batch that ER replays.
        ewc_lambda: weight of EWC's penalty.
        ewc_examples: whose gradients make EWC's Fisher information.
        long_term_ema: decay of I-LoRA's long-term adapter.
        long_term_weight: weight of I-LoRA's mean squared difference of logits.
        dtype: ``"bf16"`` (autocast) or ``"fp32"``.
        save_steps: steps between checkpoints inside a cell.

    Raises:
        ValueError: a setting out of range.
    """

    model: str
    tasks: tuple[str, ...]
    probes: tuple[str, ...]
    steps: int
    batch_size: int = 4
    learning_rate: float = 1e-3
    max_tokens: int = 192
    datasets: tuple[str, ...] = ()
    train_examples: int = 1000
    validation_examples: int = 32
    test_examples: int = 64
    probe_examples: int = 64
    text_examples: int = 24
    text_tokens: int = 192
    answer_tokens: int = 256
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    rank: int = 64
    inner_rank: int | None = None
    lora_rank: int = 8
    replay_size: int = 256
    replay_share: float = 0.2
    ewc_lambda: float = 3e4
    ewc_examples: int = 32
    long_term_ema: float = 0.99
    long_term_weight: float = 1.0
    dtype: str = "fp32"
    save_steps: int = 500

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("a run needs at least one task")
        for name in ("tasks", "probes"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names {', '.join(values)}: each may stand there once")
        if both := set(self.tasks) & set(self.probes):
            raise ValueError(f"{', '.join(sorted(both))} cannot be trained on and a probe as well")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "float") and not value > 0:
                raise ValueError(f"{field.name}={value} must be above 0")
        if self.dtype not in ("bf16", "fp32"):
            raise ValueError(f"dtype={self.dtype!r} must be 'bf16' or 'fp32'")
        if not self.replay_share < 1:
            raise ValueError(f"replay_share={self.replay_share} must be below 1")
        if not self.long_term_ema < 1:
            raise ValueError(f"long_term_ema={self.long_term_ema} must be below 1")

    def as_json(self) -> dict[str, Any]:
        """The settings as they stand in a results folder."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


PROBES = ("mmlu", "arc-easy", "hellaswag", "triviaqa")

PRESETS: dict[str, tuple[Settings, tuple[int, ...]]] = {
    "smoke": (
        Settings(
            model="random",
            tasks=("sums", "colours"),
            probes=("letters",),
            steps=4,
            learning_rate=2e-2,
            train_examples=40,
            validation_examples=4,
            test_examples=4,
            probe_examples=4,
            text_examples=2,
            rank=4,
            lora_rank=2,
            replay_size=8,
            ewc_examples=4,
            save_steps=2,
        ),
        (0,),
    ),
    "small": (
        Settings(
            model="smollm2-135m",
            tasks=("gsm8k", "csqa", "openbookqa"),
            probes=PROBES,
            steps=32,
            max_tokens=160,
            test_examples=32,
            probe_examples=32,
            text_examples=16,
            answer_tokens=128,
            long_term_ema=0.9,  # 0.99 ** 32 would keep three quarters of the start
            dtype="bf16",
            save_steps=16,
        ),
        (0, 1, 2),
    ),
    "paper": (
        Settings(
            model="Qwen/Qwen2-1.5B",
            tasks=("gsm8k", "xsum", "en-de", "logiqa"),
            probes=PROBES,
            steps=2000,
            max_tokens=512,
            train_examples=8000,
            validation_examples=128,
            test_examples=500,
            probe_examples=500,
            text_examples=200,
            rank=150,
            inner_rank=200,
            replay_size=1000,
            ewc_examples=200,
            dtype="bf16",
        ),
        (0, 1, 2),
    ),
}
"""Settings and seeds by name."""

__all__ = ["PRESETS", "Settings"]
