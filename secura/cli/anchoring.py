"""`--anchor` of `secura train`: old text from a file or from the model itself, before training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secura.cli.data import FORMATS, load_split
from secura.cli.errors import UserError, one_line
from secura.cli.rows import check_rows
from secura.wording import plain

SELF = "self"
_SCHEDULE_FREE = "schedule_free"
"""How transformers' names of optimizers begin that keep a second copy of the parameters."""
_FOLLOW_THE_LOSS = ("reduce_lr_on_plateau", "greedy")
"""Schedules that do not tell their learning rates beforehand."""


def check(arguments: Any, config: Any, training: Any, *, resumes: bool) -> None:
    """Refuse flags that would do nothing, or harm, before a model is loaded.

    A run that ``resumes`` takes the anchor from its checkpoint, and reads no file of old text.

    Raises:
        UserError: there is no core to anchor or to pull back, it would be pulled too hard, or by
            rates that are not known, or there is no such file.
    """
    if (arguments.anchor or arguments.anchor_decay) and config.core != "u":
        flag = "--anchor" if arguments.anchor else "--anchor_decay"
        raise UserError(f"{flag} acts on a core that is trained itself: give --core u")
    if arguments.anchor is None:
        usual = type(config).anchor_damping
        for flag, given in (
            ("--anchor_tokens", arguments.anchor_tokens is not None),
            ("--anchor_damping", config.anchor_damping != usual),
        ):
            if given:
                raise UserError(f"{flag} is --anchor's: give --anchor self|FILE with it")
    elif arguments.anchor_tokens is not None and arguments.anchor_tokens < 2:
        raise UserError(f"--anchor_tokens {arguments.anchor_tokens} must be 2 or more")
    decay = arguments.anchor_decay
    if decay is not None and not (decay >= 0 and math.isfinite(decay)):
        raise UserError(f"--anchor_decay {decay} must be 0 or more, and finite")
    if arguments.decays and config.fold_every:
        raise UserError(
            f"--anchor_decay pulls U back, and --fold_every {config.fold_every} moves what U "
            "learned to where nothing pulls it: give --anchor_decay 0, or leave out --fold_every"
        )
    optimizer = plain(training.optim)
    if optimizer.startswith(_SCHEDULE_FREE) and (arguments.decays or config.fold_every):
        flag = "--anchor_decay" if arguments.decays else "--fold_every"
        raise UserError(
            f"{flag} does not reach the second copy that --optim {optimizer} keeps of the "
            f"parameters: give {flag} 0, or another --optim"
        )
    schedule = plain(training.lr_scheduler_type)
    if arguments.decays and decay is None and schedule in _FOLLOW_THE_LOSS:
        raise UserError(
            f"--lr_scheduler_type {schedule} does not tell its learning rates beforehand, by which "
            "--anchor_decay would be set: give --anchor_decay a number"
        )
    given = arguments.anchor not in (None, SELF) and not resumes
    if given and not Path(arguments.anchor).is_file():
        raise UserError(
            f"--anchor {arguments.anchor}: no such file; name one of old text, or give self"
        )
    if training.learning_rate is not None:
        check_pull(arguments, training.learning_rate)


def check_pull(arguments: Any, rate: float) -> None:
    """Refuse an `--anchor_decay` that would turn U's sign at the peak rate.

    Raises:
        UserError: it would.
    """
    from secura.continual.decay import check_decay

    try:
        check_decay(arguments.anchor_decay or 0.0, rate)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def expect(trainer: Any) -> None:
    """Make room for the anchors of the checkpoint to resume at, which FSDP2 does not."""
    from secura.anchoring import u_adapters

    for adapter, _ in u_adapters(trainer.model).values():
        adapter.expect_anchor()


def begin(trainer: Any, arguments: Any, config: Any, seed: int, *, resumed: bool) -> Iterator[str]:
    """Anchor the cores where that was asked for, and say what is done, a line at a time."""
    if arguments.anchor and not resumed:
        yield announce(arguments)
        yield anchor(trainer, arguments, seed)
    elif arguments.anchor:
        expect(trainer)
    elif config.core == "u" and not resumed:
        yield (
            "secura: note: the core has no anchor, so nothing holds its steps to what the model "
            "knows: --anchor self gives it one"
        )


def announce(arguments: Any) -> str:
    """One line before what takes minutes on a CPU."""
    source = "the model's own samples" if arguments.anchor == SELF else arguments.anchor
    return f"secura: anchoring by {source} …"


def anchor(trainer: Any, arguments: Any, seed: int) -> str:
    """Anchor the trainer's model, and say in one line by what.

    Raises:
        UserError: the text or the model cannot serve; the model is left as it was.
    """
    from secura.anchoring import anchor as anchor_model
    from secura.anchoring import u_adapters

    texts = None if arguments.anchor == SELF else read_texts(arguments.anchor)
    model = trainer.model.to(trainer.args.device)
    try:
        report = anchor_model(
            model,
            texts,
            tokenizer=trainer.processing_class,
            seed=seed,
            **({"tokens": arguments.anchor_tokens} if arguments.anchor_tokens else {}),
        )
    except ValueError as error:
        raise UserError(f"--anchor {arguments.anchor}: {one_line(error)}") from error
    source = "the model's own samples" if report.sampled else arguments.anchor
    rank = max(len(adapter.core) for adapter, _ in u_adapters(model).values())
    few = f"; these are few for r={rank}" if report.tokens < rank else ""
    return (
        f"secura: anchored {report.layers} layers by {report.tokens:,} tokens of {source} in "
        f"{report.seconds:.0f} s{few}"
    )


def read_texts(name: str) -> list[str]:
    """The texts of a file: its column `text`, or what stands between empty lines.

    Raises:
        UserError: it holds none.
    """
    if Path(name).suffix.lower() in FORMATS:
        rows = load_split(name, None, "train")
        if "text" not in rows.column_names:
            raise UserError(f"--anchor {name}: wanted a column text, found {rows.column_names}")
        check_rows(rows, name, ("text",))
        texts = list(rows["text"])
    else:
        try:
            content = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--anchor {name}: {one_line(error)}") from error
        texts = re.split(r"\n\s*\n", content)
    found = [text for text in texts if text.strip()]
    if not found:
        raise UserError(f"--anchor {name} holds no text: name another file, or {SELF}")
    return found


__all__ = ["SELF", "anchor", "begin", "check", "check_pull"]
