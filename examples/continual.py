"""Learn two tasks in turn with one SECURA adapter: fold after the first, then replay and EWC.

Run it: python examples/continual.py --steps 60
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers import default_data_collator as collate

from secura import FoldCallback, SecuraConfig
from secura.continual import EWCCallback, Fisher, ReplayBuffer, ReplayCollator


def task(step: int) -> Dataset:
    """Walks around a circle of seven tokens, `step` at a time."""
    ids = [[3 + (start + step * place) % 7 for place in range(12)] for start in range(7)] * 8
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def loss(model: torch.nn.Module, dataset: Dataset) -> float:
    """The model's mean loss on a task."""
    return model.eval()(**collate(list(dataset))).loss.item()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train on both tasks; return the first one's loss before, after it, and after the second."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps a task")
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    size = {"hidden_size": 48, "intermediate_size": 96, "vocab_size": 16, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, initializer_range=0.2))
    model = get_peft_model(base, SecuraConfig(r=16, norm="channel", target_modules="all-linear"))
    first, second = task(1), task(2)

    def train(dataset, collator, callback):
        flags = {"use_cpu": True, "save_strategy": "no", "report_to": [], "learning_rate": 0.02}
        arguments = TrainingArguments(tempfile.mkdtemp(), max_steps=steps, **flags)
        Trainer(model, arguments, collator, dataset, callbacks=[callback]).train()

    losses = {"before": loss(model, first)}
    train(first, collate, FoldCallback(fold_every=steps))  # folds once, after the last step
    losses["after the first"] = loss(model, first)
    fisher = Fisher.estimate(model, [collate([row]) for row in first.select(range(7))])
    memory = ReplayBuffer([list(first)], size=14)
    train(second, ReplayCollator(collate, memory, share=0.2), EWCCallback(fisher, ewc_lambda=10.0))
    losses["after the second"] = loss(model, first)
    print("loss of the first task:", {name: round(value, 3) for name, value in losses.items()})
    return losses


if __name__ == "__main__":
    main()
