"""A two-layer model with random weights and made-up tasks: the experiment in seconds."""

from __future__ import annotations

import random
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.retention.cells import Cell, Settings
from benchmarks.retention.data import Example, Split

COLOURS = (" red", " green", " blue", " white")
TASKS = ("sums", "colours")


def save_model(folder: Path, width: int = 32) -> None:
    """Llama's architecture, two layers of `width`; one token a printable character."""
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(string.printable) + 3,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {letter: 3 + i for i, letter in enumerate(string.printable)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def load_task(name: str) -> Split:
    """Sums to complete, or the colour that was named."""
    draw = random.Random(name)
    make = {"sums": _sum, "gsm8k": _sum, "colours": _colour}[name]
    examples = list(dict.fromkeys(make(draw) for _ in range(80)))
    return Split(tuple(examples[16:]), tuple(examples[:16]))


def load_probe(name: str) -> tuple[Example, ...]:
    """Colours."""
    return load_task("colours").held_out


def load_texts(kind: str) -> tuple[str, ...]:
    """Random words."""
    words = random.Random(kind)
    return tuple(
        " ".join("".join(words.choices(string.ascii_lowercase, k=4)) for _ in range(8))
        for _ in range(12)
    )


def settings(folder: Path, **changed) -> Settings:
    """Of a stage on the model in `folder`."""
    return Settings(
        **{
            "model": str(folder),
            "tasks": TASKS,
            "texts": ("news", "code"),
            "probes": ("letters",),
            "batch_size": 2,
            "held_out": 6,
            "text_count": 4,
            "text_tokens": 24,
            "probe_questions": 4,
            "samples": 6,
            "sample_tokens": 16,
            "save_every": 2,
        }
        | changed
    )


def cell(method: str = "lora", targets: str = "qv", rate: float = 1e-2, **more) -> Cell:
    """A short cell."""
    return Cell(method, targets, rate, **({"seed": 0, "tasks": ("sums",), "steps": 4} | more))


def _sum(draw: random.Random) -> Example:
    a, b = draw.randrange(100), draw.randrange(100)
    return Example(f"Question: {a} + {b}\nAnswer:", f" #### {a + b}")


def _colour(draw: random.Random) -> Example:
    right, number = draw.choice(COLOURS), draw.randrange(1000)
    return Example(f"Question: box {number} is{right}\nAnswer:", right, COLOURS)
