"""`secura train`: supervised fine-tuning with a SECURA adapter, on TRL's `SFTTrainer`."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from secura._extras import require
from secura.cli import adapter_flags, anchoring, arguments, checks, hub, steps
from secura.cli import resume as resuming
from secura.cli.data import load_split, to_training_columns
from secura.cli.errors import UserError, one_line
from secura.cli.folders import (
    SUMS,
    TRAINER_STATE,
    checkpoints,
    record_sums,
    refuse_written_over,
    sole_use,
    why_incomplete,
)
from secura.cli.models import load_model, load_tokenizer, refuse_adapter
from secura.cli.resume import resume_point
from secura.cli.rows import holds_turns
from secura.folders import SCRATCH, clear, empty_scratch, move_out
from secura.names import is_own
from secura.wording import plain

_LITTLE = 2**24
"""Bytes left of a disk where what failed is taken to have failed for want of them."""
_PUBLISHED = (
    *("adapter_model.safetensors", "adapter_model.bin", "chat_template.jinja", "tokenizer.json"),
    *("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
)
"""What an older adapter's files are called, which a new one is not to be read with."""


def main(argv: list[str]) -> int:
    """Train, and leave a finished adapter in `--output_dir`."""
    if {"-h", "--help"} & set(argv):
        arguments.print_help()
        return 0
    if "--help_all" in argv:
        arguments.make_parser().print_help()
        return 0
    groups = arguments.parse(argv)
    first = int(os.environ.get("RANK", "0")) == 0
    with sole_use(Path(groups[0].output_dir)) if first else nullcontext():
        run(*groups)
    return 0


def run(
    training: Any, model_args: Any, data_args: Any, adapter_args: Any, anchor_args: Any
) -> None:
    """Train with parsed flags; the output folder is this run's alone."""
    named = {
        "--model": model_args.model_name_or_path,
        "--dataset": data_args.dataset_name,
        "--anchor": anchor_args.anchor,
    }
    refuse_written_over(Path(training.output_dir), named)
    resume = resume_point(training, overwrite=data_args.overwrite_output_dir)
    if training.learning_rate is None:
        steps.check_rate_asked(training, resumes=resume is not None)
        training.learning_rate = None if resume is None else resuming.saved_rate(resume)
    config = adapter_flags.to_secura_config(adapter_args, training.seed)
    anchoring.check(anchor_args, config, training, resumes=resume is not None)
    if model_args.model_revision != "main":
        config.revision = model_args.model_revision
    loading = {
        "revision": model_args.model_revision,
        "trust_remote_code": getattr(training, "trust_remote_code", False),
    }
    tokenizer, train_set, eval_set, unread = load_rows(training, model_args, data_args, loading)
    settings = resuming.settings(training, config, train_set, data_args) | vars(anchor_args)
    if resume is not None:
        resuming.check_settings(resume, settings)
    model = load_model(
        model_args.model_name_or_path,
        dtype=model_args.dtype or ("bfloat16" if training.bf16 else "float32"),
        attn_implementation=model_args.attn_implementation,
        **loading,
    )
    trainer = make_trainer(
        model=model,
        args=training,
        train_dataset=checks.number(train_set),
        eval_dataset=None if eval_set is None else checks.number(eval_set),
        processing_class=tokenizer,
        peft_config=config,
        callbacks=callbacks(config, anchor_args, settings, holding=model_args.hold_gradients),
    )
    send_buffers(trainer)
    gather_to_save(trainer)
    sum_checkpoints(trainer)
    checks.check_lengths(trainer)
    holding = model_args.hold_gradients
    notes = checks.notes(trainer, train_set, eval_set, config=config, holding=holding)
    steps.check_batches(trainer)
    chosen = steps.choose_rate(trainer) if trainer.args.learning_rate is None else None
    anchoring.check_pull(anchor_args, trainer.args.learning_rate)
    steps.check_optimizer(trainer)
    for note in filter(None, (unread, *notes, *steps.unread_settings(trainer))):
        trainer.accelerator.print(f"secura: note: {note}")
    trainer.accelerator.print(describe(trainer, config))
    if chosen is not None:
        trainer.accelerator.print(chosen)
    for line in anchoring.begin(trainer, anchor_args, config, training.seed, resumed=bool(resume)):
        trainer.accelerator.print(line)
    output = Path(training.output_dir)
    anew = data_args.overwrite_output_dir and not resuming.is_of(resume, output)
    if anew and trainer.is_world_process_zero():
        for old in checkpoints(output):
            clear(old)
        (output / TRAINER_STATE).unlink(missing_ok=True)  # else its adapter counts as this run's
    trainer.accelerator.print(train(trainer, resume))
    if training.push_to_hub:
        hub.push(trainer)


