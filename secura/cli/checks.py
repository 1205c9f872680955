"""What is looked at between making the trainer and the first step, while nothing is lost yet."""

from __future__ import annotations

import re
from collections.abc import Iterator
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


def check_names(model: Any, config: Any) -> None:
    """Refuses names of layers and parameters that the model, without adapter, has none of.

    Raises:
        UserError: names them, and the nearest name there is.
    """
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for field, among in (
        ("target_modules", modules),
        ("target_parameters", parameters),
        ("exclude_modules", modules),
        ("modules_to_save", modules),
    ):
        names = getattr(config, field)
        if isinstance(names, str):
            _check_pattern(field, names, model)
            continue
        for name in sorted(names or ()):
            _check_match(field, name, rf"(.*\.)?{re.escape(name)}", among)


def check_layers(model: Any, config: Any) -> None:
    """Refuses settings of layers that are not adapted, which PEFT passes over.

    Args:
        model: the model with the adapter on it.
        config: the adapter's config as it was asked for.

    Raises:
        UserError: names them, and the nearest name there is.
    """
    adapted = list(_adapted(model))
    for index in config.layers_to_transform or ():
        _check_match("layers_to_transform", index, rf".*\.{index}\..*", adapted)
    for name in config.rank_pattern:
        _check_match("rank_pattern", name, rf"(.*\.)?({name})", adapted)


def adapted_kinds(model: Any) -> list[str]:
    """Last names of the layers that a model's adapter is on, such as ``down_proj``."""
    return sorted({name.rpartition(".")[2] for name in _adapted(model)})


def _adapted(model: Any) -> Iterator[str]:
    from secura.tuner import SecuraLayer

    for name, module in model.get_base_model().named_modules():
        if isinstance(module, SecuraLayer):
            yield name


def _check_match(field: str, name: Any, pattern: str, among: list[str]) -> None:
    if any(re.fullmatch(pattern, full) for full in among):
        return
    known = {full.rpartition(".")[2] for full in among}
    kind = "parameter" if field == "target_parameters" else "layer"
    raise UserError(
        f"--{field}: {name!r} matches no {kind}; correct it or leave it out"
        f"{suggest(str(name), known)}"
    )


def _check_pattern(field: str, pattern: str, model: Any) -> None:
    if pattern == "all-linear" or any(re.fullmatch(pattern, n) for n, _ in model.named_modules()):
        return
    import torch

    from secura.bases import is_conv1d

    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or is_conv1d(module)
    }
    raise UserError(
        f"--{field}: {pattern!r} matches no layer of this model, whose linear layers are "
        f"{', '.join(sorted(found)) or 'none'}: name those to take in --{field}"
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


def not_rounded(training: Any, config: Any, model: Any) -> str | None:
    """Says that `--stochastic_rounding` acts in bf16 alone."""
    import torch

    if not config.stochastic_rounding or training.bf16 or model.dtype == torch.bfloat16:
        return None
    return (
        f"--stochastic_rounding changes nothing in {str(model.dtype).removeprefix('torch.')}: it "
        "rounds W' to bfloat16, in training with --bf16 and in a merge to it"
    )


__all__ = [
    "adapted_kinds",
    "check_layers",
    "check_lengths",
    "check_names",
    "left_out",
    "lost_rows",
    "not_rounded",
    "nothing_held",
    "number",
]
