"""A two-layer model with random weights and made-up tasks, to try the whole suite in seconds."""

from __future__ import annotations

import random
import string
from typing import Any

from secura._extras import require
from secura.experiments.examples import Example, TaskData

MODEL = "random"
COLOURS = ("red", "green", "blue", "white")
METRICS = {"sums": "exact_match", "colours": "accuracy", "letters": "accuracy"}


def load_model() -> Any:
    """The model: Llama's architecture, two layers of width 32, the same weights every time."""
    torch = require("torch", "experiments")
    transformers = require("transformers", "experiments")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=len(string.printable) + 3,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.2,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )


def load_tokenizer() -> Any:
    """Its tokenizer: one token a printable character."""
    tokenizers = require("tokenizers", "experiments")
    transformers = require("transformers", "experiments")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {letter: 3 + i for i, letter in enumerate(string.printable)}
    characters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    characters.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def load_task(name: str, train: int, test: int, seed: int) -> TaskData:
    """Made-up examples: sums to complete, the colour that was named, the letter that follows."""
    make = {"sums": _sum, "colours": _colour, "letters": _letter}[name]
    held_out = tuple(
        dict.fromkeys(make(random.Random(f"test {name} {i}")) for i in range(8 * test))
    )
    test_split = held_out[:test]
    drawn = (make(random.Random(f"train {name} {seed} {i}")) for i in range(8 * (train + test)))
    return TaskData(tuple(e for e in drawn if e not in test_split)[:train], test_split)


def load_text(count: int) -> list[str]:
    """Random words."""
    words = random.Random(0)
    return [
        " ".join("".join(words.choices(string.ascii_lowercase, k=4)) for _ in range(12))
    ] * count


def _sum(draw: random.Random) -> Example:
    a, b = draw.randrange(100), draw.randrange(100)
    return Example(f"Question: {a} + {b}\nAnswer:", f" #### {a + b}")


def _colour(draw: random.Random) -> Example:
    choices = tuple(f" {colour}" for colour in COLOURS)
    right, number = draw.choice(choices), draw.randrange(1000)
    return Example(f"Question: box {number} is{right}\nAnswer:", right, choices)


def _letter(draw: random.Random) -> Example:
    letters = string.ascii_lowercase
    index, word = draw.randrange(25), "".join(draw.choices(letters, k=3))
    choices = tuple(f" {letter}" for letter in letters[max(0, index - 1) : index + 3])
    return Example(
        f"Question: {word}, after {letters[index]}\nAnswer:", f" {letters[index + 1]}", choices
    )


__all__ = ["METRICS", "MODEL", "load_model", "load_task", "load_text", "load_tokenizer"]
