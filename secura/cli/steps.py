"""Checks of what a step is made of: the flags' numbers, the batches, optimizer and schedule."""

from __future__ import annotations

import copy
import math
from typing import Any

from secura._extras import require
from secura.cli.errors import UserError, one_line
from secura.wording import plain

_RATE_OF_WEIGHTS = 2e-4
"""Taken where weights themselves are trained too, which the rate of adapters might move too far."""
_MOVE_BY_THE_RATE = ("adam", "adem", "lion")
"""Stand in the names of those of transformers' optimizers that move every entry by the rate."""
_INFINITY = float("inf")
_LAYERWISE = "_layerwise"
_AT_LEAST = {
    "weight_decay": 0.0,
    "neftune_noise_alpha": 0.0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}


def check_numbers(parsed: Any) -> None:
    """Refuse numbers of `SFTConfig` that would fail late, teach nothing, or undo what is learned.

    Raises:
        UserError: names the flag, its value and what it has to be.
    """
    if parsed.max_steps == 0 or parsed.max_steps < -1:
        raise UserError(
            f"--max_steps {parsed.max_steps} must be 1 or more; leave it out to train for "
            "--num_train_epochs"
        )
    if parsed.num_train_epochs <= 0 and parsed.max_steps < 0:
        raise UserError(f"--num_train_epochs {parsed.num_train_epochs:g} must be above 0")
    rate = parsed.learning_rate
    if rate is not None and not 0 < rate < _INFINITY:
        raise UserError(f"--learning_rate {rate} must be above 0, and finite")
    for name, least in _AT_LEAST.items():
        value = getattr(parsed, name)
        if value is not None and not least <= value < _INFINITY:
            raise UserError(f"--{name} {value} must be {least:g} or more, and finite")
    if not 0 <= parsed.label_smoothing_factor < 1:
        raise UserError(
            f"--label_smoothing_factor {parsed.label_smoothing_factor} must be from 0 to below 1"
        )


def check_rate_asked(training: Any, *, resumes: bool) -> None:
    """Refuse what needs the rate before there are weights to say it, where no flag does.

    A run that ``resumes`` goes on with its own, whatever the optimizer.

    Raises:
        UserError: a DeepSpeed file that gives or asks for it, or an optimizer whose steps are not
            as long as the rate, as those of Adam and its kin are.
    """
    read, missing = getattr(training, "hf_deepspeed_config", None), object()
    for place in ("optimizer.params.lr", "scheduler.params.warmup_max_lr"):
        if read is not None and read.get_value(place, missing) is not missing:
            raise UserError(
                f"--deepspeed: its file's {place} wants the rate before the model is there: give "
                "--learning_rate"
            )
    name = plain(training.optim)
    if not resumes and not any(kin in name for kin in _MOVE_BY_THE_RATE):
        raise UserError(
            f"--optim {name}: the rate that the weights give is for Adam and its kin: give "
            "--learning_rate"
        )


def choose_rate(trainer: Any) -> str:
    """Set the rate by the weights, where no flag does, and say so in one line.

    Raises:
        UserError: the weights do not say one.
    """
    from secura.rates import learning_rate

    args = trainer.args
    if _trains_others(trainer.model):
        args.learning_rate = _RATE_OF_WEIGHTS
        return f"secura: learning rate {_RATE_OF_WEIGHTS:g}, since not adapters alone are trained"
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    epoch = max(1, math.ceil(len(trainer.train_dataset) / batch))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    constant = plain(args.lr_scheduler_type).startswith("constant")
    try:
        args.learning_rate = learning_rate(trainer.model, 2 * steps if constant else steps)
    except ValueError as error:
        raise UserError(f"{one_line(error)}; or give --learning_rate") from error
    return f"secura: learning rate {args.learning_rate:g}, by the weights that are adapted"


