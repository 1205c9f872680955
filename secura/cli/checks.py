"""What is looked at between making the trainer and the first step, while nothing is lost yet."""

from __future__ import annotations

import re
from typing import Any

from secura._extras import require
from secura.cli.errors import UserError, suggest
from secura.cli.rows import listed

_NUMBER = "secura_row"


def number(dataset: Any) -> Any:
    """The data set with its rows numbered, for `lost_rows`."""
    return dataset.add_column(_NUMBER, list(range(1, len(dataset) + 1)))


def lost_rows(trainer: Any, given: Any) -> str | None:
    """Says which rows TRL dropped because nothing of them is left to learn; unnumbers the others.

    Raises:
        UserError: no row is left.
    """
    dataset, length = trainer.train_dataset, trainer.args.max_length
    if len(dataset) == 0:
        raise UserError(
            f"none of the {len(given)} rows has anything left to learn within --max_length {length}"
            ": raise it, or shorten the prompts"
        )
    if _NUMBER not in dataset.column_names:  # packed, where rows are not dropped
        return None
    kept = set(dataset[_NUMBER])
    trainer.train_dataset = dataset.remove_columns(_NUMBER)
    lost = [row for row in range(1, len(given) + 1) if row not in kept]
    if not lost:
        return None
    return (
        f"{len(lost)} of {len(given)} rows have nothing left to learn within --max_length {length} "
        f"and are left out ({listed(lost)}); raise it, or shorten their prompts"
    )


def check_lengths(trainer: Any) -> None:
    """Refuses rows longer than the model has positions for.

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


def check_targets(model: Any, config: Any) -> None:
    """Refuses names and indices that match no layer, which PEFT passes over beside others.

    Args:
        model: the model with the adapter on it.
        config: the adapter's config as it was asked for.

    Raises:
        UserError: names them, and the nearest name there is.
    """
    from secura.tuner import SecuraLayer

    named = list(model.get_base_model().named_modules())
    modules = [name.replace(".base_layer", "") for name, _ in named]
    adapted = [name for name, module in named if isinstance(module, SecuraLayer)]
    own = model.get_base_model().named_parameters()
    parameters = [name.replace(".base_layer", "") for name, _ in own]
    asked = (
        ("target_modules", config.target_modules, modules, r"(.*\.)?{}"),
        ("target_parameters", config.target_parameters, parameters, r"(.*\.)?{}"),
        ("exclude_modules", config.exclude_modules, modules, r"(.*\.)?{}"),
        ("modules_to_save", config.modules_to_save, modules, r"(.*\.)?{}"),
        ("layers_to_transform", config.layers_to_transform, adapted, r".*\.{}\..*"),
        ("rank_pattern", config.rank_pattern, adapted, None),
    )
    for field, names, among, pattern in asked:
        for name in () if isinstance(names, str) else sorted(names or ()):
            wanted = pattern.format(re.escape(str(name))) if pattern else rf"(.*\.)?({name})"
            if any(re.fullmatch(wanted, full) for full in among):
                continue
            known = {full.rpartition(".")[2] for full in among}
            kind = "parameter" if among is parameters else "layer"
            raise UserError(
                f"--{field}: {name!r} matches no {kind}; correct it or leave it out"
                f"{suggest(str(name), known)}"
            )


def nothing_held(training: Any, *, holding: bool) -> str | None:
    """Says that `--hold_gradients` has nothing to hold from one backward pass to another."""
    several = training.gradient_accumulation_steps > 1 or training.gradient_checkpointing
    if several or not holding:
        return None
    return (
        "--hold_gradients changes nothing with one backward pass a step: give "
        "--gradient_accumulation_steps above 1, or leave it out"
    )


def left_out(model: Any, config: Any) -> str | None:
    """Says which large weights `all-linear` cannot reach: experts kept as 3-d parameters."""
    if config.target_modules != "all-linear" or config.target_parameters:
        return None
    import torch

    stacked = {
        name: value
        for name, value in model.get_base_model().named_parameters()
        if value.dim() == 3 and ".secura_adapter." not in name
    }
    owners = dict(model.get_base_model().named_modules())
    conv = torch.nn.modules.conv._ConvNd
    found = {
        name: value
        for name, value in stacked.items()
        if not isinstance(owners[name.rpartition(".")[0]], conv)
    }
    if not found:
        return None
    share = sum(value.numel() for value in found.values())
    total = sum(value.numel() for value in model.get_base_model().parameters())
    return (
        f"{len(found)} stacked weights of experts, such as {next(iter(found))}, are no linear "
        f"layers: all-linear leaves them as they are ({share / total:.0%} of the parameters); to "
        "adapt them, name them in --target_parameters; to train such a module in full, name it in "
        "--modules_to_save"
    )


__all__ = ["check_lengths", "check_targets", "left_out", "lost_rows", "nothing_held", "number"]
