"""Token batches of the demo: GSM8K answers to learn from and be tested on, news to remember."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

PROMPT = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Example:
    """Token ids of one text, of which the first `prompt` are read and not scored."""

    ids: tuple[int, ...]
    prompt: int


@dataclass(frozen=True)
class Batch:
    """Right-padded tokens: `input_ids`, `attention_mask` and `scored`, all `[B, T]`.

    `scored` is True where a token counts in the loss.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    scored: torch.Tensor


def answer_examples(
    rows: Sequence[dict[str, str]], tokenizer: Any, max_tokens: int
) -> list[Example]:
    """Question and answer of each row, the answer scored; rows over `max_tokens` are left out."""
    examples = []
    for row in rows:
        prompt = tokenizer(PROMPT.format(question=row["question"]))["input_ids"]
        answer = tokenizer(" " + row["answer"], add_special_tokens=False)["input_ids"]
        ids = (*prompt, *answer, tokenizer.eos_token_id)
        if len(ids) <= max_tokens:
            examples.append(Example(ids, len(prompt)))
    return examples


def news_examples(texts: Sequence[str], tokenizer: Any, tokens: int) -> list[Example]:
    """The first `tokens` tokens of each text, all but the first scored; shorter ones left out."""
    encoded = (tokenizer(text[: 16 * tokens])["input_ids"][:tokens] for text in texts)
    return [Example(tuple(ids), 1) for ids in encoded if len(ids) == tokens]


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pads `examples` to the longest of them."""
    length = max(len(example.ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_token_id)
    attention_mask = torch.zeros(len(examples), length, dtype=torch.long)
    scored = torch.zeros(len(examples), length, dtype=torch.bool)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.ids)] = torch.tensor(example.ids)
        attention_mask[row, : len(example.ids)] = 1
        scored[row, example.prompt : len(example.ids)] = True
    return Batch(input_ids, attention_mask, scored)


def fixed_batches(examples: Sequence[Example], size: int, pad_token_id: int) -> list[Batch]:
    """All examples in batches of like lengths, for evaluation."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    return [
        collate(ordered[start : start + size], pad_token_id)
        for start in range(0, len(ordered), size)
    ]


def training_batches(
    examples: Sequence[Example], size: int, steps: int, pad_token_id: int, seed: int
) -> list[Batch]:
    """`steps` batches in an order that depends on `seed` alone.

    Each run of eight batches is drawn at random, then sorted by length, so that little is padding,
    and the eight batches shuffled again. Starts over when the examples are used up.
    """
    generator = torch.Generator().manual_seed(seed)
    batches: list[Batch] = []
    while len(batches) < steps:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, 8 * size):
            window = [examples[index] for index in order[start : start + 8 * size]]
            made = fixed_batches(window, size, pad_token_id)
            made = [batch for batch in made if len(batch.input_ids) == size]
            shuffled = torch.randperm(len(made), generator=generator).tolist()
            batches += [made[index] for index in shuffled]
    return batches[:steps]
