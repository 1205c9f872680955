"""A short run of transformers' Trainer on the CPU, and the losses it logged."""

from __future__ import annotations

from transformers import Trainer, TrainingArguments


def trainer(folder, model, train, evaluation, callbacks=(), collator=None, **settings) -> Trainer:
    """Batches of four, every loss logged, nothing saved unless ``settings`` say so."""
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return Trainer(
        model=model, args=TrainingArguments(**(arguments | settings)), train_dataset=train,
        eval_dataset=evaluation, data_collator=collator, callbacks=list(callbacks),
    )  # fmt: skip


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]
