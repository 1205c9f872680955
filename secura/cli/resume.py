"""Where `secura train` begins: anew, or at a checkpoint that was trained with the same settings."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from secura.cli.anchoring import SELF
from secura.cli.errors import UserError
from secura.cli.folders import (
    ADAPTER_CONFIG,
    TRAINER_STATE,
    check_output_folder,
    checkpoints,
    why_incomplete,
)

_FREE = (
    *("output_dir", "log", "report_to", "run_name", "project", "trackio_", "disable_tqdm"),
    *("include_num_input_tokens_seen", "debug", "skip_memory_metrics"),
    *("save_", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("enable_jit_checkpoint", "push_to_hub", "hub_"),
    *("eval_", "per_device_eval_batch_size", "do_", "prediction_loss_only", "batch_eval_metrics"),
    "include_for_metrics",
    *("max_steps", "num_train_epochs", "resume_from_checkpoint", "ignore_data_skip"),
    "restore_callback_states_from_checkpoint",
    *("per_device_train_batch_size", "gradient_accumulation_steps"),  # their product counts
    *("use_cpu", "local_rank", "ddp_", "fsdp", "deepspeed", "parallelism_config"),
    *("bf16", "fp16", "tf32", "full_determinism"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataset_num_proc"),
    *("gradient_checkpointing", "activation_", "torch_compile", "torch_empty_cache_steps"),
    *("use_liger_kernel", "liger_kernel_config", "use_cache", "padding_free"),
    "pad_to_multiple_of",
)
"""What begins the names of those fields of `SFTConfig` that a resumed run may change: where it
writes, what it tells, saves and evaluates, how long it goes on, the devices, and settings that
change nothing of what is learned, but for rounding."""

_NO_MATTER = {
    *("allow_inexact_merge", "anchored", "check_base", "merge_dequantized"),
    *("keep_columns", "share_inputs"),
}
"""Fields of `AdapterConfig` that change nothing of what is learned, but for rounding."""

_PLACES = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("target_parameters", "modules_to_save", "trainable_token_indices", "rank_pattern"),
}
"""Fields of `SecuraConfig` that say where an adapter is."""
_DATA = "data set"


def resume_point(training: Any, *, overwrite: bool) -> str | None:
    """The checkpoint to go on from, or None to begin; refuses a folder with other work in it.

    Raises:
        UserError: the output folder is not empty, or there is no complete checkpoint to resume.
    """
    output, wanted = Path(training.output_dir), training.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "no", "none", "0"):
        _refuse_other_work(output, overwrite=overwrite)
        return None
    if str(wanted).lower() not in ("true", "yes", "1"):
        if Path(wanted).resolve() == output.resolve():
            raise UserError(
                "--resume_from_checkpoint is the output folder itself; give it without a value, or "
                "name one of the checkpoint folders in it"
            )
        if reason := why_incomplete(Path(wanted)):
            raise UserError(f"cannot resume from {wanted}: {reason}")
        if not is_of(str(wanted), output):
            _refuse_other_work(output, overwrite=overwrite)
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


def is_of(checkpoint: str | None, output: Path) -> bool:
    """Whether a run that goes on from ``checkpoint`` is the one whose folder ``output`` is."""
    return checkpoint is not None and Path(checkpoint).parent.resolve() == output.resolve()


def _refuse_other_work(output: Path, *, overwrite: bool) -> None:
    if not overwrite and int(os.environ.get("RANK", "0")) == 0:
        check_output_folder(
            output,
            hint="choose another --output_dir, go on with its own --resume_from_checkpoint, or "
            "give --overwrite_output_dir",
        )


def settings(training: Any, config: Any, dataset: Any, data: Any) -> dict[str, Any]:
    """What has to be the same when a run is resumed, in JSON's types.

    Args:
        training: the `SFTConfig`.
        config: the adapter's, before it is put on a model.
        dataset: the training rows.
        data: the `DataArguments`, to name them.
    """
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    name = f"{data.dataset_name} ({data.dataset_train_split}, {len(dataset)} rows)"
    found = {
        **{key: getattr(config, key) for key in _learnt() | _PLACES},
        **{key: getattr(training, key) for key in _compared(training)},
        "batch size": batch * training.world_size,
        _DATA: [name, digest(dataset)],
    }
    return json.loads(json.dumps(found, default=_plain))


def _compared(training: Any) -> list[str]:
    """The fields of an `SFTConfig` that a resumed run may not change."""
    names = (entry.name for entry in fields(training) if entry.init)
    return [name for name in names if not name.startswith(_FREE)]


def _plain(value: Any) -> Any:
    """What stands in JSON for a value that it cannot hold."""
    return sorted(value) if isinstance(value, set) else str(value)


def _learnt() -> set[str]:
    from secura.config import AdapterConfig

    return {entry.name for entry in fields(AdapterConfig)} - _NO_MATTER


def digest(dataset: Any) -> str:
    """A checksum of a data set's rows, whatever the file they came from is called."""
    total = hashlib.sha256()
    for batch in dataset.with_format(None).iter(batch_size=1000):
        total.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return total.hexdigest()


def check_settings(checkpoint: str, now: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint that was trained with other settings.

    One saved without a record is compared by what its `adapter_config.json` says, and settings that
    a record lacks are not compared.

    Raises:
        UserError: names each setting, its former value and the new one.
    """
    from secura.cli.callbacks import recorded_settings

    folder = Path(checkpoint)
    before = recorded_settings(json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8")))
    if not before:
        saved = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        before = {name: saved[name] for name in _learnt() & saved.keys()}
    changes = [
        _change(name, before[name], now[name])
        for name in sorted(before.keys() & now.keys())
        if _content(name, before[name]) != _content(name, now[name])
    ]
    if changes:
        raise UserError(
            f"cannot resume from {checkpoint} with other settings: {'; '.join(changes)}: give the "
            "former ones, or begin anew in another --output_dir"
        )


def _content(name: str, value: Any) -> Any:
    """What counts of a setting: the rows of a data set, and not what a file of texts is called."""
    if name == "anchor" and value not in (None, SELF):
        return "a file, which is not read again"
    return value[1] if name == _DATA else value


def _change(name: str, before: Any, now: Any) -> str:
    if name == _DATA:
        before, now = before[0], now[0] + (" with other rows" if now[0] == before[0] else "")
        return f"the data set was {before} and is now {now}"
    return f"{name} was {before!r} and is now {now!r}"


def saved_rate(checkpoint: str) -> float:
    """The peak rate that the run of a checkpoint had.

    Raises:
        UserError: none is recorded.
    """
    from secura.cli.callbacks import recorded_settings

    state = (Path(checkpoint) / TRAINER_STATE).read_text(encoding="utf-8")
    rate = recorded_settings(json.loads(state)).get("learning_rate")
    if not isinstance(rate, float):
        raise UserError(f"{checkpoint} does not say its rate: give --learning_rate")
    return rate


def saved_step(folder: Path) -> int:
    """The step at which the adapter in a folder was saved; -1 where there is none."""
    try:
        (folder / ADAPTER_CONFIG).stat()
        return int(json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


__all__ = [
    "check_settings",
    "digest",
    "is_of",
    "resume_point",
    "saved_rate",
    "saved_step",
    "settings",
]