def train(trainer: Any, resume: str | None) -> str:
    """Train and publish, and say in one line what came of it.

    Raises:
        UserError: training diverged, or the disk is full; nothing is published, and the checkpoints
            before stay.
    """
    from secura.cli.callbacks import DivergedError, FinishedError

    output = Path(trainer.args.output_dir)
    before = resuming.saved_step(Path(resume)) if resume else 0
    try:
        with closed_progress(trainer):
            result = trainer.train(resume_from_checkpoint=resume)
    except FinishedError as finished:
        if (
            resuming.is_of(resume, output)
            and resuming.saved_step(output) >= trainer.state.global_step
        ):
            return f"secura: {finished}; the adapter in {output} stays as it is"
        best = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint
        if best:
            trainer._load_best_model()
        save(trainer)
        which = f"the adapter of {best or resume}{_without_best(trainer)}"
        return f"secura: {finished}; {which} is in {output}"
    except DivergedError as error:
        kept = checkpoints(output)
        raise UserError(
            f"{error}; nothing was published"
            + (f", and {kept[-1]} is the last checkpoint before it" if kept else "")
            + "; begin anew with a lower --learning_rate, with --warmup_steps or --max_grad_norm 1"
        ) from error
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise UserError(str(error.args[0])) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(output).free >= _LITTLE:
            raise
        kept = [path for path in checkpoints(output) if why_incomplete(path) is None]
        raise UserError(
            f"the disk of {output} is full ({one_line(error)})"
            + (f"; {kept[-1]} is the last whole checkpoint" if kept else "")
            + "; make room, and "
            + ("go on with --resume_from_checkpoint" if kept else "begin again")
        ) from error
    taken = trainer.state.global_step - before
    if taken < 1:
        raise UserError("no step was taken, so nothing was learned or published")
    save(trainer)
    seconds = result.metrics.get("train_runtime", 0.0)
    return (
        f"secura: {taken} steps in {seconds:.0f} s, mean training loss {result.training_loss:.4f}"
        f"{_decayed(trainer)}; the adapter{_without_best(trainer)} is in {output}"
    )


def _without_best(trainer: Any) -> str:
    """That the last step's adapter is published in the place of the best one's, where it is."""
    state = trainer.state
    if not trainer.args.load_best_model_at_end or state.best_model_checkpoint:
        return ""
    step = state.best_global_step
    return f" (the last one's: of step {step}, the best, there is no checkpoint)" if step else ""


def _decayed(trainer: Any) -> str:
    """What the run's length made of the decay of an anchored core, where no flag said."""
    from secura.continual import AnchorDecayCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, AnchorDecayCallback) and callback.anchor_decay is None:
            return f", anchor_decay {callback.decay:.3g}"
    return ""


@contextmanager
def closed_progress(trainer: Any) -> Iterator[None]:
    """End the progress bar's line where training ends by an error, so that it has its own."""
    try:
        yield
    except BaseException:
        for callback in trainer.callback_handler.callbacks:
            if getattr(callback, "training_bar", None) is not None:
                callback.on_train_end(trainer.args, trainer.state, trainer.control)
        raise


def load_rows(training: Any, model_args: Any, data_args: Any, loading: dict[str, Any]) -> tuple:
    """The tokenizer, and what `load_data` gives for it.

    Raises:
        UserError: the model is an adapter, or the rows hold messages and nothing has a template.
    """
    name = model_args.model_name_or_path
    refuse_adapter(name, model_args.model_revision)
    tokenizer = load_tokenizer(name, **loading)
    chat = bool(tokenizer.chat_template or training.chat_template_path)
    train_set, eval_set, unread = load_data(training, data_args, chat=chat)
    if not chat and holds_turns(train_set, train_set.column_names[0]):
        raise UserError(
            f"{data_args.dataset_name} holds messages, and the tokenizer of {name} no chat "
            "template: give one with --chat_template_path"
        )
    return tokenizer, train_set, eval_set, unread


