"""What decides the demo's figures, and where its model and texts come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.assets import load_gsm8k, load_model, load_news
from benchmarks.demo.methods import METHODS, Method

MODEL = "smollm2-135m"
DTYPES = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class Settings:
    """The demo's settings, one for each flag that changes a figure.

    Args:
        steps: optimizer steps of each method; None fits them into `max_seconds`.
        batch_size: problems a step.
        learning_rate: peak rate of SECURA.
        lora_learning_rate: peak rate of LoRA.
        target_modules: the linear layers both methods adapt.
        max_tokens: longer problems are left out, of training and of scoring.
        eval_examples: GSM8K test problems scored.
        news_articles: news articles scored.
        news_tokens: tokens of each article.
        dtype: `"bf16"` (autocast), `"fp32"`, or `"auto"`: bf16 where the CPU has it in hardware.
        max_seconds: what the whole run may take where `steps` is None.
        seed: of the batches' order and of the adapters' initial values.

    Raises:
        ValueError: a setting is out of range.
    """

    steps: int | None = None
    batch_size: int = 4
    learning_rate: float = METHODS["secura"].learning_rate
    lora_learning_rate: float = METHODS["lora"].learning_rate
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    max_tokens: int = 256
    eval_examples: int = 32
    news_articles: int = 16
    news_tokens: int = 192
    dtype: str = "auto"
    max_seconds: float = 220.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("batch_size", "max_tokens", "eval_examples", "news_articles", "news_tokens")
        for name in counts if self.steps is None else ("steps", *counts):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "lora_learning_rate", "max_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be above 0")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype} must be one of {', '.join(DTYPES)}")

    def rate(self, method: Method) -> float:
        """The peak learning rate of a method."""
        return self.lora_learning_rate if method.name == "lora" else self.learning_rate


@dataclass(frozen=True)
class Sources:
    """Loaders of the model and the texts, and the packaged assets they come from, model first."""

    load_model: Callable[[], tuple[Any, Any]]
    train_rows: Callable[[], list[dict[str, str]]]
    test_rows: Callable[[], list[dict[str, str]]]
    news: Callable[[], list[str]]
    assets: tuple[str, ...]


PACKAGED = Sources(
    load_model=lambda: load_model(MODEL),
    train_rows=lambda: load_gsm8k("train"),
    test_rows=lambda: load_gsm8k("test"),
    news=load_news,
    assets=(MODEL, "gsm8k-train", "gsm8k-test", "xsum-test"),
)
