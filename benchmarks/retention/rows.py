"""Tokens in batches: prompts with what follows them, and the hidden states that predict it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.retention.data import Example

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt and of what may follow it: one completion, or several to compare."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens the model reads: all but the last of each completion."""
        return len(self.prompt) + sum(len(ids) - 1 for ids in self.completions)

    @property
    def targets(self) -> int:
        """Tokens that are predicted."""
        return sum(len(ids) for ids in self.completions)


def task_row(example: Example, tokenizer: Any, *, choices: bool = False) -> Row:
    """An example's row: its right completion and the end token, or its choices."""
    prompt = tuple(tokenizer(example.prompt)["input_ids"])
    if choices:
        texts = tokenizer(list(example.choices), add_special_tokens=False)["input_ids"]
        return Row(prompt, tuple(map(tuple, texts)))
    right = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    return Row(prompt, ((*right, tokenizer.eos_token_id),))


def text_row(ids: Sequence[int]) -> Row:
    """A text's row: all but its first token are predicted."""
    return Row(tuple(ids[:1]), (tuple(ids[1:]),))


@dataclass(frozen=True)
class Batch:
    """Rows as tensors: `ids` and `positions` `[B, T]`, `mask` `[B, 1, T, T]` or None (causal).

    The states at `rows[i], columns[i]` predict `targets[i]`, all `[S]`, row by row. The mask is
    True where a token sees another; a target of -100 counts for nothing.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    rows: Tensor
    columns: Tensor
    targets: Tensor


def pack(rows: Sequence[Row], device: torch.device, length: int = 0) -> Batch:
    """Packs rows, padded on the right; several completions of a prompt do not see one another.

    Args:
        rows: to read.
        device: of the tensors.
        length: where given, every batch of as many rows has tensors of the same shapes: T is
            this, and S is B T.
    """
    alike = length > 0
    length = length or max(row.length for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    segments = torch.full_like(ids, -1)
    scored: list[tuple[int, int, int]] = []
    for index, row in enumerate(rows):
        end = start = len(row.prompt)
        ids[index, :end] = torch.tensor(row.prompt)
        positions[index, :end] = torch.arange(end)
        segments[index, :end] = 0
        for segment, completion in enumerate(row.completions, start=1):
            place = slice(end, end + len(completion) - 1)
            ids[index, place] = torch.tensor(completion[:-1], dtype=torch.long)
            positions[index, place] = torch.arange(len(completion) - 1) + start
            segments[index, place] = segment
            columns = [start - 1, *range(place.start, place.stop)]
            scored += [(index, c, target) for c, target in zip(columns, completion, strict=True)]
            end = place.stop
    if alike:
        scored += [(0, 0, IGNORED)] * (len(rows) * length - len(scored))
    at = torch.tensor(scored, device=device).unbind(1)
    mask = None
    if alike or any(len(row.completions) > 1 for row in rows):
        seen = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
        seen = seen.tril() | torch.eye(length, dtype=torch.bool)
        mask = seen[:, None].to(device)
    return Batch(ids.to(device), positions.to(device), mask, *at)


def by_length(rows: Sequence[Row], tokens: int) -> Iterator[list[int]]:
    """Indices of rows in batches of at most `tokens`, padding included, longest first."""
    order = sorted(range(len(rows)), key=lambda index: -rows[index].length)
    while order:
        size = max(1, tokens // rows[order[0]].length)
        yield order[:size]
        order = order[size:]


def causal(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden(model: nn.Module, batch: Batch) -> Tensor:
    """The states `[S, d]` that predict a batch's targets, as the model's head takes them."""
    states = causal(model).get_decoder()(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    )
    return states.last_hidden_state[batch.rows, batch.columns]


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a batch's targets, nats a token; logits are formed for them alone."""
    logits = causal(model).get_output_embeddings()(hidden(model, batch))
    return F.cross_entropy(logits.float(), batch.targets, ignore_index=IGNORED)


__all__ = [
    "Batch",
    "Row",
    "batch_loss",
    "by_length",
    "causal",
    "hidden",
    "pack",
    "task_row",
    "text_row",
]
