"""One training loop and one evaluation, the same for every method of the demo."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.demo.text import Batch

WARMUP_SHARE = 0.1
MAX_GRAD_NORM = 1.0


class DivergedError(RuntimeError):
    """The training loss became NaN or infinite."""


@dataclass(frozen=True)
class Curve:
    """What one training run leaves behind: loss and seconds of every step."""

    losses: list[float]
    seconds: list[float]


def native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, so that autocast pays."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def precision(dtype: str) -> AbstractContextManager[Any]:
    """`"bf16"`: autocast to bfloat16 on the CPU; `"fp32"`: no autocast."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")


def token_losses(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of each scored token, `[S]` fp32.

    The vocabulary is far wider than the model, so logits are formed for the scored tokens alone.
    `model` is a transformers causal language model or a PEFT model of one.
    """
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoded = lm.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    scored = batch.scored[:, 1:]
    logits = lm.get_output_embeddings()(decoded.last_hidden_state[:, :-1][scored])
    return F.cross_entropy(logits.float(), batch.input_ids[:, 1:][scored], reduction="none")


@torch.inference_mode()
def evaluate(
    model: Any, batches: Sequence[Batch], dtype: str, on_batch: Callable[[], None]
) -> float:
    """Mean cross-entropy a scored token over `batches`, in nats."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        with precision(dtype):
            losses = token_losses(model, batch)
        total += losses.sum(dtype=torch.float64).item()
        count += losses.numel()
        on_batch()
    model.train(was_training)
    return total / count


def rate_factor(step: int, steps: int) -> float:
    """Share of the learning rate at `step`: linear warm-up over 10%, then linear decay to zero."""
    warmup = math.ceil(WARMUP_SHARE * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (steps - step) / max(1, steps - warmup)


def train(
    model: Any,
    batches: Sequence[Batch],
    learning_rate: float,
    dtype: str,
    on_step: Callable[[int, float], None],
) -> Curve:
    """AdamW over `batches`, one step each, on whatever parameters of `model` are trainable.

    Args:
        model: a PEFT model; its trainable parameters are updated in place.
        batches: one batch a step, in order.
        learning_rate: the peak rate of the schedule in `rate_factor`.
        dtype: `"bf16"` or `"fp32"`, see `precision`.
        on_step: called after each step with the steps done and the step's loss.

    Raises:
        DivergedError: the loss is NaN or infinite.
    """
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, len(batches))
    )
    curve = Curve([], [])
    for done, batch in enumerate(batches, start=1):
        start = time.perf_counter()
        with precision(dtype):
            loss = token_losses(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        curve.losses.append(loss.item())
        curve.seconds.append(time.perf_counter() - start)
        if not math.isfinite(curve.losses[-1]):
            raise DivergedError(
                f"the loss became {curve.losses[-1]} at step {done}; use a lower learning rate"
            )
        on_step(done, curve.losses[-1])
    return curve
