"""Models, data and short Trainer runs for the tests of continual learning."""

from __future__ import annotations

from types import SimpleNamespace

import tiny
import torch
import trainer_runs
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from secura import anchor
from secura.continual import LongTermMemory

ADAPTERS = ("lora", "secura")


def adapted(kind: str = "lora", *, dropout: float = 0.0):
    """A tiny Llama with an adapter on q and v that changes what it computes; always the same."""
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    if kind == "secura":
        config = tiny.config(norm="channel", dropout=dropout)
    else:
        config = LoraConfig(**settings, lora_dropout=dropout, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.llama(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                noise = torch.randn(value.shape, generator=generator)
                value.add_(noise, alpha=0.1 if kind == "lora" else 0.7)
    return model


def cored(*, anchored: bool = True, **settings):
    """A tiny Llama with ``core="u"``, U still zero, anchored by text that it samples."""
    model = get_peft_model(tiny.llama(), tiny.config(core="u", norm="none", **settings))
    if anchored:
        anchor(model, tokens=64, length=16)
    return model


def parameters(model) -> dict[str, torch.Tensor]:
    """A copy of the trainable parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def rows(count: int = 24, length: int = 8, seed: int = 0) -> list[dict[str, list[int]]]:
    """Token ids, of which the first two are read and not scored; lengths differ by one."""
    ids = tiny.tokens(count, length, seed).tolist()
    ids = [row[: length - place % 2] for place, row in enumerate(ids)]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids]


def pad(features) -> dict[str, torch.Tensor]:
    """A collator: right-padded, with a mask."""
    longest = max(len(feature["input_ids"]) for feature in features)

    def fill(name, value):
        rows = [feature[name] + [value] * (longest - len(feature[name])) for feature in features]
        return torch.tensor(rows)

    ids = fill("input_ids", 0)
    return {
        "input_ids": ids,
        "labels": fill("labels", -100),
        "attention_mask": (ids != 0).long(),
    }


def trainer(folder, model, callbacks=(), *, collator=pad, **settings):
    settings = {"max_steps": 4, "learning_rate": 1e-2} | settings
    both = Dataset.from_list(rows()), Dataset.from_list(rows(4))
    return trainer_runs.trainer(folder, model, *both, callbacks, collator, **settings)


def begun(model, *, weight: float = 1.0, **settings) -> LongTermMemory:
    """A memory attached to the model as a Trainer would, its values a little off the model's."""
    memory = LongTermMemory(weight=weight)
    plain = {"torch_compile": False, "n_gpu": 0, "label_smoothing_factor": 0.0}
    args, state = SimpleNamespace(**(plain | settings)), SimpleNamespace(global_step=0)
    memory.on_train_begin(args, state, None, model=model)
    for place, value in enumerate(memory.values.values()):
        value += 0.05 * (1 + place % 3)
    return memory