def load_data(training: Any, data: Any, *, chat: bool) -> tuple[Any, Any, str | None]:
    """The training split, the evaluation split where there is to be one, and a note on columns."""
    strategy = plain(training.eval_strategy)
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
    (train_set, unread), *others = loaded
    return train_set, (others[0][0] if others else None), unread


def make_trainer(**kwargs: Any) -> Any:
    """TRL's `SFTTrainer`; what it cannot take of layers and rows is the user's to mend."""
    from secura.tuner import UnmatchedWarning

    trl, jinja2 = require("trl", "train"), require("jinja2", "train")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnmatchedWarning)
            return trl.SFTTrainer(**kwargs)
    except UnmatchedWarning as error:
        raise UserError(f"--{error}") from error
    except (TypeError, jinja2.TemplateError) as error:
        raise UserError(one_line(error)) from error


def send_buffers(trainer: Any) -> None:
    """Send the first process's rows, columns and the like to the others: DDP then sends none.

    Machines of different kinds may choose differently where weights are nearly equal.
    """
    import torch

    if trainer.accelerator.distributed_type.value.startswith("MULTI_"):
        for name, buffer in trainer.model.named_buffers():
            if is_own(name):
                sent = buffer.contiguous()
                torch.distributed.broadcast(sent, 0)
                buffer.copy_(sent)


def gather_to_save(trainer: Any) -> None:
    """Have FSDP save whole tensors: of FSDP2's default, shards alone, no adapter is written.

    FSDP1 is kept from casting buffers: U_acc stays fp32.
    """
    import torch

    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if getattr(policy, "buffer_dtype", None) is not None:
        policy.buffer_dtype = torch.float32
    if plugin is not None:
        plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of shards
        plugin.set_state_dict_type("FULL_STATE_DICT")


def sum_checkpoints(trainer: Any) -> None:
    """Have a trainer record each checkpoint's checksums, and forget those of one saved again.

    Whoever saves it: transformers' `--enable_jit_checkpoint` does so between the steps.
    """
    save = trainer._save_checkpoint

    def summed(*args: Any, **kwargs: Any) -> None:
        folder = Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")
        first = trainer.is_world_process_zero()
        if first:
            (folder / SUMS).unlink(missing_ok=True)
        save(*args, **kwargs)
        if first and folder.is_dir():
            record_sums(folder)

    trainer._save_checkpoint = summed


def callbacks(
    config: Any, anchor_args: Any, settings: dict[str, Any], *, holding: bool = False
) -> list[Any]:
    """What runs beside the trainer: decay, fold and the like where asked for, then the checks."""
    from secura import AccumulateCallback, FoldCallback
    from secura.cli import callbacks as own
    from secura.continual import AnchorDecayCallback

    decay = [AnchorDecayCallback(anchor_args.anchor_decay)] if anchor_args.decays else []
    folding = [FoldCallback()] if config.fold_every else []
    accumulating = [AccumulateCallback()] if holding else []
    return [
        own.SettingsCallback(**settings),
        own.FinishedCallback(),
        *decay,
        *folding,
        *accumulating,
        own.FiniteCallback(),
    ]


def describe(trainer: Any, config: Any) -> str:
    """One line on what is about to be trained."""
    trainable, total = trainer.model.get_nb_trainable_parameters()
    return (
        f"secura: training {trainable:,} of {total:,} parameters on {trainer.args.device} "
        f"(r={config.r}, norm={config.norm}, on {' '.join(checks.adapted_kinds(trainer.model))}; "
        f"{len(trainer.train_dataset):,} rows)"
    )


def save(trainer: Any) -> None:
    """Write the finished adapter beside the checkpoints; no half of it is ever seen."""
    output = Path(trainer.args.output_dir)
    scratch = output / SCRATCH
    if trainer.is_world_process_zero():
        empty_scratch(output)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(scratch), _internal_call=True)  # else it uploads the scratch folder
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    (scratch / "training_args.bin").unlink(missing_ok=True)
    trainer.state.save_to_json(str(scratch / TRAINER_STATE))
    move_out(scratch, output, replaces=_PUBLISHED)


__all__ = ["gather_to_save", "main", "make_trainer", "save", "sum_checkpoints", "train"]
