"""`secura train`: supervised fine-tuning with a SECURA adapter, on TRL's `SFTTrainer`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from secura._extras import require
from secura.cli import arguments
from secura.cli.data import load_split, to_training_columns
from secura.cli.errors import UserError, one_line
from secura.cli.folders import (
    ADAPTER_CONFIG,
    check_output_folder,
    checkpoints,
    publish,
    why_incomplete,
)
from secura.cli.models import load_model, load_tokenizer, resolve_model


def main(argv: list[str]) -> int:
    """Trains, and leaves a finished adapter in `--output_dir`."""
    if {"-h", "--help"} & set(argv):
        arguments.print_help()
        return 0
    if "--help_all" in argv:
        arguments.make_parser().print_help()
        return 0
    training, model_args, data_args, adapter_args = arguments.parse(argv)
    resume = resume_point(training, overwrite=data_args.overwrite_output_dir)
    config = arguments.to_secura_config(adapter_args, training.seed)
    if model_args.model_revision != "main":
        config.revision = model_args.model_revision
    loading = {
        "revision": model_args.model_revision,
        "trust_remote_code": getattr(training, "trust_remote_code", False),
    }
    tokenizer = load_tokenizer(model_args.model_name_or_path, **loading)
    train_set, eval_set = load_data(training, data_args, chat=bool(tokenizer.chat_template))
    model = load_model(
        model_args.model_name_or_path,
        dtype=model_args.dtype or ("bfloat16" if training.bf16 else "float32"),
        attn_implementation=model_args.attn_implementation,
        **loading,
    )
    trainer = make_trainer(
        model=model,
        args=training,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=callbacks(config),
    )
    trainer.accelerator.print(describe(trainer, config))
    if data_args.overwrite_output_dir and resume is None and trainer.is_world_process_zero():
        for old in checkpoints(Path(training.output_dir)):
            shutil.rmtree(old)
    result = trainer.train(resume_from_checkpoint=resume)
    save(trainer, model_args.model_name_or_path)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=data_args.dataset_name)
    seconds = result.metrics.get("train_runtime", 0.0)
    trainer.accelerator.print(
        f"secura: {trainer.state.global_step} steps in {seconds:.0f} s, mean training loss "
        f"{result.training_loss:.4f}; the adapter is in {training.output_dir}"
    )
    return 0


def resume_point(training: Any, *, overwrite: bool) -> str | None:
    """The checkpoint to go on from, or None to begin; refuses a folder with other work in it.

    Raises:
        UserError: the output folder is not empty, or there is no complete checkpoint to resume.
    """
    output, wanted = Path(training.output_dir), training.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "no", "none", "0"):
        if not overwrite and int(os.environ.get("RANK", "0")) == 0:
            check_output_folder(
                output,
                hint="choose another --output_dir, go on with --resume_from_checkpoint, or give "
                "--overwrite_output_dir",
            )
        return None
    if str(wanted).lower() not in ("true", "yes", "1"):
        if Path(wanted).resolve() == output.resolve():
            raise UserError(
                "--resume_from_checkpoint is the output folder itself; give it without a value, or "
                "name one of the checkpoint folders in it"
            )
        if reason := why_incomplete(Path(wanted)):
            raise UserError(f"cannot resume from {wanted}: {reason}")
        return str(wanted)
    reasons = []
    for checkpoint in reversed(checkpoints(output)):
        reason = why_incomplete(checkpoint)
        if reason is None:
            return str(checkpoint)
        reasons.append(f"{checkpoint.name}: {reason}")
    raise UserError(
        f"{output} has no complete checkpoint to resume from ({'; '.join(reasons) or 'none'}); "
        "leave out --resume_from_checkpoint to begin anew"
    )


def load_data(training: Any, data: Any, *, chat: bool) -> tuple[Any, Any]:
    """The training split, and the evaluation split where the trainer is to evaluate."""
    strategy = getattr(training.eval_strategy, "value", training.eval_strategy)
    splits = [data.dataset_train_split]
    if strategy != "no":
        splits.append(data.dataset_test_split)
    loaded = [
        to_training_columns(
            load_split(data.dataset_name, data.dataset_config, split),
            data.dataset_name,
            training.dataset_text_field,
            chat=chat,
        )
        for split in splits
    ]
    return loaded[0], (loaded[1] if len(loaded) > 1 else None)


def make_trainer(**kwargs: Any) -> Any:
    """TRL's `SFTTrainer`; a layer that cannot be adapted is the user's to mend."""
    try:
        return require("trl", "train").SFTTrainer(**kwargs)
    except TypeError as error:
        raise UserError(one_line(error)) from error


def callbacks(config: Any) -> list[Any]:
    """The fold callback where the config folds."""
    if not config.fold_every:
        return []
    return [require("secura.callbacks", "train").FoldCallback()]


def describe(trainer: Any, config: Any) -> str:
    """One line on what is about to be trained."""
    trainable, total = trainer.model.get_nb_trainable_parameters()
    return (
        f"secura: training {trainable:,} of {total:,} parameters on {trainer.args.device} "
        f"(r={config.r}, norm={config.norm}, {len(trainer.train_dataset):,} rows)"
    )


def save(trainer: Any, model_name: str) -> None:
    """Writes the finished adapter beside the checkpoints; no half of it is ever seen.

    A packaged model is named in the adapter by its short name, not by this machine's cache folder.
    """
    output = Path(trainer.args.output_dir)
    scratch = output / ".saving"
    if trainer.is_world_process_zero():
        shutil.rmtree(scratch, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(scratch))
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    (scratch / "training_args.bin").unlink(missing_ok=True)
    folder = resolve_model(model_name)
    if folder != str(Path(model_name).expanduser()) and folder != model_name:
        rename_base(scratch, folder, model_name)
    publish(scratch, output)


def rename_base(adapter: Path, folder: str, name: str) -> None:
    """Replaces the base's `folder` by its `name` in an adapter's config and model card."""
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = name
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    card = adapter / "README.md"
    if card.exists():
        card.write_text(card.read_text(encoding="utf-8").replace(folder, name), encoding="utf-8")
