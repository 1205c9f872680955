"""One cell: train on its last task from where the cell before it ended, then score everything."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from secura._extras import require
from secura.cli.folders import checkpoints, complete_folder
from secura.experiments.grid import Cell
from secura.experiments.material import Material
from secura.experiments.methods import get_method
from secura.experiments.probes import NORMS, DivergedError, GradientNorms, Steps
from secura.experiments.store import MODEL
from secura.experiments.strategies import STRATEGIES, Context, Strategy

TRAINER = "trainer"
WARMUP_SHARE = 0.1
SCORING_BATCH = 64


def train(
    cell: Cell,
    material: Material,
    folder: Path,
    parent: Path | None,
    on_step: Callable[[int], None],
) -> tuple[Any, Strategy, dict[str, Any]]:
    """Trains a cell's method on its last task, going on from the last checkpoint in `folder`.

    Args:
        cell: a cell with tasks.
        material: model and data.
        folder: the cell's.
        parent: the folder of the cell it starts from; None for the base model.
        on_step: called with the optimizer steps done.

    Returns:
        The trained model, its strategy, and the figures of its training.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    transformers = require("transformers", "experiments")
    method = get_method(cell.method)
    transformers.set_seed(cell.seed)
    model = build(cell, material, parent)
    trainable = [p for p in model.parameters() if p.requires_grad]
    features, _ = material.train_features(cell.tasks[-1], cell.seed)
    strategy = STRATEGIES[method.strategy](Context(cell, material, model, folder, parent))
    norms = GradientNorms()
    trainer = transformers.Trainer(
        model=model,
        args=training_arguments(cell, material, folder / TRAINER),
        train_dataset=features,
        data_collator=strategy.wrap(
            transformers.DataCollatorForSeq2Seq(material.tokenizer, label_pad_token_id=-100)
        ),
        callbacks=[*strategy.callbacks, norms, Steps(on_step)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_checkpoint(folder / TRAINER))
    seconds = time.perf_counter() - start
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in logs]
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise DivergedError(f"the loss became {loss} at step {step}")
    figures = {
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "trainable_parameters": sum(p.numel() for p in trainable),
        "loss": losses,
        **norms.figures(),
    }
    return model, strategy, figures


def build(cell: Cell, material: Material, parent: Path | None) -> Any:
    """The model a cell trains: the base, or what its parent left, with the method's adapter."""
    method = get_method(cell.method)
    before = str(parent / MODEL) if parent else None
    if method.make_config is None:
        return material.load_model(before).float()
    peft = require("peft", "experiments")
    require("secura.tuner", "experiments")
    config = method.make_config(material.settings, cell.seed)
    base = material.load_model()
    if before is None:
        model = peft.get_peft_model(base, config)
    else:  # the parent may be another method's cell: its config is not this one's
        model = peft.PeftModel.from_pretrained(base, before, config=config, is_trainable=True)
        if method.folds:
            require("secura", "experiments").fold(model)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in method.frozen:
            parameter.requires_grad_(False)
    return model


def training_arguments(cell: Cell, material: Material, folder: Path) -> Any:
    """How the trainer runs a cell: AdamW, warm-up over a tenth, cosine decay, no clipping."""
    settings = material.settings
    return require("transformers", "experiments").TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // material.processes,
        learning_rate=cell.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARMUP_SHARE * settings.steps),
        weight_decay=0.0,
        max_grad_norm=0.0,
        bf16=settings.dtype == "bf16",
        use_cpu=material.device == "cpu",
        seed=cell.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_timeout=24 * 3600,
    )


def last_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint in `folder`; what a stop left half written is removed."""
    for checkpoint in reversed(checkpoints(folder)):
        if (checkpoint / NORMS).is_file():  # written last
            return str(checkpoint)
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def finish(model: Any, strategy: Strategy, folder: Path) -> None:
    """Keeps the trained model for the cells that go on from it."""
    shutil.rmtree(folder / MODEL, ignore_errors=True)
    with complete_folder(folder / MODEL) as scratch:
        model.save_pretrained(scratch)
    strategy.finish(folder)


@contextmanager
def merged_where_exact(model: Any) -> Iterator[None]:
    """Meanwhile the norm's W' stands in the weights: unmerged, `weight` forms it at every token.

    Both round the same fp32 W' to the weights' dtype. The other spaces are left as they are: merged
    into bf16 they would be rounded, unmerged they are not.
    """
    configs = getattr(model, "peft_config", {}).values()
    if all(getattr(config, "norm", None) != "weight" for config in configs):
        yield
        return
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


def score(cell: Cell, model: nn.Module, material: Material, on_part: Callable[[], None]) -> dict:
    """Every task, every probe and general text, scored with the model as it was trained."""
    with merged_where_exact(model):
        return _score(cell, model, material, on_part)


def _score(cell: Cell, model: nn.Module, material: Material, on_part: Callable[[], None]) -> dict:
    from secura.experiments.evaluate import Scorer

    settings = material.settings
    scorer = Scorer(model, material.tokenizer, batch_size=SCORING_BATCH, dtype=settings.dtype)
    scores = {}
    for name in material.scored:
        metric, longest = material.metric(name)
        scores[name] = scorer.score(material.task(name, cell.seed).test, metric, longest)
        on_part()
    text = scorer.perplexity(material.text, settings.text_tokens)
    on_part()
    figures: dict[str, Any] = {"scores": scores, "text": text}
    if cell.tasks:
        held = material.train_features(cell.tasks[-1], cell.seed)[1]
        figures["validation_loss"] = scorer.loss(held)
        on_part()
    return figures


def spectra(cell: Cell, model: nn.Module, material: Material) -> list[dict[str, Any]]:
    """What training did to the weights of the targeted layers."""
    from secura.experiments.spectra import spectra as compare

    trains_all = get_method(cell.method).make_config is None
    before = material.load_model().state_dict() if trains_all else None
    return compare(model, before, material.settings.target_modules)


def clean(folder: Path) -> None:
    """Removes what was kept to resume a cell that is now done."""
    shutil.rmtree(folder / TRAINER, ignore_errors=True)


__all__ = [
    "DivergedError",
    "build",
    "clean",
    "finish",
    "last_checkpoint",
    "merged_where_exact",
    "score",
    "train",
]
