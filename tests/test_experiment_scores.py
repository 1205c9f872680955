"""Scores of the experiments: likelihoods, written answers, perplexity, and weights' spectra."""

from __future__ import annotations

import pytest
import torch

from secura.experiments import smoke
from secura.experiments.evaluate import Scorer
from secura.experiments.examples import Example


@pytest.fixture
def tokenizer():
    return smoke.load_tokenizer()


@pytest.fixture
def model():
    """The smoke model with weights that tell inputs apart."""
    model = smoke.load_model()
    generator = torch.Generator().manual_seed(1)
    for value in model.parameters():
        value.data.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model


def questions(count: int = 9) -> list[Example]:
    """Prompts, choices and right answers of many lengths."""
    words = ["red", "green", "blue", "ultramarine", "off-white", "it"]
    found = []
    for i in range(count):
        choices = tuple(f" {word} {i}" for word in words[: 2 + i % 4])
        prompt = f"Question: {'which ' * (i % 3)}{i}\nAnswer:"
        found.append(Example(prompt, choices[i % len(choices)], choices))
    return found


def written(count: int = 5) -> list[Example]:
    return [Example(f"Sum {'of ' * i}{i}:", f" it is\n#### {i}") for i in range(count)]


@torch.no_grad()
def token_losses(model, tokenizer, prompt: str, completion: str) -> torch.Tensor:
    """Cross-entropy of each token of the completion, by one plain pass a text."""
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(completion, add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(after), reduction="none")


def test_multiple_choice_is_what_a_plain_pass_a_choice_gives(model, tokenizer):
    right, by_byte, margins, losses = 0, 0, [], []
    model.eval()
    for example in questions():
        each = [token_losses(model, tokenizer, example.prompt, c) for c in example.choices]
        sums = [-each_choice.sum().item() for each_choice in each]
        bytewise = [s / len(c.strip().encode()) for s, c in zip(sums, example.choices, strict=True)]
        right += sums.index(max(sums)) == example.answer
        by_byte += bytewise.index(max(bytewise)) == example.answer
        own = sums.pop(example.answer)
        margins.append(own - max(sums))
        losses.append(each[example.answer])
    scores = Scorer(model, tokenizer, batch_size=4).score(questions(), "accuracy")
    assert scores["n"] == 9
    assert (scores["accuracy"], scores["accuracy_norm"]) == (right / 9, by_byte / 9)
    assert scores["margin"] == pytest.approx(sum(margins) / 9, abs=1e-4)
    assert scores["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert 0 < right < 9 and 0 < by_byte < 9