def _trains_others(model: Any) -> bool:
    """Whether more than adapters is trained: weights themselves, which take lower rates."""
    from secura.layers import active_adapters

    own = {
        id(part) for adapter, _ in active_adapters(model).values() for part in adapter.parameters()
    }
    return any(part.requires_grad and id(part) not in own for part in model.parameters())


def check_batches(trainer: Any) -> None:
    """Refuse a run without a batch to take a step on.

    Raises:
        UserError: fewer rows than a batch has, of which none that is not full is taken.
    """
    if trainer.args.dataloader_drop_last and len(trainer.get_train_dataloader()) == 0:
        raise UserError(
            f"{len(trainer.train_dataset)} rows make no whole batch, and --dataloader_drop_last "
            "takes no other: leave it out, or lower --per_device_train_batch_size"
        )


def check_optimizer(trainer: Any) -> None:
    """Refuse an optimizer or a schedule that cannot be built, before an anchor is paid for.

    Those of torch are built on a stand-in; of others, whether they are installed is asked.

    Raises:
        UserError: names the flags and what is wrong with them.
    """
    import torch

    optimization = require("transformers.optimization", "train")
    args = trainer.args
    stand_in = [torch.nn.Parameter(torch.zeros(1, 1))]
    try:
        kind, settings = trainer.get_optimizer_cls_and_kwargs(_unhooked(args), trainer.model)
        if kind.__module__.startswith("torch."):
            kind(stand_in, **settings)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"--optim {plain(args.optim)}: {one_line(error)}") from error
    try:
        optimization.get_scheduler(
            args.lr_scheduler_type,
            optimizer=torch.optim.SGD(stand_in, lr=args.learning_rate),
            num_warmup_steps=args.get_warmup_steps(max(1, args.max_steps)),
            num_training_steps=max(1, args.max_steps),
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--lr_scheduler_type {plain(args.lr_scheduler_type)} with --lr_scheduler_kwargs "
            f"{args.lr_scheduler_kwargs}: {one_line(error)}"
        ) from error


def unread_settings(trainer: Any) -> list[str]:
    """A note on each setting of `--optim_args` that changes nothing, and on modules not looked at.

    Transformers ignores those that the chosen optimizer does not use.
    """
    args = _unhooked(trainer.args)
    built, name = _numbers(trainer, args), plain(trainer.args.optim)
    given = (args.optim_args or "").replace(" ", "").split(",")
    fewer = [
        (
            f"--optim_args {one}",
            _with(args, optim_args=",".join(other for other in given if other != one) or None),
        )
        for one in given
        if one
    ]
    if args.optim_target_modules is not None:
        fewer.append(("--optim_target_modules", _with(args, optim_target_modules=None)))
    return [
        f"{flag} changes nothing of --optim {name}: it is its default, or nothing it takes"
        for flag, rest in fewer
        if _numbers(trainer, rest) == built
    ]


def _unhooked(args: Any) -> Any:
    """The arguments, with the optimizer that a layer-wise one makes of each parameter.

    Building a layer-wise one puts it on the model, which is to be done once.
    """
    name = plain(args.optim)
    if not name.endswith(_LAYERWISE):
        return args
    return _with(args, optim=type(args.optim)(name.removesuffix(_LAYERWISE)))


def _with(args: Any, **changes: Any) -> Any:
    """A copy of training arguments with some of them replaced, and nothing derived anew."""
    copied = copy.copy(args)
    vars(copied).update(changes)
    return copied


def _numbers(trainer: Any, args: Any) -> Any:
    """What an optimizer is built of, without the parameters; None where it cannot be built."""
    try:
        kind, settings = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    except (TypeError, ValueError, ImportError):
        return None
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in settings.get("params", ())
        if isinstance(group, dict)
    ]
    return kind, {**settings, "params": groups}


__all__ = [
    "check_batches",
    "check_numbers",
    "check_optimizer",
    "check_rate_asked",
    "choose_rate",
    "unread_settings",
]
