"""Scores of a tuned model beside its base: loss, KL, token accuracy, multiple choice, answers.

Of the base model its final states of the fixed rows are kept, not its logits: both models' logits
are formed a chunk at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.retention.data import Example
from benchmarks.retention.record import Score
from benchmarks.retention.rows import Row, by_length, causal, hidden, pack
from secura.layers import evaluating

_TOKENS = {"cpu": 1024, "cuda": 16384}  # read at once, padding included
_LOGITS = {"cpu": 256, "cuda": 1024}  # rows of the vocabulary's width that are held at once
_ANSWERS = 16  # written at once: all go on until the longest ends
_NUMBER = re.compile(r"(?:(?<!\w)-)?\d+(?:,\d{3})*(?:\.\d+)?")


class Evaluator:
    """Scores models, which it leaves as they were, each in eval mode and without gradient.

    Args:
        head: weight `[V, d]` of the base model's head.
        bf16: whether to compute under autocast to bfloat16, but for the head's product.
    """

    def __init__(self, head: Tensor, *, bf16: bool = False) -> None:
        self.head = head
        self.bf16 = bf16
        self.device = head.device
        self.logits = _LOGITS[self.device.type]

    def states(self, model: nn.Module, rows: Sequence[Row]) -> Tensor:
        """The final states `[S, d]` fp32 that predict the rows' targets, row by row."""
        found: dict[int, Tensor] = {}
        with self._scoring(model):
            for indices in by_length(rows, _TOKENS[self.device.type]):
                chosen = [rows[index] for index in indices]
                states = hidden(model, pack(chosen, self.device))
                parts = states.float().split([row.targets for row in chosen])
                found |= dict(zip(indices, parts, strict=True))
        return torch.cat([found[index] for index in range(len(rows))])

    def score(self, model: nn.Module, rows: Sequence[Row], base: Tensor) -> Tensor:
        """How the tuned model reads each target, `[S, 5]` fp64: see :func:`summed`.

        Args:
            model: the tuned model.
            rows: what it reads.
            base: the rows' states `[S, d]` in the base model.
        """
        targets = self._targets(rows)
        states = self.states(model, rows)
        own_head = causal(model).get_output_embeddings().weight
        found = []
        with self._scoring(model):
            for start in range(0, len(targets), self.logits):
                part = slice(start, start + self.logits)
                truth = targets[part]
                ours = self._log_probs(states[part], own_head)
                theirs = self._log_probs(base[part].to(self.device), self.head)
                picked = truth[:, None]
                columns = (
                    -theirs.gather(1, picked)[:, 0],
                    -ours.gather(1, picked)[:, 0],
                    torch.einsum("sv,sv->s", theirs.exp(), theirs - ours),
                    (ours.argmax(-1) == truth).float(),
                    (theirs.argmax(-1) == truth).float(),
                )
                found.append(torch.stack(columns, dim=1).double().cpu())
        return torch.cat(found)

    def choose(
        self, model: nn.Module, examples: Sequence[Example], rows: Sequence[Row]
    ) -> tuple[float, float]:
        """Shares of questions whose right choice is likeliest, and likeliest a byte."""
        states, targets = self.states(model, rows), self._targets(rows)
        head = causal(model).get_output_embeddings().weight
        with self._scoring(model):
            parts = zip(states.split(self.logits), targets.split(self.logits), strict=True)
            found = [
                self._log_probs(part, head).gather(1, ids[:, None])[:, 0] for part, ids in parts
            ]
        sizes = [len(ids) for row in rows for ids in row.completions]
        nats = iter([part.sum().item() for part in torch.cat(found).double().cpu().split(sizes)])
        right, right_norm = [], []
        for example in examples:
            values = torch.tensor([next(nats) for _ in example.choices])
            sizes_in_bytes = torch.tensor([len(c.strip().encode()) for c in example.choices])
            answer = example.choices.index(example.completion)
            right.append(_margin(values, answer) > 0)
            right_norm.append(_margin(values / sizes_in_bytes, answer) > 0)
        return fmean(right), fmean(right_norm)

    def exact_match(
        self, model: nn.Module, examples: Sequence[Example], tokenizer: Any, tokens: int = 160
    ) -> float:
        """Share of answers, written greedily, whose final number is the right one."""
        answers = write(model, [e.prompt for e in examples], tokenizer, tokens, self.bf16)
        pairs = zip(answers, examples, strict=True)
        return fmean(
            (number := final_number(answer)) is not None and number == final_number(e.completion)
            for answer, e in pairs
        )

    def _targets(self, rows: Sequence[Row]) -> Tensor:
        ids = [token for row in rows for completion in row.completions for token in completion]
        return torch.tensor(ids, device=self.device)

    def _log_probs(self, states: Tensor, head: Tensor) -> Tensor:
        """Of the next token, `[S, V]` fp32, the product outside autocast (TF32 where torch is let).

        Logits rounded to bf16, steps of 1/8 from 16 on, would give a KL a floor.
        """
        with autocast(self.device, False):
            return F.log_softmax(F.linear(states.to(head.dtype), head).float(), -1)

    @contextmanager
    def _scoring(self, model: nn.Module) -> Iterator[None]:
        with torch.no_grad(), evaluating(model), autocast(self.device, self.bf16):
            yield


def summed(targets: Tensor) -> Score:
    """The score of targets `[S, 5]`: base loss, loss, KL, whether right, whether base was right."""
    return Score(len(targets), *targets.mean(0).tolist())


def write(
    model: nn.Module, prompts: Sequence[str], tokenizer: Any, tokens: int, bf16: bool = False
) -> list[str]:
    """The model's greedy answers, each up to its first empty line or end token."""
    device = next(model.parameters()).device
    answers: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with torch.no_grad(), evaluating(model), autocast(device, bf16):
        for start in range(0, len(order), _ANSWERS):
            indices = order[start : start + _ANSWERS]
            batch = tokenizer(
                [prompts[index] for index in indices],
                return_tensors="pt",
                padding=True,
                padding_side="left",
            ).to(device)
            written = causal(model).generate(
                **batch,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
            texts = tokenizer.batch_decode(
                written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text.strip().partition("\n\n")[0]
    return [answers[index] for index in range(len(prompts))]


def final_number(text: str) -> Decimal | None:
    """The last number on the first line after ``####``, or of the text where that has none."""
    marked = _NUMBER.findall(text.partition("####")[2].strip().partition("\n")[0])
    numbers = marked or _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """Autocast to bfloat16 on a device, where ``bf16`` says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def _margin(values: Tensor, answer: int) -> float:
    """The right choice's value less the best wrong one's; NaN is not above 0."""
    wrong = torch.cat([values[:answer], values[answer + 1 :]])
    return (values[answer] - wrong.max()).item()


__all__ = ["Evaluator", "autocast", "final_number", "summed", "write"]
