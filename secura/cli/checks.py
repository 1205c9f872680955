"""Checks and notes between making the trainer and the first step, while nothing is lost yet."""

from __future__ import annotations

import math
from typing import Any

from secura._extras import require
from secura.cli.errors import UserError
from secura.cli.rows import listed
from secura.wording import plain

_NUMBER = "secura_row"
_LOOKED_AT = 256
"""How many rows `never_ends` reads."""


def notes(
    trainer: Any, train_set: Any, eval_set: Any, *, config: Any, holding: bool
) -> tuple[str | None, ...]:
    """What a user should know of a run before its first step; None for what there is not.

    Args:
        trainer: TRL's.
        train_set: the rows it was given, numbered by `number`.
        eval_set: the same to evaluate, or None.
        config: the adapter's, as PEFT filled it in.
        holding: whether `--hold_gradients` was.

    Raises:
        UserError: nothing is left to learn of the rows.
    """
    return (
        lost_rows(trainer, train_set),
        lost_rows(trainer, eval_set, "eval"),
        cut_rows(trainer),
        never_ends(trainer),
        never_evaluated(trainer.args),
        nothing_held(trainer.args, holding=holding),
        not_rounded(trainer.args, config, trainer.model),
    )


def number(dataset: Any) -> Any:
    """The data set with its rows numbered, for `lost_rows`."""
    return dataset.add_column(_NUMBER, list(range(1, len(dataset) + 1)))


def lost_rows(trainer: Any, given: Any, which: str = "train") -> str | None:
    """Say which rows TRL dropped because nothing of them is left to learn; unnumber the others.

    Args:
        trainer: TRL's, whose data set loses the numbers.
        given: the rows it was given, or None.
        which: ``"train"`` or ``"eval"``.

    Raises:
        UserError: no row is left, or nothing to learn in packed ones.
    """
    dataset, length = getattr(trainer, f"{which}_dataset"), trainer.args.max_length
    if given is None:
        return None
    rows = f"{len(given)} {'evaluation ' * (which == 'eval')}rows"
    if len(dataset) == 0 or not _learns(dataset):
        raise UserError(
            f"none of the {rows} has anything left to learn within --max_length {length}: raise "
            "it, or shorten the prompts"
        )
    if _NUMBER not in dataset.column_names:  # packed: what is cut off is lost within a row
        return None
    kept = set(dataset[_NUMBER])
    setattr(trainer, f"{which}_dataset", dataset.remove_columns(_NUMBER))
    lost = [row for row in range(1, len(given) + 1) if row not in kept]
    if not lost:
        return None
    return (
        f"{len(lost)} of {rows} have nothing left to learn within --max_length {length} and are "
        f"left out ({listed(lost)}); raise it, or shorten their prompts"
    )


def cut_rows(trainer: Any) -> str | None:
    """Say how many rows are as long as `--max_length` allows, and so most likely cut there."""
    dataset, length = trainer.train_dataset, trainer.args.max_length
    if length is None or "input_ids" not in dataset.column_names or trainer.args.packing:
        return None
    compute = require("pyarrow.compute", "train")
    count = 0
    for batch in dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
        lengths = compute.list_value_length(batch.column("input_ids"))
        count += compute.sum(compute.greater_equal(lengths, length)).as_py() or 0
    if not count:
        return None
    return (
        f"{count} of {len(dataset)} rows are as long as --max_length {length} allows: what was cut "
        "off their ends is not learned; raise it to keep that"
    )


def never_ends(trainer: Any) -> str | None:
    """Say that no row holds a token at which generation stops, so that none is learned."""
    dataset, tokenizer = trainer.train_dataset, trainer.processing_class
    if "input_ids" not in dataset.column_names:
        return None
    found = getattr(trainer.model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])} - {None}
    column = "labels" if "labels" in dataset.column_names else "input_ids"
    rows = dataset[: min(_LOOKED_AT, len(dataset))][column]
    if not trainer.args.packing:  # whose ends were not cut
        rows = [row for row in rows if len(row) < (trainer.args.max_length or math.inf)]
    if not rows or any(ends & set(row) for row in rows):
        return None
    return (
        f"no row holds {tokenizer.eos_token!r}, at which an answer stops: answers will run on to "
        "--max_new_tokens; give the token that ends a turn, such as --eos_token '<|im_end|>'"
    )


def _learns(dataset: Any) -> bool:
    """Whether a token is left to learn; True where TRL made no column of them."""
    if "labels" not in dataset.column_names:
        return True
    compute = require("pyarrow.compute", "train")
    rows = dataset.select_columns("labels").with_format("arrow").iter(batch_size=1000)
    most = (compute.max(compute.list_flatten(batch.column("labels"))).as_py() for batch in rows)
    return any(label is not None and label >= 0 for label in most)


def check_lengths(trainer: Any) -> None:
    """Refuse rows longer than the model has positions for.

    Raises:
        UserError: names the longest row's tokens and the model's positions.
    """
    config = trainer.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        if dataset is None or "input_ids" not in dataset.column_names:
            continue
        longest = _longest(dataset)
        if longest > positions:
            raise UserError(
                f"the longest row has {longest} tokens, and the model {positions} positions: give "
                f"--max_length {positions} or less"
            )


def _longest(dataset: Any) -> int:
    """Tokens of the longest row; of the longest sequence in a row where rows are packed."""
    compute = require("pyarrow.compute", "train")
    packed = "seq_lengths" in dataset.column_names
    column = "seq_lengths" if packed else "input_ids"
    longest = 0
    for batch in dataset.select_columns(column).with_format("arrow").iter(batch_size=1000):
        values = batch.column(column)
        lengths = compute.list_flatten(values) if packed else compute.list_value_length(values)
        longest = max(longest, compute.max(lengths).as_py() or 0)
    return longest


def adapted_kinds(model: Any) -> list[str]:
    """Last names of the layers that a model's adapter is on, such as ``down_proj``."""
    from secura.layers import secura_layers

    return sorted({name.rpartition(".")[2] for name in secura_layers(model)})


def nothing_held(training: Any, *, holding: bool) -> str | None:
    """Say that `--hold_gradients` has nothing to hold from one backward pass to another."""
    several = training.gradient_accumulation_steps > 1 or training.gradient_checkpointing
    if several or not holding:
        return None
    return (
        "--hold_gradients changes nothing with one backward pass a step: give "
        "--gradient_accumulation_steps above 1, or leave it out"
    )


def never_evaluated(training: Any) -> str | None:
    """Say that `--eval_steps` or `--load_best_model_at_end` alone evaluates nothing."""
    strategy = plain(training.eval_strategy)
    if strategy != "no":
        return None
    if training.load_best_model_at_end:
        return "--load_best_model_at_end has no best without --eval_strategy steps or epoch"
    if training.eval_steps is None:
        return None
    return "--eval_steps evaluates nothing without --eval_strategy steps"


def not_rounded(training: Any, config: Any, model: Any) -> str | None:
    """Say that `--stochastic_rounding` acts in bf16 alone."""
    import torch

    if not config.stochastic_rounding or training.bf16 or model.dtype == torch.bfloat16:
        return None
    return (
        f"--stochastic_rounding changes nothing in {str(model.dtype).removeprefix('torch.')}: it "
        "rounds W' to bfloat16, in training with --bf16 and in a merge to it"
    )


__all__ = ["adapted_kinds", "check_lengths", "notes", "number"]
